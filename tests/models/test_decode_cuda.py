"""The CUDA decoder against the model's own forward pass, and its kernels against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.decode import Decoder
from models.generate import Engine, Request, generate
from models.layers import RMSNorm, rotary_angles, rotate
from models.sampling import Sampling, sample
from models.transformer import Transformer

pytestmark = pytest.mark.gpu

# bf16 has 8 bits of mantissa. Log-probabilities of the same tokens by other kernels differ by about
# 0.01 nats; the training path differs as much from the float32 model.
BF16_LOGPROB = 0.06


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from models import decode_kernels

    return decode_kernels


@pytest.fixture(params=[32, 64, 128])
def model(request) -> Transformer:
    """Four layers of 6 query heads that share 2 key-value heads."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=5000,
        d_model=6 * request.param,
        n_layers=4,
        n_heads=6,
        n_kv_heads=2,
        d_ffn=8 * request.param,
        max_seq_len=256,
    )
    model = Transformer(config, torch.bfloat16).cuda().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def requests(model: Transformer, count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 150, (count,), generator=generator).tolist()
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
    prompts[3] = prompts[0]  # computed once
    return [Request(prompt, 40 + i % 60, seed=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("slots", [5, 64])
def test_logprobs_are_those_of_the_training_path(model, slots):
    engine = Engine(model, slots)
    assert type(engine.decoder).__name__ == "CudaDecoder"
    done = list(engine.run(requests(model, 24)))
    assert sorted(c.index for c in done) == list(range(24))
    gaps = []
    for c in done:
        assert len(c.tokens) == c.request.max_new_tokens
        whole = torch.tensor([[*c.request.prompt, *c.tokens]], device="cuda")
        n = whole.shape[1]
        bounds = torch.tensor([0, n], dtype=torch.int32, device="cuda")
        hidden = model(whole, torch.arange(n, device="cuda")[None], bounds)
        logprobs = model.logits(hidden)[0].log_softmax(-1)
        start = len(c.request.prompt)
        theirs = logprobs[start - 1 : -1].gather(1, whole[0, start:, None])[:, 0].cpu()
        gaps.append((torch.tensor(c.logprobs) - theirs).abs())
    gaps = torch.cat(gaps)
    assert gaps.max() < BF16_LOGPROB
    assert gaps.mean() < BF16_LOGPROB / 6


def test_a_sequence_does_not_depend_on_its_neighbours_slot(model):
    """Products of another batch size may round otherwise, so: the same size, other neighbours."""
    asked = requests(model, 8)
    engine = Engine(model, 8)
    together = {c.index: c.tokens for c in engine.run(asked)}
    again = {c.index: c.tokens for c in engine.run(asked[::-1])}
    same = sum(together[i] == again[7 - i] for i in range(8))
    assert same >= 7


def test_refresh_takes_over_changed_weights(model):
    engine, asked = Engine(model, 4), requests(model, 4)
    before = {c.index: c.tokens for c in engine.run(asked)}
    for parameter in model.parameters():
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    engine.refresh()
    fresh = {c.index: c.tokens for c in engine.run(asked)}
    other = {c.index: c.tokens for c in Engine(model, 4).run(asked)}
    assert sum(fresh[i] == other[i] for i in range(4)) >= 3
    assert all(fresh[i] != before[i] for i in range(4))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0, "repetition_penalty": 9.0}, {"top_k": 3}]
)
def test_filters_and_greedy_agree_with_the_portable_decoder(model, settings, monkeypatch):
    prompts = [r.prompt for r in requests(model, 6)]
    ours = generate(model, prompts, 30, **settings)
    monkeypatch.setattr("models.generate.make_decoder", Decoder)
    theirs = generate(model, prompts, 30, **settings)
    same = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    assert sum(same) / len(same) > 0.5  # one near tie and the rest of a sequence is another
    assert all(x[0] == y[0] for x, y in zip(ours, theirs, strict=True))


