"""Whole runs of the pretraining script in which one thing is special: its optimizer is Muon, or W&B
cannot be had."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from tests.pipeline import Fault, Outcome, numbers, run
from utils import checkpoint


@pytest.fixture
def config(tmp_path) -> Path:
    """Twelve steps of a model of two thousand parameters, on one small source."""
    rows = ({"text": f"page {i} " + f"line {i * 7} " * (i % 25)} for i in range(100))
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "pretrain",
        "runs_dir": str(tmp_path / "runs"),
        "model": {
            "vocab_size": 320, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1,
            "d_ffn": 32, "max_seq_len": 64,
        },
        "tokenizer": {"vocab_size": 320},
        "data": {
            "cache_dir": str(tmp_path / "cache"), "seq_len": 64, "held_out_fraction": 0.3,
            "sources": [{"name": "web", "weight": 1, "path": str(tmp_path / "web.jsonl")}],
        },
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2, "decay_fraction": 0.25},
        "train": {
            "batch_tokens": 512, "micro_batch": 4, "steps": 12, "log_every": 3, "eval_every": 6,
            "save_every": 4, "save_every_hours": None,
        },
        "runtime": {"deterministic": True},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pretrain(config: Path, *argv: object, **how: object) -> Outcome:
    return run("train_pretrain", "--config", config, *argv, log=config.parent / "log", **how)


def muon(config: Path, *argv: object, **how: object) -> Outcome:
    return pretrain(config, "optim.kind=muon", *argv, **how)


def test_a_killed_run_of_muon_resumed_is_the_uninterrupted_run(config, tmp_path):
    whole = muon(config, f"runs_dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    killed = muon(config, fault=Fault("train.loop.train_step", 10))
    assert killed.code == -signal.SIGKILL
    resumed = muon(config, "--resume")
    assert resumed.code == 0, resumed.err
    ours, theirs = (tmp_path / folder / "pretrain" for folder in ("runs", "whole"))
    one, other = (checkpoint.load(f / "pretrain_final.pt")["model"] for f in (ours, theirs))
    assert all(torch.equal(one[key], other[key]) for key in one)
    metrics = numbers(ours / "metrics.jsonl")
    assert metrics == numbers(theirs / "metrics.jsonl")
    assert all(m["stability/update_norm"] > 0 for m in metrics if "train/loss" in m)


def test_a_branch_takes_its_own_values_but_not_another_optimizer(config, tmp_path):
    assert muon(config).code == 0
    stable = tmp_path / "runs/pretrain/checkpoints/step_00000008.pt"
    branch = ("name=branch", "--resume-from", stable, "train.steps=16")
    refused = muon(config, *branch, "optim.kind=adamw")
    assert refused.code == 2
    assert 'optim.kind: "muon" -> "adamw"' in refused.err
    taken = muon(config, *branch, "optim.muon_momentum=0.9", "optim.muon_lr=0.02")
    assert taken.code == 0, taken.err
    state = checkpoint.load(tmp_path / "runs/branch/checkpoints/step_00000016.pt")
    (group,) = (g for g in state["optimizer"]["param_groups"] if g["name"] == "muon")
    assert (group["momentum"], group["initial_lr"]) == (0.9, 0.02)


@pytest.fixture
def without_login(tmp_path, monkeypatch) -> dict[str, str]:
    """The environment of someone who never met W&B."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    return {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}


UNREACHABLE = {
    "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2",
}  # fmt: skip


@pytest.mark.parametrize("case", ["unreachable", "logged out", "absent"])
def test_without_wandb_the_run_is_the_same(config, tmp_path, without_login, case):
    plain = pretrain(config, f"runs_dir={tmp_path / 'plain'}")
    assert plain.code == 0, plain.err
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/wandb.py").write_text("raise ImportError('no W&B here')")
    special = {"unreachable": UNREACHABLE, "absent": {"PYTHONPATH": str(tmp_path / "absent")}}
    asked = pretrain(config, "train.wandb_project=test", env=without_login | special.get(case, {}))
    assert asked.code == 0, asked.err
    assert "warning: W&B" in asked.out
    ours, theirs = (tmp_path / f / "pretrain/metrics.jsonl" for f in ("runs", "plain"))
    assert numbers(ours) == numbers(theirs)
