"""Each Triton kernel against its definition in plain torch, in higher precision.

On a GPU, or anywhere with Triton's interpreter (numpy < 2.4):
TRITON_INTERPRET=1 pytest tests/models/test_kernels.py
"""

import os

import pytest
import torch

from models import elementwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    pytest.importorskip("triton")
else:
    pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def kernels():
    from models import kernels

    return kernels


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cpu").to(DEVICE, dtype)


def check(ours, exact, dtype):
    """Relative error in norm; shapes and dtypes are the activations'."""
    assert ours.shape == exact.shape
    error = (ours.double().cpu() - exact.double().cpu()).norm() / exact.double().norm().cpu()
    assert error < TOLERANCE[dtype]  # fails for NaN too


def exactly(function, *args):
    """The definition, in float64 on the CPU."""
    wide = [a.double().cpu() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    return function(*[a.cpu() if torch.is_tensor(a) else a for a in wide])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 768])
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(kernels, dtype, size, add):
    x, weight = draw(37, size, dtype=dtype), draw(size)
    delta = draw(37, size, dtype=dtype) if add else None
    total, normed, _ = kernels.add_norm(x, delta, weight, 1e-6)
    exact_total, exact_normed = exactly(elementwise.add_norm, x, delta, weight, 1e-6)
    assert (total.dtype, normed.dtype) == (dtype, dtype)
    check(total, exact_total, dtype)
    check(normed, exact_normed.wide, dtype)
    grad, to_weight, _, nothing = kernels.add_norm_backward(total, weight, normed, delta, 1e-6)
    exact = exactly(elementwise.add_norm_backward, total, weight, normed, delta, 1e-6)
    check(grad, exact[0].wide, dtype)
    check(to_weight, exact[1], dtype)
    assert to_weight.dtype == torch.float32 and nothing is None
    *same, again = kernels.add_norm_backward(total, weight, normed, delta, 1e-6, again=True)
    check(same[0], exact[0].wide, dtype)
    check(same[1], exact[1], dtype)
    check(again, exact_normed.wide, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24, 64])
