"""The demo in miniature: to its summary, undisturbed and killed once in every stage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data import builtin, builtin_tasks
from tests.pipeline import ROOT, numbers
from utils import checkpoint

STAGES = ("pretrain", "sft", "dpo", "rlvr")
SCRIPTS = dict(
    zip(STAGES, ("train_pretrain", "train_sft", "train_pref", "train_rlvr"), strict=True)
)
# Put into a process by Python's own hook: just before a call of `train_step`, SIGKILL.
KILLER = """\
import os, signal, sys
script, call, *victims = os.environ["DEMO_FAULT"].split()
if script in sys.orig_argv:
    import train.loop
    train_step, calls = train.loop.train_step, []
    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(call):
            for victim in victims:
                os.kill({"demo": os.getppid, "stage": os.getpid}[victim](), signal.SIGKILL)
        return train_step(*args, **kwargs)
    train.loop.train_step = killing
"""


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
        "chats": [builtin_tasks.chat("train", i) for i in range(300)],
        "pairs": [builtin_tasks.preference("train", i) for i in range(200)],
        "prompts": [builtin_tasks.prompt("train", i) for i in range(100)],
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
            "train": packed, "eval": asked,
        },
        "dpo": {
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
            "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 4, "seq_len": 128},
            "train": train, "eval": {"samples_per_prompt": 2},
        },
    }  # fmt: skip
    for name, values in stages.items():
        text = yaml.safe_dump({"name": name, **common, **values})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def start(configs: Path, runs: Path, fault: str = "", **how) -> subprocess.Popen:
    runs.parent.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if fault:
        hook = configs / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(KILLER)
        environment |= {"PYTHONPATH": f"{hook}:{ROOT}", "DEMO_FAULT": fault}
    command = [sys.executable, "scripts/demo.py", "--configs", configs, "--runs-dir", runs]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **piped | how)


def demo(configs: Path, runs: Path, fault: str = "") -> tuple[int, str, str]:
    process = start(configs, runs, fault)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


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
    code, out, err = demo(configs, runs)
    assert code == 0, out + err
    return runs, out


def test_killed_in_every_stage_and_run_again_it_comes_to_the_same(configs, whole, tmp_path):
    runs = tmp_path / "runs"
    victims = {"pretrain": "stage", "sft": "demo", "dpo": "demo stage", "rlvr": "stage"}
    for stage in STAGES:
        code, out, err = demo(configs, runs, f"{SCRIPTS[stage]}.py 7 {victims[stage]}")
        by_demo = "demo" in victims[stage]
        assert code == (-signal.SIGKILL if by_demo else 128 + signal.SIGKILL), out + err
        assert (runs / stage / "metrics.jsonl").exists()
        assert not (runs / stage / f"{stage}_final.pt").exists()
    code, out, err = demo(configs, runs)
    assert code == 0, out + err
    assert out.count("finished before") == 3
    assert same(runs, whole[0])


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
    assert all(stage in page for stage in STAGES)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_saves_says_how_to_go_on_and_leaves(configs, tmp_path, number):
    runs = tmp_path / "runs"
    process = start(configs, runs)
    for line in process.stdout:
        if "step" in line:
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert "run it again to go on" in err
    saved = checkpoint.Checkpointer(runs / "pretrain/checkpoints", 2).latest()
    assert saved is not None


def test_a_failing_stage_shows_its_error_and_its_code(configs, tmp_path):
    for name in STAGES:
        values = yaml.safe_load((configs / f"{name}.yaml").read_text())
        values["optim"] = {"lr": -1} if name == "pretrain" else {"lr": 1e-2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    code, out, err = demo(tmp_path, tmp_path / "runs")
    assert code == 2, out
    assert err.startswith("error: ") and "optim.lr" in err
    assert "Traceback" not in out + err
    assert "[2/4]" not in out


@pytest.mark.slow
def test_the_real_demo(tmp_path):
    code, out, err = demo(Path("configs/demo").resolve(), tmp_path / "runs")
    assert code == 0, out + err
    pretrain, sft, dpo, rlvr = summary(tmp_path / "runs")["stages"]
    assert pretrain["after"] < pretrain["before"] / 2
    assert sft["after"] > sft["before"] + 0.3
    assert dpo["after"] > 0.6
    assert rlvr["after"] > rlvr["before"]
