"""The language model: embedding, pre-norm blocks, a final norm, and a head tied to the embedding.

The head is not part of `forward`: it returns hidden states, and the loss applies the head in chunks
(`train/loss.py`), because the float32 logits of a whole batch would be the largest tensor by far.

Initialisation: every matrix is drawn from a normal distribution of standard deviation
0.5 / sqrt(d_model), truncated at three of them; norms are 1. The embedding's output is multiplied
by sqrt(d_model), so the stream begins with a root mean square of 0.5 and logits have a standard
deviation of 0.5. The first loss lies above ln(vocab_size) by what each token's own logit adds,
since at first the stream still resembles the embedding it came from, which is the head's row: on
random tokens by 0.2 to 0.5 at 160M and by 1.2 at 600M. The first steps unlearn it.

Left out: dropout, parallel blocks, query-key norms, untied heads.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, DocumentMask, Store, choose_kernel, document_mask
from models.config import ModelConfig
from models.fused import fused_block, fused_embedding, fused_norm
from models.kv_cache import KVCache
from models.layers import RMSNorm, Rotation, SwiGLU, rotary_angles
from models.products import choose_gemm


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the stream it read through a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ffn)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: DocumentMask, store: Store | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, store)
        return x + self.ffn(self.ffn_norm(x))


class Stack(nn.ModuleList):
    """The blocks one after the other: what is compiled for training."""

    def forward(self, x: Tensor, rotation: Rotation, mask: DocumentMask) -> Tensor:
        for block in self:
            x = block(x, rotation, mask)
        return x


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        dtype: of activations and matrix products; parameters are float32 whatever it is.
        kernel: one of `models.attention.KERNELS`, or "auto".
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.requested_kernel = kernel
        self.fused: dict[str, str] | None = None
        self.compiled = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = Stack(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all matrices anew from torch's global generator."""
        std = 0.5 / math.sqrt(self.config.d_model)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                # By the inverse of the distribution: four times faster than nn.init.trunc_normal_,
                # which rejects and draws again, and the same in every version of torch.
                bound = math.erf(3 / math.sqrt(2))
                parameter.uniform_(-bound, bound).erfinv_().mul_(math.sqrt(2) * std)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(V, C) float32: the embedding, from which gradients of both uses add up."""
        return self.embedding.weight

    def attention_kernel(self) -> tuple[str, str]:
        """The kernel used on the model's device and, for the log, the reason.

        Raises:
            ValueError: the requested kernel cannot run there.
        """
        return choose_kernel(self.requested_kernel, self.device, self.dtype, self.config.head_dim)

    def choose_gemm(self, requested: str) -> tuple[str, str]:
        """Whose products fused blocks can use on the model's device, and the reason; see
        `models.products.choose_gemm`."""
        config = self.config
        sizes = [config.d_model, config.n_kv_heads * config.head_dim, config.d_ffn]
        return choose_gemm(requested, self.device, self.dtype, sizes)

    def compile_blocks(self) -> None:
        """Compiles the training path at its next call, once for each shape of batch it meets."""
        self.compiled = True
        self.blocks.compile(dynamic=False)
        self.final_norm.compile(dynamic=False)

    def fuse_blocks(self, memory: str = "fast", matmul: str = "bf16", gemm: str = "cublas") -> None:
        """From now on `forward` runs the blocks as `models.fused` has them.

        Args:
            memory: one of `models.fused.MEMORY`.
            matmul: one of `models.products.MATMUL`.
            gemm: one of `models.products.GEMM`; fp8 has products of its own.
        """
        gemm = "cublas" if matmul == "fp8" else gemm
        self.fused = {"memory": memory, "matmul": matmul, "gemm": gemm}

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens, positions: (B, T) int64; positions restart at each document.
            cu_seqlens: (documents + 1,) int32 bounds of documents in the B * T tokens.

        Returns:
            (B, T, C) in the model's dtype.
        """
        if self.compiled:  # few shapes: cu_seqlens in powers of two
            unused = (1 << (len(cu_seqlens) - 1).bit_length()) - len(cu_seqlens)
            cu_seqlens = F.pad(cu_seqlens, (0, unused), value=tokens.numel())
        mask = document_mask(cu_seqlens, tokens.shape, self.attention_kernel()[0])
        rotation = self._rotation(positions)
        if self.fused is None:
            return self.final_norm(self.blocks(self.embed(tokens), rotation, mask))
        scale = math.sqrt(self.config.d_model)
        x = fused_embedding(self.embedding.weight, tokens, scale, self.dtype)  # (B, T, C)
        stream = x.flatten(0, 1), None
        for block in self.blocks:
            stream = fused_block(block, stream, rotation, mask, **self.fused)
        return fused_norm(self.final_norm, stream).view(x.shape)

    def extend(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Hidden states of tokens that continue the sequences in `cache`, which keeps them.

        Args:
            tokens, positions: (S, T), the same number for every slot. Tokens that only fill up a
                slot must come after its real ones; later tokens may take their positions.

        Returns:
            (S, T, C) in the model's dtype.
        """
        x, rotation, mask = self.embed(tokens), self._rotation(positions), cache.mask(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, mask, partial(cache.store, layer, positions))
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 logits of hidden states (..., C)."""
        return F.linear(hidden.float(), self.head_weight)

    def embed(self, tokens: Tensor) -> Tensor:
        scale = math.sqrt(self.config.d_model)
        return (self.embedding(tokens) * scale).to(self.dtype)  # (B, T, C)

    def _rotation(self, positions: Tensor) -> Rotation:
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
