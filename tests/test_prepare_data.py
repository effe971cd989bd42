"""Shards made ahead of time are those that training makes; killed, it goes on where it was."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.data.hub_server import DATASET, serve
from tests.pipeline import ROOT, Fault, Outcome, run

DOCUMENTS = {"web": 600, "code": 90}


@pytest.fixture
def config(tmp_path):
    """A pretraining config; two thirds of its web source and all of its code for 12 steps."""
    for name, count in DOCUMENTS.items():
        rows = ({"text": f"{name} {i} " + f"{name} of {i * 7} " * (i % 25)} for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = {
        "name": "pretrain",
        "runs_dir": str(tmp_path / "runs"),
        "model": {
            "vocab_size": 320, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1,
            "d_ffn": 32, "max_seq_len": 64,
        },
        "tokenizer": {"vocab_size": 320},
        "data": {
            "cache_dir": str(tmp_path / "cache"), "seq_len": 64, "max_documents_per_row": 8,
            "shard_megabytes": 0.002, "held_out_fraction": 0.1, "workers": 2,
            "sources": [
                {"name": n, "domain": n, "weight": w, "path": str(tmp_path / f"{n}.jsonl")}
                for n, w in (("web", 80), ("code", 20))
            ],
        },
        "train": {"batch_tokens": 4096, "micro_batch": 4, "steps": 12, "eval_every": 12},
        "schedule": {"warmup_steps": 1},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def prepare(config, *argv: object, **how: object) -> Outcome:
    return run("prepare_data", "--config", config, *argv, log=config.parent / "log", **how)


def shards(folder) -> dict[tuple[str, str], bytes]:
    """By source and name."""
    found = folder.rglob("shard_*.safetensors")
    return {(p.parent.name.partition("-")[0], p.name): p.read_bytes() for p in found}


def test_the_table_says_what_there_is(config, tmp_path):
    outcome = prepare(config)
    assert outcome.code == 0, outcome.err
    head, web, code = outcome.out.splitlines()[-3:]
    assert head.split()[:6] == ["source", "documents", "tokens", "shards", "GB", "seconds"]
    assert web.startswith("web")
    assert web.endswith("all that the run needs")
    assert int(web.split()[2].replace(",", "")) >= 0.8 * 12 * 4096
    assert code.endswith("source read to its end")
    recorded = (tmp_path / "cache").glob("code-*/shards.jsonl")
    infos = [json.loads(x) for path in recorded for x in path.read_text().splitlines() if x]
    for column, key in ((1, "documents"), (2, "tokens")):
        assert int(code.split()[column].replace(",", "")) == sum(info[key] for info in infos)
    assert int(code.split()[3]) == len(infos)
    assert "tokenizing web" in outcome.err, "the progress bar"


def test_training_finds_all_that_it_needs(config, tmp_path):
    """For 8 steps, as it reads up to three ahead; it would kill itself at the first shard."""
    assert prepare(config).code == 0
    before = shards(tmp_path / "cache")
    argv, fault = ("--config", config, "train.steps=8"), Fault("data.shards.make_shard", 1)
    outcome = run("train_pretrain", *argv, log=tmp_path / "log", fault=fault)
    assert outcome.code == 0, outcome.err
    assert shards(tmp_path / "cache") == before


@pytest.mark.parametrize("call", [1, 4, 9])
def test_killed_it_goes_on_where_it_was(config, tmp_path, call):
    outcome = prepare(config, "data.cache_dir=" + str(tmp_path / "undisturbed"))
    assert outcome.code == 0, outcome.err
    fault = Fault("data.shards.ShardStore.add", call)
    assert prepare(config, fault=fault).code < 0
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shard_*.safetensors")}
    recorded = {p.parent: p.read_text() for p in (tmp_path / "cache").rglob("shards.jsonl")}
    outcome = prepare(config)
    assert outcome.code == 0, outcome.err
    assert shards(tmp_path / "cache").items() >= shards(tmp_path / "undisturbed").items()
    for path, written in there.items():
        row = int(re.search(r"_(\d+)\.safetensors", path.name)[1])
        if f'"first_row": {row},' in recorded.get(path.parent, ""):
            assert path.stat().st_mtime_ns == written, "it was made already"


def test_a_limit_of_the_disk_is_kept_and_said(config, tmp_path):
    outcome = prepare(config, "data.max_cache_gb=0.00002")
    assert outcome.code == 0, outcome.err
    assert "data.max_cache_gb reached" in outcome.out
    assert len(shards(tmp_path / "cache")) < 60


def test_a_dry_run_reads_nothing(config, tmp_path):
    outcome = prepare(config, "--dry-run", "data.sources.0.path=hub:someone/nothing")
    assert outcome.code == 0, outcome.err
    assert "web: up to 39.3K tokens" in outcome.out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.worker=2", "did you mean 'workers'?"),
        ("data.sources.0.path=nowhere", "no documents at"),
        ("data.workers=-1", "must be 0 or more"),
        ("data.sources.1.text_field=body", "has no field 'body'; it has 'text'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(config, argument, message):
    outcome = prepare(config, argument)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_from_the_hub(config, tmp_path):
    """The whole way from a (local) hub, in a process that finds it by its address alone."""
    with serve(tmp_path / "hub") as (hub, address):
        files = {f"{n}/{n}.jsonl": (tmp_path / f"{n}.jsonl").read_bytes() for n in DOCUMENTS}
        card = "".join(f"- {{config_name: {n}, data_files: {n}/*}}\n" for n in DOCUMENTS)
        hub.commit({"README.md": f"---\nconfigs:\n{card}---\n".encode(), **files})
        argv = itertools.chain.from_iterable(
            (f"data.sources.{i}.path=hub:{DATASET}", f"data.sources.{i}.subset={n}")
            for i, n in enumerate(DOCUMENTS)
        )
        command = [sys.executable, "prepare_data.py", "--config", str(config), *argv]
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
        done = subprocess.run(
            [*command, f"data.cache_dir={tmp_path}/from_hub"],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert prepare(config).code == 0
    assert set(shards(tmp_path / "from_hub").items()) >= set(shards(tmp_path / "cache").items())
