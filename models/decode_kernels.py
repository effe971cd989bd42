"""Triton kernels of a decoding step: what lies between its matrix products, in as few launches.

At a batch of 64 a decoding step of a small model reads its weights in 60 µs; the rest of its time
is kernels that each do little. These fuse what can be fused, so that a layer is four products and
five kernels. They work on N tokens that know their slot and position, so a prefill uses the same.

Rounding follows `models.layers`: norms, rotations and SwiGLU in float32, results in the input's
dtype; attention is that of flash-attention (Dao et al. 2022), with the query heads that share a
key-value head in one program, so that the cache is read once (Ainslie et al. 2023).

Left out: a split of long caches over several programs; with few sequences and thousands of tokens
in each it would be faster.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.sampling import PROBABILITY_ONE, RANDOM_BITS

LOWEST = tl.constexpr(-1e30)  # a logit that is never drawn, and no infinity to subtract
LEAST_ROWS = 16  # of a matrix in tl.dot; query heads of a group are filled up to it


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x + delta, all (N, C); x becomes the sum. weight: (C,) float32."""
    n, c = x.shape
    out = torch.empty_like(x)
    added = x if delta is None else delta
    _add_norm[(n,)](x, added, weight, out, c, eps, delta is not None, triton.next_power_of_2(c))
    return out


