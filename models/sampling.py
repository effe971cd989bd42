"""Which token comes next: a pure function of (logits, seed, position).

The random number comes from a hash of the sequence's seed and the token's position (Salmon et al.
2011, "as easy as 1, 2, 3"), not from a generator with a state: what a sequence draws does not
depend on what else is in the batch, and a continuation draws what the uninterrupted run would have.
Probabilities become integers before they are summed, because integer sums are the same on every
device and in any order.

Sources: top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024; repetition penalty, CTRL (Keskar
et al. 2019). Left out: beam search, logit biases, penalties by count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROBABILITY_ONE = 2**32  # what is less likely than 2e-10 is never drawn
RANDOM_BITS = 30  # the product of the two fits into an int64


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the filters apply in this order.

    Attributes:
        repetition_penalty: divides the positive logits of tokens that the sequence or its prompt
            already has, and multiplies the negative ones; 1: none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples among so many likeliest tokens; 0: all.
        top_p: samples among the likeliest tokens that together reach this probability.
        min_p: samples among tokens at least this times as likely as the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(
                f"temperature ({self.temperature}) and top_k ({self.top_k}) must be at least 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p ({self.min_p}) must be at least 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be above 0")

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the whole tempered softmax, as reinforcement learning
        needs it."""
        filtered = self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1
        return self.temperature > 0 and not filtered


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sampling: Sampling,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token for each row of `logits` (S, V), and its log-probability.

    Args:
        seeds, positions: (S,) int64, which fix the draw; a position says how many tokens the
            sequence has already.
        seen: (S, V) bool, the tokens that the repetition penalty is for.

    Returns:
        (S,) int64, and (S,) float32: log softmax(logits / temperature) of the token, before top-k,
        top-p and min-p; of the untempered logits where the temperature is 0.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / (sampling.temperature or 1.0)
    logprobs = logits.log_softmax(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        sums = _weights(logprobs, sampling).cumsum(-1)  # (S, V)
        draws = _random_bits(seeds, positions) * sums[:, -1] >> RANDOM_BITS  # in [0, sum)
        tokens = torch.searchsorted(sums, draws[:, None], right=True).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _weights(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (S, V) as integers, 0 for tokens that are filtered out."""
    weights = (logprobs.exp() * PROBABILITY_ONE).long()
    if sampling.top_k:
        weights = _keep_top_k(weights, sampling.top_k)
    if sampling.top_p < 1:
        weights = _keep_top_p(weights, sampling.top_p)
    if sampling.min_p:
        weights = weights.where(weights >= sampling.min_p * weights.amax(-1, keepdim=True), 0)
    return weights


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
