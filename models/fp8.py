"""Matrix products in 8-bit floats, with a scale for every row.

Forward and input gradient are e4m3 on both sides: each token's activations and each output's
weights have a scale of their own, so that one outlier costs nobody else precision, and it comes
from the numbers themselves, with no history to keep. The weight gradient, which sums over tokens
and steers training, stays in bf16 with float32 sums, as do attention, norms and the head. Weights
and optimizer are float32 as ever; nothing in a checkpoint tells that fp8 was used.

Rounding is a pass over the rows unless the kernel that makes them rounds them as well, which those
of `models/elementwise.py` do. Left to a pass of its own are attention's output and the gradients
that come from attention and from the block above.

After "rowwise with high-precision weight gradient" of torchao. Left out: one scale for a whole
tensor, which is faster by a few percent and coarser; scales of blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.elementwise import Rows, quantise_rows, swiglu, swiglu_backward

FORMAT = torch.float8_e4m3fn
MULTIPLE = 16  # of every dimension, for the tensor cores


def fp8_obstacle(device: torch.device, dtype: torch.dtype, sizes: list[int]) -> str | None:
    """Why matrices of these sizes cannot be multiplied in fp8, or None if they can.

    A CPU can, slowly: it multiplies what the rounding has left, which is what tests compare with.
    """
    if odd := [size for size in sizes if size % MULTIPLE]:
        return f"needs sizes that are multiples of {MULTIPLE}, not {odd}"
    if device.type != "cuda":
        return None if device.type == "cpu" else f"needs a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return (
            "needs Ada, Hopper or later (compute capability 8.9), not "
            f"{capability[0]}.{capability[1]}"
        )
    if dtype != torch.bfloat16:
        return f"needs runtime.precision bf16, not {str(dtype).removeprefix('torch.')}"
    return None


@dataclass
class Fp8Matrix:
    """A weight (outputs, inputs) rounded to 8 bits as it is used; see `models.products.Matrix`."""

    weight: Tensor

    def apply(self, x: Rows) -> Tensor:
        return _product(x, self.weight)

    def input_gradient(self, grad: Rows) -> Tensor:
        return _product(grad, self.weight.T.contiguous())

    def add(self, x: Rows, stream: Tensor) -> tuple[Tensor, Tensor]:
        return stream, self.apply(x)

    def swiglu(self, x: Rows, product: bool, halves: bool) -> tuple[Tensor | None, Rows | None]:
        gate_up = self.apply(x)
        return gate_up if halves else None, swiglu(gate_up, FORMAT) if product else None

    def swiglu_gradient(self, grad: Rows, gate_up: Tensor) -> tuple[Tensor, Rows]:
        return swiglu_backward(gate_up, self.input_gradient(grad), FORMAT)


def _product(a: Rows, b: Tensor) -> Tensor:
    """a (n, k) times b (m, k) transposed, both rounded, in the dtype of `b`."""
    left, left_scales = a.rounded or quantise_rows(a.wide, FORMAT)
    right, right_scales = quantise_rows(b, FORMAT)
    if not b.is_cuda:
        exact = (left.float() @ right.float().T) * left_scales * right_scales.T
        return exact.to(b.dtype)
    return torch._scaled_mm(
        left,
        right.T,
        scale_a=left_scales,
        scale_b=right_scales.T,
        out_dtype=b.dtype,
        use_fast_accum=True,
    )
