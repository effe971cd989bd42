"""Log-likelihoods of many continuations, each after its context: what multiple choice is scored by.

    request    context c c c c c    continuation d d
    through the model   c c c c c d              every token but the last
    to the head                 h h              the states that predict the continuation

Three things make it fast. Requests of all lengths lie in rows of one length, packed by best fit,
longest first, with the document mask of training: nothing is padded but the ends of rows, and on a
GPU every batch has the same shape, so that nothing is compiled twice. Only the states that predict
a continuation reach the head, which costs as much as several layers. And a request whose tokens
begin another's is not computed: the answers " A", " B", " C" and " D" to one question all are read
off its last state.

Left out: sharing a context among continuations of several tokens, which takes a mask that is a tree
or a cache that forks. Four endings of 22 tokens to a context of 75 would come to 163 tokens and not
388.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE, Piece, best_fit, make_batch
from data.tokenizer import Tokenizer
from models.config import HEAD_CHUNK_TOKENS
from models.elementwise import softmax_statistics
from models.transformer import Transformer

# Tokens that go through the model at once. A GPU is busy from about 30K on; on a CPU a few rows are
# enough, and the mask of long rows takes memory.
GPU_BATCH_TOKENS = 65_536
CPU_BATCH_TOKENS = 4_096
MAX_DOCUMENTS = 64  # in a row; fixed, because the kernels' shapes depend on it
CPU_CHUNK_TOKENS = 256


class Request(NamedTuple):
    """Tokens to score, and the tokens before them (at least one: something must predict)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Summed log-probability (nats), and whether each token is the likeliest one at its place."""

    logprob: float
    greedy: bool


@dataclass
class _Document:
    """Tokens that go through the model, and the requests that are answered by them."""

    tokens: list[int]
    requests: list[int]


@dataclass
class _Answers:
    """One batch's results on their way to the host."""

    owners: np.ndarray  # (P,) the request of each scored token
    logprobs: Tensor  # (P,) float32
    greedy: Tensor  # (P,) bool
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
        same_shape: all rows have the context's length and all batches as many; else they are as
            small as the requests allow. None: on a GPU.

    Raises:
        ValueError: an empty context or continuation, or one longer than the model's context.
    """
    if not requests:
        return
    on_gpu = model.device.type == "cuda"
    same_shape = on_gpu if same_shape is None else same_shape
    limit = model.config.max_seq_len
    _check(requests, limit)
    documents = _share([_inputs(request, limit) for request in requests])
    longest = len(documents[0].tokens)
    seq_len = limit if same_shape else longest
    packed = best_fit((len(d.tokens) for d in documents), seq_len, MAX_DOCUMENTS)
    tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
    rows = max(1, tokens // seq_len)
    before: _Answers | None = None
    for start in range(0, len(packed), rows):
        members = [[documents[i] for i in row] for row in packed[start : start + rows]]
        if same_shape:
            members += [[]] * (rows - len(members))
        answers = _launch(model, members, requests, seq_len)
        if before is not None:  # read while the device computes the next batch
            yield _collect(before)
        before = answers
    yield _collect(before)


def _check(requests: Sequence[Request], limit: int) -> None:
    for i, (context, continuation) in enumerate(requests):
        if not len(context) or not 0 < len(continuation) <= limit:
            raise ValueError(
                f"request {i} has {len(context):,} tokens of context and {len(continuation):,} to "
                f"score: at least 1 of each, and at most {limit:,} to score, the model's context"
            )


def _inputs(request: Request, limit: int) -> list[int]:
    return [*request.context, *request.continuation][-(limit + 1) : -1]


def _share(inputs: list[list[int]]) -> list[_Document]:
    """The documents to compute, longest first; what begins another one is part of it.

    In lexicographic order what begins with x follows x, so one comparison with the successor tells.
    """
    documents: list[_Document] = []
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        tokens = inputs[i]
        if documents and documents[-1].tokens[: len(tokens)] == tokens:
            documents[-1].requests.append(i)
        else:
            documents.append(_Document(tokens, [i]))
    return sorted(documents, key=lambda d: len(d.tokens), reverse=True)


@torch.no_grad()
def _launch(
    model: Transformer,
    rows: list[list[_Document]],
    requests: Sequence[Request],
    seq_len: int,
) -> _Answers:
    """Put a batch to work; on a GPU this returns before it is done."""
    pieces = [[_piece(document) for document in row] for row in rows]
    batch = make_batch(pieces, seq_len, MAX_DOCUMENTS).to(model.device)
    places, targets, owners = _wanted(rows, requests, seq_len)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)  # (N, C)
    logprobs, greedy = target_scores(
        hidden[_to(places, model.device)], model.head_weight, _to(targets, model.device)
    )
    if model.device.type != "cuda":
        return _Answers(owners, logprobs, greedy, lambda: None)
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in (logprobs, greedy)]
    for copy, values in zip(copies, (logprobs, greedy), strict=True):
        copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Answers(owners, *copies, event.synchronize)


def _piece(document: _Document) -> Piece:
    tokens = np.array(document.tokens, dtype=np.int64)
    return Piece(tokens, np.full_like(tokens, IGNORE))  # its targets are in `_wanted`


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _wanted(
    rows: list[list[_Document]], requests: Sequence[Request], seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each scored token its place in the flattened rows, its id, and its request's number."""
    numbers, ends = [], []
    for r, row in enumerate(rows):
        at = r * seq_len
        for document in row:
            for i in document.requests:
                numbers.append(i)
                ends.append(at + min(sum(map(len, requests[i])) - 1, seq_len))
            at += len(document.tokens)
    continuations = [requests[i].continuation for i in numbers]
    counts = np.array([len(c) for c in continuations])
    targets = np.fromiter(chain.from_iterable(continuations), dtype=np.int64, count=counts.sum())
    first = np.repeat(np.array(ends) - counts.cumsum(), counts)
    return first + np.arange(len(targets)), targets, np.repeat(numbers, counts)


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
    numbers, places = np.unique(answers.owners, return_inverse=True)
    sums = np.bincount(places, weights=answers.logprobs.double().numpy())
    missed = np.bincount(places, weights=~answers.greedy.numpy())
    rows = zip(numbers.tolist(), sums.tolist(), missed.tolist(), strict=True)
    return [(number, Score(total, not wrong)) for number, total, wrong in rows]


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
