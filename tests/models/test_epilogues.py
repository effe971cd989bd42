"""Products with what follows them: the definitions, and quack's kernels against them on Hopper."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from models import elementwise, epilogues
from models.elementwise import Rows
from models.epilogues import EpilogueMatrix, epilogue_obstacle
from models.products import Matrix, pack_gate_up, split_gate_up

SIZES = (40, 24, 16)  # tokens, C, F


def draw(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def matrices(tokens, size, hidden):
    """Gate and up, and down, as `Matrix` and as `EpilogueMatrix`."""
    gate, up, down = draw(hidden, size), -draw(hidden, size), draw(size, hidden)
    packed = [pack_gate_up(gate, up, torch.float64, "bf16", gemm) for gemm in ("cublas", "quack")]
    assert isinstance(packed[0], Matrix) and isinstance(packed[1], EpilogueMatrix)
    return packed, [Matrix(down), EpilogueMatrix(down)]


def test_both_kinds_of_matrix_do_the_same():
    tokens, size, _ = SIZES
    packed, down = matrices(*SIZES)
    x, grad, stream = Rows(draw(tokens, size)), Rows(draw(tokens, size)), draw(tokens, size)
    (plain, product), (mixed, same) = (m.swiglu(x, product=True, halves=True) for m in packed)
    torch.testing.assert_close(same.wide, product.wide, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(split_gate_up(mixed.T, "quack"), plain.T.chunk(2), strict=True):
        torch.testing.assert_close(ours, theirs)

    total = sum(down[0].add(product, stream))
    whole, nothing = down[1].add(product, stream)
    assert nothing is None
    torch.testing.assert_close(whole, total)

    again, to_plain = down[0].swiglu_gradient(grad, plain.clone())
    again_mixed, to_mixed = down[1].swiglu_gradient(grad, mixed.clone())
    torch.testing.assert_close(again_mixed, again, rtol=1e-6, atol=1e-6)
    halves = split_gate_up(to_mixed.wide.T, "quack"), to_plain.wide.T.chunk(2)
    for ours, theirs in zip(*halves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    back = [m.input_gradient(g) for m, g in zip(packed, (to_plain, to_mixed), strict=True)]
    torch.testing.assert_close(*back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_wanted_is_not_returned(which):
    matrix, x = matrices(*SIZES)[0][which], Rows(draw(40, 24))
    whole, product = matrix.swiglu(x, product=True, halves=True)
    halves, nothing = matrix.swiglu(x, product=False, halves=True)
    assert torch.equal(halves, whole) and nothing is None
    nothing, alone = matrix.swiglu(x, product=True, halves=False)
    assert torch.equal(alone.wide, product.wide) and nothing is None


def test_the_gradient_of_gate_and_up_is_autograd_s():
    tokens, size, hidden = SIZES
    grad, weight = draw(tokens, size), draw(size, hidden)
    gate_up = draw(tokens, 2 * hidden).requires_grad_()
    product = torch.nn.functional.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]
    (product @ weight.T).backward(grad)
    place = gate_up.detach().clone()
    again, ours = epilogues.swiglu_gradient(grad, weight, place)
    assert ours is place
    torch.testing.assert_close(again, product.detach())
    torch.testing.assert_close(ours, gate_up.grad)


def test_obstacles_are_named():
    assert epilogue_obstacle(torch.device("cpu"), torch.float32, [7]) is None
    assert "not mps" in epilogue_obstacle(torch.device("mps"), torch.bfloat16, [])


@pytest.mark.parametrize(
    ("found", "obstacle"),
    [("0.7.1", "is 0.7.1, and the epilogues are written for 0.6"), (None, "cannot be imported")],
)
def test_another_quack_is_not_tried(monkeypatch, found, obstacle):
    def version(package):
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(epilogues, "version", version)
    epilogues._missing.cache_clear()
    assert obstacle in epilogues._missing()
    assert "quack-kernels==0.6.*" in epilogues._missing()
    epilogues._missing.cache_clear()


def test_obstacles_on_a_gpu(monkeypatch):
    monkeypatch.setattr(epilogues, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda = torch.device("cuda")
    assert epilogue_obstacle(cuda, torch.bfloat16, [768, 2048]) is None
    assert "bf16, not float16" in epilogue_obstacle(cuda, torch.float16, [768])
    assert "not [90]" in epilogue_obstacle(cuda, torch.bfloat16, [768, 90])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "compute capability 9), not 8" in epilogue_obstacle(cuda, torch.bfloat16, [768])


@pytest.fixture
def hopper():
    if obstacle := epilogue_obstacle(torch.device("cuda"), torch.bfloat16, []):
        pytest.skip(f"quack {obstacle}")


def check(ours, exact):
    """Within the rounding of bf16, in norm and for every number; fails for NaN too."""
    error = ours.double().cpu() - exact
    assert error.norm() / exact.norm() < 3e-3
    assert (error.abs() <= 0.01 * exact.abs() + 1e-3 * exact.abs().max()).all()


# Rows, inputs and outputs: less than a tile, no multiple of one, many; short and long sums.
SHAPES = [(1, 64, 64), (300, 96, 208), (4096, 768, 2048), (1111, 4096, 768)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "inputs", "outputs"), SHAPES)
def test_kernels_are_their_definitions(hopper, n, inputs, outputs):
    def half(*shape):
        return draw(*shape, dtype=torch.bfloat16, device="cuda")

    def exact(x):
        return x.double().cpu()

    x, weight, stream = half(n, inputs), half(outputs, inputs) / inputs**0.5, half(n, outputs)
    for added in (None, stream):
        ours = epilogues.product(x, weight.T, added)
        wide = exact(x) @ exact(weight.T)
        check(ours, wide if added is None else wide + exact(added))
    wide = epilogues.wide_product(x, weight.T)
    assert wide.dtype == torch.float32
    assert (wide.double().cpu() - exact(x) @ exact(weight.T)).abs().max() < 1e-4 * x.abs().max()
    grad = half(n, outputs)
    check(epilogues.product(grad, weight), exact(grad) @ exact(weight))

    expected = epilogues.swiglu(exact(x), exact(weight.T), True)
    ours = epilogues.swiglu(x, weight.T, True)
    for a, b in zip(ours, expected, strict=True):
        check(a, b)
    nothing, alone = epilogues.swiglu(x, weight.T, False)
    assert nothing is None and torch.equal(alone, ours[1])
    # What the backward pass computes again is what the forward pass kept.
    assert torch.equal(epilogues.product(x, weight.T), ours[0])

    gate_up, grad, down = ours[0], half(n, inputs), half(inputs, outputs // 2) / inputs**0.5
    expected = epilogues.swiglu_gradient(exact(grad), exact(down), exact(gate_up))
    place = gate_up.clone()
    product, to_gate_up = epilogues.swiglu_gradient(grad, down, place)
    assert to_gate_up.data_ptr() == place.data_ptr()
    check(product, expected[0])
    check(to_gate_up, expected[1])
    # The forward pass took it of the halves before they were rounded: three roundings apart.
    assert (product.double() - ours[1].double()).norm() < 1e-2 * ours[1].double().norm()


@pytest.mark.gpu
def test_a_gradient_written_over_its_input_is_the_one_beside_it(hopper):
    """Many tiles, so that a tile read too late would be another's result."""
    grad = draw(8192, 768, dtype=torch.bfloat16, device="cuda")
    down = draw(768, 2048, dtype=torch.bfloat16, device="cuda")
    gate_up = draw(8192, 4096, dtype=torch.bfloat16, device="cuda")
    kernels = elementwise.kernels_for(grad, "epilogue_kernels")
    beside = kernels._swiglu_gradient(grad, down, gate_up, config=kernels.WIDE, tuned=False)
    for _ in range(5):
        product, over = epilogues.swiglu_gradient(grad, down, gate_up.clone())
        assert torch.equal(over, beside["D"]) and torch.equal(product, beside["product"])


def test_elementwise_and_epilogue_definitions_agree_on_swiglu():
    gate_up = draw(5, 32)
    mixed = torch.stack(gate_up.chunk(2, -1), -1).flatten(1)
    ours = epilogues.swiglu(torch.eye(5, dtype=torch.float64), mixed, True)
    torch.testing.assert_close(ours[1], elementwise.swiglu(gate_up).wide, rtol=1e-6, atol=1e-6)
