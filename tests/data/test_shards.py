"""Shards are made once, the same whatever happens, and mended alone when lost."""

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import ShardInfo, ShardStore, is_held_out
from data.sources import SourceConfig
from data.tokenizer import TokenizerConfig, train_tokenizer
from data.windows import first_epoch
from utils.config import ConfigError

TEXTS = [f"Document {i} says {'la ' * (i % 40)}and ends." for i in range(400)]
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
FRACTION = 0.1


@pytest.fixture
def files(tmp_path):
    """400 documents in two files."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in (("a.jsonl", TEXTS[:250]), ("b.jsonl", TEXTS[250:])):
        (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def make_store(files, cache, fraction=FRACTION) -> ShardStore:
    source = SourceConfig(name="s", path=str(files), weight=1.0)
    return ShardStore(source, TOKENIZER, str(cache), 0.004, fraction)


def prepared(files, cache) -> ShardStore:
    """A store with all its shards and the held-out documents."""
    store = make_store(files, cache)
    store.held_out(10**9)
    list(first_epoch(store, seed=0))
    return store


def contents(store: ShardStore) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.directory.glob("*.safetensors"))}


def in_order(store: ShardStore) -> list[ShardInfo]:
    return [store.shards[key] for key in sorted(store.shards)]


def test_shards_hold_every_training_document_in_order(files, tmp_path):
    store = prepared(files, tmp_path / "cache")
    assert len(store.shards) > 3
    read = [store.read(info) for info in in_order(store)]
    documents = [d[i].tolist() for d in read for i in range(len(d))]
    training = [t for t in TEXTS if not is_held_out(t, FRACTION)]
    held_out = [t for t in TEXTS if is_held_out(t, FRACTION)]
    assert documents == TOKENIZER.encode_documents(training)
    assert [d.tolist() for d in store.held_out(10**9)] == TOKENIZER.encode_documents(held_out)
    assert 0.05 < len(held_out) / len(TEXTS) < 0.15


def test_the_record_says_what_each_shard_holds(files, tmp_path):
    store = prepared(files, tmp_path / "cache")
    manifest = json.loads((store.directory / "manifest.json").read_text())
    assert [Path(f["path"]).name for f in manifest["files"]] == ["a.jsonl", "b.jsonl"]
    lines = (store.directory / "shards.jsonl").read_text().splitlines()
    recorded = [ShardInfo(**json.loads(line)) for line in lines if line]
    assert sorted(recorded, key=lambda s: (s.file, s.first_row)) == in_order(store)
    for info, following in itertools.pairwise(in_order(store)):
        assert info.first_row < info.end_row
        assert following.first_row == (0 if info.last else info.end_row)
        assert following.file == info.file + info.last
    assert sum(s.documents + s.held_out_documents for s in in_order(store)) == 400


def test_nothing_there_is_tokenized_again(files, tmp_path, monkeypatch):
    before = contents(prepared(files, tmp_path / "cache"))
    monkeypatch.setattr(shards, "_tokenize", None)  # calling it would raise
    monkeypatch.setattr(shards, "read_rows", None)
    assert contents(prepared(files, tmp_path / "cache")) == before


@pytest.mark.parametrize("damage", ["delete", "flip", "truncate"])
def test_a_lost_shard_is_made_again_alone(files, tmp_path, monkeypatch, damage):
    store = prepared(files, tmp_path / "cache")
    before, info = contents(store), in_order(store)[1]
    path = store.path(info)
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[-20] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-5])
    made = []
    tokenize = shards._tokenize
    monkeypatch.setattr(
        shards,
        "_tokenize",
        lambda job, tokenizer: made.append(len(job.texts)) or tokenize(job, tokenizer),
    )
    again = prepared(files, tmp_path / "cache")
    for i in in_order(again):
        again.read(i)
    assert made == [info.end_row - info.first_row]
    assert contents(again) == before


def test_a_lost_shard_whose_text_has_changed_is_refused(files, tmp_path):
    store = prepared(files, tmp_path / "cache")
    info = in_order(store)[0]
    store.path(info).unlink()
    lines = (files / "a.jsonl").read_text().splitlines(keepends=True)
    (files / "a.jsonl").write_text("".join([json.dumps({"text": "other"}) + "\n", *lines[1:]]))
    with pytest.raises(ConfigError, match="tokenize to something else"):
        store.read(info)


def test_another_tokenizer_or_fraction_makes_another_folder(files, tmp_path):
    base = make_store(files, tmp_path)
    assert make_store(files, tmp_path, fraction=0.2).directory != base.directory
    moved = files.parent / "moved"
    files.rename(moved)
    assert make_store(moved, tmp_path).directory == base.directory


def test_lone_surrogates_do_not_stop_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "c"}\n')
    store = make_store(tmp_path / "a.jsonl", tmp_path / "cache", fraction=1e-9)
    (info,) = first_epoch(store, seed=0)
    assert TOKENIZER.decode(store.read(info)[0]) == "a ? b"


def test_held_out_is_cut_at_the_asked_number_of_tokens(files, tmp_path):
    store = prepared(files, tmp_path / "cache")
    assert sum(map(len, store.held_out(50))) == 50
    assert np.array_equal(store.held_out(50)[0], store.held_out(10**9)[0][:50])


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 7])
def test_a_build_killed_at_a_write_goes_on_where_it_was(files, tmp_path, monkeypatch, kill_at):
    """Manifest, held-out documents, then a shard each: it dies just before one is there."""
    before = contents(prepared(files, tmp_path / "undisturbed"))
    child = os.fork()
    if child == 0:
        calls, replace = iter(range(1, 1000)), Path.replace

        def replace_or_die(self: Path, target: Path) -> Path:
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        try:
            monkeypatch.setattr(Path, "replace", replace_or_die)
            prepared(files, tmp_path / "cache")
        finally:  # whatever it raises: it is no second run of all tests
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = prepared(files, tmp_path / "cache")
    assert contents(store) == before
    assert not list(store.directory.glob("*.tmp*")), "a killed build's temporaries are removed"
