"""Matrix products of the fused step: float32 weights, cast as they are used.

The cast is made anew for each use and not kept from one micro-batch to the next. It moves 6 bytes a
weight, a thousandth of a step at 100,000 tokens a micro-batch, while a copy would have to be known
to be fresh: torch's fused AdamW changes weights without counting up their `_version`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.elementwise import Rows
from models.fp8 import FORMAT, Fp8Matrix

MATMUL = ("bf16", "fp8")


def rounding_of(matmul: str) -> torch.dtype | None:
    """The 8-bit type that products of this kind read, if they do."""
    return FORMAT if matmul == "fp8" else None


@dataclass
class Matrix:
    """A weight (outputs, inputs) in the dtype of the activations."""

    weight: Tensor

    def apply(self, x: Rows) -> Tensor:
        """x (N, inputs) -> (N, outputs)."""
        return x.wide @ self.weight.T

    def input_gradient(self, grad: Rows) -> Tensor:
        """Gradient (N, inputs) of x from that of the result (N, outputs)."""
        return grad.wide @ self.weight


def pack(weights: Sequence[Tensor], dtype: torch.dtype, matmul: str = "bf16") -> Matrix | Fp8Matrix:
    """Weights of one input, one below the other, as a matrix to multiply with."""
    sizes = [len(weight) for weight in weights]
    packed = torch.empty(sum(sizes), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    # Not _foreach_copy_, whose few blocks took 17 us each time on an H200.
    for part, weight in zip(packed.split(sizes), weights, strict=True):
        part.copy_(weight.detach())
    return Fp8Matrix(packed) if matmul == "fp8" else Matrix(packed)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (outputs, inputs) of a weight, from `grad` (N, outputs) and x (N, inputs).

    In float32, in which the product sums anyway: micro-batches add up without rounding to bf16.
    """
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.T @ x
