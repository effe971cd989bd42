"""Where documents come from: local files and the built-in corpus.

A source is a list of files, and a file is a list of rows; a row holds one document. That is all
the rest of the data path knows, so that a shard can name what it holds: (file, first row, last
row). Local files are jsonl, parquet or txt (one document a file), plain, gzip or zstd. The
built-in corpus is one "file" per domain whose rows are generated.

A file's revision says what it held when it was read: a changed file is another file, and shards
made from the old one are not reused.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import builtin
from utils.config import Config, ConfigError, Problem

BUILTIN_PREFIX = "builtin:"
EDGE_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 256
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")


class SourceConfig(Config):
    """One source of documents and its share of the training tokens."""

    name: str
    """Unique name, used for folders and messages."""
    path: str
    """A file, a folder, a glob pattern, or `builtin:web`, `builtin:code`, `builtin:math`."""
    weight: float
    """Share of the training tokens, relative to the other sources' weights."""
    domain: str = "web"
    """Validation loss is reported per domain (`web_val_loss`, ...)."""
    text_field: str = "text"
    """The field or column that holds the document (jsonl, parquet)."""

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
        return Path(self.path).name


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in a fixed order.

    Raises:
        ConfigError: no file matches, or one is of an unknown kind.
    """
    if source.path.startswith(BUILTIN_PREFIX):
        domain = source.path.removeprefix(BUILTIN_PREFIX)
        if domain not in builtin.DOMAINS:
            known = ", ".join(BUILTIN_PREFIX + d for d in builtin.DOMAINS)
            raise ConfigError(f"source '{source.name}': path ('{source.path}') is none of {known}")
        return [SourceFile(source.path, f"v{builtin.VERSION}")]
    path = Path(source.path).expanduser()
    found = sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
    files = [p for p in found if p.is_file() and _kind(p) is not None]
    if not files:
        what = f"; {found[0]} is of no known kind" if found else ""
        raise ConfigError(
            f"source '{source.name}': no documents at '{source.path}'{what}. Give a file, folder "
            f"or glob of {', '.join(SUFFIXES)} (plain, {' or '.join(COMPRESSED)})"
        )
    return [SourceFile(str(p), _revision(p)) for p in files]


def read_rows(source: SourceConfig, file: SourceFile, start_row: int = 0) -> Iterator[str]:
    """The documents of one file from `start_row` on; a row without text gives ''.

    Raises:
        ConfigError: unreadable file, broken row or missing field, with the row's number.
    """
    if file.path.startswith(BUILTIN_PREFIX):
        domain = file.path.removeprefix(BUILTIN_PREFIX)
        rows = range(start_row, builtin.N_DOCUMENTS[domain])
        return (builtin.document(domain, i) for i in rows)
    path = Path(file.path)
    readers = {".parquet": _read_parquet, ".txt": _read_txt}
    return readers.get(_kind(path), _read_jsonl)(source, path, start_row)


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


def _open(source: SourceConfig, path: Path) -> object:
    import pyarrow as pa

    try:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        return pa.input_stream(str(path), compression=compression)
    except OSError as error:
        raise ConfigError(f"source '{source.name}': cannot read {path}: {error}") from error


def _read_jsonl(source: SourceConfig, path: Path, start_row: int) -> Iterator[str]:
    import io

    with _open(source, path) as stream:
        lines = io.BufferedReader(stream, 1 << 20)
        row = 0
        for line in _decompressed(source, path, lines):
            if not line.strip():
                continue
            if row >= start_row:
                yield _text_of(source, path, row, _parse(source, path, row, line))
            row += 1


def _decompressed(source: SourceConfig, path: Path, lines: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from lines
    except OSError as error:
        raise ConfigError(
            f"source '{source.name}': {path} is damaged ({error}); fetch it again"
        ) from error


def _parse(source: SourceConfig, path: Path, row: int, line: bytes) -> dict:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"source '{source.name}': {path}, row {row:,} is no valid JSON ({error}); "
            "mend or remove the line"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"source '{source.name}': {path}, row {row:,} is a {type(value).__name__}, "
            "not an object with fields"
        )
    return value


def _text_of(source: SourceConfig, path: Path, row: int, record: dict) -> str:
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


def _read_parquet(source: SourceConfig, path: Path, start_row: int) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if source.text_field not in table.schema_arrow.names:
                raise ConfigError(
                    f"source '{source.name}': {path} has no column '{source.text_field}'; it has "
                    f"{', '.join(map(repr, table.schema_arrow.names))}. Set the source's text_field"
                )
            groups, row = _row_groups_from(table, start_row)
            for batch in table.iter_batches(
                PARQUET_BATCH_ROWS, row_groups=groups, columns=[source.text_field]
            ):
                for value in batch.column(0):
                    if row >= start_row:
                        record = {source.text_field: value.as_py()}
                        yield _text_of(source, path, row, record)
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"source '{source.name}': {path} is damaged ({error}); fetch it again"
        ) from error


def _row_groups_from(table: object, start_row: int) -> tuple[list[int], int]:
    """The row groups that hold `start_row` and all after it, and the first's first row."""
    first_row = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first_row + rows > start_row:
            return list(range(group, table.num_row_groups)), first_row
        first_row += rows
    return [], first_row


def _read_txt(source: SourceConfig, path: Path, start_row: int) -> Iterator[str]:
    if start_row > 0:
        return
    with _open(source, path) as stream:
        data = stream.read()
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"source '{source.name}': {path} is not UTF-8 ({error})") from error
