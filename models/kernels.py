"""Triton kernels of the training step: each reads its inputs once and writes its outputs once.

Between the matrix products of a block nothing is left to compute but to move bytes, so a kernel is
as good as the bytes it does not move: the residual is added where the norm reads it, rotations are
done in place on the packed projections, the backward pass of SwiGLU also writes the product that
the next matrix needs, all of it over its inputs, rows that an fp8 product reads are rounded by the
kernel that makes them, and a row of logits is turned into its gradient where it stands.

Sums over rows (norm weights) go through one partial sum per program, added in a fixed order: no
atomic operations, so results repeat to the bit. Every kernel has its definition in plain torch in
`models/elementwise.py`, which also serves where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# 8-bit numbers


@triton.jit
def _largest(value, axis: tl.constexpr):
    return tl.max(tl.abs(value.to(tl.float32)), axis)


@triton.jit
def _scale_to(limit, largest):
    return tl.maximum(largest, 1e-12) / limit


@triton.jit
def _store_rounded(out, value, scale, limit, inside):
    # NaN stays NaN: a minimum and a maximum would make it the limit.
    scaled = tl.clamp(value.to(tl.float32) / scale, -limit, limit, tl.PropagateNan.ALL)
    tl.store(out, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantise_rows(
    x, out, scales, rows, limit, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * C + column[None, :]
    inside = (row < rows)[:, None] & (column < C)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    scale = _scale_to(limit, _largest(value, 1))
    tl.store(scales + row, scale, mask=row < rows)
    _store_rounded(out + at, value, scale[:, None], limit, inside)


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    out, scales = _empty_rounded(rows, size, dtype, x.device)
    block = triton.next_power_of_2(size)
    per_program = max(1, 4096 // block)
    _quantise_rows[(triton.cdiv(rows, per_program),)](
        x, out, scales, rows, torch.finfo(dtype).max, C=size, BLOCK=block, ROWS=per_program,
        num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    return out, scales


def _empty_rounded(
    rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for 8-bit rows (rows, size) and their scales (rows, 1)."""
    out = torch.empty(rows, size, dtype=dtype, device=device)
    return out, torch.empty(rows, 1, dtype=torch.float32, device=device)


# ---------------------------------------------------------------------------------------------
# RMSNorm with the residual


@triton.jit
def _add_norm(
    x, delta, weight, total, normed, rounded, scales, rows, eps, limit,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
    WIDE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    at = row[:, None] * C + column[None, :]
    inside = (row < rows)[:, None] & (column < C)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        added = value.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        value = added.to(value.dtype)  # the norm sees the stream as it is stored
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / C + eps)
    w = tl.load(weight + column, mask=column < C, other=0.0)
    out = (w[None, :] * (wide * scale[:, None])).to(x.dtype.element_ty)
    if WIDE:
        tl.store(normed + at, out, mask=inside)
    if ROUND:
        scale = _scale_to(limit, _largest(out, 1))
        tl.store(scales + row, scale, mask=row < rows)
        _store_rounded(rounded + at, out, scale[:, None], limit, inside)


