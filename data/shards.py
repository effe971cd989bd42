"""Token shards: every source is tokenized once, into files that can be made again exactly.

    rows of a source file --> [first_row, end_row) --> tokenize --> shard_000042.safetensors

A shard holds the documents of a range of rows of one file. A range ends at the first row that
brings it to `shard_megabytes` of text, so boundaries depend on the text alone: not on workers, on
timing, or on where a run was killed. `manifest.json` records for each shard its file, rows, counts
and checksum; a shard that is missing or damaged is made again from its rows, alone, and must come
out with the recorded checksum.

Held-out documents are chosen by a hash of their content before anything else is decided, so
duplicates of one are held out too, in every epoch and on every machine. They lie in a file of
their own (`held_out.safetensors`), complete before training starts.

The folder's name carries a digest of everything that decides the tokens (files and revisions,
field, tokenizer, shard size, held-out fraction): another tokenizer makes another folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from data.sources import SourceConfig, list_files, read_rows
from data.tokenizer import Tokenizer
from utils.config import ConfigError
from utils.logging import get_logger

FORMAT = 1
HASH_RANGE = 1 << 32


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard; rows are [first_row, end_row) of file number `file`."""

    file: int
    first_row: int
    end_row: int
    documents: int
    tokens: int
    held_out_documents: int
    sha256: str


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
    """

    def __init__(
        self,
        source: SourceConfig,
        tokenizer: Tokenizer,
        cache_dir: str,
        shard_megabytes: float,
        held_out_fraction: float,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.files = list_files(source)
        self.shard_bytes = int(shard_megabytes * 1e6)
        self.held_out_fraction = held_out_fraction
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.directory = Path(cache_dir) / f"{source.name}-{self._digest()}"
        self.shards: list[ShardInfo] = []

    def prepare(self) -> None:
        """Make the shards that are not there yet; a killed run's work is taken up where it ended.

        Raises:
            ConfigError: the source holds no training documents, or a row cannot be read.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / "lock"):
            complete = self._load_manifest()
            if not complete:
                for leftover in self.directory.glob("*.tmp*"):
                    leftover.unlink()
                self._build_remaining()
                self._write_held_out()
                self._write_manifest(complete=True)
        if sum(s.tokens for s in self.shards) == 0:
            raise ConfigError(
                f"source '{self.source.name}': no training documents in {len(self.files)} file(s) "
                f"at '{self.source.path}' (all rows empty or held out); add text or remove it"
            )

    def read(self, index: int) -> Documents:
        """The training documents of one shard, checked; made again if missing or damaged."""
        return _documents(self._load(index), "")

    def held_out(self, max_tokens: int) -> list[np.ndarray]:
        """Held-out documents in the order of the source, until `max_tokens` are reached."""
        path = self.directory / "held_out.safetensors"
        if not path.exists():
            self._write_held_out()
        documents, total = _documents(safetensors.numpy.load(path.read_bytes()), ""), 0
        chosen = []
        for i in range(len(documents)):
            if total >= max_tokens:
                break
            chosen.append(documents[i][: max_tokens - total])
            total += len(chosen[-1])
        return chosen

    def _digest(self) -> str:
        identity = {
            "format": FORMAT,
            "files": [(f.name, f.revision) for f in self.files],
            "text_field": self.source.text_field,
            "tokenizer": self.tokenizer.fingerprint,
            "shard_bytes": self.shard_bytes,
            "held_out_fraction": self.held_out_fraction,
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]

    def _path(self, index: int) -> Path:
        return self.directory / f"shard_{index:06d}.safetensors"

    def _load_manifest(self) -> bool:
        """Read what is recorded; True when every shard is."""
        path = self.directory / "manifest.json"
        if not path.exists():
            return False
        manifest = json.loads(path.read_text())
        self.shards = [ShardInfo(**s) for s in manifest["shards"]]
        return manifest["complete"]

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "source": self.source.model_dump(),
            "tokenizer": self.tokenizer.fingerprint,
            "files": [asdict(f) for f in self.files],
            "complete": complete,
            "shards": [asdict(s) for s in self.shards],
        }
        write_atomic(self.directory / "manifest.json", json.dumps(manifest, indent=1).encode())

    def _build_remaining(self) -> None:
        last = self.shards[-1] if self.shards else None
        start_file, start_row = (last.file, last.end_row) if last else (0, 0)
        bar = tqdm(desc=f"tokenizing {self.source.name}", unit=" tokens", unit_scale=True)
        with bar:
            bar.update(sum(s.tokens for s in self.shards))
            for file in range(start_file, len(self.files)):
                first_row = start_row if file == start_file else 0
                rows = read_rows(self.source, self.files[file], first_row)
                for texts in _split_by_bytes(rows, self.shard_bytes):
                    info = self._make(len(self.shards), file, first_row, texts)
                    self.shards.append(info)
                    self._write_manifest(complete=False)
                    first_row = info.end_row
                    bar.update(info.tokens)

    def _load(self, index: int) -> dict[str, np.ndarray]:
        path = self._path(index)
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != self.shards[index].sha256:
            reason = "damaged" if data else "missing"
            get_logger().warning(f"{path} is {reason}: making it again from its rows")
            data = self._remake(index)
        return safetensors.numpy.load(data)

    def _make(self, index: int, file: int, first_row: int, texts: list[str]) -> ShardInfo:
        data, counts = self._tokenize(texts)
        write_atomic(self._path(index), data)
        sha256 = hashlib.sha256(data).hexdigest()
        return ShardInfo(file, first_row, first_row + len(texts), sha256=sha256, **counts)

    def _tokenize(self, texts: list[str]) -> tuple[bytes, dict[str, int]]:
        """One shard's file content and its counts; empty documents are left out."""
        texts = [t.encode("utf-8", "replace").decode() for t in texts if t]  # lone surrogates
        kept_out = np.array([is_held_out(t, self.held_out_fraction) for t in texts], dtype=bool)
        ids = [np.array(i, dtype=self.dtype) for i in self.tokenizer.encode_documents(texts)]
        training = [d for d, out in zip(ids, kept_out, strict=True) if not out]
        held_out = [d for d, out in zip(ids, kept_out, strict=True) if out]
        tensors = self._tensors(training, "") | self._tensors(held_out, "held_out_")
        counts = {
            "documents": len(training),
            "tokens": sum(map(len, training)),
            "held_out_documents": len(held_out),
        }
        return safetensors.numpy.save(tensors), counts

    def _tensors(self, documents: list[np.ndarray], prefix: str) -> dict[str, np.ndarray]:
        empty = np.empty(0, dtype=self.dtype)
        return {
            f"{prefix}tokens": np.concatenate([empty, *documents]),
            f"{prefix}ends": np.cumsum([len(d) for d in documents], dtype=np.int64),
        }

    def _remake(self, index: int) -> bytes:
        info = self.shards[index]
        rows = read_rows(self.source, self.files[info.file], info.first_row)
        data, _ = self._tokenize(list(islice(rows, info.end_row - info.first_row)))
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise ConfigError(
                f"{self._path(index)} is lost and its rows now tokenize to something else: "
                f"{self.files[info.file].path} or a library has changed since. "
                f"Delete {self.directory} to tokenize anew (the run's data order starts over)"
            )
        write_atomic(self._path(index), data)
        return data

    def _write_held_out(self) -> None:
        documents = []
        for index, info in enumerate(self.shards):
            if info.held_out_documents:
                held_out = _documents(self._load(index), "held_out_")
                documents += [held_out[i] for i in range(len(held_out))]
        data = safetensors.numpy.save(self._tensors(documents, ""))
        write_atomic(self.directory / "held_out.safetensors", data)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is kept out of training: decided by its content alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < fraction * HASH_RANGE


def _documents(tensors: dict[str, np.ndarray], prefix: str) -> Documents:
    return Documents(tensors[f"{prefix}tokens"], tensors[f"{prefix}ends"])


def _split_by_bytes(rows: Iterator[str], limit: int) -> Iterator[list[str]]:
    """Consecutive rows in lists that end with the row that brings them to `limit` bytes."""
    texts, size = [], 0
    for text in rows:
        texts.append(text)
        size += len(text.encode("utf-8", "replace"))
        if size >= limit:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock dies with its process."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
