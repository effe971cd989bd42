"""Text generation: one pass over the prompts, then token by token from the key-value cache.

Prompts of any lengths share a batch: they are filled up on the right, and each goes on from its own
end, so that its first new token overwrites the filling.

Sampling is a pure function of (logits, seed, position). The random number comes from a hash of the
sequence's seed and the token's position (Salmon et al. 2011, "as easy as 1, 2, 3"), not from a
generator with a state: what a sequence draws does not depend on what else is in the batch, and a
continuation draws what the uninterrupted run would have. Probabilities become integers before they
are summed, because integer sums are the same on every device and in any order.

Left out: beam search, repetition penalties.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from models.attention import KVCache
from models.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] = 0,
) -> list[list[int]]:
    """Continues each prompt until a stop id, `max_new_tokens` or the context's end.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: samples among so many likeliest tokens; 0: all.
        top_p: samples among the likeliest tokens that together reach this probability.
        stop_ids: tokens that end a sequence and are not part of it.
        seed: one for each prompt; an int s stands for s, s + 1, s + 2 ...

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, one that leaves no room, or a setting out of range.
    """
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    completions: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, seeds):
        for completion, token in zip(completions, step, strict=True):
            if token is not None:
                completion.append(token)
    return completions


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that `generate` would give this one prompt, each as soon as it is there."""
    for (token,) in _steps(
        model, [prompt], max_new_tokens, temperature, top_k, top_p, stop_ids, [seed]
    ):
        if token is not None:
            yield token


@torch.no_grad()
def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_ids: Collection[int],
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Yields the next token of every prompt, None for those that have ended, until all have."""
    _check(prompts, model.config.max_seq_len, temperature, top_k, top_p, seeds)
    if not prompts:
        return
    rooms = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    cache = KVCache(model.config, len(prompts), capacity, model.dtype, model.device)
    seeds_on_device = torch.tensor(seeds, device=model.device)
    alive = [True] * len(prompts)
    hidden = _prefill(model, prompts, cache)  # (S, C)
    for step in range(max(rooms)):
        logits = model.logits(hidden)  # (S, V)
        tokens = sample(logits, seeds_on_device, cache.lengths, temperature, top_k, top_p)
        new = tokens.tolist()
        alive = [
            still and step < room and token not in stop_ids
            for still, room, token in zip(alive, rooms, new, strict=True)
        ]
        if not any(alive):
            return
        yield [token if still else None for token, still in zip(new, alive, strict=True)]
        if step + 1 < max(rooms):  # ended sequences run on, in place, until the last one ends
            positions = cache.lengths.clamp(max=capacity - 1)[:, None]  # (S, 1)
            hidden = model.extend(tokens[:, None], positions, cache)[:, 0]
            cache.lengths += 1


def _prefill(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Puts the prompts into the cache; returns the hidden state (S, C) of each one's last token."""
    longest = max(map(len, prompts))
    filled = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    tokens = torch.tensor(filled, device=model.device)  # (S, T)
    positions = torch.arange(longest, device=model.device).expand_as(tokens)
    hidden = model.extend(tokens, positions, cache)  # (S, T, C)
    cache.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts]))
    return hidden[cache.slots, cache.lengths - 1]


def _check(
    prompts: Sequence[Sequence[int]],
    max_seq_len: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Sequence[int],
) -> None:
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_seq_len:
            raise ValueError(
                f"prompt {i} has {len(prompt):,} tokens; it must have at least 1 and leave room in "
                f"the model's context of {max_seq_len:,}: shorten it"
            )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature ({temperature}) and top_k ({top_k}) must be at least 0, "
            f"top_p ({top_p}) above 0 and at most 1"
        )
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")


# ---------------------------------------------------------------------------------------------
# Sampling

PROBABILITY_ONE = 2**32  # what is less likely than 2e-10 is never drawn
RANDOM_BITS = 30  # the product of the two fits into an int64


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """One token for each row of `logits` (S, V); `seeds` and `positions` (S,) fix the draw.

    Args:
        positions: how many tokens the sequence has already.

    Returns:
        (S,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    weights = (logits.softmax(-1) * PROBABILITY_ONE).long()
    if top_k:
        weights = _keep_top_k(weights, top_k)
    if top_p < 1:
        weights = _keep_top_p(weights, top_p)
    sums = weights.cumsum(-1)  # (S, V)
    draws = _random_bits(seeds, positions) * sums[:, -1] >> RANDOM_BITS  # in [0, sum)
    return torch.searchsorted(sums, draws[:, None], right=True).squeeze(-1)


def _keep_top_k(weights: Tensor, k: int) -> Tensor:
    """Only the k largest weights of each row, and those that equal the k-th."""
    least = weights.topk(min(k, weights.shape[-1])).values[:, -1:]
    return weights.where(weights >= least, 0)


def _keep_top_p(weights: Tensor, p: float) -> Tensor:
    """Only the fewest largest weights of each row that reach `p` of its sum, and their equals."""
    ordered = weights.sort(descending=True).values
    sums = ordered.cumsum(-1)
    larger = sums - ordered  # the sum of what comes before each
    needed = (larger < p * sums[:, -1:]).sum(-1, keepdim=True)  # (S, 1), at least 1
    return weights.where(weights >= ordered.gather(-1, needed - 1), 0)


def _random_bits(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random integers of `RANDOM_BITS` bits, a fixed function of (seed, position)."""
    return _shift_right(_mix(_mix(seeds) + positions), 64 - RANDOM_BITS)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al. 2014) on int64, whose products wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The shift of the 64 bits as an unsigned number: zeros come in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
