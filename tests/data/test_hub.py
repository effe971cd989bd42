"""Hub sources against a hub on this machine: the real libraries, real sockets, real hang-ups."""

import gzip
import hashlib
import io
import json
import shutil
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from data import hub as reader
from data.shards import ShardStore
from data.sources import SourceConfig, list_files, read_rows
from data.streaming import DataConfig, PretrainLoader, open_stores
from data.tokenizer import TokenizerConfig, train_tokenizer
from data.windows import first_epoch
from tests.data.hub_server import DATASET, serve
from tests.data.test_streaming import equal, json_round_trip, take
from utils.config import ConfigError

NOISE = [hashlib.sha512(str(i).encode()).hexdigest() for i in range(900)]  # does not compress
TEXTS = [f"Document {i} says {noise} {'la ' * (i % 40)}." for i, noise in enumerate(NOISE)]
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
CARD = b"""---
configs:
- config_name: columns
  data_files:
  - {split: train, path: columns/*.parquet}
  - {split: test, path: columns/b.parquet}
- config_name: lines
  data_files: lines/*
---
"""


def parquet(texts: list[str]) -> bytes:
    table = pa.table({"text": texts, "other": [t[::-1] for t in texts]})
    pq.write_table(table, buffer := io.BytesIO(), row_group_size=100)
    return buffer.getvalue()


def lines(texts: list[str], field: str) -> bytes:
    return "".join(json.dumps({field: t}) + "\n" for t in texts).encode()


