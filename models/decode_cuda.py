"""The engine's decoder on NVIDIA GPUs: a step is one captured graph, a prefill is packed.

A decoding step is some 170 short kernels. Launched one by one from Python they take ten times as
long as on the GPU, so the step is captured once as a CUDA graph, over buffers that stay where they
are, and replayed. Prompts are laid end to end and go through the attention kernel of training.

Weights are copied in the model's dtype, q, k, v side by side and gate, up side by side: fewer and
larger products. `refresh` copies them again after the optimizer has changed them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import decode_kernels as kernels
from models.attention import attention, document_mask
from models.decode import unique_prompts
from models.kv_cache import KVCache
from models.layers import rotary_angles
from models.sampling import Sampling, sample
from models.transformer import Block, Transformer

if TYPE_CHECKING:
    from models.generate import Request

PREFILL_TOKENS = 32_768  # computed at once: 1 GB of activations at 160M
DENSE_PREFILL_TOKENS = 2_048  # with a mask of tokens x tokens, which flex may fall back to
WARM_UP_STEPS = 2


def obstacle(model: Transformer) -> str | None:
    """Why this decoder cannot serve the model, or None if it can."""
    if model.dtype not in (torch.bfloat16, torch.float16):
        return "needs bfloat16 or float16"
    head_dim = model.config.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"needs heads of 16, 32, 64 ... dimensions, not {head_dim}"
    return None


@dataclass
class _Layer:
    """One block's weights as they are multiplied."""

    attention_norm: Tensor  # (C,) float32
    qkv: Tensor  # ((H + 2 K) D, C)
    out: Tensor  # (C, H D)
    ffn_norm: Tensor  # (C,) float32
    gate_up: Tensor  # (2 F, C)
    down: Tensor  # (C, F)
    has_rope: bool

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> _Layer:
        a, f = block.attention, block.ffn
        return cls(
            attention_norm=block.attention_norm.weight.detach().clone(),
            qkv=_joined((a.q_proj, a.k_proj, a.v_proj), dtype),
            out=_joined((a.o_proj,), dtype),
            ffn_norm=block.ffn_norm.weight.detach().clone(),
            gate_up=_joined((f.gate_proj, f.up_proj), dtype),
            down=_joined((f.down_proj,), dtype),
            has_rope=a.has_rope,
        )

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def _joined(linears: Sequence[torch.nn.Linear], dtype: torch.dtype) -> Tensor:
    return torch.cat([linear.weight.detach() for linear in linears]).to(dtype)


