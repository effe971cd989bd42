"""The generation engine: one pass over each prompt, then token by token from a key-value cache.

    requests --> free slots --> prefill --> decode, decode, decode ... --> completions
                     ^                          |
                     +------ slot is free <-----+ a sequence has ended

The cache has a fixed number of slots. A sequence that ends gives its slot to the next request at
once (continuous batching: Orca, Yu et al. 2022), so short answers never wait for long ones. Prompts
of a group that are the same are computed once.

Where the numbers come from is the decoder's business (`models.decode` on any device,
`models.decode_cuda` on NVIDIA GPUs, where a step is one captured graph). On a GPU the host reads a
step's tokens while the next step runs: a sequence may run one step past its end, and that token is
dropped. What is sampled is a function of the logits, the sequence's seed and the position alone
(`models.sampling`).

Left out: paged caches, sharing of prompts that begin alike, speculative decoding.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.decode import Decoder
from models.sampling import Sampling
from models.transformer import Transformer

if TYPE_CHECKING:
    from models.decode_cuda import CudaDecoder

StopWhen = Callable[[list[int]], bool]
DEFAULT_SLOTS = 64


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        max_new_tokens: the end of the context may come before.
        seed: with it, the same prompt gets the same completion, whatever else is in the batch.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@dataclass
class Completion:
    """What a request has got so far.

    Attributes:
        index: the request's number, from 0.
        tokens: those sampled, the stop token included.
        logprobs: of each, as `sample` gives them.
        stopped: ended by a stop token or `stop_when`, and not by its length.
    """

    index: int
    request: Request
    room: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    done: bool = False
    ends_with_stop_token: bool = False

    @property
    def answer(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.ends_with_stop_token else self.tokens


@dataclass
class _Step:
    """Tokens that have been sampled, perhaps not yet on the host."""

    owners: list[tuple[int, Completion]]  # the row of `sampled`, and whose it is
    sampled: Tensor  # (2, rows) float64: tokens and log-probabilities
    ready: torch.cuda.Event | None

    def read(self) -> tuple[list[int], list[float]]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.sampled[0].long().tolist(), self.sampled[1].tolist()


class Engine:
    """Continues prompts with one model and one way of sampling.

    Args:
        slots: how many sequences run at once.
        capacity: tokens that a slot holds, prompt and completion; None: the model's context.
        stop_ids: tokens that end a sequence.
        stop_when: told the tokens of a completion after each one; True ends it.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int = DEFAULT_SLOTS,
        capacity: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        stop_when: StopWhen | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(stop_ids)
        self.stop_when = stop_when
        self.context = model.config.max_seq_len
        self.capacity = min(capacity or self.context, self.context)
        self.decoder = make_decoder(model, slots, self.capacity, self.sampling)
        self.running: dict[int, Completion] = {}  # slot -> whose it is
        self.free = list(range(slots))[::-1]

    def refresh(self) -> None:
        """Takes over the model's weights as they are now; needed after they have changed."""
        self.decoder.refresh()

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions, each as soon as it is done.

        Raises:
            ValueError: a prompt is empty or leaves no room.
        """
        for updated in self.steps(requests):
            yield from (completion for completion in updated if completion.done)

    @torch.no_grad()
    def steps(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """After each step, the completions that have a new token or are done."""
        waiting = enumerate(requests)
        self.free.sort(reverse=True)  # what is computed side by side does not depend on the past
        unread: deque[_Step] = deque()
        try:
            while True:
                empty = self._fill(waiting, unread)
                if empty:
                    yield empty
                if self.running:
                    unread.append(self._launch())
                if not (unread or empty):
                    return
                while len(unread) > (self.decoder.lag if self.running else 0):
                    yield self._take(unread.popleft())
        finally:
            self._release(list(self.running))

    def _fill(self, waiting: Iterator, unread: deque[_Step]) -> list[Completion]:
        """Gives free slots to requests and computes their prompts; returns those with no room."""
        few = self.running and len(self.free) < self.decoder.least_refill
        if few or not self.free:
            return []
        empty, started = [], {}
        for index, request in islice(waiting, len(self.free)):
            completion = Completion(index, request, self._room(index, request))
            if completion.room == 0:
                completion.done = True
                empty.append(completion)
            else:
                started[self.free.pop()] = completion
        if started:
            self.running |= started
            requests = [completion.request for completion in started.values()]
            sampled, ready = self.decoder.prefill(list(started), requests)
            owners = list(enumerate(started.values()))
            unread.append(_Step(owners, sampled, ready))
        return empty

    def _room(self, index: int, request: Request) -> int:
        length = len(request.prompt)
        if not 0 < length < self.context or length > self.capacity:
            raise ValueError(
                f"prompt {index} has {length:,} tokens; it must have at least 1 and leave room in "
                f"the model's context of {self.context:,}: shorten it"
            )
        return min(request.max_new_tokens, self.capacity - length)

    def _launch(self) -> _Step:
        owners = list(self.running.items())
        return _Step(owners, *self.decoder.step(list(self.running)))

    def _take(self, step: _Step) -> list[Completion]:
        """Hands a step's tokens to their owners, and frees the slots of those that are done.

        The loop over a large batch has to be done before the GPU is with its next step.
        """
        tokens, logprobs = step.read()
        stop_ids, stop_when = self.stop_ids, self.stop_when
        updated, done = [], False
        for row, completion in step.owners:
            if completion.done:
                continue  # it ran on until the host knew
            token, sampled = tokens[row], completion.tokens
            sampled.append(token)
            completion.logprobs.append(logprobs[row])
            if token in stop_ids:
                completion.stopped = completion.ends_with_stop_token = completion.done = True
            elif stop_when is not None and stop_when(sampled):
                completion.stopped = completion.done = True
            elif len(sampled) == completion.room:
                completion.done = True
            done |= completion.done
            updated.append(completion)
        if done:
            self._release([slot for slot, c in self.running.items() if c.done])
        return updated

    def _release(self, slots: list[int]) -> None:
        for slot in slots:
            del self.running[slot]
        self.free += slots
        if slots:
            self.decoder.release(slots)


def make_decoder(
    model: Transformer, slots: int, capacity: int, sampling: Sampling
) -> Decoder | CudaDecoder:
    """The fastest decoder that runs here."""
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from models.decode_cuda import CudaDecoder, obstacle

        if obstacle(model) is None:
            return CudaDecoder(model, slots, capacity, sampling)
    return Decoder(model, slots, capacity, sampling)


# ---------------------------------------------------------------------------------------------
# Without an engine to keep


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int] = (),
    stop_when: StopWhen | None = None,
    seed: int | Sequence[int] = 0,
    slots: int = DEFAULT_SLOTS,
    **sampling: float,
) -> list[list[int]]:
    """Continues each prompt until a stop token, `max_new_tokens` or the context's end.

    Args:
        stop_ids: tokens that end a sequence and are not part of it.
        seed: one for each prompt; an int s stands for s, s + 1, s + 2 ...
        sampling: the settings of `Sampling`.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, one that leaves no room, or a setting out of range.
    """
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
    settings = Sampling(**sampling)
    if not prompts:
        return []
    engine = Engine(
        model,
        min(slots, len(prompts)),
        max(map(len, prompts)) + max_new_tokens,
        sampling=settings,
        stop_ids=stop_ids,
        stop_when=stop_when,
    )
    requests = (
        Request(prompt, max_new_tokens, s) for prompt, s in zip(prompts, seeds, strict=True)
    )
    completions: list[list[int]] = [[] for _ in prompts]
    for completion in engine.run(requests):
        completions[completion.index] = completion.answer
    return completions


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int] = (),
    stop_when: StopWhen | None = None,
    seed: int = 0,
    **sampling: float,
) -> Iterator[int]:
    """The tokens that `generate` would give this one prompt, each as soon as it is there."""
    settings = Sampling(**sampling)
    engine = Engine(
        model,
        1,
        len(prompt) + max_new_tokens,
        sampling=settings,
        stop_ids=stop_ids,
        stop_when=stop_when,
    )
    for updated in engine.steps([Request(prompt, max_new_tokens, seed)]):
        for completion in updated:
            if completion.tokens and not completion.ends_with_stop_token:
                yield completion.tokens[-1]
