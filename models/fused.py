"""A training step's block with its backward pass written out: the fastest form of `Block`.

The same function as `Block.forward`, of the same parameters, as one autograd function:

- q, k and v are one product, and so are gate and up; the float32 weights are cast to bf16 side by
  side as they are used. Each weight's gradient comes out of its product in float32.
- The residual stream travels as a pair (x, delta) whose sum is taken where the next norm reads it;
  or the product adds to it, where its kernel can (`models/epilogues.py`), and there is no delta.
- What is kept for the backward pass is chosen here, in `Keep`, and not by a compiler. The SwiGLU
  product is always computed again, in the same pass that needs its inputs anyway.

Attention brings its own backward pass: it is differentiated by itself, inside, so that every kernel
of `models/attention.py` works unchanged. Where the elementwise steps have no Triton kernels they
run as plain torch (`models/elementwise.py`), so all of this is tested on a CPU in float64.

Left out: double backward; frozen weights (their gradients are computed and dropped).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import elementwise
from models.attention import DocumentMask, attention
from models.elementwise import Rows
from models.epilogues import EpilogueMatrix
from models.fp8 import Fp8Matrix
from models.layers import Rotation
from models.products import (
    Matrix,
    Stream,
    pack,
    pack_gate_up,
    rounding_of,
    split_gate_up,
    weight_gradient,
)

MEMORY = ("fast", "balanced", "low")
"""What a block keeps for its backward pass, in tokens x d_model (f = d_ffn / d_model):

fast: all but the SwiGLU product: 4 + 2 (1 + kv heads / heads) + 2 f.
balanced: without the norms' outputs, which come with their gradients again, and the stream between
the two layers, which costs the product with o_proj: 3 fewer.
low: the block's input alone: 1; everything but the last product is computed twice.
"""


AnyMatrix = Matrix | Fp8Matrix | EpilogueMatrix


@dataclass(frozen=True)
class Settings:
    """What a fused block needs to know beside tensors."""

    n_heads: int
    n_kv_heads: int
    has_rope: bool
    eps: float
    memory: str
    matmul: str
    gemm: str

    @property
    def rounding(self) -> torch.dtype | None:
        """The 8-bit type in which products read activations, if they do."""
        return rounding_of(self.matmul)


@dataclass
class Keep:
    """What the backward pass works from; None is computed again there."""

    x: Tensor  # (N, C), the stream that the attention layer reads
    attention_normed: Rows | None = None  # (N, C)
    attended: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None  # (q, k, v) and output
    middle: Tensor | None = None  # (N, C), the stream that the feed-forward layer reads
    ffn_normed: Rows | None = None  # (N, C)
    gate_up: Tensor | None = None  # (N, 2F)


def fused_embedding(weight: Tensor, tokens: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Rows of `weight` (V, C) times `scale`, (B, T, C) in `dtype`.

    The table is scaled and rounded before the lookup, which gives the same numbers and, with fewer
    words than tokens, moves fewer bytes.
    """
    return _FusedEmbedding.apply(weight, tokens, scale, dtype)