@triton.jit
def _add_norm_backward(
    total, weight, grad_normed, grad_total, grad, partial, rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    w = tl.load(weight + column, mask=inside, other=0.0)
    grad_weight = tl.zeros((BLOCK_C,), tl.float32)
    stride = tl.full((), C, tl.int64)
    # The next rows are on their way while one is summed: a program that asked for a row only when
    # done with the one before would leave the memory idle half of the time.
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        at = row * stride + column
        x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        along = upstream * w
        # Two sums at once: one exchange between the warps instead of two.
        square, overlap = tl.split(tl.sum(tl.join(x * x, along * x), 0))
        scale = tl.rsqrt(square / C + eps)
        unit = x * scale
        grad_weight += upstream * unit
        result = scale * (along - unit * (scale * overlap / C))
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * C + column, grad_weight, mask=inside)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    rounding: torch.dtype | None = None,
    wide: bool = True,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    rows, size = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x) if wide else None
    rounded = None if rounding is None else _empty_rounded(rows, size, rounding, x.device)
    block = triton.next_power_of_2(size)
    per_program = max(1, 4096 // block)
    _add_norm[(triton.cdiv(rows, per_program),)](
        x, x if delta is None else delta, weight, total, normed if wide else x,
        *(rounded or (x, x)), rows, eps, torch.finfo(rounding or torch.bfloat16).max,
        C=size, BLOCK_C=block, ROWS=per_program, ADD=delta is not None,
        WIDE=wide, ROUND=rounded is not None, num_warps=4,
    )  # fmt: skip
    return total, normed, rounded


def add_norm_backward(
    total: Tensor, weight: Tensor, grad_normed: Tensor, grad_total: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    rows, size = total.shape
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 256))  # 8 numbers, 16 bytes of bf16, for each thread
    at_once = 32 // warps * _multiprocessors(total.device)
    programs = min(rows, at_once)
    grad = torch.empty_like(total)
    partial = torch.empty(programs, size, dtype=torch.float32, device=total.device)
    _add_norm_backward[(programs,)](
        total, weight, grad_normed, total if grad_total is None else grad_total, grad, partial,
        rows, eps,
        C=size, BLOCK_C=block, ADD=grad_total is not None, STAGES=3, num_warps=warps,
    )  # fmt: skip
    return grad, partial.sum(0)


# ---------------------------------------------------------------------------------------------
# Rotary embedding


