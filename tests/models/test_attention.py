"""Every kernel against a loop over documents in float64; no leaks; which kernel is chosen."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.attention import KERNELS, attention, choose_kernel, document_mask
from models.kv_cache import KVCache

CPU = [("dense", "cpu", torch.float32), ("dense", "cpu", torch.bfloat16)]
GPU = [(kernel, "cuda", torch.bfloat16) for kernel in KERNELS]
GPU += [(kernel, "cuda", torch.float32) for kernel in ("flex", "dense")]
KERNEL_CASES = CPU + [pytest.param(*case, marks=pytest.mark.gpu) for case in GPU]

BOUNDS = [0, 40, 40, 41, 96, 96, 106, 192, 192, 192]  # of two rows of 96; some documents are empty
SHAPE = (2, 96)


def skip_where_unavailable(kernel, device, dtype, head_dim):
    try:
        choose_kernel(kernel, torch.device(device), dtype, head_dim)
    except ValueError as error:
        pytest.skip(str(error))


def inputs(device, dtype, head_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*SHAPE, heads, head_dim) for heads in (6, 2, 2)]
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


def reference(q, k, v):
    """Attention of each document by itself, head by head, (B, T, H, D)."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = torch.zeros_like(flat_q)
    group = q.shape[2] // k.shape[2]
    for start, end in pairwise(BOUNDS):
        for head in range(q.shape[2]):
            document = slice(start, end), head // group
            scores = flat_q[start:end, head] @ flat_k[document].T / math.sqrt(q.shape[-1])
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            out[start:end, head] = weights @ flat_v[document]
    return out.view_as(q)


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("kernel", "device", "dtype"), KERNEL_CASES)
def test_outputs_and_gradients_are_those_of_a_loop_over_documents(kernel, device, dtype, head_dim):
    skip_where_unavailable(kernel, device, dtype, head_dim)
    ours = inputs(device, dtype, head_dim)
    exact = [x.detach().double().requires_grad_() for x in ours]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    out = attention(*ours, document_mask(bounds, SHAPE, kernel))
    expected = reference(*exact)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    for x, y in zip(ours, exact, strict=True):
        assert relative_error(x.grad, y.grad) < tolerance


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_on_a_cpu_too_where_torch_gives_it_no_backward():
    q, k, v = (x.detach() for x in inputs("cpu", torch.float32, 64))
    mask = document_mask(torch.tensor(BOUNDS, dtype=torch.int32), SHAPE, "flex")
    expected = reference(*(x.double() for x in (q, k, v)))
    assert relative_error(attention(q, k, v, mask), expected) < 1e-5


@pytest.mark.parametrize(("kernel", "device", "dtype"), KERNEL_CASES)
def test_no_gradient_crosses_documents(kernel, device, dtype):
    skip_where_unavailable(kernel, device, dtype, 64)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    for start, end in pairwise(BOUNDS):
        q, k, v = inputs(device, dtype, 64)
        out = attention(q, k, v, document_mask(bounds, SHAPE, kernel))
        out.flatten(0, 1)[start:end].square().sum().backward()
        for x in (q, k, v):
            grad = x.grad.flatten(0, 1)
            assert not grad[:start].any()
            assert not grad[end:].any()
        assert v.grad.flatten(0, 1)[start:end].any(-1).all()


def test_fa4_can_be_traced_where_it_is_not_installed():
    """What torch.compile sees of it: shapes and dtypes of outputs and gradients."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 96, h, 64).bfloat16().requires_grad_() for h in (6, 2, 2))
        bounds = torch.empty(10, dtype=torch.int32)
        out = attention(q, k, v, document_mask(bounds, SHAPE, "fa4"))
        out.sum().backward()
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_of_fa4s_warnings_only_the_one_of_each_compilation_is_hidden():
    """In a process of its own, since pytest has filters of its own."""
    script = """