def fused_block(
    block: nn.Module,
    stream: Stream,
    rotation: Rotation,
    mask: DocumentMask,
    memory: str,
    matmul: str,
    gemm: str,
) -> Stream:
    """The stream after `block`, a `models.transformer.Block`.

    Args:
        mask: its batch shape is the rotation's.
    """
    layer, ffn = block.attention, block.ffn
    heads, kv_heads = (p.weight.shape[0] // layer.head_dim for p in (layer.q_proj, layer.k_proj))
    eps = block.attention_norm.eps
    settings = Settings(heads, kv_heads, layer.has_rope, eps, memory, matmul, gemm)
    norms = block.attention_norm, block.ffn_norm
    linear = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    linear += (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    weights = [module.weight for module in (*norms, *linear)]
    return _FusedBlock.apply(*stream, rotation, mask, settings, torch.is_grad_enabled(), *weights)


def fused_norm(norm: nn.Module, stream: Stream) -> Tensor:
    """`norm`, a `models.layers.RMSNorm`, of the stream's sum."""
    return _FusedNorm.apply(*stream, norm.weight, norm.eps)


class _FusedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.words, ctx.scale, ctx.wide = len(weight), scale, weight.dtype
        return F.embedding(tokens, (weight * scale).to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(
            grad.to(ctx.wide), tokens, ctx.words, -1, False
        )
        return summed.mul_(ctx.scale), None, None, None


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        total, normed = elementwise.add_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.has_delta = eps, delta is not None
        return normed.wide

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_stream, to_weight, _ = elementwise.add_norm_backward(total, weight, grad, None, ctx.eps)
        return to_stream.wide, to_stream.wide if ctx.has_delta else None, to_weight, None


class _Weights:
    """A block's matrices in the activations' dtype, each made as it is used."""

    def __init__(self, weights: tuple[Tensor, ...], dtype: torch.dtype, settings: Settings) -> None:
        self.attention_norm, self.ffn_norm, *self._matrices = weights
        self._how = dtype, settings.matmul, settings.gemm

    @property
    def qkv(self) -> AnyMatrix:
        return pack(self._matrices[:3], *self._how)

    @property
    def o(self) -> AnyMatrix:
        return pack(self._matrices[3:4], *self._how)

    @property
    def gate_up(self) -> AnyMatrix:
        return pack_gate_up(*self._matrices[4:6], *self._how)

    @property
    def down(self) -> AnyMatrix:
        return pack(self._matrices[6:], *self._how)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        rotation: Rotation,
        mask: DocumentMask,
        settings: Settings,
        keep_any: bool,
        *weights: Tensor,
    ) -> Stream:
        w = _Weights(weights, x.dtype, settings)
        norms = keep_any and settings.memory == "fast"
        keep = Keep(*_norm(x.detach(), delta, w.attention_norm, settings, wide=norms))
        halves = keep_any and settings.memory != "low"
        product = _compute(keep, w, rotation, mask, settings, norms, halves, product=True)
        stream = w.down.add(product, keep.middle)
        if keep_any:
            # An alias, because a function that holds its own output is never freed.
            keep.middle = keep.middle.detach()
            ctx.keep = _reduced(keep, settings.memory)
            ctx.save_for_backward(*weights)
            ctx.rest = rotation, mask, settings, delta is not None
        return stream

    @staticmethod
    def backward(
        ctx: Any, grad_stream: Tensor, grad_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weights, keep = ctx.saved_tensors, ctx.keep
        if keep is None:
            raise RuntimeError("backward through a fused block a second time: run it again")
        rotation, mask, settings, has_delta = ctx.rest
        ctx.keep = None  # memory is free as soon as it is used
        w = _Weights(weights, grad_stream.dtype, settings)
        if grad_out is None:  # the stream was whole
            grad_out = grad_stream = grad_stream.contiguous()
        with torch.no_grad():
            _compute(keep, w, rotation, mask, settings, norms=True, halves=True, product=False)
            grad, *ffn = _ffn_backward(keep, w, grad_stream, grad_out, settings)
            grad, *attn = _attention_backward(keep, w, grad, rotation, settings)
        attention_norm, q, k, v, o = attn
        ffn_norm, gate, up, down = ffn
        grads = (attention_norm, ffn_norm, q, k, v, o, gate, up, down)
        cast = (g.to(weight.dtype) for g, weight in zip(grads, weights, strict=True))
        return grad, grad if has_delta else None, None, None, None, None, *cast


def _reduced(keep: Keep, memory: str) -> Keep:
    if memory == "fast":
        return keep
    if memory == "balanced":
        return Keep(keep.x, attended=keep.attended, gate_up=keep.gate_up)
    return Keep(keep.x)


def _compute(
    keep: Keep,
    w: _Weights,
    rotation: Rotation,
    mask: DocumentMask,
    settings: Settings,
    norms: bool,
    halves: bool,
    product: bool,
) -> Rows | None:
    """Fills in what is missing, up to the gate and up projections; returns their SwiGLU product.

    Args:
        norms: whether the norms' outputs, where they come by, stay for the weights' gradients.
        halves: whether the gate and up projections stay.
        product: whether the product is wanted.
    """
    result = None
    if keep.attended is None:
        if keep.attention_normed is None:
            _, keep.attention_normed = _norm(keep.x, None, w.attention_norm, settings)
        keep.attended = _attend(keep.attention_normed, w, rotation, mask, settings)
        keep.attention_normed = _read(keep.attention_normed, norms)
    if keep.middle is None:
        attended = Rows(keep.attended[1].detach().flatten(0, 1).flatten(1))
        stream, delta = w.o.add(attended, keep.x)
        if keep.gate_up is not None:  # then nothing multiplies the norm's output
            keep.middle = stream if delta is None else stream + delta
            return None
        keep.middle, keep.ffn_normed = _norm(stream, delta, w.ffn_norm, settings, wide=norms)
        keep.gate_up, result = w.gate_up.swiglu(keep.ffn_normed, product, halves)
        keep.ffn_normed = _read(keep.ffn_normed, norms)
    return result


def _read(rows: Rows, wide: bool) -> Rows | None:
    """What is left of rows once the product has read them."""
    return Rows(rows.wide) if wide else None


def _norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    settings: Settings,
    wide: bool = True,
) -> tuple[Tensor, Rows]:
    """`elementwise.add_norm` in the forms that are needed.

    Args:
        wide: whether a weight's gradient will read the norm's output.
    """
    rounding = settings.rounding
    return elementwise.add_norm(x, delta, weight, settings.eps, rounding, wide or rounding is None)


def _attend(
    normed: Rows, w: _Weights, rotation: Rotation, mask: DocumentMask, settings: Settings
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys and values (B, T, heads, D) as leaves of a graph, and attention's output."""
    qkv = w.qkv.apply(normed)  # (N, (H + 2 K) D)
    _rotate(qkv, rotation, settings)
    q, k, v = _heads(qkv, settings)
    shape = rotation[0].shape[:2]
    with torch.enable_grad():
        leaves = tuple(x.unflatten(0, shape).detach().requires_grad_() for x in (q, k, v))
        return leaves, attention(*leaves, mask)  # (B, T, H, D)


def _heads(qkv: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the packed projections: (N, H, D) and twice (N, K, D)."""
    counts = [settings.n_heads, settings.n_kv_heads, settings.n_kv_heads]
    return qkv.unflatten(1, (sum(counts), -1)).split(counts, 1)


def _rotate(qkv: Tensor, rotation: Rotation, settings: Settings, inverse: bool = False) -> None:
    """Turns the queries and keys of the packed projections (N, (H + 2 K) D), in place."""
    if not settings.has_rope:
        return
    # Cosines and sines (N, D/2), from the form that `models.layers.rotate` wants.
    cos, sin = (x.flatten(0, 1)[:, 0, -1] for x in rotation)
    heads = settings.n_heads + settings.n_kv_heads
    both = qkv.unflatten(1, (heads + settings.n_kv_heads, -1))[:, :heads]
    elementwise.rotate_heads(both, (cos, sin), inverse)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (N, heads, D) as one (N, all heads x D): without a copy if they are already."""
    first, heads = parts[0], sum(part.shape[1] for part in parts)
    n, _, size = first.shape
    place = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != place or part.stride() != (heads * size, size, 1):
            return torch.cat(tuple(parts), 1).flatten(1)
        place += part.shape[1] * size
    return first.as_strided((n, heads * size), (heads * size, 1))


def _ffn_backward(
    keep: Keep, w: _Weights, grad_middle: Tensor, grad_out: Tensor, settings: Settings
) -> tuple[Rows, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the middle of the stream and of ffn_norm, gate, up, down."""
    product, grad_gate_up = w.down.swiglu_gradient(Rows(grad_out), keep.gate_up)
    keep.gate_up = None
    down = weight_gradient(grad_out, product)
    del product
    grad_normed = w.gate_up.input_gradient(grad_gate_up)
    grad_gate_up = grad_gate_up.wide
    again = keep.ffn_normed is None
    grad, norm, normed = elementwise.add_norm_backward(
        keep.middle, w.ffn_norm, grad_normed, grad_middle, settings.eps, settings.rounding, again
    )
    del grad_normed
    gate_up = weight_gradient(grad_gate_up, normed if again else keep.ffn_normed.wide)
    keep.ffn_normed = None
    return grad, norm, *split_gate_up(gate_up, settings.gemm), down


def _attention_backward(
    keep: Keep, w: _Weights, grad_middle: Rows, rotation: Rotation, settings: Settings
) -> tuple[Tensor, ...]:
    """Gradients of the block's input and of attention_norm, q, k, v, o."""
    leaves, out = keep.attended
    keep.attended = keep.middle = None
    o = weight_gradient(grad_middle.wide, out.detach().flatten(0, 1).flatten(1))
    grad_out = w.o.input_gradient(grad_middle).view(out.shape)
    grads = torch.autograd.grad(out, leaves, grad_out)  # (B, T, H, D), twice (B, T, K, D)
    del leaves, out, grad_out
    sizes = [g.shape[2] * g.shape[3] for g in grads]
    grad_qkv = _side_by_side([g.flatten(0, 1) for g in grads])
    del grads
    _rotate(grad_qkv, rotation, settings, inverse=True)
    grad_normed = w.qkv.input_gradient(Rows(grad_qkv))
    again = keep.attention_normed is None
    grad, norm, normed = elementwise.add_norm_backward(
        keep.x, w.attention_norm, grad_normed, grad_middle.wide, settings.eps, again=again
    )
    del grad_normed
    qkv = weight_gradient(grad_qkv, normed if again else keep.attention_normed.wide)
    keep.attention_normed = None
    return grad.wide, norm, *qkv.split(sizes), o
