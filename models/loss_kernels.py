"""Triton kernels of the loss: a softmax over the vocabulary for each token.

Logits are the widest rows of a training step, so what counts is how often they are read. Where a
row fits the registers of one program, `cross_entropy_gradient` reads it once; otherwise, and where
the gradient of the loss is not known beforehand, it is read for its statistics and once more for
its gradient. Each kernel has its definition in `models/elementwise.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit
def _cross_entropy_gradient(
    logits, out, targets, logp, logz, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    counts = target != IGNORED
    # Before the sums, after which other threads may write the gradient over the logits.
    chosen = tl.load(logits + row * V + tl.where(counts, target, 0)).to(tl.float32)
    value = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    power = tl.exp(value - top)
    total = tl.sum(power, 0)
    z = top + tl.log(total)
    tl.store(logp + row, tl.where(counts, chosen - z, 0.0))
    tl.store(logz + row, z)
    spread = tl.where(counts, (1 + 2 * z_loss * z) / total, 0.0)
    grad = power * spread - tl.where(counts & (at == target), 1.0, 0.0)
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
    to_logp, to_logz = to_logp.contiguous(), to_logz.contiguous()  # a sum's are expanded
    block = min(4096, triton.next_power_of_2(size))
    _logits_gradient[(rows, triton.cdiv(size, block))](
        logits, out, logz, targets, to_logp, to_logz,
        V=size, BLOCK=block, IGNORED=ignored, num_warps=8,
    )  # fmt: skip
    return out


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logz = torch.empty_like(logp)
    block = triton.next_power_of_2(size)
    _cross_entropy_gradient[(rows,)](
        logits, out, targets, logp, logz, z_loss,
        V=size, BLOCK=block, IGNORED=ignored, num_warps=min(32, max(4, block // 1024)),
    )  # fmt: skip
    return logp, logz, out
