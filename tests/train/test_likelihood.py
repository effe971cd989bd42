"""Packed scores against one request at a time, and bits per byte against the sum they stand for."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import builtin
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from train.likelihood import (
    Request,
    Score,
    _pack,
    _share,
    bits_per_byte,
    score,
    target_scores,
    windows,
)
from train.loss import token_logprobs

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelConfig(
    vocab_size=300, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=48, max_seq_len=48
)


def build(shape: ModelConfig = SHAPE) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(3)  # probabilities that differ by much
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


@torch.no_grad()
def logprobs_of(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """(T, V) of one row that is one document."""
    row, length = torch.tensor([tokens]), len(tokens)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    hidden = model(row, torch.arange(length)[None], bounds)
    return model.logits(hidden)[0].log_softmax(-1)


def alone(model: Transformer, request: Request) -> Score:
    """One request by itself, from all of its logits."""
    tokens = [*request.context, *request.continuation][-(model.config.max_seq_len + 1) :]
    logprobs = logprobs_of(model, tokens[:-1])[-len(request.continuation) :]
    wanted = torch.tensor(request.continuation)
    total = logprobs.gather(-1, wanted[:, None]).sum().item()
    return Score(total, bool((logprobs.argmax(-1) == wanted).all()))


def collect(model: Transformer, requests: list[Request], *settings: object) -> list[Score]:
    found = dict(pair for batch in score(model, requests, *settings) for pair in batch)
    return [found[i] for i in range(len(requests))]


def random_requests(count: int, shape: ModelConfig = SHAPE) -> list[Request]:
    """Contexts from 1 token to more than fit, few different tokens, several answers to each."""
    generator = torch.Generator().manual_seed(1)

    def draw(least: int, most: int, below: int) -> list[int]:
        n = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(below, (n,), generator=generator).tolist()

    requests = []
    for _ in range(count):
        context = draw(1, shape.max_seq_len + 9, 3)
        requests += [Request(context, draw(1, 12, shape.vocab_size)) for _ in range(2)]
        requests += [Request(context, [answer]) for answer in range(3)]
    return requests


def test_packed_scores_are_those_of_one_request_at_a_time(model):
    requests = random_requests(60)
    expected = [alone(model, request) for request in requests]
    # Greedy continuations too, or `greedy` would hardly ever be true.
    for request in [r for r in requests if len(r.context) < 40][:20]:
        answer = []
        for _ in range(3):
            tokens = [*request.context, *answer][-SHAPE.max_seq_len :]
            answer.append(int(logprobs_of(model, tokens)[-1].argmax()))
        requests.append(Request(request.context, answer))
        expected.append(alone(model, requests[-1]))
    assert any(e.greedy and len(r[1]) > 1 for r, e in zip(requests, expected, strict=True))
    assert not all(e.greedy for e in expected)
    for how in ((), (1,), (200,), (100_000,), (500, True)):
        ours = collect(model, requests, *how)
        assert [o.greedy for o in ours] == [e.greedy for e in expected]
        assert max(abs(o[0] - e[0]) for o, e in zip(ours, expected, strict=True)) < 1e-5


def test_on_request_every_batch_has_the_same_shape(model, monkeypatch):
    shapes = set()
    forward = model.forward

    def seen(tokens: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        shapes.add((tokens.shape, positions.shape))
        return forward(tokens, positions, bounds)

    monkeypatch.setattr(model, "forward", seen)
    for count in (1, 7, 40):
        collect(model, random_requests(count), 480, True)
    assert shapes == {((10, 48), (10, 48))}
    monkeypatch.setattr(model, "compiled", True)  # by itself where another shape costs
    collect(model, random_requests(7), 480)
    assert len(shapes) == 1


def test_the_last_batch_has_the_rows_that_are_left(model, monkeypatch):
    """And there is one kernel for all batches: see BOUNDS_STEP."""
    shapes = []
    forward = model.forward

    def seen(tokens: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        shapes.append(tokens.shape)
        assert len(bounds) == 512 and (bounds.diff() >= 0).all()
        assert (bounds[0], bounds[-1]) == (0, tokens.numel())
        return forward(tokens, positions, bounds)

    monkeypatch.setattr(model, "forward", seen)
    requests = [Request([1] * 20 + [i], [2]) for i in range(23)]  # two to a row
    collect(model, requests, 48 * 5, True)
    assert shapes == [(5, 48)] * 3
    shapes.clear()
    collect(model, [*requests, Request([3] * 48, [2])], 48 * 5)
    assert shapes == [(5, 48), (5, 48), (3, 48)]


tokens_of_three = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(
    contexts=st.lists(
        st.tuples(tokens_of_three, st.lists(tokens_of_three, min_size=1, max_size=3)),
        min_size=1, max_size=8,
    ),
    batch_tokens=st.integers(1, 500),
    same_shape=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_scores_do_not_depend_on_the_company(model, contexts, batch_tokens, same_shape):
    """Contexts that begin one another, answers that share one, any size of a batch."""
    requests = [Request(c, a[: SHAPE.max_seq_len]) for c, answers in contexts for a in answers]
    ours = collect(model, requests, batch_tokens, same_shape)
    expected = [alone(model, request) for request in requests]
    assert [o.logprob for o in ours] == pytest.approx([e.logprob for e in expected], abs=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_scores_are_those_of_the_cpu_within_bf16():
    shape = SHAPE.model_copy(update={"d_model": 256, "max_seq_len": 256, "vocab_size": 4096})
    requests = random_requests(300, shape)
    expected = collect(build(shape), requests)
    model = build(shape)
    model.dtype = torch.bfloat16
    ours = collect(model.cuda(), requests, 8192)
    error = [abs(o[0] - e[0]) / len(r[1]) for o, e, r in zip(ours, expected, requests, strict=True)]
    assert sum(error) / len(error) < 0.03


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_what_begins_another_request_is_not_computed(inputs):
    requests = [Request(tokens, [7]) for tokens in inputs]
    documents = _share(_pack(requests, 100).inputs)
    texts = [np.frombuffer(d.tokens, np.intc).tolist() for d in documents]
    assert sorted(i for d in documents for i in d.requests) == list(range(len(inputs)))
    for text, document in zip(texts, documents, strict=True):
        assert all(text[: len(inputs[i])] == inputs[i] for i in document.requests)
    assert not any(
        a[: len(b)] == b for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j
    )
    assert [len(t) for t in texts] == sorted(map(len, texts), reverse=True)


def test_the_head_is_that_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (600, 50))
    targets = torch.randint(50, (600,), generator=generator)
    logprobs, greedy = target_scores(hidden, weight, targets)
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, targets)[0])
    assert greedy.tolist() == ((hidden @ weight.T).argmax(-1) == targets).tolist()


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1] * 49)])
def test_what_cannot_be_scored_is_refused(model, request_):
    with pytest.raises(ValueError, match=r"request 1 has .* at most 48 to score"):
        collect(model, [Request([1], [2]), Request(*request_)])


@given(st.integers(1, 200), st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_windows_score_every_token_once_after_half_a_context(length, seq_len):
    tokens = list(range(1, length + 1))
    requests = windows(tokens, 0, seq_len)
    assert [t for r in requests for t in r.continuation] == tokens
    for context, continuation in requests:
        assert list(context) == list(range(context[0], context[0] + len(context)))
        assert context[-1] + 1 == continuation[0]
        assert len(context) + len(continuation) - 1 <= seq_len
        assert context[0] == 0 or len(context) >= seq_len // 2


def test_bits_per_byte_of_a_text_that_fits_is_one_pass(model):
    tokenizer = train_tokenizer([builtin.document("web", 0)], TokenizerConfig(vocab_size=280))
    text = "ä" + builtin.document("web", 1)[:20]
    tokens = tokenizer.encode(text)
    assert len(tokens) <= SHAPE.max_seq_len
    nats = -alone(model, Request([tokenizer.bos_id], tokens)).logprob
    measured = bits_per_byte(model, tokenizer, text)
    assert measured["bytes"] == len(text) + 1
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(text) + 1))


def test_bits_per_byte_count_bytes_and_not_tokens(model):
    """A model that finds all tokens alike needs log2(V) bits for each, whatever it covers."""
    uniform = build()
    with torch.no_grad():
        uniform.embedding.weight.zero_()
    text = builtin.document("web", 3) * 5
    for size in (270, 300):
        texts = [builtin.document("web", i) for i in range(20)]
        tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=size))
        measured = bits_per_byte(uniform, tokenizer, text)
        assert measured["tokens"] == len(tokenizer.encode(text)) > SHAPE.max_seq_len
        bits = measured["tokens"] * math.log2(SHAPE.vocab_size) / len(text.encode())
        assert measured["bits_per_byte"] == pytest.approx(bits)


def test_scoring_needs_no_harness():
    code = "import sys; sys.modules['lm_eval'] = None; import train.likelihood"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
