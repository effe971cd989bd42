"""The SFT loader: conversations -> rows -> batches, with exact state; and what is held out.

    Conversations --\\
    Conversations ---> epoch's order --> best fit --> rows --> [Batch, Batch, ...] of one step
    Conversations --/

A conversation is never cut across rows, so rows are planned from lengths: each epoch is shuffled,
and each conversation put where it leaves the least room (`packing.best_fit`). The plan follows from
the data, the seed and the epoch, so the loader's state is (epoch, row). After an epoch's last row
comes the next epoch's first: no step is short.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.conversations import ChatDataConfig, Conversations
from data.packing import Batch, Piece, best_fit, make_batch
from data.shards import HASH_RANGE
from utils.config import ConfigError
from utils.seed import derive, shuffle_order


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
        self.seed = seed
        self.rows_per_step = rows_per_step
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.members = _members(sources)
        self.fingerprint = _fingerprint(sources, self.members)
        self.epoch = self.row = 0
        self._plan = (0, self.plan(0))

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        rows = [self._next_row() for _ in range(self.rows_per_step)]
        mine = range(self.rank * self.micro_batch, len(rows), self.world_size * self.micro_batch)
        return [self._batch(rows[start : start + self.micro_batch]) for start in mine]

    def plan(self, epoch: int) -> list[list[int]]:
        """The members in each row of an epoch."""
        order = shuffle_order(len(self.members), derive(self.seed, "conversations", epoch))
        lengths = _lengths(self.sources, self.members[order])
        most = self.config.max_documents_per_row
        return [
            [int(order[i]) for i in row] for row in best_fit(lengths, self.config.seq_len, most)
        ]

    def steps(self, epochs: int) -> int:
        """Steps in which every conversation is seen in `epochs` epochs."""
        rows = sum(len(self.plan(epoch)) for epoch in range(epochs))
        return math.ceil(rows / self.rows_per_step)

    def describe(self) -> str:
        """The first epoch in a line, for the log."""
        rows, tokens = len(self._plan[1]), int(_lengths(self.sources, self.members).sum())
        padding = 1 - tokens / (rows * self.config.seq_len)
        return (
            f"an epoch: {len(self.members):,} conversations, {tokens:,} tokens, in {rows:,} rows "
            f"of {self.config.seq_len:,}; {padding:.2%} is padding"
        )

    def _next_row(self) -> list[int]:
        if self._plan[0] != self.epoch:
            self._plan = (self.epoch, self.plan(self.epoch))
        rows = self._plan[1]
        row = rows[self.row]
        self.row += 1
        if self.row == len(rows):
            self.epoch, self.row = self.epoch + 1, 0
        return row

    def _batch(self, rows: list[list[int]]) -> Batch:
        pieces = [[self._piece(member) for member in row] for row in rows]
        return make_batch(pieces, self.config.seq_len, self.config.max_documents_per_row)

    def _piece(self, member: int) -> Piece:
        source, index = self.members[member]
        return self.sources[source].piece(index)

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "row": self.row, "fingerprint": self.fingerprint}

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
        self.epoch, self.row = state["epoch"], state["row"]


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
        whole = conversations.tokens[conversations.ends - 1] == eos_id  # not truncated
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
