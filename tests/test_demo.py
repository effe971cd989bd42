"""The demo in miniature: to its summary, undisturbed and killed once in every stage."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data import builtin, builtin_tasks
from scripts.demo import make_stages
from tests.pipeline import ROOT, Outcome, Run, numbers
from train.summary import Measured, largest_fall
from utils import checkpoint
from utils.config import load_config, plain
from utils.report import read_run

STAGES = ("pretrain", "sft", "dpo", "rlvr")
CONFIGS = ("pretrainconfig", "sftconfig", "prefconfig", "rlvrconfig")
KINDS = ("larger",)  # yes or no: even the smallest model is right now and then
SCRIPTS = dict(
    zip(STAGES, ("train_pretrain", "train_sft", "train_pref", "train_rlvr"), strict=True)
)


def rows(path: Path, values: list[dict]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """The four stages with a model of ten thousand parameters and a dozen steps."""
    folder = tmp_path_factory.mktemp("configs")
    cache = {"cache_dir": str(folder / "cache")}
    common = {
        "model": {
            "vocab_size": 400, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1,
            "d_ffn": 32, "max_seq_len": 192,
        },
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "runtime": {"deterministic": True},
    }  # fmt: skip
    train = {
        "steps": 12, "micro_batch": 4, "log_every": 2, "eval_every": 6, "save_every": 4,
        "stability": {"sigma": None},
    }  # fmt: skip
    packed = {**train, "batch_tokens": 768}
    made = {
        "text": [{"text": builtin.document("web", i)} for i in range(120)],
        "chats": [builtin_tasks.chat("train", i, kinds=KINDS) for i in range(300)],
        "pairs": [builtin_tasks.preference("train", i, kinds=KINDS) for i in range(200)],
        "prompts": [builtin_tasks.prompt("train", i, kinds=KINDS) for i in range(100)],
    }
    path = {name: rows(folder / f"{name}.jsonl", values) for name, values in made.items()}
    asked = {"questions": 8, "max_new_tokens": 4}
    stages = {
        "pretrain": {
            "tokenizer": {"path": "trained", "vocab_size": 400},
            "data": {
                **cache, "seq_len": 192, "held_out_fraction": 0.2,
                "sources": [{"name": "text", "weight": 1, "path": path["text"]}],
            },
            "train": packed,
        },
        "sft": {
            "data": {
                **cache, "seq_len": 192, "held_out_fraction": 0.2,
                "sources": [{"name": "chats", "path": path["chats"], "exact_match": True}],
            },
            "train": packed | {"steps": 60, "eval_every": 30}, "eval": asked,
        },
        "dpo": {
            "optim": {"lr": 1e-4},
            "data": {
                **cache, "seq_len": 192, "held_out_fraction": 0.2,
                "sources": [{"name": "pairs", "path": path["pairs"]}],
            },
            "train": packed, "eval": asked,
        },
        "rlvr": {
            "data": {
                "max_prompt_tokens": 64, "held_out_fraction": 0.2, "held_out_prompts": 10,
                "sources": [{"name": "sums", "path": path["prompts"]}],
            },
            "rollout": {
                "prompts": 4, "group_size": 4, "max_new_tokens": 4, "seq_len": 128,
                "temperature": 0.5,
            },
            "train": train, "eval": {"samples_per_prompt": 2},
        },
    }  # fmt: skip
    for name, values in stages.items():
        text = yaml.safe_dump({"name": name} | common | values)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def start(configs: Path, runs: Path) -> subprocess.Popen:
    command = [sys.executable, "scripts/demo.py", "--configs", configs, "--runs-dir", runs]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **piped)


def forked(configs: Path, runs: Path, fault: str = "", timeout_s: float = 600) -> Outcome:
    """The same by forks that need not import torch; `fault` as in tests/forked_demo.py."""
    runs.parent.mkdir(parents=True, exist_ok=True)
    argv = [fault, "--configs", str(configs), "--runs-dir", str(runs)]
    return Run("tests.forked_demo", argv, runs.with_name("log")).wait(timeout_s)


def summary(runs: Path) -> dict:
    """What the demo found out, without what depends on the clock."""
    values = json.loads((runs / "summary.json").read_text())
    for stage in values["stages"]:
        assert stage.pop("seconds") > 0
    return values


def same(ours: Path, theirs: Path) -> bool:
    files = [f"{stage}/{name}.jsonl" for stage in STAGES for name in ("metrics", "samples")]
    files.remove("pretrain/samples.jsonl")
    return summary(ours) == summary(theirs) and all(
        numbers(ours / file) == numbers(theirs / file) for file in files
    )


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory) -> tuple[Path, str]:
    """An undisturbed demo: its runs, and what it printed."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    done = forked(configs, runs)
    assert done.code == 0, done.out + done.err
    return runs, done.out