@pytest.mark.parametrize("inverse", [True, False])
def test_rotate_heads_in_place_inside_wider_rows(kernels, dtype, size, inverse):
    packed, angles = draw(45, 5, size, dtype=dtype), draw(45, size // 2)
    before = packed.clone()
    rotation = angles.cos(), angles.sin()
    expected = before[:, 1:4].double().cpu()
    elementwise.rotate_heads(expected, [r.double().cpu() for r in rotation], inverse)
    kernels.rotate_heads(packed[:, 1:4], rotation, inverse)
    check(packed[:, 1:4], expected, dtype)
    assert torch.equal(packed[:, [0, 4]], before[:, [0, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 2048, 2500])
def test_swiglu(kernels, dtype, size):
    gate_up, grad = draw(7, 2 * size, dtype=dtype), draw(7, size, dtype=dtype)
    check(kernels.swiglu(gate_up), exactly(elementwise.swiglu, gate_up).wide, dtype)
    exact_product, exact_grad = exactly(elementwise.swiglu_backward, gate_up, grad.clone())
    product, grad_gate_up, _ = kernels.swiglu_backward(gate_up, grad)
    check(product, exact_product, dtype)
    check(grad_gate_up, exact_grad.wide, dtype)


def spread(*shape, dtype):
    """Rows of very different size, one of them all zeros."""
    x = draw(*shape, dtype=dtype) * torch.logspace(-4, 4, shape[0], device=DEVICE)[:, None]
    x[1] = 0
    return x.to(dtype)


def check_rounded(kernels, rounded, wide):
    """To the bit what the pass that only rounds makes of the same rows."""
    expected = kernels.quantise_rows(wide, FP8)
    assert torch.equal(rounded[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert rounded[0].view(torch.uint8).any()
    assert torch.equal(rounded[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 768, 1536])
@pytest.mark.parametrize("add", [True, False])
def test_norms_round_what_they_write(kernels, dtype, size, add):
    x, weight = spread(7, size, dtype=dtype), draw(size)
    delta = draw(7, size, dtype=dtype) if add else None
    total, normed, rounded = kernels.add_norm(x, delta, weight, 1e-6, FP8)
    plain = kernels.add_norm(x, delta, weight, 1e-6)
    # Another kernel than without rounding, whose compiler may contract its sums in another way: a
    # number in ten thousand is off by its last bit.
    assert torch.equal(total, plain[0]) and plain[2] is None
    check(normed, plain[1], dtype)
    check_rounded(kernels, rounded, normed)
    alone = kernels.add_norm(x, delta, weight, 1e-6, FP8, wide=False)
    assert torch.equal(alone[0], total) and alone[1] is None
    check(*(part.float() * scales for part, scales in (alone[2], rounded)), torch.bfloat16)
    plain = kernels.add_norm_backward(total, weight, normed, delta, 1e-6)
    grad, to_weight, rounded, _ = kernels.add_norm_backward(total, weight, normed, delta, 1e-6, FP8)
    check(grad, plain[0], dtype)
    check(to_weight, plain[1], torch.float32)
    check_rounded(kernels, rounded, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 2048, 2500, 4096])
def test_swiglu_rounds_what_it_would_write(kernels, dtype, size):
    gate_up, grad = spread(5, 2 * size, dtype=dtype), draw(5, size, dtype=dtype)
    check_rounded(kernels, kernels.swiglu_rounded(gate_up, FP8), kernels.swiglu(gate_up))
    expected = kernels.swiglu_backward(gate_up.clone(), grad.clone())
    product, grad_gate_up, rounded = kernels.swiglu_backward(gate_up, grad, FP8)
    assert torch.equal(product, expected[0]) and torch.equal(grad_gate_up, expected[1])
    check_rounded(kernels, rounded, grad_gate_up)


@pytest.fixture
def loss_kernels():
    from models import loss_kernels

    return loss_kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [37, 20_000])
def test_softmax_and_its_gradient(loss_kernels, dtype, vocab):
    kernels = loss_kernels
    logits, targets = draw(9, vocab, dtype=dtype) * 5, torch.randint(vocab, (9,), device=DEVICE)
    targets[[0, 5]] = -100
    statistics = kernels.softmax_statistics(logits, targets, -100)
    exact = exactly(elementwise.softmax_statistics, logits, targets, -100)
    for ours, expected in zip(statistics, exact, strict=True):
        check(ours, expected, torch.float32)
    upstream = draw(9), draw(9)
    expected = exactly(
        elementwise.logits_gradient, logits, exact[1], targets, *upstream, torch.float64, -100
    )
    for out in (torch.float32, torch.bfloat16):
        ours = kernels.logits_gradient(logits.clone(), statistics[1], targets, *upstream, out, -100)
        assert ours.dtype == out
        check(ours, expected, out)
    # The gradients of a plain sum are one number for all rows, not a number in each.
    upstream = torch.ones((), device=DEVICE).expand(9), torch.zeros((), device=DEVICE).expand(9)
    expected = exactly(
        elementwise.logits_gradient, logits, exact[1], targets, *upstream, torch.float64, -100
    )
    ours = kernels.logits_gradient(logits, statistics[1], targets, *upstream, torch.float32, -100)
    check(ours, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [37, 20_000])
@pytest.mark.parametrize(("z_loss", "ignored"), [(0.0, -100), (0.1, 7)])
def test_loss_with_its_gradient(loss_kernels, dtype, vocab, z_loss, ignored):
    logits, targets = draw(9, vocab, dtype=dtype) * 5, torch.randint(vocab, (9,), device=DEVICE)
    targets[[0, 5]], targets[1], targets[2] = ignored, 0, vocab - 1
    exact = exactly(
        elementwise.cross_entropy_gradient, logits, targets, z_loss, torch.float64, ignored
    )
    for out in DTYPES:
        given = logits.clone()
        ours = loss_kernels.cross_entropy_gradient(given, targets, z_loss, out, ignored)
        for x, expected, kind in zip(ours, exact, (*[torch.float32] * 2, out), strict=True):
            assert x.dtype == kind
            check(x, expected, kind)
        assert (ours[2].data_ptr() == given.data_ptr()) == (out == dtype)


@pytest.mark.skipif(INTERPRETED, reason="the choice is made by the device")
@pytest.mark.parametrize("vocab", [elementwise.WIDEST_ROW, elementwise.WIDEST_ROW + 8])
def test_rows_of_any_width_have_a_loss(vocab):
    logits, targets = draw(3, vocab) * 5, torch.randint(vocab, (3,), device=DEVICE)
    exact = exactly(elementwise.cross_entropy_gradient, logits, targets, 0.1, torch.float64, -100)
    ours = elementwise.cross_entropy_gradient(logits, targets, 0.1, torch.float32, -100)
    for x, expected in zip(ours, exact, strict=True):
        check(x, expected, torch.float32)


def test_kernels_repeat_to_the_bit(kernels):
    total, weight, grad = draw(500, 96), draw(96), draw(500, 96)
    runs = [kernels.add_norm_backward(total, weight, grad, None, 1e-6)[1] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts 8-bit floats off")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 96, 4096])
def test_quantise_rows(kernels, dtype, size):
    x = draw(11, size, dtype=dtype) * torch.logspace(-4, 4, 11, device=DEVICE)[:, None].to(dtype)
    x[3] = 0
    rounded, scales = kernels.quantise_rows(x, FP8)
    restored = rounded.float() * scales
    largest = x.float().abs().amax(1, keepdim=True)
    # Half a unit in the last of 3 bits, and half the smallest number of the format.
    assert ((restored - x.float()).abs() <= x.float().abs() / 16 + largest / 448 / 1024).all()
    assert not restored[3].any()
    expected, expected_scales = elementwise.quantise_rows(x.cpu(), FP8)
    torch.testing.assert_close(scales.cpu(), expected_scales)
    assert (rounded.cpu().float() != expected.float()).float().mean() < 0.01


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no 8-bit NaN")
def test_rounding_keeps_nan(kernels):
    x = draw(3, 96, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    rounded, scales = kernels.quantise_rows(x, FP8)
    assert (rounded.float() * scales).isnan().nonzero().tolist() == [[1, 5]]
