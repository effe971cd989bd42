"""Shards and their order are the same for any number of workers, whoever is killed or slow."""

import contextlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.shards import ShardStore
from data.sources import SourceConfig
from data.streaming import DataConfig, PretrainLoader, open_stores
from data.tokenizer import TokenizerConfig, train_tokenizer
from data.windows import WINDOW, Place, ShardMaker, first_epoch, read_ahead, walk
from data.workers import LIVES, WorkerPool
from tests.data.test_streaming import equal, json_round_trip, take
from utils.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = {"a": 300, "b": 0, "c": 500, "d": 1, "e": 200}  # documents; one file holds none


def texts(name: str) -> list[str]:
    return [f"{name} {i} " + f"{name} word {i * 7} " * (i % 30) for i in range(FILES[name])]


TOKENIZER = train_tokenizer(itertools.chain(*map(texts, FILES)), TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in FILES:
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts(name))
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> ShardStore:
    """All shards, made in this process."""
    store = new_store(folder, tmp_path_factory.mktemp("whole"))
    list(first_epoch(store, seed=0))
    return store


def new_store(folder: Path, cache: Path) -> ShardStore:
    source = SourceConfig(name="s", path=str(folder), weight=1.0)
    return ShardStore(source, TOKENIZER, str(cache), 0.004, 0.1)


@pytest.fixture
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """Makes pools that end with the test."""
    with contextlib.ExitStack() as pools:
        yield lambda workers: pools.enter_context(WorkerPool(workers, TOKENIZER))


def contents(store: ShardStore) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.directory.glob("shard_*.safetensors")}


