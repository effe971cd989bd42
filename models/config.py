"""What a model is: its shape, and what follows from it (parameters, FLOPs, memory).

The block is that of `transformers`' SmolLM3 (Llama's, with no rotary embedding on every fourth
layer), so that an exported model needs no remote code. The counts are exact except for activation
memory, which is an estimate: what autograd keeps depends on what the compiler chooses to recompute.
FLOPs follow the PaLM paper's convention (appendix B): a multiplication and an addition are two, and
work that is done twice is counted once.
"""

from collections.abc import Iterator

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from utils.config import Config, Problem

HEAD_CHUNK_TOKENS = 8192
"""Tokens whose float32 logits exist at once in the loss: 1 GB at a vocabulary of 32,000."""

GIB = 2**30


class ModelConfig(Config):
    """The shape of a model; the embedding is always tied to the head."""

    vocab_size: PositiveInt = 32_000
    d_model: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    """Each key-value head serves n_heads / n_kv_heads query heads."""
    d_ffn: PositiveInt
    max_seq_len: PositiveInt = 2048
    """The longest context trained on, and the most that generation fills."""
    nope_every: NonNegativeInt = 4
    """Every so many layers one has no position embedding; 0: all have one."""
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6

    def problems(self) -> Iterator[Problem]:
        if self.d_model % (2 * self.n_heads):
            yield Problem(
                ("d_model", "n_heads"),
                f"d_model ({self.d_model}) must be a multiple of 2 x n_heads ({self.n_heads}): "
                "each head has an even number of dimensions, for the rotary embedding",
            )
        if self.n_heads % self.n_kv_heads:
            yield Problem(
                ("n_heads", "n_kv_heads"),
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def has_rope(self, layer: int) -> bool:
        """Whether this layer, counted from 0, rotates its queries and keys."""
        return not self.nope_every or (layer + 1) % self.nope_every != 0

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; the embedding is also the head and is counted once."""
        d_kv = self.n_kv_heads * self.head_dim
        return {
            "embedding": self.vocab_size * self.d_model,
            "attention": self.n_layers * 2 * self.d_model * (self.d_model + d_kv),
            "ffn": self.n_layers * 3 * self.d_model * self.d_ffn,
            "norms": (2 * self.n_layers + 1) * self.d_model,
        }

    @property
    def n_params(self) -> int:
        return sum(self.parameter_counts().values())

    def training_flops(self, tokens: int, attended_pairs: int) -> int:
        """FLOPs of forward and backward over packed documents.

        6 for each token and matrix parameter (looking up the embedding is free, but it is also the
        head's matrix), and for each (query, key) pair 4 per head dimension forward (scores and
        values) and twice that backward. A document of n tokens has n (n + 1) / 2 pairs.
        """
        matrix_params = self.n_params - self.parameter_counts()["norms"]
        per_pair = 12 * self.n_layers * self.n_heads * self.head_dim
        return 6 * matrix_params * tokens + per_pair * attended_pairs

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token where each row of `seq_len` tokens is one document."""
        return self.training_flops(seq_len, seq_len * (seq_len + 1) // 2) // seq_len

    def memory_gib(
        self,
        micro_batch: int,
        seq_len: int,
        memory: str | None = "fast",
        bytes_per_activation: int = 2,
    ) -> dict[str, float]:
        """Training memory by use, in GiB, before what the allocator and the kernels add.

        weights, gradients: 4 bytes for each parameter; optimizer: AdamW's two moments, 8 bytes.
        activations, an estimate: what is kept of each token in each layer is
        4 d_model (both norms' inputs and outputs), 2 (n_heads + n_kv_heads) head_dim
        (q, k, v and attention's output) and 3 d_ffn (gate, up and their product), of which fused
        blocks leave out what their mode says (`models.fused.MEMORY`).
        working: what the backward pass of one layer has beside that: 3 d_model, d_ffn, and what is
        computed again.
        head: the final hidden states with their gradient, the float32 gradient of the matrix and,
        for one chunk, the float32 logits with their gradient.

        Args:
            memory: the mode of fused blocks; None: the plain modules.
        """
        tokens = micro_batch * seq_len
        attention = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim
        whole = 4 * self.d_model + attention + 2 * self.d_ffn
        kept = {
            "fast": whole,
            "balanced": whole - 3 * self.d_model,
            "low": self.d_model,
            None: whole + self.d_ffn,
        }[memory]
        working = 3 * self.d_model + self.d_ffn + max(0, whole - kept)
        hidden = 2 * tokens * self.d_model * bytes_per_activation
        chunk = min(tokens, HEAD_CHUNK_TOKENS) * self.vocab_size * (4 + bytes_per_activation)
        parts = {
            "weights": 4 * self.n_params,
            "gradients": 4 * self.n_params,
            "optimizer": 8 * self.n_params,
            "activations": tokens * self.n_layers * kept * bytes_per_activation,
            "working": tokens * working * bytes_per_activation,
            "head": hidden + chunk + 4 * self.vocab_size * self.d_model,
        }
        return {name: size / GIB for name, size in (parts | {"total": sum(parts.values())}).items()}