@triton.jit
def _rotate(
    heads, cos, sin, tokens, stride, cos_stride, sin_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < tokens) & (d < HALF)
    c = tl.load(cos + token * cos_stride + d, mask=inside, other=0.0)
    s = tl.load(sin + token * sin_stride + d, mask=inside, other=0.0)
    if INVERSE:
        s = -s
    for head in tl.static_range(HEADS):
        at = heads + token * stride + head * 2 * HALF + d
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
        tl.store(at + HALF, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


def rotate_heads(heads: Tensor, rotation: tuple[Tensor, Tensor], inverse: bool) -> None:
    tokens, count, size = heads.shape
    assert heads.stride()[1:] == (size, 1), "heads lie side by side"
    cos, sin = rotation
    block = triton.next_power_of_2(size // 2)
    per_program = max(1, 1024 // block)
    _rotate[(triton.cdiv(tokens, per_program),)](
        heads, cos, sin, tokens, heads.stride(0), cos.stride(0), sin.stride(0),
        HEADS=count, HALF=size // 2, BLOCK_D=block, TOKENS=per_program, INVERSE=inverse,
        num_warps=4,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# SwiGLU


@triton.jit
def _swiglu(
    gate_up, product, scales, limit, F: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
    if ROUND:  # the block is the whole row
        scale = _scale_to(limit, _largest(out, 0))
        tl.store(scales + row, scale)
        _store_rounded(product + row * F + column, out, scale, limit, inside)
    else:
        tl.store(product + row * F + column, out, mask=inside)


@triton.jit
def _swiglu_backward(
    gate_up, grad_product, rounded, scales, limit,
    F: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    at_gate, at_up = row * 2 * F + column, row * 2 * F + F + column
    gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_up, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_product + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = gate_up.dtype.element_ty
    to_gate = (grad * up * (sigmoid + silu * (1 - sigmoid))).to(kind)
    to_up = (grad * silu).to(kind)
    tl.store(gate_up + at_gate, to_gate, mask=inside)
    tl.store(gate_up + at_up, to_up, mask=inside)
    tl.store(grad_product + row * F + column, (silu * up).to(kind), mask=inside)
    if ROUND:  # the block is half of the row
        scale = _scale_to(limit, tl.maximum(_largest(to_gate, 0), _largest(to_up, 0)))
        tl.store(scales + row, scale)
        _store_rounded(rounded + at_gate, to_gate, scale, limit, inside)
        _store_rounded(rounded + at_up, to_up, scale, limit, inside)


def swiglu(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    product = gate_up.new_empty(rows, size)
    block = min(2048, triton.next_power_of_2(size))
    _swiglu[(rows, triton.cdiv(size, block))](
        gate_up, product, gate_up, 0.0, F=size, BLOCK=block, ROUND=False, num_warps=4
    )
    return product


def swiglu_rounded(gate_up: Tensor, rounding: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    product, scales = _empty_rounded(rows, size, rounding, gate_up.device)
    block = triton.next_power_of_2(size)
    _swiglu[(rows, 1)](
        gate_up, product, scales, torch.finfo(rounding).max,
        F=size, BLOCK=block, ROUND=True, num_warps=_warps_of_row(block),
    )  # fmt: skip
    return product, scales


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, rounding: torch.dtype | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    rows, size = grad.shape
    block = triton.next_power_of_2(size)
    if rounding is None:
        block = min(2048, block)
        _swiglu_backward[(rows, triton.cdiv(size, block))](
            gate_up, grad, gate_up, gate_up, 0.0, F=size, BLOCK=block, ROUND=False, num_warps=4
        )
        return grad, gate_up, None
    rounded = _empty_rounded(rows, 2 * size, rounding, grad.device)
    _swiglu_backward[(rows, 1)](
        gate_up, grad, *rounded, torch.finfo(rounding).max,
        F=size, BLOCK=block, ROUND=True, num_warps=_warps_of_row(block),
    )  # fmt: skip
    return grad, gate_up, rounded


def _warps_of_row(block: int) -> int:
    return min(16, max(4, block // 512))  # 16 numbers for each thread


# ---------------------------------------------------------------------------------------------
# Softmax over the vocabulary


@triton.jit
def _softmax_statistics(
    logits, targets, logp, logz, V: tl.constexpr, BLOCK: tl.constexpr, IGNORED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + column
        value = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, value)
        # In a lane that has seen nothing yet both are -inf, whose difference is not a number.
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.exp(value - base)
        largest = new
    top = tl.max(largest, 0)
    z = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    target = tl.load(targets + row)
    counts = target != IGNORED
    value = tl.load(logits + row * V + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(logp + row, tl.where(counts, value - z, 0.0))
    tl.store(logz + row, z)


@triton.jit
def _logits_gradient(
    logits, out, logz, targets, to_logp, to_logz,
    V: tl.constexpr, BLOCK: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    counts = target != IGNORED
    picked = tl.where(counts, tl.load(to_logp + row), 0.0)
    spread = tl.where(counts, tl.load(to_logz + row), 0.0) - picked
    value = tl.load(logits + row * V + at, mask=at < V, other=0.0).to(tl.float32)
    grad = spread * tl.exp(value - tl.load(logz + row)) + tl.where(at == target, picked, 0.0)
    tl.store(out + row * V + at, grad.to(out.dtype.element_ty), mask=at < V)


def softmax_statistics(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    rows, size = logits.shape
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logz = torch.empty_like(logp)
    block = min(8192, triton.next_power_of_2(size))
    _softmax_statistics[(rows,)](
        logits, targets, logp, logz, V=size, BLOCK=block, IGNORED=ignored, num_warps=16
    )
    return logp, logz


def logits_gradient(
    logits: Tensor,
    logz: Tensor,
    targets: Tensor,
    to_logp: Tensor,
    to_logz: Tensor,
    dtype: torch.dtype,
    ignored: int,
) -> Tensor:
    rows, size = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    block = min(4096, triton.next_power_of_2(size))
    _logits_gradient[(rows, triton.cdiv(size, block))](
        logits, out, logz, targets, to_logp, to_logz,
        V=size, BLOCK=block, IGNORED=ignored, num_warps=8,
    )  # fmt: skip
    return out


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
