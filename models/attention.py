"""Grouped-query attention over packed documents, and its kernels.

A row of T tokens holds several documents; a token attends to itself and to the earlier tokens of
its own document. Five kernels compute the same thing:

    fa4     flash-attn-4      Hopper and Blackwell; by far the fastest there
    fa2     flash-attn 2      Ampere and later
    varlen  torch's own FA2   Ampere and later, nothing to install
    flex    FlexAttention     any CUDA device and dtype
    dense   a (T, T) mask     any device; what the CPU uses, and decoding with a cache

The first three see B * T tokens and `cu_seqlens`, the places where documents begin and end. The
masks of the other two are built by `document_mask` outside the compiled region: inside it they
would be rebuilt in each layer, and a data-dependent shape would compile anew for each batch.

Grouped queries: Ainslie et al. 2023. Left out: dropout, sliding windows, paged caches.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import Linear, Rotation, rotate

# ---------------------------------------------------------------------------------------------
# Which kernel

KERNELS = ("fa4", "fa2", "varlen", "flex", "dense")  # the order in which "auto" tries them on CUDA

LARGEST_HEAD = {"fa4": 128, "fa2": 256, "varlen": 256}
NEEDED_FUNCTION = {
    "fa4": ("flash_attn.cute.interface", "_flash_attn_bwd", "pip install flash-attn-4"),
    "fa2": ("flash_attn", "flash_attn_varlen_func", "pip install flash-attn"),
}


def choose_kernel(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, str]:
    """The kernel's name and, for the log, why it and no other.

    Args:
        requested: one of `KERNELS`, or "auto".

    Raises:
        ValueError: no such kernel, or it cannot run here.
    """
    if requested not in (*KERNELS, "auto"):
        raise ValueError(f"no attention kernel '{requested}': one of auto, {', '.join(KERNELS)}")
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, head_dim):
            raise ValueError(f"attention kernel '{requested}' cannot run: {obstacle}")
        return requested, "as requested"
    if device.type != "cuda":
        return "dense", f"the device is {device.type}"
    passed_over = []
    for kernel in KERNELS:
        obstacle = _obstacle(kernel, device, dtype, head_dim)
        if obstacle is None:
            break
        passed_over.append(f"{kernel} {obstacle}")
    return kernel, "; ".join(passed_over) or "the fastest on this device"


def _obstacle(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if kernel == "dense":
        return None
    if device.type != "cuda":  # flex would run on a CPU, but has no backward pass there
        return f"needs a CUDA device, not {device.type}"
    if kernel == "flex":
        return None if head_dim >= 16 else f"needs heads of at least 16 dimensions, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if kernel == "fa4" and major not in (9, 10):
        return f"needs Hopper or Blackwell (compute capability 9 or 10), not {major}.{minor}"
    if major < 8:
        return f"needs Ampere or later (compute capability 8), not {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > LARGEST_HEAD[kernel]:
        return f"needs heads of 8, 16 ... {LARGEST_HEAD[kernel]} dimensions, not {head_dim}"
    return _missing(*NEEDED_FUNCTION[kernel]) if kernel in NEEDED_FUNCTION else None


@functools.cache
def _missing(module: str, function: str, install: str) -> str | None:
    """Why a package's function cannot be imported, or None if it can.

    The module alone proves nothing: flash-attn-4 leaves an empty `flash_attn` namespace, and a
    GPU library may fail while it loads with whatever it likes.
    """
    # flash-attn-4 compiles for 20 seconds; kept on disk, a second process starts without. The disk
    # cache wants the user's name, which there need not be in a container.
    with contextlib.suppress(KeyError, OSError):
        getpass.getuser()
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        getattr(importlib.import_module(module), function)
    except Exception as error:
        return f"cannot be imported ({error}), install it with `{install}`"
    return None


# ---------------------------------------------------------------------------------------------
# What a query may see


@dataclass
class DocumentMask:
    """Who attends to whom, in the form that `kernel` wants it.

    Attributes:
        cu_seqlens: (documents + 1,) int32 over the B * T tokens, for fa4, fa2 and varlen.
        max_seqlen: upper bound of a document's length; constant, so that nothing is recompiled.
        allowed: (B, 1, T, keys) bool, for dense.
        blocks: BlockMask, for flex.
        varlen: torch's kernel, for varlen.
        deterministic: the backward pass sums in a fixed order (slower); varlen follows torch's
            global setting by itself, flex and dense need nothing.
    """

    kernel: str
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    allowed: Tensor | None = None
    blocks: Any = None
    varlen: Callable | None = None
    deterministic: bool = False


def document_mask(cu_seqlens: Tensor, shape: tuple[int, int], kernel: str) -> DocumentMask:
    """The causal mask of packed documents.

    Args:
        cu_seqlens: (documents + 1,) int32 bounds of documents in the flattened rows. Documents do
            not cross rows and cover them whole; empty ones are allowed anywhere.
        shape: B and T.
    """
    if kernel in ("fa4", "fa2", "varlen"):
        deterministic = torch.are_deterministic_algorithms_enabled()
        varlen = _varlen_kernel() if kernel == "varlen" else None
        return DocumentMask(
            kernel, cu_seqlens, shape[1], varlen=varlen, deterministic=deterministic
        )
    tokens = torch.arange(shape[0] * shape[1], device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:], tokens, right=True).view(shape)  # (B, T)
    if kernel == "dense":
        same = document[:, None, :, None] == document[:, None, None, :]
        return DocumentMask(kernel, allowed=same.tril())  # (B, 1, T, T)
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    batch, length = shape
    blocks = create_block_mask(allowed, batch, None, length, length, device=cu_seqlens.device)
    return DocumentMask(kernel, blocks=blocks)


# ---------------------------------------------------------------------------------------------
# The kernels


def attention(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    """Attention of each query to what its mask allows.

    Args:
        q: (B, T, H, D).
        k, v: (B, keys, K, D); K divides H.

    Returns:
        (B, T, H, D).
    """
    if mask.kernel in ("dense", "flex"):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        return (_dense if mask.kernel == "dense" else _flex)(q, k, v, mask).transpose(1, 2)
    run = {"fa4": _fa4, "fa2": _fa2, "varlen": _varlen}[mask.kernel]
    packed = run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)  # (N, H, D)
    return packed.view(q.shape)  # (B, T, H, D)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, enable_gqa=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Where it is not compiled it computes all T x T scores.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    run = _compiled(flex_attention) if alone else flex_attention
    return run(q, k, v, block_mask=mask.blocks, enable_gqa=True)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    bounds, longest = mask.cu_seqlens, mask.max_seqlen
    return mask.varlen(q, k, v, bounds, bounds, longest, longest)


@functools.cache
def _varlen_kernel() -> Callable:
    """torch's, causal; not imported before it is used, because it brings torch._dynamo: 2.5 s."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1, 0)}
    # torch 2.11 serves grouped queries unasked; later versions want to be asked.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _fa2(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = mask.cu_seqlens, mask.max_seqlen
    return flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=mask.deterministic
    )


