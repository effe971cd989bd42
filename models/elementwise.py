"""What a training step computes between its matrix products, forward and backward.

Each function is written out in plain torch: that is its definition, what a CPU runs, and what the
Triton kernels of `models/kernels.py` and `models/loss_kernels.py`, which CUDA tensors go to, are
tested against. All compute in float32 (float64 for float64) and return the dtype of the
activations. N tokens are the rows.

What a matrix product reads next is returned as `Rows`: where products are in 8 bits the same pass
that makes the rows rounds them, which would otherwise be a pass of its own.
"""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST_ROW = 32_768
"""Logits that one GPU program holds: 32 for each of 1,024 threads, which have 64 registers each."""


@dataclass
class Rows:
    """Rows (N, C) in the forms that matrix products read.

    Attributes:
        wide: in the activations' dtype; None where only 8-bit products read them.
        rounded: in an 8-bit float type, and the float32 scales (N, 1) to multiply them by; None
            where they have not been rounded.
    """

    wide: Tensor | None
    rounded: tuple[Tensor, Tensor] | None = None


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    rounding: torch.dtype | None = None,
    wide: bool = True,
) -> tuple[Tensor, Rows]:
    """The residual stream x + delta (N, C) and its RMSNorm; the stream is `x` without a delta.

    Args:
        rounding: the 8-bit type to round the norm's output to as well; None: to none.
        wide: whether the output is wanted in the activations' dtype.
    """
    if kernels := kernels_for(x):
        total, normed, rounded = kernels.add_norm(x, delta, weight, eps, rounding, wide)
        return total, Rows(normed, rounded)
    total = x if delta is None else x + delta
    unit, _ = _unit(total, eps)
    normed = (weight * unit).to(x.dtype)
    return total, Rows(normed if wide else None, _rounded(normed, rounding))


def add_norm_backward(
    total: Tensor,
    weight: Tensor,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    eps: float,
    rounding: torch.dtype | None = None,
    again: bool = False,
) -> tuple[Rows, Tensor, Tensor | None]:
    """Gradients of `add_norm`: of x and delta alike (N, C), and of the weight (C,) in float32.

    Args:
        grad_total: what reaches the stream past the norm; None: nothing.
        rounding: the 8-bit type to round the rows to as well; None: to none.
        again: whether the norm's output is wanted once more; it is returned last.
    """
    if kernels := kernels_for(total):
        grad, to_weight, rounded, normed = kernels.add_norm_backward(
            total, weight, grad_normed, grad_total, eps, rounding, again
        )
        return Rows(grad, rounded), to_weight, normed
    unit, scale = _unit(total, eps)
    upstream = grad_normed.to(unit.dtype)
    along = upstream * weight
    grad = scale * (along - unit * (along * unit).mean(-1, keepdim=True))
    if grad_total is not None:
        grad = grad + grad_total
    grad = grad.to(total.dtype)
    normed = (weight * unit).to(total.dtype) if again else None
    return Rows(grad, _rounded(grad, rounding)), (upstream * unit).sum(0), normed


