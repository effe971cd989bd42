"""SFT as its users meet it: it learns to answer and to stop, survives kills, says what is wrong."""

import json
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
import yaml

from data.chat import ChatTemplate, render
from data.packing import IGNORE, Piece, cut_document, make_batch
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from tests.pipeline import Fault, Outcome, numbers, run
from train.loss import cross_entropy_loss, token_logprobs
from utils import checkpoint

SHAPE = {
    "vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64,
    "max_seq_len": 64,
}  # fmt: skip
STEPS = 24
ANSWERS = {"red": "warm", "blue": "cold", "grey": "dull"}


def chat(i: int) -> list[dict]:
    colour = list(ANSWERS)[i % 3]
    return [
        {"role": "system", "content": "Say how it feels."},
        {"role": "user", "content": f"{i}: {colour}" + "!" * (i % 7)},
        {"role": "assistant", "content": ANSWERS[colour]},
    ]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [message["content"] for i in range(60) for message in chat(i)]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=320))


@pytest.fixture
def base(tokenizer, tmp_path):
    """A checkpoint of a model that knows nothing, as pretraining would hand it over."""
    torch.manual_seed(0)
    path = tmp_path / "pretrain_final.pt"
    state = {
        "stage": "pretrain", "step": 0, "tokens": 0, "model_config": SHAPE | _rest_of_the_shape(),
        "model": Transformer(ModelConfig(**SHAPE)).state_dict(),
        "tokenizer": tokenizer.state_dict(), "chat_template": None, "config": {},
    }  # fmt: skip
    checkpoint.save(path, state)
    return path


def _rest_of_the_shape() -> dict:
    return ModelConfig(**SHAPE).model_dump()