def files(texts: list[str]) -> dict[str, bytes]:
    """Two parquet files, and two of lines whose text is called otherwise."""
    a, b = texts[:500], texts[500:]
    return {
        "README.md": CARD,
        "columns/a.parquet": parquet(a),
        "columns/b.parquet": parquet(b),
        "lines/a.json.gz": gzip.compress(lines(a, "content")),
        "lines/b.jsonl.zst": bytes(pa.compress(lines(b, "content"), "zstd", asbytes=True)),
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one commit; waiting is short and blocks are small, so that much can go wrong."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.002)))
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1 << 11)
    with serve(tmp_path / "hub") as (hub, address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        hub.commit(files(TEXTS))
        yield hub


def source(**changes) -> SourceConfig:
    base = {"name": "s", "path": f"hub:{DATASET}", "weight": 1.0, "subset": "columns"}
    return SourceConfig(**base | changes)


LINES = {"subset": "lines", "text_field": "content"}


def store_of(source: SourceConfig, cache: Path, commit: str | None = None) -> ShardStore:
    return ShardStore(source, TOKENIZER, str(cache), 0.01, 0.1, commit)


def contents(store: ShardStore) -> dict[str, bytes]:
    store.held_out(500)
    list(first_epoch(store, 0))
    return {p.name: p.read_bytes() for p in store.directory.glob("*.safetensors")}


@pytest.mark.parametrize("kind", [{}, LINES], ids=["parquet", "json"])
@pytest.mark.parametrize("start", [0, 1, 250, 499, 500])
def test_rows_from_any_row_on(hub, kind, start):
    a, b = list_files(source(**kind))
    assert list(read_rows(source(**kind), a, start)) == TEXTS[start:500]
    assert list(read_rows(source(**kind), b, 7)) == TEXTS[507:]


def test_a_split_has_its_own_files(hub):
    (only,) = list_files(source(split="test"))
    assert only.path.endswith("b.parquet")


@pytest.mark.parametrize("kind", [{}, LINES], ids=["parquet", "json"])
def test_disconnects_change_no_shard(hub, tmp_path, kind):
    """A fifth of all answers is cut short, and two outages outlast the library's own retries."""
    folder = tmp_path / "hub" / hub.commits[0] / kind.get("subset", "columns")
    local = source(path=str(folder), text_field=kind.get("text_field", "text"))
    expected = contents(store_of(local, tmp_path / "local"))
    assert contents(store_of(source(**kind), tmp_path / "undisturbed")) == expected
    hub.hang_up = 0.2
    hub.outage = 9
    store = store_of(source(**kind), tmp_path / "disturbed")
    store.held_out(500)
    hub.outage = 20
    assert contents(store) == expected
    assert hub.hung_up > 9 + 20, "and some at random"


def test_a_hub_that_stays_away_is_said(hub):
    file = list_files(source())[0]
    hub.hang_up = 1.0
    with pytest.raises(ConfigError, match=r"could not get .* from the hub.*Check the network"):
        list(read_rows(source(), file))


def test_a_pinned_commit_outlives_the_hub_s_next_one(hub, tmp_path):
    before = contents(store_of(source(), tmp_path / "cache"))
    first = hub.commits[0]
    hub.commit(files([t.replace("says", "sings") for t in TEXTS]))
    store = store_of(source(), tmp_path / "cache")
    assert store.revision == first
    assert contents(store) == before
    for path in store.directory.glob("shard_*"):
        path.unlink()
    assert contents(store_of(source(), tmp_path / "cache")) == before, "made again from the old one"
    assert store_of(source(), tmp_path / "new").revision == hub.commits[1]
    assert contents(store_of(source(), tmp_path / "lost", first)) == before
    assert contents(store_of(source(), tmp_path / "new", first)) == before, "beside the new one"
    assert contents(store_of(source(revision=first), tmp_path / "named")) == before


def test_what_is_on_the_disk_needs_no_hub(hub, tmp_path):
    before = contents(store_of(source(), tmp_path / "cache"))
    asked = len(hub.requests)
    assert contents(store_of(source(), tmp_path / "cache")) == before
    assert len(hub.requests) == asked


def test_a_run_resumed_on_an_empty_disk_reads_its_own_commit(hub, tmp_path):
    config = DataConfig(
        sources=[source()],
        cache_dir=str(tmp_path / "cache"),
        seq_len=64,
        shard_megabytes=0.004,
        held_out_fraction=0.1,
    )

    def loader(state: dict | None) -> PretrainLoader:
        loader = PretrainLoader(open_stores(config, TOKENIZER, state), config, 0, 8, 8)
        if state:
            loader.load_state_dict(state)
        return loader

    whole = loader(None)
    take(whole, 9)
    state, expected = json_round_trip(whole.state_dict()), take(whole, 9)
    shutil.rmtree(tmp_path / "cache")
    hub.commit(files([t.upper() for t in TEXTS]))
    for batches, again in zip(expected, take(loader(state), 9), strict=True):
        assert equal(batches, again)


MISTAKES = {
    "dataset": ({"path": "hub:someone/nothing"}, "no such dataset, or it is private. Check the id"),
    "subset": ({"subset": "rows"}, "'rows' not found. Available: ['columns', 'lines']. Set the"),
    "no subset": ({"subset": None}, "pick one among the available configs: ['columns', 'lines']"),
    "split": ({"split": "dev"}, "has no split 'dev'; it has 'train', 'test'. Set the source's"),
    "revision": ({"revision": "v9"}, "no such revision. Set or remove the source's revision"),
    "column": ({"text_field": "body"}, "no column 'body'; it has 'text', 'other'. Set the"),
    "field": (LINES | {"text_field": "text"}, "no field 'text'; it has 'content'. Set the"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_its_remedy(hub, case):
    changes, message = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        for file in list_files(source(**changes)):
            list(read_rows(source(**changes), file))
    assert message in str(error.value)


def test_a_gated_dataset_names_its_page(hub):
    hub.gated = True
    with pytest.raises(ConfigError, match=rf"gated.*/datasets/{DATASET} and run `hf auth login`"):
        list_files(source())


def test_no_network_is_said(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"Check the network.*or download its files"):
        list_files(source())


def test_files_of_no_known_kind_are_said(hub):
    hub.commit({"README.md": b"", "data/a.csv": b"text\nx\n"})
    with pytest.raises(ConfigError, match=r"a\.csv, \.\.\.\) are none of \.jsonl"):
        list_files(source(subset=None))
