"""Rows with fields, for the stages after pretraining: where they come from, and which were of use.

A source is a folder of files, a dataset of the hub, or generated. Each row becomes a value (a
conversation, a pair) or is counted: nothing is left out silently. What comes of a source is kept in
one file, together with the account of what was left out, which is told again whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from data import builtin
from data.hub import HUB_PREFIX, hub_error
from data.shards import write_atomic
from data.sources import (
    BUILTIN_PREFIX,
    BrokenRow,
    Record,
    SourceConfig,
    SourceFile,
    list_files,
    read_records,
)
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger

ROWS_TOLD = 5


class RecordSource(Config):
    """One source of rows."""

    BUILTIN: ClassVar[str]  # the path of what is generated

    name: str
    """Unique name, used for folders and messages."""
    path: str
    """A file, folder or glob of jsonl, json or parquet; `hub:OWNER/NAME`; or `builtin:...`."""
    split: str = "train"
    """The split of a hub dataset."""
    subset: str | None = None
    """The subset of a hub dataset that has several."""
    exact_match: bool = False
    """Its answers are the only right ones: held-out questions are asked and answers compared."""

    def problems(self) -> Iterator[Problem]:
        if self.path.startswith(BUILTIN_PREFIX) and self.path != self.BUILTIN:
            yield Problem(
                ("path",), f"path ('{self.path}'): what is built in here is '{self.BUILTIN}'"
            )
        if not self.name.replace("-", "_").isidentifier():
            yield Problem(("name",), f"name ('{self.name}') must be letters, digits, '-' and '_'")


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


# ---------------------------------------------------------------------------------------------
# Reading


def read_source(
    source: RecordSource, generate: Callable[[str, int], Record], examples: Mapping[str, int]
) -> Iterator[tuple[str, Record | BrokenRow, bool | None]]:
    """Where each row stands, what it holds, and whether it is held out if the source decides it.

    Args:
        generate: the built-in record of a split ("train", "heldout") and index.
        examples: how many built-in records a split has.

    Raises:
        ConfigError: unreadable, or not there.
    """
    if source.path == source.BUILTIN:
        for split, rows in examples.items():
            for i in range(rows):
                yield f"{split} row {i}", generate(split, i), split == "heldout"
    elif source.path.startswith(HUB_PREFIX):
        for i, record in enumerate(_hub_dataset(source)):
            yield f"row {i}", record, None
    else:
        for file in _files(source):
            for i, record in enumerate(read_records(source.name, file)):
                yield f"{file.name} row {i}", record, None


def source_revision(source: RecordSource, examples: Mapping[str, int]) -> object:
    """Plain values that change when the rows do: of files, their names, sizes and hashes; of a hub
    dataset, its length and a hundred of its rows, read from disk in milliseconds."""
    if source.path == source.BUILTIN:
        return [builtin.VERSION, examples]
    if not source.path.startswith(HUB_PREFIX):
        return [(file.name, file.revision) for file in _files(source)]
    dataset = _hub_dataset(source)
    rows = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 100))]
    return hashlib.sha256(json.dumps([len(dataset), rows], default=str).encode()).hexdigest()


def _files(source: RecordSource) -> list[SourceFile]:
    files = list_files(SourceConfig(name=source.name, path=source.path, weight=1.0))
    files = [file for file in files if ".txt" not in Path(file.path).suffixes]
    if not files:
        raise ConfigError(
            f"source '{source.name}': only txt files at '{source.path}', which cannot tell a "
            "question from an answer; give jsonl, json or parquet"
        )
    return files


def _hub_dataset(source: RecordSource) -> Any:
    """A dataset of the hub: downloaded once, then read from the hub library's own cache."""
    import datasets

    name = source.path.removeprefix(HUB_PREFIX)
    try:
        return datasets.load_dataset(name, source.subset, split=source.split)
    except Exception as error:  # the library raises many kinds
        raise hub_error(source.name, name, error) from error


Value = TypeVar("Value")


@dataclass
class Row(Generic[Value]):
    """A usable row: where it stands, what it says, and its split if the source decides it."""

    place: str
    value: Value
    held_out: bool | None


def usable_rows(
    source: RecordSource,
    records: Iterable[tuple[str, Record | BrokenRow, bool | None]],
    convert: Callable[[Record], Value | None],
    check: Callable[[Value], str | None],
    shapes: Iterable[str],
    bad: Tally,
) -> Iterator[Row[Value]]:
    """The rows that can be used; the others are added to `bad`.

    Args:
        records: (place, record, split) of each row.
        convert: the value of a record, None if it has none of the `shapes`.
        check: why a value cannot be used, in a few words; None if it can.

    Raises:
        ConfigError: the first record has no known shape.
    """
    shape_seen = False
    for place, record, held_out in records:
        if isinstance(record, BrokenRow):
            bad.add(record.reason, place)
            continue
        value = convert(record)
        if value is None and not shape_seen:
            excerpt = json.dumps(record, default=str)
            raise ConfigError(
                f"source '{source.name}', {place}: no known shape in its fields "
                f"{', '.join(map(repr, record))}: {excerpt[:300]}{'...' * (len(excerpt) > 300)}\n"
                "  Shapes accepted:\n    " + "\n    ".join(shapes)
            )
        shape_seen = True
        reason = "no known shape" if value is None else check(value)
        if reason:
            bad.add(reason, place)
        else:
            yield Row(place, value, held_out)


# ---------------------------------------------------------------------------------------------
# Keeping


@dataclass
class Account:
    """What was left out of a source."""

    bad: Tally = field(default_factory=Tally)
    too_long: Tally = field(default_factory=Tally)


def cached_tensors(
    path: Path, make: Callable[[], tuple[dict[str, np.ndarray], Account]]
) -> tuple[dict[str, np.ndarray], Account]:
    """What `make` returns, from the file at `path` if it is there, else made and written to it."""
    if not path.exists():
        tensors, account = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"bad": vars(account.bad), "too_long": vars(account.too_long)})
        write_atomic(path, safetensors.numpy.save(tensors, {"account": told}))
    with safetensors.safe_open(path, "np") as file:
        told = json.loads(file.metadata()["account"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, Account(**{name: Tally(**tally) for name, tally in told.items()})


def tell_account(source: RecordSource, account: Account, seq_len: int, bad_rows: str) -> None:
    """Warn of what was left out.

    Raises:
        ConfigError: rows cannot be used and `bad_rows` is "fatal".
    """
    warn = get_logger().warning
    if account.too_long.counts:
        warn(f"source '{source.name}', longer than {seq_len:,} tokens: {account.too_long}")
    if account.bad.counts and bad_rows == "fatal":
        raise ConfigError(
            f"source '{source.name}', rows that cannot be used: {account.bad}. "
            "Mend or remove them, or set data.bad_rows to skip"
        )
    if account.bad.counts:
        warn(f"source '{source.name}', rows skipped: {account.bad}")
