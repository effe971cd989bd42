"""Token shards: every source is tokenized once, into files that can be made again exactly.

    rows of a source file --> [first_row, end_row) --> tokenize --> shard_00004_00012345.safetensors

A shard holds the documents of a range of rows of one file. A range ends at the first row that
brings it to `shard_megabytes` of text, or with the file, so boundaries depend on the text alone:
not on workers, on timing, or on where a run was killed. A shard is known by its file and first row:
the next one can be begun without counting those before.

`manifest.json` names the source's files at their revision, once and for all; `shards.jsonl` gets a
line for each shard that is made: its rows, counts and checksum. A shard that is missing (given up
for room on the disk, or lost) or damaged is made again from its rows, alone, and must come out with
the recorded checksum. Two processes that make the same shard write the same bytes, so nothing is
locked.

Held-out documents are chosen by a hash of their content before anything else is decided, so
duplicates of one are held out too, in every epoch and on every machine. Those that evaluation uses
are the first ones of the source, gathered before training starts (`held_out_200000.safetensors`
for 200,000 tokens): that costs reading the text, but tokenizing only what is held out.

The folder's name carries a digest of everything that decides the tokens (files and revisions,
field, tokenizer, shard size, held-out fraction): another tokenizer makes another folder. Of a hub
dataset it is the configured revision, so that the manifest can pin the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.numpy

from data.hub import HUB_PREFIX
from data.sources import SourceConfig, SourceFile, list_files, read_rows
from data.tokenizer import Tokenizer, id_dtype
from utils.config import ConfigError
from utils.logging import get_logger

FORMAT = 2
HASH_RANGE = 1 << 32
HELD_OUT_BATCH = 64  # documents tokenized together; read ahead in vain at the end
Key = tuple[int, int]


@dataclass(frozen=True)
class ShardInfo:
    """What is recorded of one shard; rows are [first_row, end_row) of file number `file`."""

    file: int
    first_row: int
    end_row: int
    last: bool  # of its file
    documents: int
    tokens: int
    held_out_documents: int
    sha256: str


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to make a shard, but for the tokenizer."""

    directory: Path
    file: int
    first_row: int
    last: bool
    texts: list[str]
    held_out_fraction: float
    sha256: str | None  # of a shard that is made again


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end: document i is tokens[ends[i-1] : ends[i]]."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index > 0 else 0
        return self.tokens[start : self.ends[index]]


