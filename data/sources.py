"""Where documents come from: the hub, local files and the built-in corpus.

A source is a list of files, and a file is a list of rows; a row holds one document. That is all
the rest of the data path knows, so that a shard can name what it holds: (file, first row, last
row). Files are jsonl, parquet or txt (one document a file), plain, gzip or zstd, on the disk or in
a dataset of the hub. The built-in corpus is one "file" per domain whose rows are generated.

A file's revision says what it held when it was read: a changed file is another file, and shards
made from the old one are not reused. For the hub it is the commit.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data import builtin, hub
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger

BUILTIN_PREFIX = "builtin:"
EDGE_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
Record = dict[str, Any]


class SourceConfig(Config):
    """One source of documents and its share of the training tokens."""

    name: str
    """Unique name, used for folders and messages."""
    path: str
    """A file, folder or glob pattern; `hub:OWNER/NAME`; or `builtin:web`, `builtin:code`, ..."""
    weight: float
    """Share of the training tokens, relative to the other sources' weights."""
    domain: str = "web"
    """Validation loss is reported per domain (`web_val_loss`, ...)."""
    text_field: str = "text"
    """The field or column that holds the document (jsonl, parquet)."""
    subset: str | None = None
    """The subset of a hub dataset that has several."""
    split: str = "train"
    """The split of a hub dataset."""
    revision: str | None = None
    """A commit, tag or branch of a hub dataset; null: what is there when it is first read."""

    def problems(self) -> Iterator[Problem]:
        if not self.weight > 0:
            yield Problem(("weight",), f"weight ({self.weight}) must be above 0")
        if not self.name.replace("-", "_").isidentifier():
            yield Problem(("name",), f"name ('{self.name}') must be letters, digits, '-' and '_'")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as the manifest records it."""

    path: str
    revision: str

    @property
    def name(self) -> str:
        """What identifies the file wherever it lies."""
        return self.path if self.path.startswith(hub.URL_PREFIX) else Path(self.path).name


@dataclass(frozen=True)
class BrokenRow:
    """A row that holds no record: why, in words that can be counted, and what is wrong exactly."""

    reason: str
    detail: str


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in a fixed order.

    Raises:
        ConfigError: no file matches, all are of unknown kinds, or the hub cannot be read.
    """
    if source.path.startswith(hub.HUB_PREFIX):
        return _list_hub_files(source)
    if source.path.startswith(BUILTIN_PREFIX):
        domain = source.path.removeprefix(BUILTIN_PREFIX)
        if domain not in builtin.DOMAINS:
            known = ", ".join(BUILTIN_PREFIX + d for d in builtin.DOMAINS)
            raise ConfigError(f"source '{source.name}': path ('{source.path}') is none of {known}")
        return [SourceFile(source.path, f"v{builtin.VERSION}")]
    path = Path(source.path).expanduser()
    found = sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
    there = [p for p in found if p.is_file()]
    files = [p for p in there if _kind(p) is not None]
    if not files:
        what = f"; {found[0]} is of no known kind" if found else ""
        raise ConfigError(
            f"source '{source.name}': no documents at '{source.path}'{what}. Give a file, folder "
            f"or glob of {', '.join(SUFFIXES)} (plain, {' or '.join(COMPRESSED)})"
        )
    if others := [p.name for p in there if _kind(p) is None]:
        _tell_others(source.name, tuple(others))
    return [SourceFile(str(p), _revision(p)) for p in files]


@functools.cache  # once
def _tell_others(name: str, others: tuple[str, ...]) -> None:
    some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
    get_logger().warning(
        f"source '{name}': not read, of no known kind: {len(others):,} file(s) ({some})"
    )


def _list_hub_files(source: SourceConfig) -> list[SourceFile]:
    dataset = source.path.removeprefix(hub.HUB_PREFIX)
    commit = hub.resolve_commit(source.name, dataset, source.revision)
    urls = hub.data_files(source.name, dataset, commit, source.subset, source.split)
    files = [SourceFile(url, commit) for url in urls if _kind(Path(url)) is not None]
    if not files:
        raise ConfigError(
            f"source '{source.name}': the files of '{dataset}' ({', '.join(urls[:1])}, ...) are "
            f"none of {', '.join(SUFFIXES)}; convert them and give the folder as the path"
        )
    return files


def read_rows(source: SourceConfig, file: SourceFile, start_row: int = 0) -> Iterator[str]:
    """The documents of one file from `start_row` on; a row without text gives ''.

    Raises:
        ConfigError: unreadable file, broken row or missing field, with the row's number.
    """
    if file.path.startswith(BUILTIN_PREFIX):
        domain = file.path.removeprefix(BUILTIN_PREFIX)
        rows = range(start_row, builtin.N_DOCUMENTS[domain])
        return (builtin.document(domain, i) for i in rows)
    if _kind(Path(file.path)) == ".txt":
        return _read_txt(source, file.path, start_row)
    records = read_records(source.name, file, start_row, [source.text_field])
    return (_text_of(source, file.path, row, r) for row, r in enumerate(records, start_row))