def _fa4(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    return _fa4_forward(q, k, v, mask.cu_seqlens, mask.max_seqlen, mask.deterministic)[0]


# flash-attn-4 is an autograd function around kernels that are compiled as they are called, which
# torch.compile can neither trace nor keep in one graph. As operators of ours they are opaque to it.

# Each kernel's compilation warns, in 600 characters, that the type of one argument, empty here, is
# unknown to the compiler. Only flash-attn-4's authors can act on it.
warnings.filterwarnings("ignore", "Argument aux_data ", UserWarning, r"cutlass\.base_dsl\.")


@torch.library.custom_op("smol::fa4_forward", mutates_args=(), device_types="cuda")
def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Attention (N, H, D) and the logarithm of its normaliser (H, N), float32."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, logz, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
        return_lse=True,
    )
    return out, logz


@_fa4_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, n), dtype=torch.float32)


@torch.library.custom_op("smol::fa4_backward", mutates_args=(), device_types="cuda")
def _fa4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logz: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    deterministic: bool,
) -> Tensor:
    """Gradients of q, k and v side by side, (N, H + 2 K, D): as one product made them."""
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v = (x if _ordered(x) else x.contiguous() for x in (q, k, v))
    heads = [x.shape[1] for x in (q, k, v)]
    packed = q.new_empty(len(q), sum(heads), q.shape[2])
    dq, dk, dv = packed.split(heads, 1)
    _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad.contiguous(),
        logz,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=deterministic,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return packed


@_fa4_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logz: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    deterministic: bool,
) -> Tensor:
    return q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])


def _ordered(x: Tensor) -> bool:
    """Whether heads (N, H, D) lie side by side, in rows that may be longer."""
    return x.stride()[1:] == (x.shape[2], 1) and x.stride(0) >= x.shape[1] * x.shape[2]


def _fa4_save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _fa4_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    packed = _fa4_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.deterministic)
    heads = [x.shape[1] for x in ctx.saved_tensors[:3]]
    return *packed.split(heads, 1), None, None, None


_fa4_forward.register_autograd(_fa4_gradient, setup_context=_fa4_save)


# ---------------------------------------------------------------------------------------------
# The layer

Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values (B, T, K, D), returns all that queries may look at."""


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding on the layers that have it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d_model, d_kv = config.d_model, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_kv)
        self.v_proj = Linear(d_model, d_kv)
        self.o_proj = Linear(d_model, d_model)
        self.head_dim = config.head_dim
        self.has_rope = config.has_rope(layer)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: DocumentMask, store: Store | None = None
    ) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(p, "b t (h d) -> b t h d", d=self.head_dim) for p in projected)
        if self.has_rope:
            q, k = rotate(q, rotation), rotate(k, rotation)  # (B, T, H, D), (B, T, K, D)
        if store is not None:
            k, v = store(k, v)  # (B, L, K, D)
        return self.o_proj(rearrange(attention(q, k, v, mask), "b t h d -> b t (h d)"))