def test_stop_tokens_and_refilled_slots(model):
    asked = requests(model, 30)
    free = {c.index: c.tokens for c in Engine(model, 6).run(asked)}
    stop = free[2][10]
    for c in Engine(model, 6, stop_ids=[stop]).run(asked):
        assert c.stopped == (c.tokens[-1] == stop)
        assert stop not in c.tokens[:-1]


# ---------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("size", [48, 768, 1536])
def test_add_norm(kernels, size):
    x, delta = torch.randn(2, 7, size, device="cuda").bfloat16()
    norm = RMSNorm(size, 1e-6).cuda()
    norm.weight.data.uniform_(0.5, 2)
    expected = norm(x + delta)
    kept = x.clone()
    out = kernels.add_norm(kept, delta, norm.weight, 1e-6)
    assert torch.equal(kept, x + delta)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(kernels.add_norm(kept, None, norm.weight, 1e-6), expected)


def test_swiglu(kernels):
    gate_up = torch.randn(5, 2 * 3000, device="cuda").bfloat16()
    gate, up = gate_up.float().chunk(2, dim=1)
    expected = (F.silu(gate) * up).bfloat16()
    torch.testing.assert_close(kernels.swiglu(gate_up), expected)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotation_cache_and_attention(kernels, head_dim):
    slots, capacity, n_kv_heads, n_heads = 5, 300, 4, 12
    shape = (slots, capacity, n_kv_heads, head_dim)
    keys, values = torch.randn(2, *shape, device="cuda").bfloat16()
    positions = torch.tensor([0, 63, 64, 299, 130], device="cuda")
    rows = torch.arange(slots, device="cuda")
    heads = n_heads + 2 * n_kv_heads
    qkv = torch.randn(slots, heads * head_dim, device="cuda").bfloat16()
    q, k, v = qkv.view(slots, 1, heads, head_dim).split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    rotation = rotary_angles(positions[:, None], head_dim, 1e4)
    q, k, v = rotate(q, rotation), rotate(k, rotation), v.clone()
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[rows, positions], expected_values[rows, positions] = k[:, 0], v[:, 0]

    cos, sines = rotary_angles(torch.arange(capacity, device="cuda")[None], head_dim, 1e4)
    table = torch.stack([cos[0, :, 0, 0], sines[0, :, 0, 1]])
    kernels.rotate_and_store(qkv, rows, positions, table, keys, values, n_heads)
    torch.testing.assert_close(keys, expected_keys, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0)

    out = kernels.attend(qkv, keys, values, positions, n_heads).view(slots, n_heads, head_dim)
    for slot, position in enumerate(positions.tolist()):
        seen = slice(0, position + 1)
        repeat = n_heads // n_kv_heads
        k = keys[slot, seen].float().repeat_interleave(repeat, dim=1)  # (n, H, D)
        v = values[slot, seen].float().repeat_interleave(repeat, dim=1)
        scores = torch.einsum("hd,nhd->hn", q[slot, 0].float(), k) / math.sqrt(head_dim)
        expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
        torch.testing.assert_close(out[slot].float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("vocab", [100, 5000, 32_000])
def test_draw_is_sample(kernels, vocab):
    logits = 4 * torch.randn(64, vocab, device="cuda")
    seeds, positions = torch.arange(64, device="cuda") * 977, torch.arange(64, device="cuda")
    tokens, logprobs = kernels.draw(logits, seeds, positions, 0.7)
    expected, expected_logprobs = sample(logits, seeds, positions, Sampling(temperature=0.7))
    assert (tokens == expected).float().mean() >= 0.95  # exponentials differ in the last bit
    same = tokens == expected
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=1e-4)


def test_drawn_frequencies_are_the_softmax(kernels):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.0, -30.0, 0.0], device="cuda")
    draws = 40_000
    numbers = torch.arange(draws, device="cuda")
    tokens, _ = kernels.draw(logits.repeat(draws, 1), numbers, numbers % 7, 1.0)
    expected = logits.softmax(-1)
    found = torch.bincount(tokens, minlength=7) / draws
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all()