def test_killed_in_every_stage_and_run_again_it_comes_to_the_same(configs, whole, tmp_path):
    runs = tmp_path / "runs"
    victims = {"pretrain": "stage", "sft": "demo", "dpo": "demo stage", "rlvr": "stage"}
    for stage in STAGES:
        killed = forked(configs, runs, f"{stage} 7 {victims[stage]}")
        by_demo = "demo" in victims[stage]
        expected = -signal.SIGKILL if by_demo else 128 + signal.SIGKILL
        assert killed.code == expected, killed.out + killed.err
        assert (runs / stage / "metrics.jsonl").exists()
        assert not (runs / stage / f"{stage}_final.pt").exists()
    done = forked(configs, runs)
    assert done.code == 0, done.out + done.err
    assert done.out.count("finished before") == 3
    assert same(runs, whole[0])
    moved = [line["train/grad_norm"] for line in numbers(runs / "rlvr/metrics.jsonl")[1:4]]
    assert any(moved), "without a gradient every resumed run is the same"


def test_run_again_all_is_skipped_and_a_changed_config_is_refused(configs, whole, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(whole[0], runs)
    again = forked(configs, runs)
    assert again.code == 0, again.err
    assert again.out.count("finished before") == 4
    assert same(runs, whole[0])

    other = tmp_path / "configs"
    shutil.copytree(configs, other)
    values = yaml.safe_load((other / "dpo.yaml").read_text())
    (other / "dpo.yaml").write_text(yaml.safe_dump(values | {"preference": {"beta": 7.0}}))
    refused = forked(other, runs)
    assert refused.code == 2
    assert "preference.beta: 0.1 -> 7.0" in refused.err

    final = runs / "sft/sft_final.pt"
    state = checkpoint.load(final)
    state["model"]["final_norm.weight"] += 1
    checkpoint.save(final, state)
    refused = forked(configs, runs)
    assert refused.code == 2
    assert f"{runs}/dpo grew from another" in refused.err


def test_it_tells_each_stage_its_measures_the_dialogues_and_the_way_on(whole):
    runs, out = whole
    places = [out.index(f"[{n}/4] {stage}: ") for n, stage in enumerate(STAGES, 1)]
    assert places == sorted(places)
    found = summary(runs)
    for stage, own, measured in zip(STAGES, found["stages"], found["measured"], strict=True):
        assert own["name"] == measured["name"] == stage
        assert own["after"] is not None and own["tokens"] > 0
        assert measured["few_shot"] == (stage == "pretrain")
        assert f"\n{stage:<8}  {own['measure']}" in out
    assert len(found["dialogues"]) == 3
    for talk in found["dialogues"]:
        assert all(m["content"] in out for m in talk)
    chat = f"inference.py --checkpoint {runs}/rlvr/rlvr_final.pt --interactive"
    assert f"python {chat}" in out
    page = (runs / "report.html").read_text()
    assert "<th>asked</th>" + "".join(f"<th>{s}</th>" for s in STAGES) in page
    values = "".join(f"<td>{m['text_accuracy']:.4f}</td>" for m in found["measured"])
    (n,) = {m["text_tokens"] for m in found["measured"]}
    way = f"<td>unseen text</td><td>tokens right</td><td>{n:,}</td>" + "<td></td>" * 3
    assert f"{way}{values}</tr>" in page
    for stage, measured in zip(STAGES, found["measured"], strict=True):
        (kept,) = read_run(runs / stage).evaluations
        assert [r["value"] for r in kept["results"]] == [
            measured[k] for k in ("text_loss", "text_accuracy", "exact_match", "pair_accuracy")
        ]


def test_a_stage_s_measures_are_those_of_its_metrics(whole):
    runs, _ = whole
    first, *_, last = (
        line["val/loss"] for line in numbers(runs / "pretrain/metrics.jsonl") if "val/loss" in line
    )
    (sft,) = {
        line["sft/base_exact_match"]
        for line in numbers(runs / "sft/metrics.jsonl")
        if "sft/base_exact_match" in line
    }
    pretrain, tuned, *_ = summary(runs)["stages"]
    assert (pretrain["before"], pretrain["after"]) == (first, last)
    assert tuned["before"] == sft
    assert pretrain["tokens"] == 12 * 768


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_it_saves_says_how_to_go_on_and_leaves(configs, tmp_path, number):
    runs, endless = tmp_path / "runs", tmp_path / "pretrain.yaml"
    values = yaml.safe_load((configs / "pretrain.yaml").read_text())
    values["train"]["steps"] = 1_000_000
    endless.write_text(yaml.safe_dump(values))
    process = start(tmp_path, runs)
    try:
        for line in process.stdout:
            if "step         6/1,000,000" in line:
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number, out + err
    assert "run it again to go on" in err
    saved = checkpoint.Checkpointer(runs / "pretrain/checkpoints", 2).latest()
    assert saved is not None


def test_a_failing_stage_shows_its_error_and_its_code(configs, tmp_path):
    for name in STAGES:
        values = yaml.safe_load((configs / f"{name}.yaml").read_text())
        values["optim"] = {"lr": -1} if name == "pretrain" else {"lr": 1e-2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    failed = forked(tmp_path, tmp_path / "runs")
    assert failed.code == 2, failed.out
    assert failed.err.startswith("error: ") and "optim.lr" in failed.err
    assert "Traceback" not in failed.out + failed.err
    assert "[2/4]" not in failed.out


@pytest.mark.parametrize("number", range(4), ids=STAGES)
def test_a_stage_is_finished_with_its_whole_final_checkpoint_and_its_config(number, tmp_path):
    stage = make_stages(Path("configs/demo"), tmp_path)[number]
    script = importlib.import_module(stage.script.removesuffix(".py"))
    (kind,) = (v for k, v in vars(script).items() if k.lower() == CONFIGS[number])
    config = plain(load_config(kind, stage.config, [f"runs_dir={tmp_path}"]))
    assert not stage.finished()
    checkpoint.save(stage.final, {"config": config})
    assert stage.finished()
    checkpoint.save(stage.final, {"config": config | {"seed": 1}})
    assert not stage.finished()
    checkpoint.save(stage.final, {"config": config})
    stage.final.write_bytes(stage.final.read_bytes()[:-1])
    assert not stage.finished()


@pytest.mark.slow
def test_the_real_demo_killed_in_every_stage_comes_to_the_same(tmp_path):
    configs = ROOT / "configs/demo"
    whole, runs = tmp_path / "whole/runs", tmp_path / "killed/runs"
    done = forked(configs, whole, timeout_s=7200)
    assert done.code == 0, done.out + done.err
    pretrain, sft, dpo, rlvr = summary(whole)["stages"]
    assert pretrain["after"] < pretrain["before"] / 2
    assert sft["after"] > sft["before"] + 0.5
    assert dpo["after"] > dpo["before"] + 0.2
    assert rlvr["after"] > rlvr["before"] + 0.2
    measured = [Measured(**values) for values in summary(whole)["measured"]]
    assert largest_fall(measured)[-1] > -0.05

    for stage, step in zip(STAGES, (170, 510, 30, 270), strict=True):
        killed = forked(configs, runs, f"{stage} {step} demo stage", timeout_s=7200)
        assert killed.code == -signal.SIGKILL, killed.out + killed.err
        assert not (runs / stage / f"{stage}_final.pt").exists()
    done = forked(configs, runs, timeout_s=7200)
    assert done.code == 0, done.out + done.err
    assert same(runs, whole)
