"""Matrix products of the fused step: float32 weights, cast as they are used.

A matrix is asked for a product together with what follows it (the residual's sum, SwiGLU and its
backward pass), so that each kind of matrix does as much as it can in one kernel: `Matrix` and
`models.fp8.Fp8Matrix` multiply and leave the rest to `models/elementwise.py`,
`models.epilogues.EpilogueMatrix` does it while the product's tiles are still on the chip.

The cast is made anew for each use and not kept from one micro-batch to the next. It moves 6 bytes a
weight, a thousandth of a step at 100,000 tokens a micro-batch, while a copy would have to be known
to be fresh: torch's fused AdamW changes weights without counting up their `_version`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import elementwise
from models.elementwise import Rows
from models.epilogues import EpilogueMatrix, epilogue_obstacle
from models.fp8 import FORMAT, Fp8Matrix

MATMUL = ("bf16", "fp8")
GEMM = ("quack", "cublas")

Stream = tuple[Tensor, Tensor | None]
"""The residual stream (N, C) as a sum of two, which the next norm takes; or whole, and None."""


def choose_gemm(
    requested: str, device: torch.device, dtype: torch.dtype, sizes: list[int]
) -> tuple[str, str]:
    """Whose products, one of `GEMM`, and, for the log, why theirs.

    Args:
        requested: one of `GEMM`, or "auto".
        sizes: of the matrices.

    Raises:
        ValueError: the requested ones cannot run here.
    """
    obstacle = epilogue_obstacle(device, dtype, sizes)
    if requested == "quack" and obstacle:
        raise ValueError(f"quack cannot run: it {obstacle}")
    if requested != "auto":
        return requested, "as requested"
    if device.type == "cpu":
        return "cublas", "the CPU's own library"
    return ("cublas", f"quack {obstacle}") if obstacle else ("quack", "the fastest on this device")


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

    def add(self, x: Rows, stream: Tensor) -> Stream:
        """The stream (N, outputs) with x's product added."""
        return stream, self.apply(x)

    def swiglu(self, x: Rows, product: bool, halves: bool) -> tuple[Tensor | None, Rows | None]:
        """The gate and up projections (N, 2F) of x and their SwiGLU product (N, F), as wanted."""
        gate_up = self.apply(x)
        return gate_up if halves else None, elementwise.swiglu(gate_up) if product else None

    def swiglu_gradient(self, grad: Rows, gate_up: Tensor) -> tuple[Tensor, Rows]:
        """The SwiGLU product (N, F) that was multiplied by this matrix, and `gate_up`'s gradient.

        Args:
            grad: (N, outputs), of this matrix's result.
            gate_up: (N, 2F); may be written over.
        """
        return elementwise.swiglu_backward(gate_up, self.input_gradient(grad))


def pack(weights: Sequence[Tensor], dtype: torch.dtype, matmul: str = "bf16", gemm: str = "cublas"):
    """Weights of one input, one below the other, as a matrix to multiply with."""
    packed = _room(weights, dtype)
    # Not _foreach_copy_, whose few blocks took 17 us each time on an H200.
    for part, weight in zip(packed.split([len(w) for w in weights]), weights, strict=True):
        part.copy_(weight.detach())
    return _matrix(packed, matmul, gemm)


def pack_gate_up(gate: Tensor, up: Tensor, dtype: torch.dtype, matmul: str, gemm: str):
    """The matrix of gate (F, C) and up (F, C); quack wants a row of one, then of the other."""
    if gemm != "quack":
        return pack((gate, up), dtype, matmul, gemm)
    packed = _room((gate, up), dtype)
    for half, weight in enumerate((gate, up)):
        packed[half::2].copy_(weight.detach())
    return _matrix(packed, matmul, gemm)


def split_gate_up(packed: Tensor, gemm: str) -> tuple[Tensor, Tensor]:
    """Views of the gate's and up's rows of what is laid out as `pack_gate_up` does."""
    return (packed[0::2], packed[1::2]) if gemm == "quack" else packed.chunk(2)


def _room(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    rows = sum(map(len, weights))
    return torch.empty(rows, weights[0].shape[1], dtype=dtype, device=weights[0].device)


def _matrix(packed: Tensor, matmul: str, gemm: str) -> "Matrix | Fp8Matrix | EpilogueMatrix":
    if matmul == "fp8":
        return Fp8Matrix(packed)
    return EpilogueMatrix(packed) if gemm == "quack" else Matrix(packed)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (outputs, inputs) of a weight, from `grad` (N, outputs) and x (N, inputs).

    In float32, in which the product sums anyway: micro-batches add up without rounding to bf16.
    """
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.T @ x