@triton.jit
def _add_norm(
    x_ptr, delta_ptr, weight_ptr, out_ptr, c, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < c
    x = tl.load(x_ptr + row * c + at, mask=inside, other=0.0)
    if HAS_DELTA:
        x = x + tl.load(delta_ptr + row * c + at, mask=inside, other=0.0)
        tl.store(x_ptr + row * c + at, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / c + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * c + at, (weight * (wide * scale)).to(x.dtype), mask=inside)


def rotate_and_store(
    qkv: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor | None,
    keys: Tensor,
    values: Tensor,
    n_heads: int,
) -> None:
    """Turns queries and keys by their positions, in place, and puts keys and values in the cache.

    Args:
        qkv: (N, (H + 2 K) D), the heads of q, k and v one after the other.
        slots, positions: (N,) int64, where each token lies.
        table: (2, L, D / 2) float32, cosines and sines of every position; None: no rotation.
        keys, values: (S, L, K, D) of one layer.
    """
    n = len(qkv)
    capacity, n_kv_heads, head_dim = keys.shape[1:]
    heads = n_heads + 2 * n_kv_heads
    _rotate_and_store[(n,)](
        qkv,
        slots,
        positions,
        keys if table is None else table,
        keys,
        values,
        capacity,
        table is not None,
        n_heads,
        n_kv_heads,
        head_dim,
        triton.next_power_of_2(heads),
    )


@triton.jit
def _rotate_and_store(
    qkv_ptr,
    slots_ptr,
    positions_ptr,
    table_ptr,
    keys_ptr,
    values_ptr,
    capacity,
    HAS_ROPE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    place = (tl.load(slots_ptr + row) * capacity + position) * K * D
    heads = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, D // 2)[None, :]
    first = qkv_ptr + row * (H + 2 * K) * D + heads * D + at
    inside = (heads < H + 2 * K) & (at < D // 2)
    a = tl.load(first, mask=inside, other=0.0)
    b = tl.load(first + D // 2, mask=inside, other=0.0)
    if HAS_ROPE:
        cos = tl.load(table_ptr + position * (D // 2) + at)
        sin = tl.load(table_ptr + (capacity + position) * (D // 2) + at)
        turns = heads < H + K
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        turned_a = (wide_a * cos - wide_b * sin).to(a.dtype)
        turned_b = (wide_b * cos + wide_a * sin).to(a.dtype)
        a, b = tl.where(turns, turned_a, a), tl.where(turns, turned_b, b)
        tl.store(first, a, mask=inside & turns)
        tl.store(first + D // 2, b, mask=inside & turns)
    is_key = (heads >= H) & (heads < H + K)
    key = keys_ptr + place + (heads - H) * D + at
    tl.store(key, a, mask=inside & is_key)
    tl.store(key + D // 2, b, mask=inside & is_key)
    is_value = inside & (heads >= H + K)
    value = values_ptr + place + (heads - H - K) * D + at
    tl.store(value, a, mask=is_value)
    tl.store(value + D // 2, b, mask=is_value)


def attend(qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, n_heads: int) -> Tensor:
    """Attention of one query for each slot to its cache, up to and with its own position.

    Args:
        qkv: (S, (H + 2 K) D) with rotated queries.
        keys, values: (S, L, K, D).
        positions: (S,) int64.

    Returns:
        (S, H D).
    """
    slots, capacity, n_kv_heads, head_dim = keys.shape
    group = n_heads // n_kv_heads
    out = qkv.new_empty(slots, n_heads * head_dim)
    _attend[(slots, n_kv_heads)](
        qkv,
        keys,
        values,
        positions,
        out,
        math.log2(math.e) / math.sqrt(head_dim),
        capacity,
        n_heads,
        n_kv_heads,
        head_dim,
        group,
        max(LEAST_ROWS, triton.next_power_of_2(group)),
        BLOCK=64,
        num_warps=4,
        num_stages=3,
    )
    return out


@triton.jit
def _attend(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    out_ptr,
    scale,
    capacity,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(positions_ptr + slot) + 1
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    is_row = rows < GROUP
    place = (head * GROUP + rows) * D + dims
    q = tl.load(qkv_ptr + slot * (H + 2 * K) * D + place, mask=is_row, other=0.0)
    tokens = tl.arange(0, BLOCK)
    start_of_slot = slot * capacity * K * D + head * D + dims
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tokens
        inside = at < length
        cached = start_of_slot + at[:, None] * (K * D)
        k = tl.load(keys_ptr + cached, mask=inside[:, None], other=0.0)  # (BLOCK, D)
        scores = tl.dot(q, tl.trans(k)) * scale  # (ROWS, BLOCK), in units of log 2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        v = tl.load(values_ptr + cached, mask=inside[:, None], other=0.0)  # (BLOCK, D)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * shrink + tl.sum(weights, 1)
        largest = larger
    out = (acc / total[:, None]).to(q.dtype)
    tl.store(out_ptr + slot * H * D + place, out, mask=is_row)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side, (N, 2 F) -> (N, F)."""
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, f)
    block = 1024
    _swiglu[(n, triton.cdiv(f, block))](gate_up, out, f, block)
    return out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, f, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    gate = tl.load(gate_up_ptr + row * 2 * f + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * f + f + at, mask=inside, other=0.0)
    out = gate / (1 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + row * f + at, out.to(up.dtype), mask=inside)


def draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`models.sampling.sample` without filters, in one kernel; the temperature is not 0."""
    n, vocab = logits.shape
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    _draw[(n,)](
        logits,
        seeds,
        positions,
        tokens,
        logprobs,
        1 / temperature,
        vocab,
        float(PROBABILITY_ONE),
        RANDOM_BITS,
        BLOCK=4096,
        num_warps=8,
    )
    return tokens, logprobs


@triton.jit
def _draw(
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    tokens_ptr,
    logprobs_ptr,
    inverse_temperature,
    vocab,
    ONE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    logits = logits_ptr + row * vocab + at
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start, mask=start + at < vocab, other=LOWEST) * inverse_temperature
        larger = tl.maximum(largest, x)
        sums = sums * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, 0)
    logz = top + tl.log(tl.sum(sums * tl.exp(largest - top), 0))
    weights = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start, mask=start + at < vocab, other=LOWEST) * inverse_temperature
        weights += (tl.exp(x - logz) * ONE).to(tl.int64)
    bits = _random_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), BITS)
    drawn = (bits * tl.sum(weights, 0)) >> BITS  # in [0, sum)
    start = 0
    before = tl.zeros([], tl.int64)
    token = tl.zeros([], tl.int64)  # how many tokens end at or before what was drawn
    while (before <= drawn) & (start < vocab):
        x = tl.load(logits + start, mask=start + at < vocab, other=LOWEST) * inverse_temperature
        w = (tl.exp(x - logz) * ONE).to(tl.int64)
        token += tl.sum((before + tl.cumsum(w, 0) <= drawn).to(tl.int64), 0)
        before += tl.sum(w, 0)
        start += BLOCK
    tl.store(tokens_ptr + row, token)
    x = tl.load(logits_ptr + row * vocab + token) * inverse_temperature
    tl.store(logprobs_ptr + row, x - logz)


@triton.jit
def _random_bits(seed, position, BITS: tl.constexpr):
    return (_mix(_mix(seed) + position) >> (64 - BITS)) & ((1 << BITS) - 1)


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as in `models.sampling`; the masks make the shifts unsigned."""
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 17179869183)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 137438953471)) * -7723592293110705685
    return x ^ ((x >> 31) & 8589934591)
