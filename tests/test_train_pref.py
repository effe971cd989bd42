"""Preference training as its users meet it: it learns, survives kills, says what is wrong."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from data.chat import ChatTemplate
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from models.verifier import Verifier
from tests.pipeline import Fault, Outcome, numbers, run
from utils import checkpoint

SHAPE = {
    "vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64,
    "max_seq_len": 96,
}  # fmt: skip
STEPS = 24
COLOURS = {"red": ("warm", "cold"), "blue": ("cold", "warm"), "grey": ("dull", "loud")}


def pair(i: int) -> dict:
    colour = list(COLOURS)[i % 3]
    chosen, rejected = COLOURS[colour]
    return {"prompt": f"{i}: {colour}" + "!" * (i % 7), "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for i in range(60) for text in pair(i).values()]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=320))


@pytest.fixture
def base(tokenizer, tmp_path):
    """A checkpoint of a model that knows nothing, as SFT would hand it over."""
    torch.manual_seed(0)
    path = tmp_path / "sft_final.pt"
    state = {
        "stage": "sft", "step": 0, "tokens": 0, "model_config": ModelConfig(**SHAPE).model_dump(),
        "model": Transformer(ModelConfig(**SHAPE)).state_dict(),
        "tokenizer": tokenizer.state_dict(), "config": {},
        "chat_template": ChatTemplate.of(tokenizer).state_dict(),
    }  # fmt: skip
    checkpoint.save(path, state)
    return path


@pytest.fixture
def config(tmp_path):
    path, pairs = tmp_path / "config.yaml", tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(120)))
    values = {
        "name": "dpo",
        "runs_dir": str(tmp_path / "runs"),
        "model": SHAPE,
        "data": {
            "cache_dir": str(tmp_path / "cache"), "seq_len": 96, "max_pairs_per_row": 4,
            "held_out_fraction": 0.2,
            "sources": [{"name": "pairs", "path": str(pairs), "exact_match": True}],
        },
        "preference": {"loss": "dpo", "beta": 0.5, "nll_weight": 1.0},
        "optim": {"lr": 2e-2, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "train": {
            "batch_tokens": 768, "micro_batch": 4, "steps": STEPS, "log_every": 3,
            "eval_every": 6, "save_every": 5, "save_every_hours": None,
        },
        "eval": {"questions": 20, "max_new_tokens": 6, "samples": 2},
        "runtime": {"deterministic": True},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def pref(config, *argv, fault: Fault | None = None) -> Outcome:
    return run("train_pref", "--config", config, *argv, log=config.parent / "log", fault=fault)


def succeed(config, *argv) -> Outcome:
    outcome = pref(config, *argv)
    assert outcome.code == 0, outcome.err
    return outcome


def evaluations(folder: Path) -> list[dict]:
    return [line for line in numbers(folder / "metrics.jsonl") if "val/loss" in line]


def same(a: Path, b: Path) -> bool:
    """Two runs that ended with the same weights, and reported the same numbers and answers."""
    one, other = (checkpoint.load(runs / "dpo/dpo_final.pt")["model"] for runs in (a, b))
    return all(torch.equal(one[k], other[k]) for k in one) and all(
        numbers(a / "dpo" / name) == numbers(b / "dpo" / name)
        for name in ("metrics.jsonl", "samples.jsonl")
    )


@pytest.fixture
def undisturbed(config, base, tmp_path):
    """The runs folder of an uninterrupted run; the disturbed ones start from nothing."""
    succeed(config, "--base-model", base)
    (tmp_path / "runs").rename(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "undisturbed"


def test_it_learns_to_prefer(undisturbed, base):
    first, *_, last = evaluations(undisturbed / "dpo")
    assert (first["step"], last["step"]) == (0, STEPS)
    assert first["pref/val_reward_accuracy"] == 0.5
    assert first["pref/val_kl"] == 0
    assert last["pref/val_reward_accuracy"] > 0.9
    assert last["pref/val_reward_margin"] > 1
    assert last["sft/exact_match"] > 0.9
    assert last["sft/stopped_frac"] == 1
    training = [n for n in numbers(undisturbed / "dpo/metrics.jsonl") if "train/loss" in n]
    assert training[-1]["pref/reward_accuracy"] > 0.9
    state = checkpoint.load(undisturbed / "dpo/dpo_final.pt")
    before = checkpoint.load(base)
    assert state["stage"] == "pref"
    assert all(state[key] == before[key] for key in ("chat_template", "tokenizer"))


KILLS = [
    (Fault("train.loop.train_step", 13), Fault("train.loop.train_step", 2)),
    (Fault("pathlib.Path.replace", 4), Fault("utils.checkpoint._flush", 3)),  # while saving
    (Fault("train.pairs.write_atomic", 1), Fault("train_pref.held_out_preference", 3)),
]


@pytest.mark.parametrize("faults", KILLS, ids=["step", "saving", "start"])
def test_a_run_killed_and_resumed_twice_is_the_uninterrupted_run(
    undisturbed, config, base, tmp_path, faults
):
    for fault in faults:
        outcome = pref(config, "--resume", "--base-model", base, fault=fault)
        assert outcome.code == -signal.SIGKILL, outcome.err
    succeed(config, "--resume", "--base-model", base)
    assert same(tmp_path / "runs", undisturbed)


def test_a_resumed_run_needs_neither_base_model_nor_cache(undisturbed, config, base, tmp_path):
    pref(config, "--base-model", base, fault=Fault("train.loop.train_step", 12))
    base.unlink()
    shutil.rmtree(tmp_path / "cache")
    succeed(config, "--resume")
    assert same(tmp_path / "runs", undisturbed)


def test_a_live_reference_gives_the_same_run(undisturbed, config, base, tmp_path):
    """Up to rounding: the cache was made from other packs. Killed and resumed it is exact."""
    live = (config, "--base-model", base, "preference.reference=live")
    succeed(*live)
    shutil.move(tmp_path / "runs", tmp_path / "live")
    for line, other in zip(
        evaluations(tmp_path / "live/dpo"), evaluations(undisturbed / "dpo"), strict=True
    ):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-3)
    pref(*live, fault=Fault("train.loop.train_step", 12))
    succeed(*live, "--resume")
    assert same(tmp_path / "runs", tmp_path / "live")


def test_a_live_reference_must_stay_the_same(config, base, tmp_path):
    live = (config, "--resume", "preference.reference=live")
    pref(*live, "--base-model", base, fault=Fault("train.loop.train_step", 12))
    assert "--base-model is missing" in pref(*live).err
    state = checkpoint.load(base)
    state["model"]["final_norm.weight"][0] += 1
    checkpoint.save(base, state)
    assert "is not the model that this run started from" in pref(*live, "--base-model", base).err


def test_other_pairs_are_refused_on_resume(config, base, tmp_path):
    pref(config, "--base-model", base, fault=Fault("train.loop.train_step", 12))
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.writelines(json.dumps(pair(i)) + "\n" for i in range(120, 200))
    outcome = pref(config, "--resume")
    assert outcome.code == 2
    assert "the pairs are not those of the checkpoint" in outcome.err


def test_micro_batches_do_not_change_the_result(undisturbed, config, base, tmp_path):
    succeed(config, "--base-model", base, "train.micro_batch=2")
    for line, other in zip(
        evaluations(tmp_path / "runs/dpo"), evaluations(undisturbed / "dpo"), strict=True
    ):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("loss", ["dpo_norm", "ipo", "apo_zero", "apo_down"])
def test_every_loss_trains_and_chains(config, base, tmp_path, loss):
    succeed(config, "--base-model", base, f"preference.loss={loss}", f"name={loss}")
    folder = tmp_path / "runs" / loss
    assert evaluations(folder)[-1]["pref/val_reward_accuracy"] > 0.9
    succeed(config, "--base-model", folder / f"{loss}_final.pt", "train.steps=2", "name=next")
    assert evaluations(tmp_path / "runs/next")[0]["pref/val_reward_accuracy"] == 0.5


VERIFIER = ("preference.loss=bradley_terry", "preference.nll_weight=0.0", "name=verifier")


def test_a_verifier_learns_to_score(config, base, tmp_path):
    pref(config, "--base-model", base, *VERIFIER, fault=Fault("train.loop.train_step", 12))
    succeed(config, "--resume", *VERIFIER)
    folder = tmp_path / "runs/verifier"
    last = evaluations(folder)[-1]
    assert last["pref/val_reward_accuracy"] > 0.9
    assert "sft/exact_match" not in last
    state = checkpoint.load(folder / "verifier_final.pt")
    head = state["head"]
    assert state["stage"] == "verifier"
    assert (head["name"], head["parameter"]) == ("scalar", "score.weight")
    assert head["deviation"] > 0.1
    assert abs(head["mean"]) < 10 * head["deviation"]
    Verifier(ModelConfig(**SHAPE)).load_state_dict(state["model"])
    refused = run(
        "inference", "--checkpoint", folder / "verifier_final.pt", "--prompt", "a",
        log=tmp_path / "log",
    )  # fmt: skip
    assert refused.code == 2
    assert "scores answers and writes none" in refused.err
    assert "is of stage 'verifier'" in pref(
        config, "--base-model", folder / "verifier_final.pt", "name=other"
    ).err  # fmt: skip


def test_a_fall_of_the_chosen_answers_is_told(config, base, tmp_path):
    """Without the NLL term, and at a rate that lets the likelihood of both answers collapse."""
    falling = ("preference.nll_weight=0.0", "preference.loss=apo_down", "preference.warn_window=6")
    outcome = succeed(config, "--base-model", base, *falling)
    assert "warning: within 6 steps the held-out chosen answers have lost" in outcome.out
    chosen = [line["pref/val_chosen_logp"] for line in evaluations(tmp_path / "runs/dpo")]
    assert chosen[-1] < chosen[0]


def test_a_rise_is_not_told(undisturbed, config):
    assert "have lost" not in (config.parent / "log.out").read_text()


def change(path, **values) -> None:
    checkpoint.save(path, checkpoint.load(path) | values)


def test_a_base_model_that_does_not_fit_is_refused(config, base, tmp_path):
    def refusal(*argv) -> str:
        outcome = pref(config, *argv)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err + outcome.out
        return outcome.err

    given = ("--base-model", base)
    assert "--base-model is missing: this stage starts from a sft or pref" in refusal()
    assert "d_ffn: 96 in the config" in refusal(*given, "model.d_ffn=96")
    assert "train.z_loss (0.1) is no part" in refusal(*given, "train.z_loss=0.1")
    change(base, chat_template=None)
    assert "has no chat template" in refusal(*given)
    change(base, stage="pretrain")
    assert "is of stage 'pretrain', but this one starts from a sft or pref" in refusal(*given)
    assert not list((tmp_path / "runs").rglob("*.pt"))


def test_a_dry_run_needs_no_data_and_leaves_nothing(config, tmp_path):
    outcome = succeed(config, "--dry-run", "data.sources.0.path=nowhere")
    assert "768" in outcome.out
    assert not (tmp_path / "runs").exists()


ROWS = {"": "65,536", "_160m": "131,072"}  # 8 x 4 and 16 x 4 rows of 2,048


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("name", ["dpo", "apo", "verifier"])
def test_the_plan_of_the_shipped_configs(tmp_path, name, size):
    outcome = run(
        "train_pref", "--config", f"configs/{name}{size}.yaml", "--dry-run", log=tmp_path / "log"
    )
    assert outcome.code == 0, outcome.err
    assert ROWS[size] in outcome.out