def children(parent: int) -> list[int]:
    """The workers of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
            if int(fields[1]) == parent and fields[0] != "Z" and b"-m\0data.workers" in command:
                found.append(int(status.parent.name))
    return found


@contextlib.contextmanager
def disturbing(
    send: tuple[int, ...], pause_s: float = 0.3, most: int = LIVES - 1
) -> Iterator[list[int]]:
    """Random workers get signals while this is open, fewer than kill a job; yields who was hit."""
    generator, done, hit = random.Random(0), threading.Event(), []

    def disturb() -> None:
        while not done.wait(generator.uniform(0, pause_s)):
            if (there := children(os.getpid())) and len(hit) < most:
                hit.append(generator.choice(there))
                for number in send:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(hit[-1], number)
                    time.sleep(0.02)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield hit
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_workers_makes_the_same_shards(whole, folder, tmp_path, pool, count):
    store = new_store(folder, tmp_path)
    made = list(first_epoch(store, 0, pool(count)))
    assert len(made) > 3 * WINDOW
    assert store.shards == whole.shards
    assert contents(store) == contents(whole)
    assert made == list(first_epoch(whole, 0)), "the order is training's"


def test_killed_workers_are_replaced(whole, folder, tmp_path, pool):
    two = pool(2)
    with disturbing((signal.SIGKILL,)) as hit:
        for turn in itertools.count():
            store = new_store(folder, tmp_path / str(turn))
            list(first_epoch(store, 0, two))
            assert contents(store) == contents(whole)
            again = new_store(folder, tmp_path / str(turn))
            assert again.shards == whole.shards, "every shard is recorded"
            if len(hit) == LIVES - 1:
                break


def test_a_shard_that_kills_every_worker_is_said(folder, tmp_path, pool):
    store = new_store(folder, tmp_path)
    with (
        disturbing((signal.SIGKILL,), pause_s=0.001, most=10**9),
        pytest.raises(ConfigError, match=r"died over the same shard.*lower data\.workers"),
    ):
        list(first_epoch(store, 0, pool(1)))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(folder, tmp_path, end):
    """The parent has two workers busy; nobody tells them that it was killed."""
    code = (
        "import sys, time\n"
        "from data.workers import WorkerPool\n"
        "from tests.data.test_windows import *\n"
        "pool = WorkerPool(2, TOKENIZER)\n"
        f"store = new_store(Path({str(folder)!r}), Path({str(tmp_path)!r}))\n"
        "futures = [pool.submit(store.job(0, i, texts('c') * 200, False)) for i in range(4)]\n"
        "print('busy', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    try:
        assert parent.stdout.readline() == b"busy\n"
        while len(family := children(parent.pid)) < 2:  # each starts with its first job
            assert time.monotonic() < deadline, "no second worker"
            time.sleep(0.01)
        assert all(os.getsid(pid) == pid for pid in family), "a terminal's Ctrl-C would reach them"
        parent.send_signal(end)
        parent.wait()
    finally:
        parent.kill()
        parent.wait()
    while any(alive(pid) for pid in family):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def test_a_worker_whose_parent_goes_while_it_starts_says_nothing(folder, tmp_path):
    """It reads half a tokenizer, or a job whose answer nobody takes."""
    tokenizer = pickle.dumps(TOKENIZER.state_dict())
    job = pickle.dumps(new_store(folder, tmp_path).job(0, 0, texts("a"), False))
    for sent in (b"", tokenizer[:-9], tokenizer + job):
        with subprocess.Popen(
            [sys.executable, "-m", "data.workers"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as worker:  # fmt: skip
            worker.stdout.close()
            worker.stdin.write(sent)
            worker.stdin.flush()
            if sent != tokenizer + job:  # else it is the answer that finds nobody
                worker.stdin.close()
            assert worker.stderr.read() == b""
            worker.stdin.close()
        assert worker.returncode == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_is_said(folder, tmp_path):
    """The workers may write no file beyond 2 kB, as on a disk with little room."""
    code = (
        "import resource, signal\n"
        "from tests.data.test_windows import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))\n"
        f"store = new_store(Path({str(folder)!r}), Path({str(tmp_path)!r}))\n"
        "try:\n"
        "    list(first_epoch(store, 0, WorkerPool(2, TOKENIZER)))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "not written: File too large. Make room, or lower data.max_cache_gb" in told.stdout


def test_windows_cover_every_epoch_in_an_order_of_its_own(whole):
    windows = walk(ShardMaker(whole), 0, Place())
    epochs: dict[int, list] = {0: [], 1: [], 2: []}
    for window in windows:
        if window.place.epoch == 2:
            break
        infos = [shard.result() for shard in window.shards]
        assert len(infos) == WINDOW or infos[-1].last
        assert len({info.file for info in infos}) == 1
        epochs[window.place.epoch] += infos
    assert set(epochs[0]) == set(epochs[1]) == set(whole.shards.values())
    files = [list(dict.fromkeys(info.file for info in epochs[e])) for e in (0, 1)]
    assert files[0] != files[1]


# ---------------------------------------------------------------------------------------------
# The loader over shards that are made while it reads


@pytest.fixture(scope="module")
def config(folder) -> DataConfig:
    return DataConfig(
        sources=[
            {"name": "all", "domain": "web", "weight": 80.0, "path": str(folder)},
            {"name": "some", "domain": "code", "weight": 20.0, "path": str(folder / "e.jsonl")},
        ],
        seq_len=64,
        max_documents_per_row=8,
        shard_megabytes=0.004,
        held_out_fraction=0.1,
    )


def open_loader(config, cache, pool=None, **changes) -> PretrainLoader:
    config = config.model_copy(update={"cache_dir": str(cache)} | changes)
    return PretrainLoader(open_stores(config, TOKENIZER), config, 0, 16, 16, pool=pool)


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """Batches of two epochs and the states before them, without workers."""
    loader, states, batches = open_loader(config, tmp_path_factory.mktemp("cache")), [], []
    while loader.streams[0].epoch < 2:
        states.append(json_round_trip(loader.state_dict()))
        batches.append(next(loader))
    assert len(batches) > 100
    return states, batches


@pytest.mark.parametrize("disturbance", ["none", "slow", "killed"])
@pytest.mark.parametrize("cache_gb", [None, 0.0])
def test_batches_do_not_depend_on_the_workers(
    reference, config, tmp_path, pool, disturbance, cache_gb
):
    """Workers that are stopped for a while at random are slow ones."""
    _, batches = reference
    send = {"slow": (signal.SIGSTOP, signal.SIGCONT), "killed": (signal.SIGKILL,), "none": ()}
    loader = open_loader(config, tmp_path, pool(2), max_cache_gb=cache_gb)
    with disturbing(send[disturbance]) as hit:
        for step, expected in enumerate(batches):
            assert equal(next(loader), expected)
            while step == 3 and disturbance != "none" and len(hit) < 2:
                time.sleep(0.01)


@pytest.mark.parametrize("cache_gb", [0.0, 60e-6])
def test_the_disk_is_bounded(reference, config, tmp_path, cache_gb):
    """No more than the limit and the windows in use; what was given up is made again alike."""
    _, batches = reference
    loader = open_loader(config, tmp_path, max_cache_gb=cache_gb)
    most = present = 0
    for expected in batches:
        assert equal(next(loader), expected)
        sizes = [p.stat().st_size for p in loader.streams[0].store.directory.glob("shard_*")]
        most, present = max(most, sum(sizes)), max(present, len(sizes))
    largest = max(sizes)  # of what is left
    assert most <= 0.8 * cache_gb * 1e9 + 4 * WINDOW * largest
    assert present < len(loader.streams[0].store.shards)


def test_a_resume_on_an_empty_disk_reads_from_its_window_on(reference, config, tmp_path):
    states, batches = reference
    for at in random.Random(0).sample(range(len(states) - 1), 6):
        loader = open_loader(config, tmp_path / str(at))
        loader.load_state_dict(states[at])
        assert equal(take(loader, 1)[0], batches[at])
        stores = [stream.store for stream in loader.streams]
        assert all(len(store.shards) <= 2 * WINDOW for store in stores)
        assert equal(take(loader, 1)[0], batches[at + 1])


def test_a_follower_waits_for_who_makes_the_shards(reference, config, tmp_path):
    _, batches = reference
    changed = config.model_copy(update={"cache_dir": str(tmp_path)})
    open_stores(changed, TOKENIZER)  # as the first process does before the others look
    follower = PretrainLoader(open_stores(changed, TOKENIZER), changed, 0, 16, 8, 1, 2)
    got: list = []
    thread = threading.Thread(target=lambda: got.extend(next(follower) for _ in range(30)))
    thread.start()
    leader = PretrainLoader(open_stores(changed, TOKENIZER), changed, 0, 16, 8, 0, 2)
    expected = [next(leader) for _ in range(30)]
    thread.join(300)
    for (first,), (second,), (both,) in zip(expected, got, batches, strict=False):
        assert first.tokens.tolist() + second.tokens.tolist() == both.tokens.tolist()
    assert len(got) == 30


def test_other_files_than_the_checkpoint_s_are_refused(reference, config, folder, tmp_path):
    states, _ = reference
    copy = tmp_path / "text"
    copy.mkdir()
    for path in folder.glob("*.jsonl"):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "e.jsonl").write_text('{"text": "another"}\n' * 200)
    sources = [s.model_copy(update={"path": s.path.replace(str(folder), str(copy))})
               for s in config.sources]  # fmt: skip
    loader = open_loader(config, tmp_path / "cache", sources=sources)
    with pytest.raises(ConfigError, match="not those that the checkpoint was trained on"):
        loader.load_state_dict(states[3])


def test_a_source_without_documents_is_said(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    source = {"name": "s", "weight": 1.0, "path": str(tmp_path / "empty.jsonl")}
    config = DataConfig(sources=[source], seq_len=64)
    with pytest.raises(ConfigError, match="no training documents"):
        next(open_loader(config, tmp_path))


def test_reading_ahead_ends_when_closed():
    """Its thread, waiting with an item in hand, goes away."""
    before = set(threading.enumerate())  # other tests' may be ending
    items = read_ahead(itertools.count(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    (thread,) = set(threading.enumerate()) - before
    items.close()
    thread.join(300)
    assert not thread.is_alive()
