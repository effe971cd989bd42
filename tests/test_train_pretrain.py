"""Pretraining as users meet it: it learns, survives kills to the bit, and says what is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.pipeline import ROOT, Fault, Outcome, Run, numbers, run
from utils import checkpoint

DOCUMENTS = {"web": 120, "code": 40, "math": 12}  # the smallest source repeats several times
STEPS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three small sources, one jsonl each."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in DOCUMENTS.items():
        rows = ({"text": f"{name} {i} " + f"{name} of {i * 7} " * (i % 25)} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def config(text, tmp_path):
    """A YAML file for a model of two thousand parameters and 24 steps."""
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
            "shard_megabytes": 0.003, "held_out_fraction": 0.3,
            "sources": [
                {"name": n, "domain": n, "weight": w, "path": str(text / f"{n}.jsonl")}
                for n, w in (("web", 80), ("code", 15), ("math", 5))
            ],
        },
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 4, "decay_fraction": 0.25},
        "train": {
            "batch_tokens": 512, "micro_batch": 4, "steps": STEPS, "log_every": 3,
            "eval_every": 6, "save_every": 5, "save_every_hours": None,
        },
        "runtime": {"deterministic": True},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pretrain(config, *argv: object, **how: object) -> Outcome:
    return run("train_pretrain", "--config", config, *argv, log=config.parent / "log", **how)


def before_step(step: int, written: Path, number: int = signal.SIGKILL) -> Fault:
    """A signal once a checkpoint, which a thread writes, is there with its sha256."""
    return Fault("train.loop.train_step", step, number, after=f"{written}.sha256")


def final(runs) -> dict:
    return checkpoint.load(runs / "pretrain" / "pretrain_final.pt")


def same(a, b) -> bool:
    """Two runs that ended with the same weights and reported the same numbers."""
    one, other = final(a)["model"], final(b)["model"]
    return all(torch.equal(one[k], other[k]) for k in one) and numbers(
        a / "pretrain/metrics.jsonl"
    ) == numbers(b / "pretrain/metrics.jsonl")


@pytest.fixture
def undisturbed(config, tmp_path):
    """The runs folder of an uninterrupted run; the disturbed ones start from nothing."""
    outcome = pretrain(config)
    assert outcome.code == 0, outcome.err
    (tmp_path / "runs").rename(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "undisturbed"


def test_it_learns_and_hands_over_a_self_contained_checkpoint(undisturbed):
    metrics = numbers(undisturbed / "pretrain/metrics.jsonl")
    first, last = ([m for m in metrics if "val/loss" in m][i] for i in (0, -1))
    assert (first["step"], last["step"]) == (0, STEPS)
    for domain in DOCUMENTS:
        assert last[f"{domain}_val_loss"] < first[f"{domain}_val_loss"] - 0.5
    state = final(undisturbed)
    assert state["stage"] == "pretrain"
    assert state["tokens"] == STEPS * 512
    assert set(state) == {
        "format_version", "stage", "step", "tokens", "model_config", "model", "tokenizer",
        "chat_template", "config",
    }  # fmt: skip
    kept = sorted(p.name for p in (undisturbed / "pretrain/checkpoints").glob("*.pt"))
    assert kept == ["step_00000020.pt", "step_00000024.pt"]


KILLS = [
    (Fault("train.loop.train_step", 13), Fault("train.loop.train_step", 2)),  # mid-pack
    (Fault("utils.checkpoint._flush", 3), Fault("pathlib.Path.replace", 1)),  # saving
    (Fault("data.shards.record", 3), Fault("train.loop._evaluate", 2)),
]


@pytest.mark.parametrize("faults", KILLS, ids=["mid-pack", "saving", "shards"])
def test_a_run_killed_and_resumed_twice_is_the_uninterrupted_run(
    undisturbed, config, tmp_path, faults
):
    for fault in faults:
        outcome = pretrain(config, "--resume", fault=fault)
        assert outcome.code == -signal.SIGKILL, outcome.err
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(44))
def test_kills_at_random_moments(undisturbed, config, tmp_path, seed):
    """Each run is killed before a random call (from seed 24 on: while it saves), twice; see log."""
    calls = {
        "train.loop.train_step": STEPS,
        "data.packing.RowPacker.next_row": STEPS * 8,
        "data.streaming.SourceStream._load": 100,
        "utils.checkpoint._flush": 8,
        "utils.checkpoint._HashingFile.write": 300,
        "utils.checkpoint.Checkpointer._rotate": 5,
        "data.shards.write_atomic": 12,
        "pathlib.Path.replace": 12,
        "os.fsync": 20,
        "train.evals.held_out_loss": 4,
        "utils.logging.MetricsLog.write": 10,
    }
    generator = random.Random(seed)
    names = sorted(name for name in calls if seed < 24 or "checkpoint" in name)
    for _ in range(2):
        function = generator.choice(names)
        fault = Fault(function, generator.randint(1, calls[function]))
        outcome = pretrain(config, "--resume", fault=fault)
        print(f"seed {seed}: {fault.function} call {fault.call} -> exit {outcome.code}")
        assert outcome.code in (0, -signal.SIGKILL), outcome.err
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_latest_checkpoint_is_passed_over(undisturbed, config, tmp_path, damage):
    latest = tmp_path / "runs/pretrain/checkpoints/step_00000015.pt"
    pretrain(config, fault=before_step(18, latest))
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 1
    latest.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert "step_00000015.pt: damaged" in outcome.out
    assert "resuming from" in outcome.out
    assert "step_00000010.pt" in outcome.out
    assert same(tmp_path / "runs", undisturbed)


def test_a_lost_shard_is_made_again_on_resume(undisturbed, config, tmp_path):
    pretrain(config, fault=Fault("train.loop.train_step", 12))
    for path in (tmp_path / "cache").rglob("shard_*"):
        path.unlink()
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert "is missing: making it again" in outcome.out
    assert same(tmp_path / "runs", undisturbed)


def test_sigterm_in_the_middle_of_an_accumulation(undisturbed, config, tmp_path):
    """The 21st loss is the first micro-batch of step 11: it is abandoned, step 10 is saved."""
    fault = Fault("train_pretrain.cross_entropy_loss", 21, signal.SIGTERM)
    outcome = pretrain(config, fault=fault)
    assert outcome.code == 0, outcome.err
    assert "--resume" in outcome.out.splitlines()[-1]
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_a_full_disk_loses_only_the_work_since_the_last_save(undisturbed, config, tmp_path):
    """Checkpoints no longer fit after step 10: training goes on and ends with an error."""
    checkpoints = tmp_path / "runs/pretrain/checkpoints"
    pretrain(config, fault=before_step(12, checkpoints / "step_00000010.pt"))
    outcome = pretrain(config, "--resume", largest_file=20_000)
    assert outcome.code == 2
    assert "step_00000015.pt: not saved: File too large. Training goes on" in outcome.out
    assert "The last checkpoint is not on disk; make room" in outcome.err
    assert sorted(p.name for p in checkpoints.glob("*")) == [
        f"step_{step:08d}.pt{end}" for step in (5, 10) for end in ("", ".sha256")
    ]
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


@pytest.fixture
def mirror(tmp_path):
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("train.loop.train_step", 18),
        Fault("utils.mirror._copy_checkpoint", 2),  # while the second checkpoint is copied
        Fault("utils.mirror.Mirror._copy_texts", 2),
    ],
    ids=["training", "copying", "metrics"],
)
def test_a_lost_disk_is_made_good_by_the_mirror(undisturbed, config, tmp_path, mirror, fault):
    where = f"train.mirror_dir={mirror}"
    mirrored = before_step(9, mirror / "pretrain/checkpoints/step_00000005.pt", 0)
    killed = pretrain(config, where, fault=[mirrored, fault])
    assert killed.code == -signal.SIGKILL, killed.err
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "cache")
    assert pretrain(config, where).code == 2, "a fresh run would overwrite the mirrored one"
    outcome = pretrain(config, where, "--resume")
    assert outcome.code == 0, outcome.err
    assert "from the mirror" in outcome.out
    assert same(tmp_path / "runs", undisturbed)
    mirrored, ours = (numbers(f / "pretrain/metrics.jsonl") for f in (mirror, tmp_path / "runs"))
    assert mirrored == ours
    assert (mirror / "pretrain/pretrain_final.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments_of_the_copy(undisturbed, config, tmp_path, mirror, seed):
    """Each run is killed, its disk lost, and restored from whatever the mirror got; twice."""
    generator, where = random.Random(seed), f"train.mirror_dir={mirror}"
    for _ in range(2):
        function = generator.choice(["_copy", "os.fsync", "os.replace"])
        name = function if "." in function else f"utils.mirror.{function}"
        fault = Fault(name, generator.randint(1, 20))
        outcome = pretrain(config, where, "--resume", fault=fault)
        print(f"seed {seed}: {fault.function} call {fault.call} -> exit {outcome.code}")
        assert outcome.code in (0, -signal.SIGKILL), outcome.err
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    outcome = pretrain(config, where, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_a_mirror_that_vanishes_stops_nothing(undisturbed, config, tmp_path, mirror):
    """Its folder becomes a file while the run is stopped for a moment, after step 5 is mirrored."""
    where, log = f"train.mirror_dir={mirror}", config.parent / "log"
    mirrored = mirror / "pretrain/checkpoints/step_00000005.pt"
    fault = before_step(9, mirrored, signal.SIGSTOP)
    paused = Run("train_pretrain", ["--config", str(config), where], log, fault)
    paused.until_stopped()
    shutil.rmtree(mirror)
    mirror.write_text("")
    os.kill(paused.process.pid, signal.SIGCONT)
    outcome = paused.wait()
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("warning: mirror") == 1
    assert same(tmp_path / "runs", undisturbed)
    missing = pretrain(config, where, "--resume")
    assert missing.code == 2
    assert "mount the drive" in missing.err


def test_wandb_goes_on_under_one_id_and_changes_nothing(undisturbed, config, tmp_path):
    argv, env = (config, "train.wandb_project=test"), {"WANDB_MODE": "offline"}
    begun = str(tmp_path / "runs/pretrain/wandb/offline-run-*/*.wandb")
    pretrain(*argv, fault=Fault("train.loop.train_step", 13, after=begun), env=env)
    identity = (tmp_path / "runs/pretrain/wandb_id.txt").read_text().strip()
    outcome = pretrain(*argv, "--resume", env=env)
    assert outcome.code == 0, outcome.err
    assert "warning: W&B" not in outcome.out
    assert same(tmp_path / "runs", undisturbed)
    records = (tmp_path / "runs/pretrain/wandb").glob(f"offline-run-*-{identity}/*.wandb")
    assert any(b"val/loss" in record.read_bytes() for record in records)


def test_a_decay_branches_off_the_stable_phase(undisturbed, config, tmp_path):
    stable = tmp_path / "runs/pretrain/checkpoints/step_00000010.pt"
    pretrain(config, fault=before_step(12, stable))
    branch = ("name=branch", "schedule.decay_now=true", "schedule.decay_steps=6", "--resume-from")
    for call in (4, 5):
        outcome = pretrain(
            config, *branch, stable, "--resume", fault=Fault("train.loop.train_step", call)
        )
        assert outcome.code == -signal.SIGKILL
    outcome = pretrain(config, *branch, stable)
    assert outcome.code == 2, "the branch's own folder holds a run now"
    outcome = pretrain(config, *branch, stable, "--resume", "train.log_every=1")
    assert outcome.code == 0, outcome.err
    metrics = numbers(tmp_path / "runs/branch/metrics.jsonl")
    rates = {m["step"]: m["train/lr"] for m in metrics if "train/lr" in m}
    assert metrics[-1]["step"] == 16
    assert rates[16] == pytest.approx(0.01 / 6)


def test_a_branch_off_a_branch_takes_the_schedule_that_it_is_given(config, tmp_path):
    stable = tmp_path / "runs/pretrain/checkpoints/step_00000010.pt"
    pretrain(config, fault=before_step(12, stable))
    decay = ("schedule.decay_now=true", "--resume-from")
    outcome = pretrain(config, "name=one", "schedule.decay_steps=6", *decay, stable)
    assert outcome.code == 0, outcome.err
    one = tmp_path / "runs/one/checkpoints/step_00000016.pt"
    outcome = pretrain(config, "name=two", "schedule.decay_steps=3", *decay, one)
    assert "to end at step 19" in outcome.out
    stopped = Fault("train.loop.train_step", 1, signal.SIGTERM)  # nothing of its own is trained
    more = ("name=three", f"train.steps={STEPS + 2}", "train.log_every=1")
    outcome = pretrain(config, *more, "--resume-from", one, fault=stopped)
    assert "stopped at step 16; everything is saved" in outcome.out
    outcome = pretrain(config, *more, "--resume")
    assert "resuming from" in outcome.out
    rates = [m.get("train/lr") for m in numbers(tmp_path / "runs/three/metrics.jsonl")]
    assert rates.count(0.01) >= 2, "the stable phase goes on"
    outcome = pretrain(config, "name=four", "train.steps=16", "--resume-from", one)
    assert outcome.code == 2
    assert "begins at step 16, and the run ends at step 16: train longer" in outcome.err


def test_a_finished_run_resumed_says_so_and_changes_nothing(config, tmp_path):
    pretrain(config)
    before = numbers(tmp_path / "runs/pretrain/metrics.jsonl")
    outcome = pretrain(config, "--resume")
    assert outcome.code == 0
    assert "done" in outcome.out
    assert numbers(tmp_path / "runs/pretrain/metrics.jsonl") == before


BAD_INPUT = {
    "unknown key": (["optim.wieght_decay=1"], "unknown key, did you mean 'weight_decay'?"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "batch": (["train.batch_tokens=500"], "nearest: 512"),
    "length": (["train.tokens=5000"], "one of them"),
    "context": (["data.seq_len=128", "train.batch_tokens=1024"], "must not exceed model.max_seq"),
    "heads": (["model.n_kv_heads=3"], "must be a multiple of n_kv_heads"),
    "warm-up": (["schedule.warmup_steps=23"], "do not fit"),
    "vocabulary": (["model.vocab_size=200"], "raise model.vocab_size"),
    "no file": (["data.sources.0.path=nowhere.jsonl"], "no documents at"),
    "no folder for runs": (["runs_dir=LICENSE/runs"], "error: LICENSE/runs"),
    "no folder for shards": (["data.cache_dir=LICENSE/cache"], "error: LICENSE/cache"),
    "no tokenizer": (["tokenizer.path=./nowhere"], "no tokenizer.json there"),
    "kernel": (["runtime.attention=fa4"], "needs a CUDA device"),
    "two": (["optim.lr=-1", "train.micro_batch=0"], "2 problem"),
    "checkpoint": (["--resume-from", "nowhere.pt"], "nowhere.pt: cannot be read"),
    "decay": (["schedule.decay_now=true", "schedule.decay_steps=5"], "needs --resume-from"),
    "flag": (["--resum"], "--resume"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_message_and_exit_code_2(config, tmp_path, case):
    argv, message = BAD_INPUT[case]
    outcome = pretrain(config, *argv)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    assert not list(tmp_path.rglob("*.pt"))


def test_what_a_resumed_run_may_not_change(config):
    pretrain(config, fault=Fault("train.loop.train_step", 12))
    again = pretrain(config)
    assert again.code == 2
    assert "--resume" in again.err
    changed = pretrain(config, "--resume", "optim.lr=0.5", "data.sources.0.weight=50")
    assert changed.code == 2
    assert "optim.lr: 0.01 -> 0.5" in changed.err
    assert "Traceback" not in changed.err
    other_shape = pretrain(config, "--resume", "model.d_ffn=64")
    assert other_shape.code == 2
    assert "model.d_ffn: 32 -> 64" in other_shape.err


def test_a_dry_run_needs_no_data_and_leaves_nothing(config, tmp_path):
    outcome = pretrain(config, "--dry-run", "data.sources.0.path=nowhere.jsonl")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "parameters", "per_step"),
    [("pretrain", "653,207,040", "1,572,864"), ("pretrain_160m", "137,850,624", "3,145,728")],
)
def test_the_plan_of_the_shipped_configs(tmp_path, name, parameters, per_step):
    outcome = run(
        "train_pretrain", "--config", f"configs/{name}.yaml", "--dry-run", log=tmp_path / "log"
    )
    assert outcome.code == 0, outcome.err
    for value in (parameters, per_step, "GiB", "FLOPs per token", "$"):
        assert value in outcome.out


def test_two_processes_see_the_batches_of_one(undisturbed, config, tmp_path):
    """torchrun with gloo: the losses agree to 1e-5, the loader's state exactly."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "train_pretrain.py", "--config", str(config),
    ]  # fmt: skip
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        numbers(runs / "pretrain/metrics.jsonl") for runs in (undisturbed, tmp_path / "runs")
    )
    assert [m["step"] for m in one] == [m["step"] for m in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"train/loss", "val/loss", "train/grad_norm"}:
            assert a[key] == pytest.approx(b[key], abs=1e-5)
    states = [
        checkpoint.load(runs / "pretrain/checkpoints/step_00000024.pt")["loader"]
        for runs in (undisturbed, tmp_path / "runs")
    ]
    assert states[0]["sources"] == states[1]["sources"]
    assert states[0]["mixture"] == states[1]["mixture"]
