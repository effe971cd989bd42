"""The loader: the same batches from any point on, for any number of ranks, at exact shares."""

import json

import pytest
import torch

from data.packing import IGNORE, Batch
from data.shards import ShardStore
from data.sources import SourceConfig
from data.streaming import (
    DataConfig,
    Prefetcher,
    PretrainLoader,
    held_out_batches,
    make_tokenizer,
)
from data.tokenizer import TokenizerConfig, train_tokenizer
from data.windows import first_epoch
from utils.config import ConfigError

LENGTHS = {"web": 60, "code": 25, "math": 9}  # documents; the smallest source repeats soonest
WEIGHTS = {"web": 80.0, "code": 15.0, "math": 5.0}


def text(name: str, i: int) -> str:
    return f"{name} {i} " + f"{name} word {i * 7} " * (i % 30)


TOKENIZER = train_tokenizer(
    [text(n, i) for n, count in LENGTHS.items() for i in range(count)],
    TokenizerConfig(vocab_size=300),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, count in LENGTHS.items():
        lines = [json.dumps({"text": text(name, i)}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(folder) -> DataConfig:
    return DataConfig(
        sources=[
            {"name": n, "domain": n, "weight": w, "path": str(folder / f"{n}.jsonl")}
            for n, w in WEIGHTS.items()
        ],
        cache_dir=str(folder / "cache"),
        seq_len=64,
        max_documents_per_row=8,
        shard_megabytes=0.002,
        held_out_fraction=0.3,
    )


@pytest.fixture(scope="module")
def stores(config) -> list[ShardStore]:
    stores = [
        ShardStore(s, TOKENIZER, config.cache_dir, config.shard_megabytes, config.held_out_fraction)
        for s in config.sources
    ]
    for store in stores:
        list(first_epoch(store, seed=0))
    return stores


def loader(stores, config, rows=4, micro_batch=4, rank=0, world_size=1, seed=0) -> PretrainLoader:
    return PretrainLoader(stores, config, seed, rows, micro_batch, rank, world_size)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.targets, y.targets)
        and torch.equal(x.cu_seqlens, y.cu_seqlens)
        for x, y in zip(a, b, strict=True)
    )


def take(iterator, n: int) -> list[list[Batch]]:
    return [next(iterator) for _ in range(n)]


def test_a_resume_at_every_step_gives_the_same_batches(stores, config):
    """200 steps: each source repeats, and rows end in the middle of documents."""
    whole, states = loader(stores, config), []
    batches = []
    for _ in range(200):
        states.append(json_round_trip(whole.state_dict()))
        batches.append(next(whole))
    assert min(s.epoch for s in whole.streams) >= 1
    assert any(s["packer"]["open"] is not None for s in states)
    for at in range(0, 199, 3):
        resumed = loader(stores, config)
        resumed.load_state_dict(states[at])
        assert equal(next(resumed), batches[at])
        again = loader(stores, config)  # a second resume, one step later
        again.load_state_dict(json_round_trip(resumed.state_dict()))
        assert equal(next(again), batches[at + 1])


def json_round_trip(state: dict) -> dict:
    """A copy that shares nothing with the loader."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_resume_opens_one_shard_per_source(stores, config, monkeypatch):
    whole = loader(stores, config)
    take(whole, 37)
    opened = []
    read = ShardStore.read
    monkeypatch.setattr(
        ShardStore, "read", lambda self, i: opened.append(self.source.name) or read(self, i)
    )
    resumed = loader(stores, config)
    resumed.load_state_dict(whole.state_dict())
    resumed.packer.next_row(iter(resumed._next_piece, None))
    assert sorted(opened) == sorted(WEIGHTS)


def test_read_ahead_does_not_skew_the_state(stores, config):
    plain, ahead = loader(stores, config), Prefetcher(loader(stores, config), depth=5)
    for _ in range(20):
        assert equal(next(plain), next(ahead))
        resumed = Prefetcher(loader(stores, config))
        resumed.load_state_dict(ahead.state_dict())
        assert equal(next(resumed), take(restored(plain, stores, config), 1)[0])


@pytest.mark.gpu
def test_read_ahead_leaves_nothing_for_the_loop_to_copy(stores, config):
    plain, ahead = loader(stores, config), Prefetcher(loader(stores, config))
    batches = next(ahead)
    assert equal(next(plain), batches)
    for batch in batches:
        assert batch.tokens.is_pinned() and batch.cu_seqlens.is_pinned()
        assert batch.pin_memory().tokens.data_ptr() == batch.tokens.data_ptr()


def restored(other: PretrainLoader, stores, config) -> PretrainLoader:
    copy = loader(stores, config)
    copy.load_state_dict(json_round_trip(other.state_dict()))
    return copy


def test_errors_of_the_reader_reach_the_loop(stores, config):
    class Failing(PretrainLoader):
        def __next__(self) -> list[Batch]:
            raise ConfigError("no more")

    ahead = Prefetcher(Failing(stores, config, 0, 4, 4))
    with pytest.raises(ConfigError, match="no more"):
        next(ahead)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 2), (2, 4), (4, 1)])
def test_ranks_and_micro_batches_share_out_the_same_rows(stores, config, world_size, micro_batch):
    whole = loader(stores, config, rows=8, micro_batch=8)
    ranks = [loader(stores, config, 8, micro_batch, r, world_size) for r in range(world_size)]
    for _ in range(5):
        (expected,) = next(whole)
        parts = [next(r) for r in ranks]
        in_order = [parts[r][m] for m in range(len(parts[0])) for r in range(world_size)]
        assert torch.equal(torch.cat([b.tokens for b in in_order]), expected.tokens)
        assert sum(b.weight for b in in_order) == expected.weight


def test_shares_are_exact_at_every_row(stores, config):
    reader = loader(stores, config, rows=1, micro_batch=1)
    for _ in range(500):
        next(reader)
        total = sum(reader.mixture.tokens)
        for tokens, weight in zip(reader.mixture.tokens, WEIGHTS.values(), strict=True):
            assert abs(tokens - weight / 100 * total) <= config.seq_len


def test_an_epoch_gives_every_training_token_once(stores, config):
    (store,) = stores[1:2]
    only = loader([store], config, rows=1, micro_batch=1)
    counts = torch.zeros(300, dtype=torch.int64)
    while only.streams[0].epoch == 0:
        piece = only.streams[0].next_piece()
        counts += torch.bincount(torch.from_numpy(piece.tokens), minlength=300)
        only.streams[0].peek()  # moves on to the next epoch when this one ends
    expected = torch.zeros(300, dtype=torch.int64)
    for info in store.shards.values():
        tokens = torch.from_numpy(store.read(info).tokens.astype("int64"))
        expected += torch.bincount(tokens, minlength=300)
    assert torch.equal(counts, expected)


def test_epochs_and_seeds_have_orders_of_their_own(stores, config):
    first, other_seed = loader(stores, config), loader(stores, config, seed=1)
    assert not equal(next(first), next(other_seed))
    stream = first.streams[0]
    epochs: list[list[int]] = []
    for epoch in range(2):
        stream.load_state_dict(stream.state_dict() | {"epoch": epoch, "document": 0, "offset": 0})
        epochs.append(stream.next_piece().tokens.tolist())
    assert epochs[0] != epochs[1]


def test_held_out_documents_are_never_trained_on(stores, config):
    batches = held_out_batches(stores, config, micro_batch=2)
    assert set(batches) == set(WEIGHTS)
    held_out = {tuple(d.tolist()) for s in stores for d in s.held_out(10**9)}
    training = {
        tuple(d[i].tolist())
        for s in stores
        for d in map(s.read, s.shards.values())
        for i in range(len(d))
    }
    assert held_out
    assert not held_out & training
    learned = sum(int((b.targets != IGNORE).sum()) for bs in batches.values() for b in bs)
    assert learned == sum(len(d) - 1 for d in held_out)


def test_a_domain_without_held_out_documents_is_refused(folder, config):
    changed = config.model_copy(update={"held_out_fraction": 1e-9})
    store = ShardStore(config.sources[0], TOKENIZER, str(folder / "cache2"), 0.002, 1e-9)
    with pytest.raises(ConfigError, match="raise it"):
        held_out_batches([store], changed, 2)


def test_half_an_emoji_does_not_stop_a_tokenizer_from_being_trained(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n' * 30)
    source = SourceConfig(name="a", path=str(path), weight=1.0)
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=300), [source])
    assert tokenizer.decode(tokenizer.encode("a ? b")) == "a ? b"


def test_a_source_without_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9)
    source = SourceConfig(name="a", path=str(tmp_path / "a.jsonl"), weight=1.0)
    store = ShardStore(source, TOKENIZER, str(tmp_path / "cache"), 1.0, 0.1)
    config = DataConfig(sources=[source], cache_dir=str(tmp_path / "cache"), seq_len=64)
    with pytest.raises(ConfigError, match=r"source 'a': no text at '.*a.jsonl'"):
        held_out_batches([store], config, 1)
