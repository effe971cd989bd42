"""The pretraining loader: sources -> shards -> mixture -> packing, with exact state.

    ShardStore --> SourceStream --\
    ShardStore --> SourceStream ---> Mixture --> RowPacker --> [Batch, Batch, ...] of one step
    ShardStore --> SourceStream --/

Everything is a function of the seed and of small counters, so the state of the loader is, for each
source, (epoch, place of the window, shard, document, offset), the token counts of the mixture, and
the piece that the last row had no room for. Loading it reads one shard per source; on an empty disk
it makes the shards of one window per source, from the window's first row on.

Files are permuted in every epoch, shards within their window (`windows.py`), and documents within
their shard. Rows belong to steps, not to processes: each rank builds all rows of a step and keeps
its own, so the batches are the same for any number of ranks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import zip_longest

import numpy as np
import torch

from data.mixture import Mixture
from data.packing import Batch, Piece, RowPacker, cut_document, make_batch, pack_rows
from data.shards import Documents, ShardStore, clean
from data.sources import SourceConfig, sample_texts
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from data.windows import (
    WINDOWS_AHEAD,
    Place,
    ShardMaker,
    Window,
    read_ahead,
    shard_order,
    walk,
)
from data.workers import WorkerPool
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger
from utils.seed import derive, shuffle_order

LONG_WAIT_S = 5.0  # of training for a shard; the first ones take a while


class DataConfig(Config):
    """Where the tokens come from and how they are packed."""

    sources: list[SourceConfig]
    cache_dir: str = "cache"
    """Token shards and trained tokenizers; may be deleted, is then made again."""
    seq_len: int = 2_048
    """Tokens per row (T)."""
    max_documents_per_row: int = 32
    """A row with this many documents is closed early, which bounds `cu_seqlens`."""
    shard_megabytes: float = 8.0
    """Text per token shard; also the window within which documents are shuffled."""
    held_out_fraction: float = 0.005
    """Share of the documents, by content hash, never trained on."""
    held_out_tokens: int = 200_000
    """At most so many held-out tokens per domain are used at an evaluation."""
    workers: int = 0
    """Processes that tokenize ahead of training; 0: the training process tokenizes."""
    max_cache_gb: float | None = None
    """Disk for token shards (about 2 GB per 10**9 tokens), shared out by weight; shards that have
    been read make room and are made again when needed; null: all are kept."""

    def problems(self) -> Iterator[Problem]:
        names = [s.name for s in self.sources]
        if not names:
            yield Problem(("sources",), "sources is empty: name at least one source of documents")
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem(("sources",), f"sources: the name '{name}' is used twice")
        for key in ("seq_len", "max_documents_per_row", "shard_megabytes", "held_out_tokens"):
            if getattr(self, key) <= 0:
                yield Problem((key,), f"{key} ({getattr(self, key)}) must be above 0")
        if self.workers < 0:
            yield Problem(("workers",), f"workers ({self.workers}) must be 0 or more")
        if self.max_cache_gb is not None and self.max_cache_gb < 0:
            yield Problem(
                ("max_cache_gb",), f"max_cache_gb ({self.max_cache_gb}) must be 0 or more"
            )
        if not 0 < self.held_out_fraction < 0.5:
            yield Problem(
                ("held_out_fraction",),
                f"held_out_fraction ({self.held_out_fraction}) must be between 0 and 0.5",
            )

    def held_out_share(self, source: SourceConfig) -> int:
        """How many held-out tokens of a source are used."""
        return self.held_out_tokens // sum(s.domain == source.domain for s in self.sources)

    def cache_bytes(self, source: SourceConfig) -> float | None:
        """What the shards of a source may take on the disk; None: any amount."""
        if self.max_cache_gb is None:
            return None
        return self.max_cache_gb * 1e9 * source.weight / sum(s.weight for s in self.sources)


class SourceStream:
    """An endless stream of one source's pieces, epoch after epoch.

    Args:
        windows: gives the source's windows from a place on.
        seed: decides the order of shards and documents, together with source name and epoch.
        longest: documents are cut into pieces of at most this many tokens.
    """

    def __init__(
        self,
        store: ShardStore,
        windows: Callable[[Place], Iterator[Window]],
        seed: int,
        longest: int,
    ) -> None:
        self.store = store
        self.seed = seed
        self.longest = longest
        self.place = Place()  # of the window
        self.shard = self.document = self.offset = 0
        self._windows_from = windows
        self._forget()

    @property
    def epoch(self) -> int:
        return self.place.epoch

    def peek(self) -> int:
        """Length in tokens of the next piece."""
        return min(len(self._current()) - self.offset, self.longest)

    def next_piece(self) -> Piece:
        document = self._current()
        piece = cut_document(document, self.offset, self.longest)
        self.offset += len(piece)
        if self.offset == len(document):
            self.document, self.offset = self.document + 1, 0
        return piece

    def _forget(self) -> None:
        self._windows: Iterator[Window] | None = None
        self._window: Window | None = None
        self._documents: Documents | None = None
        self._order: np.ndarray

    def _current(self) -> np.ndarray:
        """The document the next piece comes from, loading its shard when it is another."""
        if self._documents is None:
            self._load()
        epoch = self.epoch
        while self.document >= len(self._documents):
            self.shard, self.document = self.shard + 1, 0
            if self.shard == len(self._window.shards):
                self.place, self.shard, self._window = self._window.following, 0, None
            if self.epoch > epoch + 1:
                raise ConfigError(
                    f"source '{self.store.source.name}': no training documents in "
                    f"{len(self.store.files)} file(s) at '{self.store.source.path}' (all rows "
                    "empty or held out); add text or remove it"
                )
            self._load()
        return self._documents[self._order[self.document]]

    def _load(self) -> None:
        """Read the shard, waiting for it if it is not made yet."""
        started = time.monotonic()
        if self._windows is None:
            self._windows = self._windows_from(self.place)
        if self._window is None:
            self._window = next(self._windows)
        index = shard_order(self.store, self.seed, self._window)[self.shard]
        info = self._window.shards[index].result()
        self._documents = self.store.read(info)
        if (waited_s := time.monotonic() - started) > LONG_WAIT_S:
            get_logger().info(
                f"{self.store.source.name}: waited {waited_s:.0f} s for a shard to be tokenized; "
                "if that happens often, raise data.workers or run prepare_data.py before"
            )
        key = derive(self.seed, self.store.source.name, self.epoch, info.file, info.first_row)
        self._order = shuffle_order(len(self._documents), key)

    def state_dict(self) -> dict:
        keys = ("shard", "document", "offset")
        place = {key: getattr(self, key) for key in keys}
        return {"revision": self.store.revision} | asdict(self.place) | place

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state.

        Raises:
            ConfigError: it is of other files.
        """
        if state["revision"] != self.store.revision:
            raise ConfigError(
                f"source '{self.store.source.name}': the files at '{self.store.source.path}' are "
                "not those that the checkpoint was trained on; restore them or start another run"
            )
        self.place = Place(state["epoch"], state["file"], state["row"])
        for key in ("shard", "document", "offset"):
            setattr(self, key, state[key])
        self._forget()


