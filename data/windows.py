"""The endless order of a source's shards, decided without knowing how many there are.

In every epoch the files of a source are permuted. A file is walked through in windows of eight
consecutive shards, and the shards of a window are permuted; at the end of a file a window may be
smaller. So the order follows from (seed, source, epoch) and from the text that was read, never from
how far tokenizing has come, and a source of hundreds of gigabytes can be trained on from its first
window on.

    file 7: [s2 s0 s1 ... ][s9 s15 s8 ... ][s16 s17]   file 3: [ ... ]   ...

`walk` yields windows whose shards are there or on their way. It reads the text and cuts it, which
takes little; tokenizing it is left to a pool of workers. Run in a thread (`read_ahead`) it keeps a
few windows ahead of training, and gives up shards that have been read when the disk is to hold no
more.

Left out: shuffling across windows. A source whose files are sorted by topic should be shuffled.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from data.shards import Key, ShardInfo, ShardJob, ShardStore, cut, make_shard
from data.workers import WorkerPool
from utils.logging import get_logger
from utils.seed import derive, shuffle_order

WINDOW = 8  # shards
WINDOWS_AHEAD = 2  # that wait for training; one more is being made
POLL_S = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a window begins: place of its file in the epoch's order, and its first row there."""

    epoch: int = 0
    file: int = 0
    row: int = 0


@dataclass(frozen=True)
class Window:
    """Consecutive shards of a file, in their order there, and where the next window begins."""

    place: Place
    following: Place
    shards: list[Future[ShardInfo]]


class ShardMaker:
    """Has a source's shards made.

    Args:
        pool: who makes them; None: this thread.
        follow: another process makes them; wait until it has.
        most_bytes: what the source's shards may take on the disk, apart from those of the windows
            ahead and of the one being read; None: do not give up any.
    """

    def __init__(
        self,
        store: ShardStore,
        pool: WorkerPool | None = None,
        follow: bool = False,
        most_bytes: float | None = None,
    ) -> None:
        self.store = store
        self.pool = pool
        self.follow = follow
        self.most_bytes = most_bytes
        self._coming: dict[Key, tuple[Future[ShardInfo], int, bool]] = {}  # not made yet
        self._at: Key | None = None  # (file, row) that comes next in self._rows
        self._rows: Iterator[str]

    def shard(self, file: int, row: int) -> tuple[Future[ShardInfo], int, bool]:
        """The shard that begins at a row, its end, and whether its file ends there."""
        store = self.store
        while self.follow and (file, row) not in store.shards:
            time.sleep(POLL_S)
            store.refresh()
        if coming := self._coming.get((file, row)):  # a short source is in its next epoch already
            return coming
        known = store.shards.get((file, row))
        if known and (self.follow or store.path(known).exists()):
            future: Future[ShardInfo] = Future()
            future.set_result(known)
            return future, known.end_row, known.last
        if known and self.most_bytes is None:
            get_logger().warning(f"{store.path(known)} is missing: making it again from its rows")
        texts, last = self._cut(file, row)
        return self._make(store.job(file, row, texts, last))

    def _make(self, job: ShardJob) -> tuple[Future[ShardInfo], int, bool]:
        key, future = (job.file, job.first_row), Future()

        def done(future: Future[ShardInfo]) -> None:
            if not future.exception():
                self.store.add(future.result())
                self._coming.pop(key, None)

        if self.pool:
            future = self.pool.submit(job)
        else:
            future.set_result(make_shard(job, self.store.tokenizer))
        self._coming[key] = future, job.first_row + len(job.texts), job.last
        coming = self._coming[key]
        future.add_done_callback(done)
        return coming

    def _cut(self, file: int, row: int) -> tuple[list[str], bool]:
        """The texts of a shard, and whether no row comes after them."""
        if self._at != (file, row):
            self._rows = _Peekable(self.store.rows(file, row))
        texts = cut(self._rows, self.store.shard_bytes)
        self._at = (file, row + len(texts))
        return texts, self._rows.ended()


def file_order(store: ShardStore, seed: int, epoch: int) -> list[int]:
    """The order of a source's files in an epoch."""
    key = derive(seed, store.source.name, epoch)
    return shuffle_order(len(store.files), key).tolist()


def shard_order(store: ShardStore, seed: int, window: Window) -> list[int]:
    """The order in which the shards of a window are read."""
    place = window.place
    key = derive(seed, store.source.name, place.epoch, "window", place.file, place.row)
    return shuffle_order(len(window.shards), key).tolist()


def walk(maker: ShardMaker, seed: int, place: Place) -> Iterator[Window]:
    """The windows from a place on, without end."""
    in_use: deque[list[Key]] = deque(maxlen=WINDOWS_AHEAD + 2)
    order = file_order(maker.store, seed, place.epoch)
    while True:
        file, row, last = order[place.file], place.row, False
        shards, keys = [], []
        while not last and len(shards) < WINDOW:
            keys.append((file, row))
            shard, row, last = maker.shard(file, row)
            shards.append(shard)
        following = _after(place, row, last, len(order))
        yield Window(place, following, shards)
        in_use.append(keys)
        if maker.most_bytes is not None:
            kept = [key for window in in_use for key in window]
            maker.store.trim(maker.most_bytes, kept, order, (place.file, place.row))
        if following.epoch != place.epoch:
            order = file_order(maker.store, seed, following.epoch)
        place = following


def _after(place: Place, row: int, file_ends: bool, files: int) -> Place:
    if not file_ends:
        return replace(place, row=row)
    if place.file + 1 < files:
        return replace(place, file=place.file + 1, row=0)
    return Place(place.epoch + 1)


def first_epoch(
    store: ShardStore, seed: int, pool: WorkerPool | None = None, most_tokens: float | None = None
) -> Iterator[ShardInfo]:
    """The shards of the first epoch, made where they are missing.

    Args:
        most_tokens: end with the window that brings them to so many.
    """
    windows, tokens = walk(ShardMaker(store, pool), seed, Place()), 0
    with closing(read_ahead(windows, WINDOWS_AHEAD) if pool else windows) as windows:
        for window in windows:
            if window.place.epoch > 0:
                return
            for shard in window.shards:
                tokens += shard.result().tokens
                yield shard.result()
            if most_tokens is not None and tokens >= most_tokens:
                return


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, taken up to `depth` in advance by a thread; its error comes in its place.

    Closed, it takes one more at most.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                waiting.put((item, None))
                if closed.is_set():
                    return
        except BaseException as error:
            waiting.put((None, error))

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            item, error = waiting.get()
            if error:
                raise error
            yield item
    finally:
        closed.set()
        with suppress(queue.Empty):  # room for what the thread may be holding
            while True:
                waiting.get_nowait()


class _Peekable:
    """An iterator of rows that can tell whether it has ended."""

    def __init__(self, rows: Iterator[str]) -> None:
        self._rows = rows
        self._next: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._next.pop() if self._next else next(self._rows)

    def ended(self) -> bool:
        if not self._next:
            self._next = [row for _, row in zip(range(1), self._rows, strict=False)]
        return not self._next