@pytest.fixture
def config(tmp_path):
    path, chats = tmp_path / "config.yaml", tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat(i)}) + "\n" for i in range(120)))
    values = {
        "name": "sft",
        "runs_dir": str(tmp_path / "runs"),
        "model": SHAPE,
        "data": {
            "cache_dir": str(tmp_path / "cache"), "seq_len": 64, "max_documents_per_row": 4,
            "held_out_fraction": 0.2,
            "sources": [{"name": "chats", "path": str(chats), "exact_match": True}],
        },
        "optim": {"lr": 2e-2},
        "schedule": {"kind": "cosine", "warmup_fraction": 0.1},
        "train": {
            "batch_tokens": 512, "micro_batch": 4, "steps": STEPS, "log_every": 3,
            "eval_every": 6, "save_every": 5, "save_every_hours": None,
        },
        "eval": {"questions": 20, "max_new_tokens": 6, "samples": 2},
        "runtime": {"deterministic": True},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def sft(config, *argv, fault: Fault | None = None) -> Outcome:
    return run("train_sft", "--config", config, *argv, log=config.parent / "log", fault=fault)


def final(runs) -> dict:
    return checkpoint.load(runs / "sft/sft_final.pt")


def same(a, b) -> bool:
    """Two runs that ended with the same weights, and reported the same numbers and answers."""
    one, other = final(a)["model"], final(b)["model"]
    return all(torch.equal(one[k], other[k]) for k in one) and all(
        numbers(a / "sft" / name) == numbers(b / "sft" / name)
        for name in ("metrics.jsonl", "samples.jsonl")
    )


@pytest.fixture
def undisturbed(config, base, tmp_path):
    """The runs folder of an uninterrupted run; the disturbed ones start from nothing."""
    outcome = sft(config, "--base-model", base)
    assert outcome.code == 0, outcome.err
    (tmp_path / "runs").rename(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "cache")
    return tmp_path / "undisturbed"


def test_it_learns_to_answer_and_to_stop(undisturbed, tokenizer):
    metrics = numbers(undisturbed / "sft/metrics.jsonl")
    first, last = ([m for m in metrics if "val/loss" in m][i] for i in (0, -1))
    assert (first["step"], last["step"]) == (0, STEPS)
    assert first["sft/base_exact_match"] == first["sft/exact_match"] == 0
    assert last["sft/exact_match"] > 0.9
    assert last["sft/stopped_frac"] == 1
    assert last["sft/val_loss"] < 0.5 < 3 < first["sft/val_loss"]
    state = final(undisturbed)
    assert state["stage"] == "sft"
    assert ChatTemplate.from_state(state["chat_template"]) == ChatTemplate.of(tokenizer)
    assert state["tokenizer"] == tokenizer.state_dict()


def test_samples_are_kept_at_every_evaluation(undisturbed):
    samples = numbers(undisturbed / "sft/samples.jsonl")
    assert [s["step"] for s in samples] == [s for s in (0, 6, 12, 18, 24) for _ in range(2)]
    assert samples[-1]["stopped"]
    assert samples[-1]["answer"] == samples[-1]["expected"] in ANSWERS.values()
    assert samples[-1]["prompt"].startswith("<s><|system|>Say how it feels.</s><|user|>")


KILLS = [
    (Fault("train.loop.train_step", 13), Fault("train.loop.train_step", 2)),
    (Fault("pathlib.Path.replace", 4), Fault("utils.checkpoint._flush", 3)),  # while saving
    (Fault("data.records.write_atomic", 1), Fault("train.chat_evals.generate", 5)),
]


@pytest.mark.parametrize("faults", KILLS, ids=["step", "saving", "start"])
def test_a_run_killed_and_resumed_twice_is_the_uninterrupted_run(
    undisturbed, config, base, tmp_path, faults
):
    for fault in faults:
        outcome = sft(config, "--resume", "--base-model", base, fault=fault)
        assert outcome.code == -signal.SIGKILL, outcome.err
    outcome = sft(config, "--resume", "--base-model", base)
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_plain_text_is_learned_beside_the_chats_and_a_resume_is_exact(config, base, tmp_path):
    texts = tmp_path / "texts.jsonl"
    words = ("old mill", "cold river", "long road")
    rows = [{"text": f"The {words[i % 3]} is {i}. " * 3} for i in range(60)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = yaml.safe_load(config.read_text())
    values["data"]["text_sources"] = [{"name": "text", "path": str(texts), "weight": 1}]
    values["data"]["text_tokens"] = 1_000
    config.write_text(yaml.safe_dump(values))
    assert sft(config, "--base-model", base).code == 0
    (tmp_path / "runs").rename(tmp_path / "undisturbed")
    losses = [
        m["text_val_loss"]
        for m in numbers(tmp_path / "undisturbed/sft/metrics.jsonl")
        if "text_val_loss" in m
    ]
    assert losses[-1] < 2 < 5 < losses[0]
    killed = sft(config, "--base-model", base, fault=Fault("train.loop.train_step", 14))
    assert killed.code == -signal.SIGKILL
    assert sft(config, "--resume").code == 0
    assert same(tmp_path / "runs", tmp_path / "undisturbed")


def test_a_resumed_run_needs_no_base_model(undisturbed, config, base, tmp_path):
    sft(config, "--base-model", base, fault=Fault("train.loop.train_step", 12))
    base.unlink()
    outcome = sft(config, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_epochs_give_the_length(config, base, tmp_path):
    outcome = sft(config, "--base-model", base, "train.steps=null", "train.epochs=2")
    assert outcome.code == 0, outcome.err
    (line,) = [t for t in outcome.out.splitlines() if t.startswith("an epoch:")]
    rows = int(line.partition(" rows")[0].split()[-1])
    assert final(tmp_path / "runs")["step"] == -(-2 * rows // 8)


def test_an_sft_checkpoint_may_be_trained_on(undisturbed, config, tmp_path):
    outcome = sft(config, "--base-model", undisturbed / "sft/sft_final.pt", "train.steps=10")
    assert outcome.code == 0, outcome.err
    first = numbers(tmp_path / "runs/sft/metrics.jsonl")[0]
    assert first["sft/exact_match"] > 0.9


def change(path, **values) -> None:
    checkpoint.save(path, checkpoint.load(path) | values)


def test_a_base_model_that_does_not_fit_is_refused(config, base, tokenizer, tmp_path):
    def refusal(*argv) -> str:
        outcome = sft(config, *argv)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err + outcome.out
        return outcome.err

    given = ("--base-model", base)
    assert "--base-model is missing: this stage starts from a pretrain or sft" in refusal()
    assert "nowhere.pt: cannot be read" in refusal("--base-model", "nowhere.pt")
    shape = refusal(*given, "model.d_ffn=96", "model.n_layers=3")
    assert "d_ffn: 96 in the config, 64 in the checkpoint" in shape
    assert "n_layers: 3 in the config, 2" in shape
    change(base, stage="dpo")
    assert "is of stage 'dpo', but this one starts from a pretrain or sft" in refusal(*given)
    roles = {"bos": tokenizer.bos_id}
    change(base, stage="pretrain", tokenizer=tokenizer.state_dict() | {"roles": roles})
    assert "names no eos_token" in refusal(*given)
    assert not list((tmp_path / "runs").rglob("*.pt"))


def test_a_dry_run_needs_no_data_and_leaves_nothing(config, tmp_path):
    epochs = ("train.steps=null", "train.epochs=2")
    outcome = sft(config, "--dry-run", *epochs)
    assert outcome.code == 2
    assert "data.expected_tokens" in outcome.err
    outcome = sft(config, "--dry-run", *epochs, "data.expected_tokens=51_200")
    assert outcome.code == 0, outcome.err
    assert "102,400" in outcome.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "per_step"), [("sft", "131,072"), ("sft_160m", "262,144")])
def test_the_plan_of_the_shipped_configs(tmp_path, name, per_step):
    outcome = run(
        "train_sft", "--config", f"configs/{name}.yaml", "--dry-run", log=tmp_path / "log"
    )
    assert outcome.code == 0, outcome.err
    assert per_step in outcome.out


# ---------------------------------------------------------------------------------------------
# Masks


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE))


