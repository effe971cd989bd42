"""The key-value cache: what decoding keeps of the tokens that it has seen."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from models.attention import DocumentMask
from models.config import ModelConfig


class KVCache:
    """Rotated keys and values of `slots` sequences that grow independently of each other.

    The place of a token in its slot is its position, so nothing is moved or padded as sequences
    come and go. What lies in a slot beyond the position of the query is never looked at: a slot is
    freed by beginning again at position 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.n_layers, slots, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (layers, S, L, K, D)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)  # (S,) tokens held
        self.slots = torch.arange(slots, device=device)

    def at(self, slots: Tensor, length: int | None = None) -> KVCache:
        """The same memory, of which only `slots` (n,) are written and looked at, and of these only
        the first `length` places."""
        view = copy.copy(self)
        view.slots = slots
        view.keys, view.values = self.keys[:, :, :length], self.values[:, :, :length]
        return view

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (n, T, K, D) at `positions` (n, T); returns the layer's (n, L, K, D)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.slots[:, None], positions] = k
        values[self.slots[:, None], positions] = v
        return keys[self.slots], values[self.slots]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Slots `target` (n,) get the first `length` tokens of slots `source` (n,)."""
        if torch.equal(source, target):
            return
        for kept in (self.keys, self.values):
            kept[:, target, :length] = kept[:, source, :length]

    def mask(self, positions: Tensor) -> DocumentMask:
        """A query at some position sees its slot up to there, itself included."""
        places = torch.arange(self.keys.shape[2], device=positions.device)
        return DocumentMask("dense", allowed=places <= positions[:, None, :, None])
