"""Conversations for SFT: rows of any common shape -> messages -> tokens -> packed rows.

    files, hub, built-in --> messages --> tokens, learned --> cache, one file a source
                                                                |
    [Batch, Batch, ...] of one step <-- rows <-- best fit over the epoch's order

A conversation is never cut across rows, so rows are planned from lengths: each epoch is shuffled,
and each conversation put where it leaves the least room (`packing.best_fit`). The plan follows from
the data, the seed and the epoch, so the loader's state is (epoch, row). The row after an epoch's
last is the next epoch's first: no step is short.

Nothing is left out silently. Rows that cannot be used and conversations that are too long are
counted by reason and told with the first row numbers (from 0), also when they come from the cache.

Held-out conversations are chosen by a hash of what is asked in them, so two answers to one question
are on the same side. The cache's name carries a digest of everything that decides its content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from data import builtin, builtin_tasks
from data.chat import SHAPES, ChatTemplate, Message, check_messages, render_many, to_messages
from data.packing import IGNORE, Batch, Piece, best_fit, cut_document, make_batch
from data.shards import HASH_RANGE, is_held_out
from data.sources import BrokenRow, Record, SourceConfig, list_files, read_records
from data.tokenizer import Tokenizer
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger
from utils.seed import derive, shuffle_order

FORMAT = 1
BUILTIN = "builtin:chats"
BUILTIN_ROWS = {"train": 20_000, "heldout": 1_000}
HUB_PREFIX = "hub:"
CHUNK = 1_000  # conversations encoded at a time
ROWS_TOLD = 5


class ChatSource(Config):
    """One source of conversations."""

    name: str
    """Unique name, used for folders and messages."""
    path: str
    """A file, folder or glob of jsonl, json or parquet; `hub:OWNER/NAME`; or `builtin:chats`."""
    weight: float = 1.0
    """How often each conversation is seen in an epoch: 2 is twice, 0.25 a fixed quarter of them
    once, 1.5 all once and a fixed half again. Which ones is decided by a hash of their content."""
    split: str = "train"
    """The split of a hub dataset."""
    subset: str | None = None
    """The subset of a hub dataset that has several."""
    exact_match: bool = False
    """Its answers are the only right ones: held-out questions are asked and answers compared."""

    def problems(self) -> Iterator[Problem]:
        if not self.weight > 0:
            yield Problem(("weight",), f"weight ({self.weight}) must be above 0")
        if not self.name.replace("-", "_").isidentifier():
            yield Problem(("name",), f"name ('{self.name}') must be letters, digits, '-' and '_'")


class ChatDataConfig(Config):
    """Where conversations come from, which are used, and how they are packed."""

    sources: list[ChatSource]
    cache_dir: str = "cache"
    """Tokenized conversations; may be deleted, are then made again."""
    seq_len: int = 2_048
    """Tokens per row (T)."""
    max_documents_per_row: int = 32
    """At most so many conversations in a row: cu_seqlens has a fixed length."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to conversations that do not fit into a row; either way they are counted."""
    bad_rows: Literal["skip", "fatal"] = "skip"
    """Whether rows that cannot be used end the run, or are only counted and told."""
    held_out_fraction: float = 0.01
    """Share of the conversations, by a hash of what is asked, never trained on."""
    held_out_tokens: int = 200_000
    """At most so many held-out tokens are used at an evaluation."""
    expected_tokens: int | None = None
    """Tokens of an epoch, roughly: read by --dry-run alone, which has no data to count."""

    def problems(self) -> Iterator[Problem]:
        names = [s.name for s in self.sources]
        if not names:
            yield Problem(("sources",), "sources is empty: name at least one")
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem(("sources",), f"sources: the name '{name}' is used twice")
        for key in ("seq_len", "max_documents_per_row", "held_out_tokens", "expected_tokens"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem((key,), f"{key} ({value}) must be above 0")
        if not 0 < self.held_out_fraction < 0.5:
            yield Problem(
                ("held_out_fraction",),
                f"held_out_fraction ({self.held_out_fraction}) must be between 0 and 0.5",
            )


# ---------------------------------------------------------------------------------------------
# Rows to messages


@dataclass
class Tally:
    """How many rows met each fate, and where the first few of them are."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= ROWS_TOLD:
            self.first.setdefault(reason, []).append(place)

    def __str__(self) -> str:
        return "; ".join(
            f"{reason} {count:,} ({', '.join(self.first[reason])}{', ...' * (count > ROWS_TOLD)})"
            for reason, count in self.counts.items()
        )


@dataclass
class _Row:
    """A usable row: where it stands, what it says, and its split if the source decides it."""

    place: str
    messages: list[Message]
    held_out: bool | None


def _read(source: ChatSource, bad: Tally) -> Iterator[_Row]:
    """The usable rows of a source; the others are added to `bad`.

    Raises:
        ConfigError: no row so far has a shape that is known.
    """
    shape_seen = False
    for place, record, held_out in _records(source):
        if isinstance(record, BrokenRow):
            bad.add(record.reason, place)
            continue
        messages = to_messages(record)
        if messages is None and not shape_seen:
            raise ConfigError(
                f"source '{source.name}', {place}: no known shape in its fields "
                f"{', '.join(map(repr, record))}: {_excerpt(record)}\n  Shapes accepted:\n    "
                + "\n    ".join(SHAPES)
            )
        shape_seen = True
        reason = "no known shape" if messages is None else check_messages(messages)
        if reason:
            bad.add(reason, place)
        else:
            yield _Row(place, messages, held_out)


def _excerpt(record: Record) -> str:
    text = json.dumps(record, default=str)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _records(source: ChatSource) -> Iterator[tuple[str, Record | BrokenRow, bool | None]]:
    if source.path == BUILTIN:
        for split, rows in BUILTIN_ROWS.items():
            for i in range(rows):
                chat = {"messages": builtin_tasks.chat(split, i)}
                yield f"{split} row {i}", chat, split == "heldout"
    elif source.path.startswith(HUB_PREFIX):
        for i, record in enumerate(_hub_dataset(source)):
            yield f"row {i}", record, None
    else:
        for file in _files(source):
            for i, record in enumerate(read_records(source.name, file)):
                yield f"{file.name} row {i}", record, None
