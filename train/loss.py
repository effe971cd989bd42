"""Token log-probabilities fused with the head, and cross-entropy made of them.

Float32 logits of a batch of 65,536 tokens at a vocabulary of 32,000 would take 8 GB, and their
gradient as much again. Here the head is applied to a chunk of tokens at a time and only two numbers
per token are kept: the target's log-probability and log Z, the logarithm of the softmax's
normaliser. The backward pass computes a chunk's logits again, which costs one product with the head
in four but no memory, and holds for any gradients of the two: cross-entropy, z-loss, preference and
policy losses alike are plain functions of them.

The idea is that of Liger-Kernel's fused linear cross-entropy and of Cut Cross-Entropy (Wijmans et
al. 2024); those fix the loss, and Liger computes its gradient in the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from data.packing import IGNORE, Batch
from models.config import HEAD_CHUNK_TOKENS
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
    if chunk_tokens is None:
        chunk_tokens = HEAD_CHUNK_TOKENS if hidden.is_cuda else CPU_CHUNK_TOKENS
    return _TokenLogprobs.apply(hidden, head_weight, targets, chunk_tokens)


def cross_entropy_loss(
    model: Transformer, batch: Batch, z_loss: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed cross-entropy of a batch's targets, in nats.

    Args:
        z_loss: coefficient of the summed squares of log Z, which keep the logits from drifting
            (PaLM, section 5); 0: none.

    Returns:
        The sum to differentiate, and what to log of it: detached sums on the device, "loss" without
        the z-loss and, if there is one, "z_loss".
    """
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)  # (B, T, C)
    logp, logz = token_logprobs(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
    loss = -logp.sum()
    if not z_loss:
        return loss, {"loss": loss.detach()}
    penalty = z_loss * logz.square().sum()
    return loss + penalty, {"loss": loss.detach(), "z_loss": penalty.detach()}


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
            logp[rows], logz[rows] = _fused(_statistics, logits)(logits, targets[rows])
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
            grad = _fused(_logits_gradient, logits)(
                logits, logz[rows], targets[rows], grad_logp[rows], grad_logz[rows], weight.dtype
            )  # (n, V)
            if wants_hidden:
                grad_hidden[rows] = grad @ weight
            if wants_weight:
                grad_weight += _product(grad.T, chunk)
        return grad_hidden, grad_weight, None, None


def _statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (0 where ignored) and log Z of each row of logits (n, V)."""
    logz = logits.logsumexp(-1)
    target_logits = logits.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return (target_logits - logz).where(targets != IGNORE, 0), logz


def _logits_gradient(
    logits: Tensor,
    logz: Tensor,
    targets: Tensor,
    grad_logp: Tensor,
    grad_logz: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """d/dlogits (n, V) of grad_logp * (logit[target] - log Z) + grad_logz * log Z, in `dtype`."""
    counts = targets != IGNORE
    to_target = grad_logp.where(counts, 0)[:, None]
    to_logz = (grad_logz - grad_logp).where(counts, 0)[:, None]
    is_target = targets[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    return (to_logz * (logits - logz[:, None]).exp() + to_target.where(is_target, 0)).to(dtype)


def _fused(function: Callable, logits: Tensor) -> Callable:
    """On CUDA the compiled function: it reads the logits once or twice rather than ten times."""
    return _compiled(function) if logits.is_cuda else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _product_dtype(hidden: Tensor, head_weight: Tensor) -> torch.dtype:
    return hidden.dtype if hidden.is_cuda else head_weight.dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the sums kept and returned in float32 (float64 for float64)."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]
