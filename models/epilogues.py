"""Matrix products that also do what follows them, before the result leaves the chip.

A product with d_model inputs ends in an epilogue that writes its tiles. There the residual can be
added, SwiGLU be taken of gate and up, and its backward pass be done, at the price of the bytes that
have to be written anyway: one H200 does gate and up with SwiGLU in 1.85 ms where product and kernel
took 2.2 apart, and the backward pass in 1.51 instead of 2.2 (160M, 196,608 tokens).

The kernels are quack's for Hopper (Guo, Dao; it comes with flash-attn-4), with epilogues of ours in
`models/epilogue_kernels.py`. Each function here is first written out in plain torch: its
definition, and what a CPU runs. Gate and up alternate, column by column, so that both numbers of a
pair lie in one thread.

Left out: weight gradients, which cuBLAS does as fast; norms, whose sums over a row would have to
pass from one product's tiles to the next one's (measured: no gain at 160M).
"""

import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from models.elementwise import Rows, kernels_for, swiglu_backward, widened

QUACK = "0.6"  # its language of epilogues is young
MULTIPLE = 8  # of every dimension: rows begin at multiples of 16 bytes


def epilogue_obstacle(device: torch.device, dtype: torch.dtype, sizes: list[int]) -> str | None:
    """Why quack's kernels cannot multiply matrices of these sizes, or None if they can."""
    if device.type == "cpu":
        return None  # the definitions can
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if (major := torch.cuda.get_device_capability(device)[0]) != 9:
        return f"needs Hopper (compute capability 9), not {major}"
    if dtype != torch.bfloat16:
        return f"needs runtime.precision bf16, not {str(dtype).removeprefix('torch.')}"
    if odd := [size for size in sizes if size % MULTIPLE]:
        return f"needs sizes that are multiples of {MULTIPLE}, not {odd}"
    return _missing()


@functools.cache
def _missing() -> str | None:
    install = f"`pip install 'quack-kernels=={QUACK}.*'`"
    try:
        found = version("quack-kernels")
        if not found.startswith(f"{QUACK}."):
            return (
                f"is {found}, and the epilogues are written for {QUACK}; install it with {install}"
            )
        importlib.import_module("models.epilogue_kernels")
        importlib.import_module("quack.cache").get_cache_path()  # fails for a user without a name
    except Exception as error:  # a GPU library may fail while it loads with whatever it likes
        return f"cannot be imported ({error}), install it with {install}"
    return None


@dataclass
class EpilogueMatrix:
    """A weight (outputs, inputs) in the dtype of the activations; see `models.products.Matrix`."""

    weight: Tensor

    def apply(self, x: Rows) -> Tensor:
        return product(x.wide, self.weight.T)

    def input_gradient(self, grad: Rows) -> Tensor:
        return product(grad.wide, self.weight)

    def add(self, x: Rows, stream: Tensor) -> tuple[Tensor, None]:
        return product(x.wide, self.weight.T, stream), None

    def swiglu(self, x: Rows, product: bool, halves: bool) -> tuple[Tensor | None, Rows | None]:
        if not product:
            return self.apply(x), None
        gate_up, result = swiglu(x.wide, self.weight.T, halves)
        return gate_up, Rows(result)

    def swiglu_gradient(self, grad: Rows, gate_up: Tensor) -> tuple[Tensor, Rows]:
        result, grad_gate_up = swiglu_gradient(grad.wide, self.weight, gate_up)
        return result, Rows(grad_gate_up)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M) in float32; M is a multiple of `MULTIPLE`."""
    if kernels := kernels_for(a, "epilogue_kernels"):
        return kernels.wide_product(a, b)
    return a.float() @ b.float()


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a (N, K) @ b (K, M) + added (N, M), rounded once."""
    if kernels := kernels_for(a, "epilogue_kernels"):
        return kernels.product(a, b, added)
    wide = widened(a) @ widened(b)
    return (wide if added is None else wide + added).to(a.dtype)


def swiglu(x: Tensor, weight: Tensor, halves: bool) -> tuple[Tensor | None, Tensor]:
    """x (N, K) @ weight (K, 2F), whose columns alternate, if wanted; and its SwiGLU (N, F)."""
    if kernels := kernels_for(x, "epilogue_kernels"):
        return kernels.swiglu(x, weight, halves)
    wide = widened(x) @ widened(weight)
    result = (F.silu(wide[:, 0::2]) * wide[:, 1::2]).to(x.dtype)
    return wide.to(x.dtype) if halves else None, result


def swiglu_gradient(grad: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The SwiGLU (N, F) of `gate_up` (N, 2F), and the gradient of `gate_up`, written over it.

    Args:
        grad: (N, K), of the SwiGLU times `weight` transposed.
        weight: (K, F).
    """
    if kernels := kernels_for(grad, "epilogue_kernels"):
        return kernels.swiglu_gradient(grad, weight, gate_up)
    halves = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
    result, to_halves = swiglu_backward(halves, widened(grad) @ widened(weight))
    gate_up[:, 0::2], gate_up[:, 1::2] = to_halves.wide.chunk(2, 1)
    return result.to(grad.dtype), gate_up
