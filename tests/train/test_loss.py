"""The chunked loss against the obvious one: values, gradients, dtypes and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data.packing import IGNORE, Batch
from models.config import ModelConfig
from models.transformer import Transformer
from train.loss import cross_entropy_loss, token_logprobs

N, C, V = 23, 8, 37


def obvious(hidden, weight, targets):
    logits = hidden @ weight.T
    logz = logits.logsumexp(-1)
    counts = targets != IGNORE
    picked = logits[torch.arange(len(targets)), targets.clamp(min=0)]
    return (picked - logz) * counts, logz * counts


def inputs(dtype=torch.float64, ignored=(0, 7, 8, 22), n=N):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, C, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (n,), generator=generator)
    targets[list(ignored)] = IGNORE
    return hidden, weight, targets


def gradients(function, hidden, weight, targets, upstream):
    outputs = function(hidden, weight, targets)
    return outputs, torch.autograd.grad(outputs, (hidden, weight), upstream)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
def test_values_and_gradients_are_the_obvious_ones(chunk_tokens):
    hidden, weight, targets = inputs()
    upstream = (torch.randn(N).double(), torch.randn(N).double())
    ours = gradients(
        lambda *x: token_logprobs(*x, chunk_tokens=chunk_tokens), hidden, weight, targets, upstream
    )
    torch.testing.assert_close(ours, gradients(obvious, hidden, weight, targets, upstream))


def test_gradcheck():
    hidden, weight, targets = inputs(ignored=(3,), n=7)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 3), (hidden, weight))


def test_ignored_tokens_are_zero_and_have_no_gradient():
    hidden, weight, targets = inputs()
    logp, logz = token_logprobs(hidden, weight, targets, 5)
    (logp + logz).sum().backward()
    ignored = targets == IGNORE
    assert not logp[ignored].any() and not logz[ignored].any()
    assert not hidden.grad[ignored].any()
    assert hidden.grad[~ignored].any(-1).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_nothing_and_changes_nothing(frozen):
    hidden, weight, targets = inputs()
    expected = gradients(obvious, hidden, weight, targets, [torch.ones(N).double()] * 2)[1]
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    sum(token_logprobs(hidden, weight, targets, 5)).sum().backward()
    if frozen == "hidden":
        assert hidden.grad is None
        torch.testing.assert_close(weight.grad, expected[1])
    else:
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, expected[0])


def test_logits_of_a_thousand_do_not_overflow():
    hidden, weight, targets = inputs(torch.float32)
    logp, logz = token_logprobs(hidden * 1000, weight, targets, 5)
    (logp.sum() + logz.sum()).backward()
    assert logp.isfinite().all() and logz.isfinite().all()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bf16_hidden_states_are_summed_in_float32_on_a_cpu():
    hidden, weight, targets = inputs(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    upstream = (torch.randn(N), torch.randn(N))
    values, grads = gradients(token_logprobs, half, weight, targets, upstream)
    exact = gradients(obvious, half.float(), weight, targets, upstream)
    torch.testing.assert_close(values, exact[0])
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0], exact[1][0].bfloat16())
    torch.testing.assert_close(grads[1], exact[1][1])


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


def test_all_logits_never_exist_at_once():
    hidden, weight, targets = inputs(torch.float32, n=256)
    with Largest() as largest:
        sum(token_logprobs(hidden, weight, targets, 8)).sum().backward()
    assert largest.numel == max(8 * V, 256 * C, V * C)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=24)
    )


def batch(rows: slice = slice(0, 4)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (4, 12), generator=generator)[rows]
    targets = torch.randint(V, (4, 12), generator=generator)
    targets[0, :9] = IGNORE
    targets[2] = IGNORE
    b = len(tokens)
    return Batch(
        tokens=tokens,
        targets=targets[rows],
        positions=torch.arange(12).expand(b, 12),
        cu_seqlens=torch.arange(0, 12 * b + 1, 12, dtype=torch.int32),
        max_seqlen=12,
        weight=float((targets[rows] != IGNORE).sum()),
        attended_pairs=b * 78,
    )


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_is_torchs_plus_the_z_loss(model, z_loss):
    whole = batch()
    loss, logged = cross_entropy_loss(model, whole, z_loss)
    logits = model.logits(model(whole.tokens, whole.positions, whole.cu_seqlens)).flatten(0, 1)
    targets = whole.targets.flatten()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    penalty = z_loss * logits.logsumexp(-1)[targets != IGNORE].square().sum()
    torch.testing.assert_close(loss, nll + penalty)
    torch.testing.assert_close(logged["loss"], nll.detach())
    assert ("z_loss" in logged) == bool(z_loss)
    assert not any(value.requires_grad for value in logged.values())
    torch.testing.assert_close(gradient(model, loss), gradient(model, nll + penalty))


def test_micro_batches_of_unequal_weight_add_up(model):
    """One row of three targets, two full ones, none at all: sums divided once by the total."""
    whole = gradient(model, cross_entropy_loss(model, batch())[0]) / batch().weight
    parts = [batch(slice(0, 1)), batch(slice(1, 3)), batch(slice(3, 4))]
    total = sum(part.weight for part in parts)
    summed = sum(gradient(model, cross_entropy_loss(model, part)[0]) for part in parts)
    torch.testing.assert_close(summed / total, whole)


def test_bf16_gradients_are_scaled_in_float32(model):
    """A third in bf16 is 0.2% too much, which would be on every weight below the head."""
    model.dtype = torch.bfloat16
    whole = batch()
    grads = []
    for scale in (1.0, 1 / 3):
        hidden = model(whole.tokens, whole.positions, whole.cu_seqlens).detach().requires_grad_()
        (cross_entropy_loss(Fixed(hidden, model.head_weight), whole)[0] * scale).backward()
        grads.append(hidden.grad)
    assert grads[0].dtype == torch.bfloat16
    assert torch.equal(grads[1], (grads[0].float() * torch.tensor(1 / 3)).bfloat16())


class Fixed:
    """A model whose hidden states are given."""

    def __init__(self, hidden, head_weight):
        self.hidden, self.head_weight, self.fused = hidden, head_weight, None

    def __call__(self, *batch):
        return self.hidden


def test_a_second_backward_pass_is_refused_in_words(model):
    loss, _ = cross_entropy_loss(model, batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_close_to_float64():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator).bfloat16()
    weight = torch.randn(1000, 64, generator=generator) / 8
    targets = torch.randint(1000, (600,), generator=generator)
    targets[::7] = IGNORE
    upstream = (torch.randn(600, generator=generator), torch.randn(600, generator=generator))
    exact_in = [x.double().requires_grad_() for x in (hidden, weight.bfloat16())]
    exact, exact_grads = gradients(obvious, *exact_in, targets, [x.double() for x in upstream])
    ours_in = [x.cuda().requires_grad_() for x in (hidden, weight)]
    ours, grads = gradients(
        lambda *x: token_logprobs(*x, chunk_tokens=256),
        *ours_in,
        targets.cuda(),
        [x.cuda() for x in upstream],
    )
    assert {x.dtype for x in ours} == {torch.float32} == {grads[1].dtype}
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, exact_grads, strict=True):
        assert (a.cpu().double() - b).norm() / b.norm() < 1e-2
