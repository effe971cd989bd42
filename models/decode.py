"""The engine's decoder on any device: the model's own forward pass with a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.kv_cache import KVCache
from models.sampling import Sampling, sample
from models.transformer import Transformer

if TYPE_CHECKING:
    from models.generate import Request


class Decoder:
    """Prompts into slots, and one token more for every slot, by the model's own forward pass.

    Works on every device. A step computes the sequences that run, and reads the cache as far as the
    longest of them reaches.
    """

    lag = 0  # steps that the host may be behind
    least_refill = 1  # free slots that are worth a prefill while others run

    def __init__(self, model: Transformer, slots: int, capacity: int, sampling: Sampling) -> None:
        self.model = model
        self.sampling = sampling
        self.cache = KVCache(model.config, slots, capacity, model.dtype, model.device)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self.seeds = torch.zeros_like(self.tokens)
        penalised = sampling.repetition_penalty != 1
        shape = (slots, model.config.vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=model.device) if penalised else None

    def refresh(self) -> None:
        """Nothing: the model itself is used."""

    def prefill(self, slots: list[int], requests: list[Request]) -> tuple[Tensor, None]:
        """Puts the prompts into the cache's slots and samples the first token of each."""
        prompts, first, numbers = unique_prompts(slots, requests)
        device = self.model.device
        prompt_of = torch.tensor(numbers, device=device)
        hidden = self._extend_prompts(prompts, torch.tensor(first, device=device))
        place = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(r.prompt) for r in requests], device=device)
        self.cache.copy(torch.tensor(first, device=device)[prompt_of], place, int(lengths.max()))
        self.cache.lengths[place] = lengths
        self.seeds[place] = torch.tensor([r.seed for r in requests], device=device)
        if self.seen is not None:
            for slot, request in zip(slots, requests, strict=True):
                self.seen[slot] = False
                self.seen[slot, list(request.prompt)] = True
        return self._sample(hidden[prompt_of], place), None

    def step(self, slots: list[int]) -> tuple[Tensor, None]:
        """The next token of each of `slots`; (2, S), 0 for the others."""
        place = torch.tensor(slots, device=self.model.device)  # (n,)
        positions = self.cache.lengths[place]
        cache = self.cache.at(place, int(positions.max()) + 1)
        hidden = self.model.extend(self.tokens[place, None], positions[:, None], cache)[:, 0]
        self.cache.lengths[place] += 1
        sampled = torch.zeros(2, len(self.tokens), dtype=torch.float64)
        sampled[:, slots] = self._sample(hidden, place).cpu()
        return sampled, None

    def release(self, slots: list[int]) -> None:
        """Nothing needs to be cleared: a slot begins again at position 0."""

    def _extend_prompts(self, prompts: list[tuple[int, ...]], slots: Tensor) -> Tensor:
        """Computes prompts, filled up on the right; hidden state (n, C) of each one's last token.

        A slot's first new token overwrites the filling.
        """
        longest = max(map(len, prompts))
        filled = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(filled, device=self.model.device)  # (n, T)
        positions = torch.arange(longest, device=self.model.device).expand_as(tokens)
        hidden = self.model.extend(tokens, positions, self.cache.at(slots, longest))  # (n, T, C)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.model.device)
        return hidden[torch.arange(len(prompts), device=self.model.device), ends]

    def _sample(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """Samples and keeps the next token of `slots`; (2, n) float64 tokens and logprobs."""
        seen = None if self.seen is None else self.seen[slots]
        logits = self.model.logits(hidden)  # (n, V)
        positions = self.cache.lengths[slots]
        tokens, logprobs = sample(logits, self.seeds[slots], positions, self.sampling, seen)
        self.tokens[slots] = tokens
        if self.seen is not None:
            self.seen[slots, tokens] = True
        return torch.stack([tokens.double(), logprobs.double()])


def unique_prompts(
    slots: list[int], requests: list[Request]
) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
    """The different prompts, the slot that each is computed in, and each request's prompt."""
    seen: dict[tuple[int, ...], int] = {}
    first, numbers = [], []
    for slot, request in zip(slots, requests, strict=True):
        number = seen.setdefault(tuple(request.prompt), len(seen))
        if number == len(first):
            first.append(slot)
        numbers.append(number)
    return list(seen), first, numbers