def piece(messages: list[dict], tokenizer) -> Piece:
    """As data/conversations.py makes it, from the definition."""
    rendered = render(messages, tokenizer, ChatTemplate.of(tokenizer))
    made = cut_document(torch.tensor(rendered.tokens).numpy(), 0, len(rendered.tokens) - 1)
    made.targets[[not yes for yes in rendered.learned[1:]]] = IGNORE
    return made


def test_answers_and_their_ends_have_a_gradient_and_nothing_else_has(model, tokenizer):
    batch = make_batch([[piece(chat(i), tokenizer) for i in (1, 2)], []], 64, 4)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).detach().requires_grad_()
    logp, _ = token_logprobs(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
    logp.sum().backward()
    moved = hidden.grad.abs().sum(-1) > 0  # (B, T)
    predicted = batch.tokens.roll(-1, dims=1)[moved].tolist()
    assert moved.sum() == batch.weight
    answers = "".join(ANSWERS[c] + "</s>" for c in ("blue", "grey"))
    # A row's second conversation begins where the first one's last token is only a target.
    learned = batch.targets[moved].tolist()
    assert tokenizer.decode(learned, skip_special=False) == answers
    assert [a == b for a, b in zip(predicted, learned, strict=True)].count(False) == 2


def test_a_conversations_loss_does_not_change_with_its_neighbours(model, tokenizer):
    """Packed with others, and alone through the whole softmax, one after the other."""
    pieces = [piece(chat(i), tokenizer) for i in range(5)]
    packed = make_batch([[pieces[0], pieces[1]], [pieces[2]], [pieces[3], pieces[4]]], 64, 4)
    with torch.no_grad():
        together, _ = cross_entropy_loss(model, packed)
        alone = 0.0
        for one in pieces:
            tokens, targets = map(torch.from_numpy, (one.tokens, one.targets))
            positions, ends = torch.arange(len(one)), torch.tensor([0, len(one)], dtype=torch.int32)
            logits = model.logits(model(tokens[None], positions[None], ends))[0]  # (T, V)
            alone += F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