def rotate_heads(heads: Tensor, rotation: tuple[Tensor, Tensor], inverse: bool = False) -> None:
    """Turns each head of `heads` (N, H, D), in place, by its token's angles.

    Heads may lie inside wider rows.

    Args:
        rotation: cosines and sines (N, D/2) of the angles.
        inverse: turn the other way: the gradient.
    """
    if kernels := kernels_for(heads):
        kernels.rotate_heads(heads, rotation, inverse)
        return
    cos, sin = (x[:, None] for x in rotation)  # (N, 1, D/2)
    sin = -sin if inverse else sin
    first, second = heads.to(cos.dtype).chunk(2, -1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def swiglu(gate_up: Tensor, rounding: torch.dtype | None = None) -> Rows:
    """silu(gate) * up (N, F) of the halves of `gate_up` (N, 2F).

    Args:
        rounding: the 8-bit type to return it in; None: the activations' dtype.
    """
    if kernels := kernels_for(gate_up):
        if rounding is None:
            return Rows(kernels.swiglu(gate_up))
        return Rows(None, kernels.swiglu_rounded(gate_up, rounding))
    gate, up = widened(gate_up).chunk(2, -1)
    product = (F.silu(gate) * up).to(gate_up.dtype)
    return Rows(product if rounding is None else None, _rounded(product, rounding))


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, rounding: torch.dtype | None = None
) -> tuple[Tensor, Rows]:
    """The product (N, F) once more, and the gradient of `gate_up` (N, 2F).

    They may be written over `grad`, the gradient (N, F) of the product, and over `gate_up`.

    Args:
        rounding: the 8-bit type to round the gradient to as well; None: to none.
    """
    if kernels := kernels_for(gate_up):
        product, grad_gate_up, rounded = kernels.swiglu_backward(gate_up, grad, rounding)
        return product, Rows(grad_gate_up, rounded)
    gate, up = widened(gate_up).chunk(2, -1)
    sigmoid, upstream = gate.sigmoid(), widened(grad)
    silu = gate * sigmoid
    to_gate = upstream * up * (sigmoid + silu * (1 - sigmoid))
    grad_gate_up = torch.cat((to_gate, upstream * silu), -1).to(grad.dtype)
    return (silu * up).to(grad.dtype), Rows(grad_gate_up, _rounded(grad_gate_up, rounding))


def softmax_statistics(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Each target's log-probability (0 where ignored) and log Z, (n,), of `logits` (n, V)."""
    if kernels := kernels_for(logits, "loss_kernels"):
        return kernels.softmax_statistics(logits, targets, ignored)
    logits = widened(logits)
    logz = logits.logsumexp(-1)
    picked = logits.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return (picked - logz).where(targets != ignored, 0), logz


def logits_gradient(
    logits: Tensor,
    logz: Tensor,
    targets: Tensor,
    to_logp: Tensor,
    to_logz: Tensor,
    dtype: torch.dtype,
    ignored: int,
) -> Tensor:
    """Gradient (n, V), in `dtype`, of to_logp * log p(target) + to_logz * log Z.

    It may be written over `logits`.
    """
    if kernels := kernels_for(logits, "loss_kernels"):
        return kernels.logits_gradient(logits, logz, targets, to_logp, to_logz, dtype, ignored)
    logits = widened(logits)
    counts = targets != ignored
    to_target = to_logp.where(counts, 0)[:, None]
    spread = (to_logz - to_logp).where(counts, 0)[:, None]
    is_target = targets[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    return (spread * (logits - logz[:, None]).exp() + to_target.where(is_target, 0)).to(dtype)


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Both numbers of `softmax_statistics`, and the gradient (n, V) of the loss, in `dtype`.

    The loss is -log p(target) + z_loss (log Z)^2. Its gradient may be written over `logits`.
    """
    kernels = kernels_for(logits, "loss_kernels")
    if kernels and logits.shape[1] <= WIDEST_ROW:
        return kernels.cross_entropy_gradient(logits, targets, z_loss, dtype, ignored)
    logp, logz = softmax_statistics(logits, targets, ignored)
    to_logp, to_logz = torch.full_like(logz, -1), 2 * z_loss * logz
    grad = logits_gradient(logits, logz, targets, to_logp, to_logz, dtype, ignored)
    return logp, logz, grad


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (n, C) in an 8-bit float type, and the float32 scales (n, 1) to multiply them by.

    A row's largest number becomes the largest of the type.
    """
    if kernels := kernels_for(x):
        return kernels.quantise_rows(x, dtype)
    limit = torch.finfo(dtype).max
    scales = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / limit
    return (x.float() / scales).clamp(-limit, limit).to(dtype), scales


def _rounded(x: Tensor, rounding: torch.dtype | None) -> tuple[Tensor, Tensor] | None:
    return None if rounding is None else quantise_rows(x, rounding)


def _unit(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows scaled to a root mean square of 1, and the scale (N, 1)."""
    wide = widened(total)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def widened(x: Tensor) -> Tensor:
    """In float32, in which everything here is computed; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def kernels_for(x: Tensor, module: str = "kernels") -> ModuleType | None:
    """The Triton kernels, where `x` is on a GPU."""
    return _load(module) if x.is_cuda else None


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(f"models.{module}")
