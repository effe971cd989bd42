"""Log-likelihoods of many continuations, each after its context: what multiple choice is scored by.

    request    context c c c c c    continuation d d
    through the model   c c c c c d              every token but the last
    to the head                 h h              the states that predict the continuation

Four things make it fast. Requests of all lengths lie in rows of one length, the longest first, with
the document mask of training: nothing is padded but the ends of rows. Only the states that predict
a continuation reach the head, which costs as much as several layers. A request whose tokens begin
another's is not computed: the answers " A", " B", " C" and " D" to one question all are read off
its last state. And the host does little, because a GPU scores tens of requests in a millisecond:
tokens are bytes and arrays, rows are planned and laid out a batch at a time, while the device
computes the batch before.

Left out: sharing a context among continuations of several tokens, which takes a mask that is a tree
or a cache that forks. Four endings of 22 tokens to a context of 75 would come to 163 tokens and not
388.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE, document_bounds, longest_first
from data.tokenizer import Tokenizer
from models.config import HEAD_CHUNK_TOKENS
from models.elementwise import softmax_statistics
from models.transformer import Transformer

# Tokens that go through the model at once. A GPU is busy from about 30K on; on a CPU a few rows are
# enough, and the mask of long rows takes memory.
GPU_BATCH_TOKENS = 65_536
CPU_BATCH_TOKENS = 4_096
CPU_CHUNK_TOKENS = 256
# flash-attn-4 compiles one kernel for up to 256 documents and one for more: here there are always
# more, so that the other is not compiled in the middle of an evaluation.
BOUNDS_STEP = 512
ID = "i"  # a token among a request's bytes: a C int, as in `np.intc`
ID_BYTES = array(ID).itemsize


class Request(NamedTuple):
    """Tokens to score, and the tokens before them (at least one: something must predict)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Summed log-probability (nats), and whether each token is the likeliest one at its place."""

    logprob: float
    greedy: bool


@dataclass
class _Packed:
    """Requests as bytes, `ID_BYTES` a token: nothing is compared, sorted and joined faster.

    Attributes:
        inputs: what the model reads of each, all but the last token.
        targets: what is scored of each.
    """

    inputs: list[bytes]
    targets: list[bytes]


class _Document(NamedTuple):
    """Tokens that go through the model, and the requests that are answered by them."""

    tokens: bytes
    requests: list[int]


@dataclass
class _Answers:
    """One batch's results on their way to the host."""

    requests: list[int]  # R numbers
    counts: np.ndarray  # (R,) tokens scored of each
    results: Tensor  # (2, P) float32: log-probabilities, and 1 where a token is the likeliest
    arrived: Callable[[], None]