class ShardStore:
    """The token shards of one source.

    Args:
        cache_dir: folder under which the source's own folder lies.
        shard_megabytes: text per shard, in 10**6 bytes.
        held_out_fraction: share of the documents, by content hash, kept out of training.
        commit: what a resumed run read of a hub dataset, if any.
    """

    def __init__(
        self,
        source: SourceConfig,
        tokenizer: Tokenizer,
        cache_dir: str,
        shard_megabytes: float,
        held_out_fraction: float,
        commit: str | None = None,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.shard_bytes = int(shard_megabytes * 1e6)
        self.held_out_fraction = held_out_fraction
        self._cache_dir = Path(cache_dir)
        self.shards: dict[Key, ShardInfo] = {}
        self._read_to = 0  # bytes of shards.jsonl
        self._open(commit)
        self.refresh()

    @property
    def revision(self) -> str:
        """What the source held: the commit, or a digest of its files."""
        if self.source.path.startswith(HUB_PREFIX):
            return self.files[0].revision
        return _digest([(file.name, file.revision) for file in self.files])

    def refresh(self) -> None:
        """Learn of shards that were recorded since the last time."""
        path = self.directory / "shards.jsonl"
        if not path.exists():
            return
        with path.open("rb") as lines:
            lines.seek(self._read_to)
            for line in lines:
                if line.endswith(b"\n"):
                    self._read_to += len(line)
                    self._learn(line)

    def _learn(self, line: bytes) -> None:
        try:
            self.add(ShardInfo(**json.loads(line)))
        except (ValueError, TypeError):
            return  # torn by a kill, or the empty line before each record

    def add(self, info: ShardInfo) -> None:
        """Know of a shard."""
        self.shards[info.file, info.first_row] = info

    def path(self, info: ShardInfo) -> Path:
        return shard_path(self.directory, info.file, info.first_row)

    def job(self, file: int, first_row: int, texts: list[str], last: bool) -> ShardJob:
        """How to make the shard of these rows, or to make it again."""
        known = self.shards.get((file, first_row))
        sha256 = known.sha256 if known else None
        return ShardJob(
            self.directory, file, first_row, last, texts, self.held_out_fraction, sha256
        )

    def rows(self, file: int, first_row: int = 0) -> Iterator[str]:
        """The documents of a file from a row on; '' where a row has none."""
        return read_rows(self.source, self.files[file], first_row)

    def read(self, info: ShardInfo) -> Documents:
        """The training documents of one shard, checked; made again if missing or damaged."""
        path = self.path(info)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            reason = "damaged" if data else "missing"
            get_logger().warning(f"{path} is {reason}: making it again from its rows")
            rows = self.rows(info.file, info.first_row)
            texts = list(islice(rows, info.end_row - info.first_row))
            make_shard(self.job(info.file, info.first_row, texts, info.last), self.tokenizer)
            data = path.read_bytes()
        return Documents(**safetensors.numpy.load(data))

    def held_out(self, max_tokens: int) -> list[np.ndarray]:
        """The first held-out documents of the source, cut at `max_tokens` in all."""
        path = self.directory / f"held_out_{max_tokens}.safetensors"
        if not path.exists():
            chosen = list(self._held_out_documents(max_tokens))
            write_atomic(path, safetensors.numpy.save(_laid_out(chosen, self.tokenizer)))
        documents = Documents(**safetensors.numpy.load(path.read_bytes()))
        return [documents[i] for i in range(len(documents))]

    def trim(
        self, most_bytes: float, keep: Collection[Key], file_order: np.ndarray, now: Key
    ) -> None:
        """Give up shards, those that are needed last first, until they fit into `most_bytes`.

        Args:
            keep: shards that stay in any case, by (file, first row).
            file_order: the epoch's.
            now: where in the epoch we are, as (place of the file in `file_order`, row).
        """
        size = {}
        for key, info in list(self.shards.items()):  # workers add to them meanwhile
            with suppress(FileNotFoundError):
                size[key] = self.path(info).stat().st_size
        excess = sum(size.values()) - most_bytes
        if excess <= 0:
            return
        place = {int(file): i for i, file in enumerate(file_order)}

        def needed(key: Key) -> tuple[bool, int, int]:
            at = (place[key[0]], key[1])
            return (at < now, *at)  # those behind us wait for the next epoch

        for key in sorted(size.keys() - set(keep), key=needed, reverse=True):
            if excess <= 0:
                return
            self.path(self.shards[key]).unlink(missing_ok=True)
            excess -= size[key]

    def _held_out_documents(self, max_tokens: int) -> Iterator[np.ndarray]:
        rows = (clean(t) for file in range(len(self.files)) for t in self.rows(file) if t)
        texts = (t for t in rows if is_held_out(t, self.held_out_fraction))
        left = max_tokens
        while batch := list(islice(texts, HELD_OUT_BATCH)):
            for ids in self.tokenizer.encode_documents(batch):
                yield np.array(ids[:left])
                left -= len(ids)
                if left <= 0:
                    return

    def _open(self, commit: str | None) -> None:
        """Find the source's folder and its files, or begin it."""
        on_hub = self.source.path.startswith(HUB_PREFIX)
        local = None if on_hub else list_files(self.source)
        self.directory = self._folder(local, self.source.revision)
        files = self._manifest_files()
        if on_hub and files and commit not in (None, files[0].revision):  # begun anew, from another
            self.directory = self._folder(local, commit)
            files = self._manifest_files()
        self.directory.mkdir(parents=True, exist_ok=True)
        sweep(self.directory)
        if files is None:
            revision = commit or self.source.revision
            files = local or list_files(self.source.model_copy(update={"revision": revision}))
            self._write_manifest(files)
        self.files = local or files

    def _folder(self, files: list[SourceFile] | None, revision: str | None) -> Path:
        where = [self.source.path, self.source.subset, self.source.split, revision]
        identity = {
            "format": FORMAT,
            "files": [(f.name, f.revision) for f in files] if files else where,
            "text_field": self.source.text_field,
            "tokenizer": self.tokenizer.fingerprint,
            "shard_bytes": self.shard_bytes,
            "held_out_fraction": self.held_out_fraction,
        }
        return self._cache_dir / f"{self.source.name}-{_digest(identity)}"

    def _manifest_files(self) -> list[SourceFile] | None:
        path = self.directory / "manifest.json"
        if not path.exists():
            return None
        return [SourceFile(**file) for file in json.loads(path.read_text())["files"]]

    def _write_manifest(self, files: list[SourceFile]) -> None:
        manifest = {
            "format": FORMAT,
            "source": self.source.model_dump(),
            "tokenizer": self.tokenizer.fingerprint,
            "files": [asdict(f) for f in files],
        }
        write_atomic(self.directory / "manifest.json", json.dumps(manifest, indent=1).encode())


def make_shard(job: ShardJob, tokenizer: Tokenizer) -> ShardInfo:
    """Tokenize, write and record a shard.

    Raises:
        ConfigError: one that is made again comes out otherwise, or the disk is full.
    """
    data, counts = _tokenize(job, tokenizer)
    end_row = job.first_row + len(job.texts)
    sha256 = hashlib.sha256(data).hexdigest()
    info = ShardInfo(job.file, job.first_row, end_row, job.last, sha256=sha256, **counts)
    path = shard_path(job.directory, job.file, job.first_row)
    if job.sha256 not in (None, sha256):
        raise ConfigError(
            f"{path} is lost and its rows now tokenize to something else: the source or a library "
            f"has changed since. Delete {job.directory} to tokenize anew (the run's data order "
            "starts over)"
        )
    try:
        write_atomic(path, data)
        if job.sha256 is None:
            record(job.directory, info)
    except OSError as error:
        raise ConfigError(
            f"{path}: not written: {error.strerror}. Make room, or lower data.max_cache_gb"
        ) from error
    return info


def record(directory: Path, info: ShardInfo) -> None:
    """Append a shard to the list; a line torn by a kill before does not swallow this one.

    Not fsynced: what a power cut loses of the list is made again.
    """
    with (directory / "shards.jsonl").open("ab", buffering=0) as lines:
        lines.write(b"\n" + json.dumps(asdict(info)).encode() + b"\n")


def cut(rows: Iterator[str], limit: int) -> list[str]:
    """The next shard's rows: up to and with the one that brings them to `limit` bytes."""
    texts, size = [], 0
    for text in rows:
        texts.append(text)
        size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        if size >= limit:
            break
    return texts


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is kept out of training: decided by its content alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < fraction * HASH_RANGE


def shard_path(directory: Path, file: int, first_row: int) -> Path:
    return directory / f"shard_{file:05d}_{first_row:08d}.safetensors"


def sweep(directory: Path) -> None:
    """Remove what killed processes left half written."""
    for path in directory.glob("*.tmp*"):
        try:
            os.kill(int(path.suffix.removeprefix(".tmp")), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except OSError:  # another user's process
            continue


def _tokenize(job: ShardJob, tokenizer: Tokenizer) -> tuple[bytes, dict[str, int]]:
    """One shard's file content and its counts; empty documents are left out."""
    texts = [clean(text) for text in job.texts if text]
    training = [text for text in texts if not is_held_out(text, job.held_out_fraction)]
    tensors = _laid_out(tokenizer.encode_documents(training), tokenizer)
    counts = {
        "documents": len(training),
        "tokens": len(tensors["tokens"]),
        "held_out_documents": len(texts) - len(training),
    }
    return safetensors.numpy.save(tensors), counts


def _laid_out(documents: list, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Documents (lists or arrays of ids) as the tensors of `Documents`."""
    dtype = id_dtype(tokenizer.vocab_size)
    parts = [np.empty(0, dtype), *(np.asarray(d, dtype) for d in documents)]
    ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
    return {"tokens": np.concatenate(parts), "ends": ends}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, whatever happens in between."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
