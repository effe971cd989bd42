"""The SFT loader: conversations -> rows -> batches, with exact state; and what is held out.

    Conversations --\\
    Conversations ---> by weight --> RowPlan --> [Batch, Batch, ...] of one step
    Conversations --/

A conversation is never cut across rows, so rows are planned from lengths (`packing.RowPlan`), and
the loader's state is the plan's: epoch and row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.conversations import ChatDataConfig, Conversations
from data.packing import Batch, Piece, RowPlan, best_fit, make_batch
from data.shards import HASH_RANGE
from utils.config import ConfigError


class ChatLoader:
    """Yields, for each optimizer step, this rank's list of micro-batches.

    Args:
        rows_per_step: rows of all micro-batches and ranks together.
        micro_batch: rows per micro-batch of one rank.
    """

    def __init__(
        self,
        sources: list[Conversations],
        config: ChatDataConfig,
        seed: int,
        rows_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources = sources
        self.config = config
        self.rows_per_step = rows_per_step
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.members = _members(sources)
        self.fingerprint = _fingerprint(sources, self.members)
        lengths = _lengths(sources, self.members)
        self.plan = RowPlan(lengths, config.seq_len, config.max_documents_per_row, seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        rows = [self.plan.next_row() for _ in range(self.rows_per_step)]
        mine = range(self.rank * self.micro_batch, len(rows), self.world_size * self.micro_batch)
        return [self._batch(rows[start : start + self.micro_batch]) for start in mine]

    def steps(self, epochs: int) -> int:
        """Steps until every conversation has been seen in so many epochs."""
        return math.ceil(self.plan.rows_in(epochs) / self.rows_per_step)

    def __str__(self) -> str:
        return f"an epoch: {len(self.members):,} conversations, {self.plan}"

    def _batch(self, rows: list[list[int]]) -> Batch:
        pieces = [[self._piece(member) for member in row] for row in rows]
        return make_batch(pieces, self.config.seq_len, self.config.max_documents_per_row)

    def _piece(self, member: int) -> Piece:
        source, index = self.members[member]
        return self.sources[source].piece(index)

    def state_dict(self) -> dict:
        return {"plan": self.plan.state_dict(), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is of other conversations, so that their order would be another.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the conversations are not those of the checkpoint (a file, a hub dataset or its "
                "revision has changed); restore them, or start another run"
            )
        self.plan.load_state_dict(state["plan"])


def _members(sources: list[Conversations]) -> np.ndarray:
    """An epoch's conversations as (source, index) pairs (m, 2), repeated or thinned by weight."""
    members = []
    for number, conversations in enumerate(sources):
        whole, part = divmod(conversations.source.weight, 1)
        times = int(whole) + (conversations.keys < part * HASH_RANGE)
        indices = np.repeat(np.arange(len(times)), times * ~conversations.held_out)
        members.append(np.stack([np.full_like(indices, number), indices], axis=1))
    if not any(map(len, members)):
        raise ConfigError("data.sources: the weights leave no conversation to train on; raise them")
    return np.concatenate(members)


def _lengths(sources: list[Conversations], members: np.ndarray) -> np.ndarray:
    """Tokens that each member takes in a row."""
    starts = np.cumsum([0, *(len(s.lengths) for s in sources)])
    every = np.concatenate([s.lengths for s in sources])
    return every[starts[members[:, 0]] + members[:, 1]]


def _fingerprint(sources: list[Conversations], members: np.ndarray) -> str:
    digest = hashlib.sha256(members.tobytes())
    for conversations in sources:
        for array in (conversations.tokens, conversations.learned, conversations.ends):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Held out


def held_out_batches(
    sources: list[Conversations], config: ChatDataConfig, micro_batch: int
) -> list[Batch]:
    """The held-out conversations as batches; the last one is filled with empty rows.

    Raises:
        ConfigError: there are none.
    """
    pieces = []
    for conversations in sources:
        indices = np.flatnonzero(conversations.held_out)
        before = np.cumsum(conversations.lengths[indices]) - conversations.lengths[indices]
        few = indices[before < config.held_out_tokens / len(sources)]
        pieces += [conversations.piece(i) for i in few]
    if not pieces:
        raise ConfigError(
            f"data.held_out_fraction ({config.held_out_fraction}) leaves no held-out conversation; "
            "raise it"
        )
    most = config.max_documents_per_row
    plan = best_fit(map(len, pieces), config.seq_len, most)
    rows = [[pieces[i] for i in row] for row in plan]
    rows += [[] for _ in range(-len(rows) % micro_batch)]
    return [
        make_batch(rows[i : i + micro_batch], config.seq_len, most)
        for i in range(0, len(rows), micro_batch)
    ]


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, and that answer without its EOS.

    `known`: the answer is the only right one, so that exact match means something.
    """

    prompt: list[int]
    answer: list[int]
    known: bool


def choose_questions(
    sources: list[Conversations], count: int, eos_id: int, held_out: bool = True
) -> list[Question]:
    """At most `count` questions, from all sources alike and from all over each."""
    chosen = []
    for conversations in sources:
        last = conversations.ends - 1
        whole = (conversations.tokens[last] == eos_id) & conversations.learned[last]  # not cut
        indices = np.flatnonzero(whole & (conversations.held_out == held_out))
        few = min(len(indices), count // len(sources))
        spread = np.arange(few) * len(indices) // max(1, few)
        chosen += [_question(conversations, i) for i in indices[spread]]
    return chosen


def _question(conversations: Conversations, index: int) -> Question:
    span = conversations.slice(index)
    tokens, learned = conversations.tokens[span], conversations.learned[span]
    start = int(np.flatnonzero(~learned)[-1]) + 1  # where the last answer begins
    known = conversations.source.exact_match
    return Question(tokens[:start].tolist(), tokens[start:-1].tolist(), known)