def read_records(
    name: str, file: SourceFile, start_row: int = 0, columns: list[str] | None = None
) -> Iterator[Record | BrokenRow]:
    """The whole rows of a jsonl, json or parquet file from `start_row` on.

    Args:
        name: the source's, for messages.
        columns: all that is read of a parquet file; None: every column.

    Raises:
        ConfigError: unreadable file or missing column.
    """
    if _kind(Path(file.path)) == ".parquet":
        return _read_parquet(name, file.path, start_row, columns)
    return _read_json(name, file.path, start_row)


def sample_texts(source: SourceConfig) -> Iterator[str]:
    """The documents of a source in their order, for training a tokenizer."""
    for file in list_files(source):
        yield from read_rows(source, file)


def _kind(path: Path) -> str | None:
    """'.jsonl', '.parquet' or '.txt', compression aside; None for another file."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    kind = suffixes[-1] if suffixes else None
    return kind if kind in SUFFIXES else None


def _revision(path: Path) -> str:
    """Size and a hash of the first and last MiB: cheap for huge files, independent of dates."""
    size = path.stat().st_size
    with path.open("rb") as f:
        digest = hashlib.sha256(f.read(EDGE_BYTES))
        f.seek(max(0, size - EDGE_BYTES))
        digest.update(f.read(EDGE_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"


def _open(name: str, path: str) -> object:
    import pyarrow as pa

    try:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
        return pa.input_stream(_located(name, path), compression=compression)
    except OSError as error:
        raise ConfigError(f"source '{name}': cannot read {path}: {error}") from error


def _located(name: str, path: str) -> Any:
    """What pyarrow reads: a path of this machine, or an open file of the hub."""
    return hub.open_url(name, path) if path.startswith(hub.URL_PREFIX) else path


def _read_json(name: str, path: str, start_row: int) -> Iterator[Record | BrokenRow]:
    """A record a line; or, in a file that begins with '[', one array of all records."""
    with _open(name, path) as stream:
        lines = io.BufferedReader(stream, 1 << 20)
        try:
            if _kind(Path(path)) == ".json" and lines.peek(1)[:1] == b"[":
                yield from map(_checked, json.load(lines)[start_row:])
                return
            filled = (line for line in lines if line.strip())
            yield from map(_parse, islice(filled, start_row, None))
        except ConfigError:  # of the hub; a ValueError too
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"source '{name}': {path} is damaged ({error}); fetch it again"
            ) from error


def _parse(line: bytes) -> Record | BrokenRow:
    try:
        return _checked(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return BrokenRow("broken UTF-8", str(error))
    except ValueError as error:
        return BrokenRow("no valid JSON", str(error))


def _checked(value: object) -> Record | BrokenRow:
    if isinstance(value, dict):
        return value
    return BrokenRow(f"a {type(value).__name__}, not an object", json.dumps(value)[:60])


def _text_of(source: SourceConfig, path: str, row: int, record: Record | BrokenRow) -> str:
    if isinstance(record, BrokenRow):
        raise ConfigError(
            f"source '{source.name}': {path}, row {row:,} is {record.reason} ({record.detail}); "
            "mend or remove it"
        )
    if source.text_field not in record:
        raise ConfigError(
            f"source '{source.name}': {path}, row {row:,} has no field '{source.text_field}'; "
            f"it has {', '.join(map(repr, record))}. Set the source's text_field"
        )
    text = record[source.text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ConfigError(
            f"source '{source.name}': {path}, row {row:,}: field '{source.text_field}' holds "
            f"a {type(text).__name__}, not text"
        )
    return text


def _read_parquet(
    name: str, path: str, start_row: int, columns: list[str] | None
) -> Iterator[Record | BrokenRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    damages = (pa.ArrowInvalid, OSError)  # looked up now: at exit pyarrow may be gone before us
    try:
        with pq.ParquetFile(_located(name, path)) as table:
            for column in columns or ():
                if column not in table.schema_arrow.names:
                    raise ConfigError(
                        f"source '{name}': {path} has no column '{column}'; it has "
                        f"{', '.join(map(repr, table.schema_arrow.names))}. "
                        "Set the source's text_field"
                    )
            groups, row = _row_groups_from(table, start_row)
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=columns):
                for i in range(max(0, start_row - row), len(batch)):
                    yield _parquet_record(batch, i)
                row += len(batch)
    except damages as error:
        raise ConfigError(
            f"source '{name}': {path} is damaged ({error}); fetch it again"
        ) from error


def _parquet_record(batch: object, index: int) -> Record | BrokenRow:
    try:
        return {n: batch[n][index].as_py() for n in batch.schema.names}
    except UnicodeDecodeError as error:
        return BrokenRow("broken UTF-8", str(error))


def _row_groups_from(table: object, start_row: int) -> tuple[list[int], int]:
    """The row groups that hold `start_row` and all after it, and the first's first row."""
    first_row = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first_row + rows > start_row:
            return list(range(group, table.num_row_groups)), first_row
        first_row += rows
    return [], first_row


def _read_txt(source: SourceConfig, path: str, start_row: int) -> Iterator[str]:
    if start_row > 0:
        return
    with _open(source.name, path) as stream:
        data = stream.read()
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"source '{source.name}': {path} is not UTF-8 ({error})") from error
