"""Token log-probabilities fused with the head, and cross-entropy made of them.

Float32 logits of a batch of 65,536 tokens at a vocabulary of 32,000 would take 8 GB, and their
gradient as much again. Here the head is applied to a chunk of tokens at a time and only two numbers
per token are kept: the target's log-probability and log Z, the logarithm of the softmax's
normaliser.

`token_logprobs` holds for any gradients of the two, so preference and policy losses are plain
functions of it; its backward pass computes a chunk's logits again, which costs one product with the
head in four but no memory. Cross-entropy, whose gradient is known beforehand, takes it in the
forward pass while the logits are there, and scales it in the backward pass.

The ideas are those of Cut Cross-Entropy (Wijmans et al. 2024) and of Liger-Kernel's fused linear
cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.packing import IGNORE, Batch
from models import epilogues
from models.config import HEAD_CHUNK_TOKENS
from models.elementwise import cross_entropy_gradient, logits_gradient, softmax_statistics
from models.transformer import Transformer

CPU_CHUNK_TOKENS = 256  # a few MB of logits, which stay in the cache: 2-3 times as fast as 4,096


def token_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each target's log-probability, and log Z; both differentiable, both 0 where ignored.

    Products with the head are in `hidden`'s dtype with float32 results on CUDA, and in the weight's
    dtype elsewhere. The gradient of the weight is summed in the weight's dtype.

    Args:
        hidden: (N, C).
        head_weight: (V, C), float32.
        targets: (N,) int64, -100 to ignore.
        chunk_tokens: how many rows of logits exist at once; None: as many as suit the device.

    Returns:
        Two (N,) tensors in the weight's dtype.
    """
    chunk_tokens = chunk_tokens or _default_chunk(hidden)
    return _TokenLogprobs.apply(hidden, head_weight, targets, chunk_tokens)


def cross_entropy_loss(
    model: Transformer,
    batch: Batch,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed cross-entropy of a batch's targets, in nats.

    Args:
        z_loss: coefficient of the summed squares of log Z, which keep the logits from drifting
            (PaLM, section 5); 0: none.
        logits_dtype: in which a GPU writes a chunk's logits; None: that of the hidden states.

    Returns:
        The sum to differentiate, and what to log of it: detached sums on the device, "loss" without
        the z-loss and, if there is one, "z_loss".
    """
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)  # (N, C)
    weight, targets = model.head_weight, batch.targets.flatten()
    gemm = model.fused["gemm"] if model.fused else "cublas"
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss, nll, penalty = _CrossEntropy.apply(
        hidden, weight, targets, z_loss, _default_chunk(hidden), logits_dtype, gemm, wanted
    )
    return loss, {"loss": nll, "z_loss": penalty} if z_loss else {"loss": nll}


class _CrossEntropy(torch.autograd.Function):
    """The loss and, of a loss that counts once, both gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk_tokens: int,
        logits_dtype: torch.dtype | None,
        gemm: str,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = head_weight.to(_product_dtype(hidden, head_weight))
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(head_weight) if wanted[1] else None
        logp = head_weight.new_empty(len(hidden))
        logz = torch.empty_like(logp)
        for rows in _chunks(len(hidden), chunk_tokens):
            chunk = hidden[rows].to(weight.dtype)  # (n, C)
            logits = _product(chunk, weight.T, logits_dtype, gemm)  # (n, V)
            if not any(wanted):
                logp[rows], logz[rows] = softmax_statistics(logits, targets[rows], IGNORE)
                del logits
                continue
            logp[rows], logz[rows], grad = cross_entropy_gradient(
                logits, targets[rows], z_loss, weight.dtype, IGNORE
            )  # (n,), (n,), (n, V)
            if wanted[0]:
                grad_hidden[rows] = grad @ weight
            if wanted[1]:
                _add_product(grad_weight, grad.T, chunk)
            del logits, grad  # before the next chunk's
        ctx.gradients = grad_hidden, grad_weight
        nll = -logp.sum()
        penalty = z_loss * logz.where(targets != IGNORE, 0).square().sum()
        ctx.mark_non_differentiable(nll, penalty)
        return nll + penalty, nll, penalty

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # else they live as long as the loss
        if gradients is None:
            raise RuntimeError("backward through a cross-entropy a second time: compute it again")
        # A vector, because a number would first be rounded to the gradient's dtype.
        scaled = [g if g is None else g.mul_(grad.view(1)) for g in gradients]
        return *scaled, None, None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the hidden states and log Z for the backward pass, and computes the logits twice."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        weight = head_weight.to(_product_dtype(hidden, head_weight))
        logp = head_weight.new_empty(len(hidden))
        logz = torch.empty_like(logp)
        for rows in _chunks(len(hidden), chunk_tokens):
            logits = _product(hidden[rows].to(weight.dtype), weight.T)  # (n, V)
            logp[rows], logz[rows] = softmax_statistics(logits, targets[rows], IGNORE)
            del logits
        ctx.save_for_backward(hidden, head_weight, targets, logz)
        ctx.chunk_tokens = chunk_tokens
        return logp, logz.where(targets != IGNORE, 0)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_logp: Tensor, grad_logz: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, targets, logz = ctx.saved_tensors
        weight = head_weight.to(_product_dtype(hidden, head_weight))
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(head_weight) if wants_weight else None
        for rows in _chunks(len(hidden), ctx.chunk_tokens):
            chunk = hidden[rows].to(weight.dtype)  # (n, C)
            logits = _product(chunk, weight.T)  # (n, V)
            grad = logits_gradient(
                logits,
                logz[rows],
                targets[rows],
                grad_logp[rows],
                grad_logz[rows],
                weight.dtype,
                IGNORE,
            )  # (n, V)
            if wants_hidden:
                grad_hidden[rows] = grad @ weight
            if wants_weight:
                _add_product(grad_weight, grad.T, chunk)
            del logits, grad
        return grad_hidden, grad_weight, None, None


def _product_dtype(hidden: Tensor, head_weight: Tensor) -> torch.dtype:
    return hidden.dtype if hidden.is_cuda else head_weight.dtype


def _product(
    a: Tensor, b: Tensor, dtype: torch.dtype | None = torch.float32, gemm: str = "cublas"
) -> Tensor:
    """a @ b with the sums kept in float32 (float64 for float64), returned in `dtype`."""
    if a.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        if gemm == "quack" and b.shape[1] % epilogues.MULTIPLE == 0:
            return epilogues.wide_product(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, within the product where its result is as wide as `total`."""
    if a.dtype in (torch.bfloat16, torch.float16):
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _default_chunk(hidden: Tensor) -> int:
    return HEAD_CHUNK_TOKENS if hidden.is_cuda else CPU_CHUNK_TOKENS