class PretrainLoader:
    """Yields, for each optimizer step, this rank's list of micro-batches.

    Args:
        rows_per_step: rows of all micro-batches and ranks together.
        micro_batch: rows per micro-batch of one rank.
        rank: the first one makes shards that are missing, the others wait for it.
        pool: makes shards ahead; None: they are made when they are needed.
    """

    def __init__(
        self,
        stores: list[ShardStore],
        config: DataConfig,
        seed: int,
        rows_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        pool: WorkerPool | None = None,
    ) -> None:
        self.streams = [
            SourceStream(s, _windows(s, config, seed, pool, rank), seed, config.seq_len)
            for s in stores
        ]
        self.mixture = Mixture([s.source.weight for s in stores], config.seq_len)
        self.packer = RowPacker(config.seq_len, config.max_documents_per_row)
        self.config = config
        self.rows_per_step = rows_per_step
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        pieces = iter(self._next_piece, None)
        rows = [self.packer.next_row(pieces) for _ in range(self.rows_per_step)]
        mine = range(self.rank * self.micro_batch, len(rows), self.world_size * self.micro_batch)
        return [self._batch(rows[start : start + self.micro_batch]) for start in mine]

    def _batch(self, rows: list[list[Piece]]) -> Batch:
        return make_batch(rows, self.config.seq_len, self.config.max_documents_per_row)

    def _next_piece(self) -> Piece:
        source = self.mixture.choose([stream.peek() for stream in self.streams])
        return self.streams[source].next_piece()

    def state_dict(self) -> dict:
        return {
            "sources": {s.store.source.name: s.state_dict() for s in self.streams},
            "mixture": self.mixture.state_dict(),
            "packer": self.packer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for stream in self.streams:
            stream.load_state_dict(state["sources"][stream.store.source.name])
        self.mixture.load_state_dict(state["mixture"])
        self.packer.load_state_dict(state["packer"])


def _windows(
    store: ShardStore, config: DataConfig, seed: int, pool: WorkerPool | None, rank: int
) -> Callable[[Place], Iterator[Window]]:
    """How a loader comes by the windows of a source."""

    def windows(place: Place) -> Iterator[Window]:
        maker = ShardMaker(
            store, pool, rank > 0, None if rank else config.cache_bytes(store.source)
        )
        found = walk(maker, seed, place)
        return read_ahead(found, WINDOWS_AHEAD) if pool else found

    return windows


class Prefetcher:
    """Reads ahead in a thread; its state is that of what it has handed out, not of what it read.

    Where there is a GPU the thread copies batches into pinned memory too: after a step that is
    logged the GPU waits for the next one's first batch, and that copy takes 5 to 10 ms.
    Errors of the loader are raised where its result would have been.
    """

    def __init__(self, loader: PretrainLoader, depth: int = 2) -> None:
        self.loader = loader
        self.depth = depth
        self._state = loader.state_dict()
        self._queue: queue.Queue | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._queue is None:
            self._queue = queue.Queue(self.depth)
            gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
            threading.Thread(target=self._read_ahead, args=(gpu,), daemon=True).start()
        item, self._state = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_ahead(self, gpu: int | None) -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins with the first one
            while True:
                batches = next(self.loader)
                if gpu is not None:
                    batches = [batch.pin_memory() for batch in batches]
                self._queue.put((batches, self.loader.state_dict()))
        except BaseException as error:
            self._queue.put((error, self._state))

    def state_dict(self) -> dict:
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Only before the first batch is taken."""
        self.loader.load_state_dict(state)
        self._state = state


def make_tokenizer(config: TokenizerConfig, sources: list[SourceConfig]) -> Tokenizer:
    """The configured tokenizer; a trained one sees all sources in turn, one document each."""
    if config.path != "trained":
        return load_tokenizer(config)
    turns = zip_longest(*map(sample_texts, sources), fillvalue="")
    return train_tokenizer((clean(text) for turn in turns for text in turn), config)


def open_stores(
    config: DataConfig, tokenizer: Tokenizer, state: dict | None = None
) -> list[ShardStore]:
    """The sources' stores with their held-out documents; `state` is of the loader to resume.

    Raises:
        ConfigError: a source cannot be read.
    """
    stores = []
    for source in config.sources:
        known = state["sources"].get(source.name) if state else None
        store = ShardStore(
            source,
            tokenizer,
            config.cache_dir,
            config.shard_megabytes,
            config.held_out_fraction,
            known["revision"] if known else None,
        )
        store.held_out(config.held_out_share(source))
        stores.append(store)
    return stores


def held_out_batches(
    stores: list[ShardStore], config: DataConfig, micro_batch: int
) -> dict[str, list[Batch]]:
    """The held-out documents of each domain as batches; the last one is filled with empty rows.

    Raises:
        ConfigError: a domain has none.
    """
    batches = {}
    for domain in dict.fromkeys(s.source.domain for s in stores):
        members = [s for s in stores if s.source.domain == domain]
        documents = [d for s in members for d in s.held_out(config.held_out_share(s.source))]
        if not documents:
            for source in (s.source for s in members):
                if not any(sample_texts(source)):
                    raise ConfigError(f"source '{source.name}': no text at '{source.path}'")
            raise ConfigError(
                f"data.held_out_fraction ({config.held_out_fraction}) leaves no held-out document "
                f"in domain '{domain}'; raise it"
            )
        rows = pack_rows(documents, config.seq_len, config.max_documents_per_row)
        rows += [[] for _ in range(-len(rows) % micro_batch)]
        batches[domain] = [
            make_batch(rows[i : i + micro_batch], config.seq_len, config.max_documents_per_row)
            for i in range(0, len(rows), micro_batch)
        ]
    return batches