import warnings
import models.attention
for message, module in (
    ("Argument aux_data (position 17) cannot be converted", "cutlass.base_dsl.dsl"),
    ("Argument aux_data of another", "other"),
    ("Cache is disabled", "cutlass.base_dsl.dsl"),
):
    warnings.warn_explicit(message, UserWarning, "file.py", 1, module)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", script],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = [line for line in run.stderr.splitlines() if line.startswith("file.py")]
    assert shown == [
        "file.py:1: UserWarning: Argument aux_data of another",
        "file.py:1: UserWarning: Cache is disabled",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fa4", "fa2", "varlen", "flex"])
def test_deterministic_backward_repeats_to_the_bit(kernel):
    skip_where_unavailable(kernel, "cuda", torch.bfloat16, 64)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(5):
            q, k, v = inputs("cuda", torch.bfloat16, 64)
            attention(q, k, v, document_mask(bounds, SHAPE, kernel)).square().sum().backward()
            runs.append(torch.cat([x.grad.flatten() for x in (q, k, v)]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_mask_asks_for_a_deterministic_backward(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        mask = document_mask(torch.tensor(BOUNDS, dtype=torch.int32), SHAPE, "fa4")
    finally:
        torch.use_deterministic_algorithms(False)
    assert mask.deterministic is deterministic


def test_a_cpu_gets_the_dense_kernel():
    device = torch.device("cpu")
    assert choose_kernel("auto", device, torch.float32, 64) == ("dense", "the device is cpu")


@pytest.mark.parametrize(
    ("requested", "reason"),
    [
        ("fa5", "no attention kernel 'fa5': one of auto, fa4, fa2, varlen, flex, dense"),
        ("varlen", "attention kernel 'varlen' cannot run: needs a CUDA device, not cpu"),
        ("flex", "needs a CUDA device, not cpu"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(requested, reason):
    with pytest.raises(ValueError, match=reason):
        choose_kernel(requested, torch.device("cpu"), torch.float32, 8)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "kernel", "reason"),
    [
        ((8, 0), torch.bfloat16, 64, "varlen", "fa4 needs Hopper or Blackwell"),
        ((8, 0), torch.bfloat16, 64, "varlen", "pip install flash-attn"),
        ((9, 0), torch.float32, 64, "flex", "varlen needs bfloat16 or float16, not float32"),
        ((9, 0), torch.bfloat16, 60, "flex", "needs heads of 8, 16 ... 256 dimensions, not 60"),
        ((7, 5), torch.float16, 64, "flex", "varlen needs Ampere or later"),
        ((7, 5), torch.float32, 64, "flex", "fa2 needs Ampere or later (compute capability 8)"),
        ((7, 0), torch.float32, 64, "flex", "fa4 needs Hopper or Blackwell"),
        ((7, 5), torch.float16, 8, "dense", "flex needs heads of at least 16 dimensions"),
    ],
)
def test_choice_on_cuda(monkeypatch, capability, dtype, head_dim, kernel, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        "models.attention.NEEDED_FUNCTION", {"fa2": ("nowhere", "f", "pip install flash-attn")}
    )
    chosen, why = choose_kernel("auto", torch.device("cuda"), dtype, head_dim)
    assert chosen == kernel
    assert reason in why


@pytest.mark.parametrize("kernel", ["fa4", "fa2", "varlen"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_flash_attention_is_refused_before_ampere(monkeypatch, kernel, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=f"'{kernel}' cannot run: needs .* not 7.{capability[1]}"):
        choose_kernel(kernel, torch.device("cuda"), torch.float16, 64)


def test_an_empty_package_does_not_pass_for_a_kernel(tmp_path, monkeypatch):
    """What flash-attn-4 leaves of `flash_attn`: it can be imported and holds nothing."""
    (tmp_path / "empty_kernels").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    needed = {"fa2": ("empty_kernels", "flash_attn_varlen_func", "pip install flash-attn")}
    monkeypatch.setattr("models.attention.NEEDED_FUNCTION", needed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="has no attribute 'flash_attn_varlen_func'"):
        choose_kernel("fa2", torch.device("cuda"), torch.bfloat16, 64)


def test_the_cache_keeps_slots_apart_and_hides_what_is_later(tiny):
    cache = KVCache(tiny, slots=2, capacity=4, dtype=torch.float32, device=torch.device("cpu"))
    new = torch.randn(2, 2, tiny.n_kv_heads, tiny.head_dim)
    positions = torch.tensor([[0, 1], [2, 3]])
    keys, values = cache.store(1, positions, new, -new)
    assert torch.equal(keys[0, :2], new[0]) and torch.equal(keys[1, 2:], new[1])
    assert torch.equal(values, -keys)
    assert not cache.keys[0].any()
    allowed = cache.mask(positions).allowed[:, 0].int().tolist()
    assert allowed == [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