class CudaDecoder:
    """What `models.decode.Decoder` does, by kernels of its own."""

    lag = 1

    def __init__(self, model: Transformer, slots: int, capacity: int, sampling: Sampling) -> None:
        self.model, self.config, self.sampling = model, model.config, sampling
        self.kernel = model.attention_kernel()[0]
        device = model.device
        self.least_refill = max(1, slots // 32)  # a prefill costs as much as three to five steps
        self.cache = KVCache(self.config, slots, capacity, model.dtype, device)
        self.layers = [_Layer.of(block, model.dtype) for block in model.blocks]
        self.final_norm = model.final_norm.weight.detach().clone()
        self.head = model.head_weight.detach().to(model.dtype)  # (V, C)
        self.table = self._rotary_table(capacity)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.seeds = torch.zeros_like(self.tokens)
        self.runs = torch.zeros_like(self.tokens)  # 1 where a sequence is; the others stay at 0
        self.sampled = torch.zeros(2, slots, dtype=torch.float64, device=device)
        penalised = sampling.repetition_penalty != 1
        shape = (slots, self.config.vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device) if penalised else None
        self.graph = self._capture()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the model's weights into the buffers that the graph reads."""
        for layer, block in zip(self.layers, self.model.blocks, strict=True):
            fresh = _Layer.of(block, self.model.dtype)
            for buffer, value in zip(layer.tensors(), fresh.tensors(), strict=True):
                buffer.copy_(value)
        self.final_norm.copy_(self.model.final_norm.weight)
        self.head.copy_(self.model.head_weight)

    @torch.no_grad()
    def prefill(self, slots: list[int], requests: list[Request]) -> tuple[Tensor, torch.cuda.Event]:
        """Puts the prompts into the cache's slots and samples the first token of each."""
        prompts, first, numbers = unique_prompts(slots, requests)
        chunks = self._chunks(prompts, first)
        hidden = torch.cat([self._prefill(some, at) for some, at in chunks])  # (prompts, C)
        lengths = [len(r.prompt) for r in requests]
        columns = [slots, [first[n] for n in numbers], numbers, lengths, [r.seed for r in requests]]
        place, source, prompt_of, length, seeds = self._to_device(torch.tensor(columns))
        if len(prompts) < len(requests):
            self.cache.copy(source, place, max(lengths))
        self.cache.lengths[place] = length
        self.seeds[place] = seeds
        self.runs[place] = 1
        if self.seen is not None:
            for slot, request in zip(slots, requests, strict=True):
                self.seen[slot] = False
                self.seen[slot, list(request.prompt)] = True
        seen = None if self.seen is None else self.seen[place]
        tokens, logprobs = self._sample(hidden[prompt_of], seeds, length, seen)
        self.tokens[place] = tokens
        if self.seen is not None:
            self.seen[place, tokens] = True
        return self._to_host(torch.stack([tokens.double(), logprobs.double()]))

    def step(self, slots: list[int]) -> tuple[Tensor, torch.cuda.Event]:
        """The next token of each of `slots`; the graph computes all others as well."""
        self.graph.replay()
        return self._to_host(self.sampled)

    def release(self, slots: list[int]) -> None:
        """Free slots stay at position 0, where attention has nothing to read."""
        place = self._to_device(torch.tensor(slots))
        self.runs[place] = 0
        self.cache.lengths[place] = 0

    # -----------------------------------------------------------------------------------------
    # The forward passes

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. What the warm-up leaves behind lies where prompts are written."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        cache, config = self.cache, self.config
        positions = cache.lengths

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            return kernels.attend(qkv, keys, values, positions, config.n_heads)

        hidden = self._forward(self.tokens, cache.slots, positions, attend)  # (S, C)
        cache.lengths += self.runs
        tokens, logprobs = self._sample(hidden, self.seeds, cache.lengths, self.seen)
        self.tokens.copy_(tokens)
        self.sampled[0].copy_(tokens)
        self.sampled[1].copy_(logprobs)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def _prefill(self, prompts: list[tuple[int, ...]], slots: list[int]) -> Tensor:
        """Computes prompts laid end to end; hidden state (n, C) of each one's last token."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        tokens = torch.from_numpy(np.fromiter(chain.from_iterable(prompts), dtype=np.int64))
        slot_of = torch.tensor(slots).repeat_interleave(lengths)
        positions = torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
        tokens, slot_of, positions = self._to_device(torch.stack([tokens, slot_of, positions]))
        cu_seqlens = self._to_device(F.pad(ends, (1, 0)).int())
        mask = document_mask(cu_seqlens, (1, len(tokens)), self.kernel)
        mask.max_seqlen = int(lengths.max())
        sizes = [self.config.n_heads, self.config.n_kv_heads, self.config.n_kv_heads]
        widths = [size * self.config.head_dim for size in sizes]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            parts = zip(qkv.split(widths, dim=1), sizes, strict=True)
            q, k, v = (part.unflatten(1, (n, -1))[None] for part, n in parts)
            return attention(q, k, v, mask)[0].flatten(1)  # (N, H D)

        hidden = self._forward(tokens, slot_of, positions, attend)
        return hidden[self._to_device(ends - 1)]

    def _forward(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, attend: Callable
    ) -> Tensor:
        """Hidden states (N, C) after the final norm of N tokens that go into the cache."""
        cache, eps = self.cache, self.config.norm_eps
        x = self.model.embed(tokens)  # (N, C)
        delta = None
        for number, layer in enumerate(self.layers):
            normed = kernels.add_norm(x, delta, layer.attention_norm, eps)
            qkv = F.linear(normed, layer.qkv)  # (N, (H + 2 K) D)
            table = self.table if layer.has_rope else None
            keys, values = cache.keys[number], cache.values[number]
            kernels.rotate_and_store(
                qkv, slots, positions, table, keys, values, self.config.n_heads
            )
            delta = F.linear(attend(number, qkv), layer.out)  # (N, C)
            normed = kernels.add_norm(x, delta, layer.ffn_norm, eps)
            delta = F.linear(kernels.swiglu(F.linear(normed, layer.gate_up)), layer.down)
        return kernels.add_norm(x, delta, self.final_norm, eps)

    def _sample(
        self, hidden: Tensor, seeds: Tensor, positions: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = torch.mm(hidden, self.head.T, out_dtype=torch.float32)  # (n, V)
        if self.sampling.is_plain:
            return kernels.draw(logits, seeds, positions, self.sampling.temperature)
        return sample(logits, seeds, positions, self.sampling, seen)

    # -----------------------------------------------------------------------------------------
    # Between host and device, without waiting

    def _rotary_table(self, capacity: int) -> Tensor:
        """(2, L, D / 2) float32: cosines and sines of every position."""
        positions = torch.arange(capacity, device=self.model.device)[None]
        cos, sines = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return torch.stack([cos[0, :, 0, 0], sines[0, :, 0, 1]])

    def _chunks(
        self, prompts: list[tuple[int, ...]], slots: list[int]
    ) -> list[tuple[list[tuple[int, ...]], list[int]]]:
        """Prompts and slots in parts of bounded size."""
        masked = self.kernel in ("dense", "flex")
        most = DENSE_PREFILL_TOKENS if masked else PREFILL_TOKENS
        chunks, size = [], math.inf
        for prompt, slot in zip(prompts, slots, strict=True):
            if size + len(prompt) > most:
                chunks.append(([], []))
                size = 0
            chunks[-1][0].append(prompt)
            chunks[-1][1].append(slot)
            size += len(prompt)
        return chunks

    def _to_device(self, rows: Tensor) -> Tensor:
        """Copied without waiting."""
        return rows.pin_memory().to(self.model.device, non_blocking=True)

    def _to_host(self, sampled: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy on the host that is complete when the event has happened."""
        host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True)
        host.copy_(sampled, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return host, ready
