"""The parts of a block other than attention: linear maps, RMSNorm, SwiGLU, rotary embedding.

Weights are float32 and activations may be bf16, so each linear map casts its weight as it is used;
gradients come back to the weight in float32. Norms and rotations are computed in float32.

Sources: RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary embedding (Su et al. 2021)
in the half-split form of GPT-NeoX and Llama. Left out: biases, dropout, learned positions.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, applied in the input's dtype."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Does nothing: `Transformer` draws all weights, in one place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1, then each dimension by its weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide * scale)).to(x.dtype)


class SwiGLU(nn.Module):
    """Feed-forward layer with a gate: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ffn)
        self.up_proj = Linear(d_model, d_ffn)
        self.down_proj = Linear(d_ffn, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


Rotation = tuple[Tensor, Tensor]
"""Cosines (B, T, 1, 1, D/2) and, for either half, sines with their sign (B, T, 1, 2, D/2)."""


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotation of each token of `positions` (B, T), in float32, for `rotate`.

    Dimension i of the first half and dimension i of the second are turned together, by the token's
    position times theta^(-2i/D) radians.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (exponents / head_dim)  # (D/2,)
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # (B, T, 1, D/2)
    sin = angles.sin()
    return angles.cos()[..., None, :], torch.stack((-sin, sin), dim=-2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each head of `x` (B, T, H, D) by its token's angles; keeps the dtype.

    The halves change places by a flip rather than a concatenation: the compiler makes one
    elementwise kernel of it, forward and backward, which moves each byte once.
    """
    cos, signed_sin = rotation
    halves = rearrange(x.float(), "b t h (half d) -> b t h half d", half=2)
    turned = halves * cos + halves.flip(-2) * signed_sin
    return rearrange(turned, "b t h half d -> b t h (half d)").to(x.dtype)