def score(
    model: Transformer,
    requests: Sequence[Request],
    batch_tokens: int | None = None,
    same_shape: bool | None = None,
) -> Iterator[list[tuple[int, Score]]]:
    """Score requests in an order of its own; yields numbers and scores, a batch at a time.

    What exceeds the context is cut off at the front.

    Args:
        batch_tokens: tokens that go through the model at once; None: as many as suit the device.
        same_shape: all rows have the context's length and all batches as many, also the last;
            None: where another shape would be compiled for.

    Raises:
        ValueError: an empty context or continuation, or one longer than the model's context.
    """
    if not requests:
        return
    on_gpu = model.device.type == "cuda"
    same_shape = _compiles(model) if same_shape is None else same_shape
    limit = model.config.max_seq_len
    packed = _pack(requests, limit)
    documents = _share(packed.inputs)
    lengths = [len(document.tokens) // ID_BYTES for document in documents]
    # A GPU's kernels are told how long a row is, and may be built anew for another length.
    seq_len = limit if same_shape or on_gpu else lengths[0]
    rows = max(1, (batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)) // seq_len)
    plan = longest_first(lengths, seq_len)
    before: _Answers | None = None
    while some := list(islice(plan, rows)):
        if same_shape:
            some += [[]] * (rows - len(some))
        answers = _launch(model, [[documents[i] for i in row] for row in some], packed, seq_len)
        if before is not None:  # read while the device computes the next batch
            yield _collect(before)
        before = answers
    yield _collect(before)


def _compiles(model: Transformer) -> bool:
    """Whether a batch of a shape not seen before is compiled for; the fused blocks' kernels and
    those that take `cu_seqlens` serve any number of rows."""
    return model.compiled or model.attention_kernel()[0] == "flex"


def _pack(requests: Sequence[Request], limit: int) -> _Packed:
    """What the model reads and what is scored, checked and cut to `limit` tokens."""
    packed, last, front = _Packed([], []), None, b""
    for i, (context, continuation) in enumerate(requests):
        if not len(context) or not 0 < len(continuation) <= limit:
            raise ValueError(
                f"request {i} has {len(context):,} tokens of context and {len(continuation):,} to "
                f"score: at least 1 of each, and at most {limit:,} to score, the model's context"
            )
        if context is not last:  # the answers to a question come one after the other
            last, front = context, array(ID, context).tobytes()
        wanted = array(ID, continuation).tobytes()
        packed.inputs.append((front + wanted[:-ID_BYTES])[-limit * ID_BYTES :])
        packed.targets.append(wanted)
    return packed


def _share(inputs: list[bytes]) -> list[_Document]:
    """The documents to compute, longest first; what begins another one is part of it.

    In the order of bytes what begins with x follows x, so one comparison with the successor tells.
    """
    documents: list[_Document] = []
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        if documents and documents[-1].tokens.startswith(inputs[i]):
            documents[-1].requests.append(i)
        else:
            documents.append(_Document(inputs[i], [i]))
    return sorted(documents, key=lambda document: len(document.tokens), reverse=True)


@torch.no_grad()
def _launch(
    model: Transformer, rows: list[list[_Document]], packed: _Packed, seq_len: int
) -> _Answers:
    """Put a batch to work; on a GPU this returns before it is done."""
    documents = [document for row in rows for document in _filled(row, seq_len)]
    tokens = [document.tokens for document in documents]
    sizes = _lengths(tokens)
    ends = sizes.cumsum()
    starts = ends - sizes
    numbers, counts, places, targets = _wanted(documents, starts, packed)
    arrays = (
        document_bounds(ends, BOUNDS_STEP),  # first, and so aligned as if it were alone
        np.frombuffer(b"".join(tokens), np.intc),
        np.arange(ends[-1]) - np.repeat(starts, sizes),
        places,
        targets,
    )
    bounds, *others = _to(model.device, *arrays)
    tokens, positions, places, targets = (values.long() for values in others)
    shape = len(rows), seq_len
    hidden = model(tokens.view(shape), positions.view(shape), bounds).flatten(0, 1)  # (N, C)
    logprobs, greedy = target_scores(hidden[places], model.head_weight, targets)
    results = torch.stack((logprobs, greedy.to(logprobs.dtype)))
    if model.device.type != "cuda":
        return _Answers(numbers, counts, results, lambda: None)
    copy = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
    copy.copy_(results, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Answers(numbers, counts, copy, event.synchronize)


def _filled(row: list[_Document], seq_len: int) -> list[_Document]:
    """A row and, as a document that answers nothing, the room that it leaves."""
    room = seq_len * ID_BYTES - sum(len(document.tokens) for document in row)
    return [*row, _Document(bytes(room), [])] if room else row


def _lengths(texts: list[bytes]) -> np.ndarray:
    """In tokens."""
    return np.fromiter(map(len, texts), np.int64, len(texts)) // ID_BYTES


def _wanted(
    documents: list[_Document], starts: np.ndarray, packed: _Packed
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """The requests that documents answer and how many tokens are scored of each; then the place of
    each scored token in the flattened rows, and its id.

    Args:
        starts: where the documents begin there.
    """
    numbers = [i for document in documents for i in document.requests]
    ends = np.repeat(starts, [len(document.requests) for document in documents])
    ends += _lengths([packed.inputs[i] for i in numbers])
    wanted = [packed.targets[i] for i in numbers]
    counts = _lengths(wanted)
    targets = np.frombuffer(b"".join(wanted), np.intc)
    places = np.repeat(ends - counts.cumsum(), counts) + np.arange(len(targets))
    return numbers, counts, places, targets


def _to(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays as int32 tensors, sent in one piece; to a GPU without blocking the host."""
    whole = torch.from_numpy(np.concatenate(arrays, dtype=np.int32, casting="same_kind"))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return list(whole.split([len(values) for values in arrays]))


def target_scores(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability, and whether no other token is likelier.

    The products are those of `train.loss.token_logprobs`: in `hidden`'s dtype with float32 results
    on CUDA, in the weight's dtype elsewhere. A chunk of the logits exists at a time.

    Args:
        hidden: (P, C).
        head_weight: (V, C), float32.
        targets: (P,) int64.

    Returns:
        (P,) float32 and (P,) bool.
    """
    weight = head_weight.to(hidden.dtype) if hidden.is_cuda else head_weight
    wide = {"out_dtype": torch.float32} if weight.dtype != torch.float32 else {}
    logprobs, greedy = [], []
    size = HEAD_CHUNK_TOKENS if hidden.is_cuda else CPU_CHUNK_TOKENS
    for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = torch.mm(states.to(weight.dtype), weight.T, **wide)  # (n, V)
        logprobs.append(softmax_statistics(logits, wanted, IGNORE)[0])
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(greedy)


def _collect(answers: _Answers) -> list[tuple[int, Score]]:
    """Wait for a batch; add up each request's tokens, in float64 and in their order."""
    answers.arrived()
    logprobs, greedy = answers.results.double().numpy()
    owners = np.repeat(np.arange(len(answers.requests)), answers.counts)
    sums = np.bincount(owners, weights=logprobs).tolist()
    all_greedy = (np.bincount(owners, weights=greedy) == answers.counts).tolist()
    return list(zip(answers.requests, map(Score, sums, all_greedy), strict=True))


# ---------------------------------------------------------------------------------------------
# Whole texts


def windows(tokens: Sequence[int], first: int, seq_len: int) -> list[Request]:
    """A text as requests: every token is scored once, after at least half a context if there is so
    much before it.

    Args:
        first: what predicts the first token; it is not scored.
    """
    stride = max(1, seq_len // 2)
    tokens = [first, *tokens]
    requests, at = [], 1
    while at < len(tokens):
        end = min(len(tokens), at + (seq_len if at == 1 else stride))
        requests.append(Request(tokens[max(0, end - seq_len - 1) : at], tokens[at:end]))
        at = end
    return requests


def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, text: str, batch_tokens: int | None = None
) -> dict[str, float]:
    """How many bits the model needs for a byte of the text, whatever its tokens are.

    The text is one document: BOS (else EOS) predicts its first token, is itself not scored, and no
    EOS is expected at its end.

    Returns:
        bits_per_byte, and the bytes and tokens it was measured on.

    Raises:
        ValueError: the text is empty, or the vocabulary has neither BOS nor EOS.
    """
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    tokens = tokenizer.encode(text)
    if not tokens or first is None:
        raise ValueError("bits per byte need a text and a tokenizer with BOS or EOS")
    requests = windows(tokens, first, model.config.max_seq_len)
    batches = score(model, requests, batch_tokens)
    nats = -math.fsum(result.logprob for batch in batches for _, result in batch)
    size = len(text.encode())
    return {"bits_per_byte": nats / math.log(2) / size, "bytes": size, "tokens": len(tokens)}
