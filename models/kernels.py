"""Triton kernels of the training step: each reads its inputs once and writes its outputs once.

Between the matrix products of a block nothing is left to compute but to move bytes, so a kernel is
as good as the bytes it does not move: the residual is added where the norm reads it, rotations are
done in place on the packed projections, the backward pass of SwiGLU also writes the product that
the next matrix needs, all of it over its inputs, rows that an fp8 product reads are rounded by the
kernel that makes them. The kernels of the loss are in `models/loss_kernels.py`.

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
def _scales(largest, limit):
    """What rounded numbers are multiplied by to restore them, and what numbers are before."""
    largest = tl.maximum(largest, 1e-12)
    return largest / limit, limit / largest


@triton.jit
def _store_rounded(out, value, inverse, inside):
    # The largest ends within a rounding of the limit, so nothing is to be cut off; NaN stays NaN.
    scaled = value.to(tl.float32) * inverse
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
    scale, inverse = _scales(_largest(value, 1), limit)
    tl.store(scales + row, scale, mask=row < rows)
    _store_rounded(out + at, value, inverse[:, None], inside)


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


def _limit(rounding: torch.dtype | None) -> float:
    return 0.0 if rounding is None else torch.finfo(rounding).max


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
        scale, inverse = _scales(_largest(out, 1), limit)
        tl.store(scales + row, scale, mask=row < rows)
        _store_rounded(rounded + at, out, inverse[:, None], inside)


@triton.jit
def _add_norm_backward(
    total, weight, grad_normed, grad_total, grad, normed, rounded, scales, partial,
    rows, eps, limit,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    ROUND: tl.constexpr, STAGES: tl.constexpr,
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
        if NORM:
            tl.store(normed + at, (w * unit).to(normed.dtype.element_ty), mask=inside)
        result = scale * (along - unit * (scale * overlap / C))
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        result = result.to(grad.dtype.element_ty)
        tl.store(grad + at, result, mask=inside)
        if ROUND:
            scale, inverse = _scales(_largest(result, 0), limit)
            tl.store(scales + row, scale)
            _store_rounded(rounded + at, result, inverse, inside)
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
        *(rounded or (x, x)), rows, eps, _limit(rounding),
        C=size, BLOCK_C=block, ROWS=per_program, ADD=delta is not None,
        WIDE=wide, ROUND=rounded is not None, num_warps=4,
    )  # fmt: skip
    return total, normed, rounded


def add_norm_backward(
    total: Tensor,
    weight: Tensor,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    eps: float,
    rounding: torch.dtype | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    rows, size = total.shape
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 256))  # 8 numbers, 16 bytes of bf16, for each thread
    at_once = 32 // warps * _multiprocessors(total.device)
    programs = min(rows, at_once)
    grad = torch.empty_like(total)
    normed = torch.empty_like(total) if again else None
    rounded = None if rounding is None else _empty_rounded(rows, size, rounding, total.device)
    partial = torch.empty(programs, size, dtype=torch.float32, device=total.device)
    _add_norm_backward[(programs,)](
        total, weight, grad_normed, total if grad_total is None else grad_total, grad,
        normed if again else grad, *(rounded or (grad, grad)), partial, rows, eps, _limit(rounding),
        C=size, BLOCK_C=block, ADD=grad_total is not None, NORM=again, ROUND=rounded is not None,
        STAGES=3, num_warps=warps,
    )  # fmt: skip
    return grad, partial.sum(0), rounded, normed


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
        scale, inverse = _scales(_largest(out, 0), limit)
        tl.store(scales + row, scale)
        _store_rounded(product + row * F + column, out, inverse, inside)
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
        scale, inverse = _scales(tl.maximum(_largest(to_gate, 0), _largest(to_up, 0)), limit)
        tl.store(scales + row, scale)
        _store_rounded(rounded + at_gate, to_gate, inverse, inside)
        _store_rounded(rounded + at_up, to_up, inverse, inside)


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


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
