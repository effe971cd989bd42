"""What a chain of stages has made of a model: what each stage taught, and what it made forget.

A stage's own measure comes from its `metrics.jsonl`: it is what the stage was trained for, on its
own held-out data. `measure` asks the same of every stage's final checkpoint, on built-in data that
none of them saw: plain text, questions, and pairs of a right and a wrong answer. The second table
is the one that shows forgetting, and `largest_fall` puts a number on it.

Left out: benchmarks (`eval.py`), and error bars in the tables: of 200 questions a share of 80% has
a standard error of 3 points (the report has them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from operator import gt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import builtin, builtin_tasks
from data.chat import ChatTemplate, Message, render, render_prompt
from data.chat_loader import Question
from data.packing import IGNORE, make_batch, pack_rows
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.generate import generate
from models.transformer import Transformer
from train.chat_evals import ChatEvalConfig, answer_questions, few_shot_exact_match
from train.likelihood import Request, score, target_scores
from utils import checkpoint
from utils.config import validate
from utils.distributed import Distributed
from utils.logging import human_count, human_time
from utils.report import read_run
from utils.report_evals import FILE, add_evaluation
from utils.versions import versions

# A stage's own measure: its name, the metric before (its first value) and after (its last).
OWN_MEASURES = {
    "pretrain": ("text, loss per token", "val/loss", "val/loss"),
    "sft": ("questions, exact match", "sft/base_exact_match", "sft/exact_match"),
    "pref": ("pairs told apart", "pref/val_reward_accuracy", "pref/val_reward_accuracy"),
    "rlvr": ("sums, pass@1", "rlvr/val_pass_at_1", "rlvr/val_pass_at_1"),
}
DOCUMENTS = {"web": 52, "code": 6, "math": 2}  # the demo's mixture
QUESTIONS, SHOTS, NEW_TOKENS = 200, 3, 32
PAIRS = 200
# The shares that every checkpoint is asked for, in the order of the stages that teach them.
SHARED = {
    "tokens right": "text_accuracy",
    "questions, exact": "exact_match",
    "pairs, right likelier": "pair_accuracy",
}
ROWS_AT_ONCE, DOCUMENTS_PER_ROW = 16, 16
ALONE = Distributed(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Own:
    """A stage by its own account; `seconds` are those of training steps, evaluations left out."""

    name: str
    measure: str
    before: float | None
    after: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A checkpoint on the common data.

    Attributes:
        text_loss: nats per token of unseen documents.
        text_accuracy: share of their tokens that were the likeliest, of `text_tokens` in all.
        exact_match: share of unseen questions answered to the letter.
        pair_accuracy: share of unseen pairs whose right answer is likelier than the wrong one.
        few_shot: the questions came after solved examples, since it knows no chat.
    """

    name: str
    text_loss: float
    text_accuracy: float
    text_tokens: int
    exact_match: float
    pair_accuracy: float
    few_shot: bool


def own_account(folder: Path) -> Own:
    """What a finished run's metrics say of it."""
    run = read_run(folder)
    name, before, after = OWN_MEASURES[run.stage]
    first, last = run.curve(before)[1][:1], run.curve(after)[1][-1:]
    tokens, seconds = 0, 0.0
    for line in run.lines:
        if "train/tokens_per_sec" in line:
            seconds += (line["train/tokens"] - tokens) / line["train/tokens_per_sec"]
        tokens = line.get("train/tokens", tokens)
    return Own(folder.name, name, *(v[0] if v else None for v in (first, last)), tokens, seconds)


def load_model(path: Path) -> tuple[Transformer, Tokenizer, ChatTemplate | None]:
    """A checkpoint's model on the CPU, in float32."""
    state = checkpoint.load(path)
    model = Transformer(validate(ModelConfig, state["model_config"], str(path)))
    model.load_state_dict(state["model"])
    template = state["chat_template"] and ChatTemplate.from_state(state["chat_template"])
    return model.eval(), Tokenizer.from_state(state["tokenizer"]), template


def measure(path: Path) -> Measured:
    """A final checkpoint on the text and the questions that are the same for every stage."""
    model, tokenizer, template = load_model(path)
    held_out = unseen_questions(tokenizer, "heldout", QUESTIONS)
    if template:
        config = ChatEvalConfig(questions=QUESTIONS, max_new_tokens=NEW_TOKENS, samples=0)
        exact = answer_questions(model, held_out, tokenizer, config, ALONE)[0]["sft/exact_match"]
    else:
        solved = unseen_questions(tokenizer, "train", SHOTS)
        exact = few_shot_exact_match(model, solved, held_out, tokenizer, ALONE)
    text = text_measures(model, tokenizer)
    pairs = pair_accuracy(model, tokenizer)
    return Measured(path.parent.name, *text, exact, pairs, template is None)


def text_measures(model: Transformer, tokenizer: Tokenizer) -> tuple[float, float, int]:
    """Of built-in documents beyond those that training reads: loss and accuracy per token, and how
    many tokens there were."""
    texts = [
        builtin.document(domain, builtin.N_DOCUMENTS[domain] + i)
        for domain, count in DOCUMENTS.items()
        for i in range(count)
    ]
    documents = map(np.asarray, tokenizer.encode_documents(texts))
    rows = pack_rows(documents, model.config.max_seq_len, DOCUMENTS_PER_ROW)
    targets, hidden = [], []
    with torch.no_grad():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            batch = make_batch(some, model.config.max_seq_len, DOCUMENTS_PER_ROW)
            wanted = batch.targets != IGNORE
            targets.append(batch.targets[wanted])
            hidden.append(model(batch.tokens, batch.positions, batch.cu_seqlens)[wanted])
        logp, likeliest = target_scores(torch.cat(hidden), model.head_weight, torch.cat(targets))
    return -float(logp.mean()), float(likeliest.double().mean()), len(logp)


def pair_accuracy(model: Transformer, tokenizer: Tokenizer) -> float:
    """The share of unseen pairs whose right answer has the higher log-probability."""
    template = ChatTemplate.of(tokenizer)
    requests = []
    for i in range(PAIRS):
        pair = builtin_tasks.preference("heldout", i)
        prompt = render_prompt(pair["prompt"], tokenizer, template)
        for answer in (pair["chosen"], pair["rejected"]):
            said = [*pair["prompt"], {"role": "assistant", "content": answer}]
            requests.append(
                Request(prompt, render(said, tokenizer, template).tokens[len(prompt) :])
            )
    scores = dict(chain.from_iterable(score(model, requests)))
    logp = [scores[number].logprob for number in range(len(requests))]
    return sum(map(gt, logp[::2], logp[1::2])) / PAIRS


def keep(path: Path, measured: Measured) -> None:
    """Put what a checkpoint was measured to be into the `eval.json` beside it, for the report."""
    state = checkpoint.load(path)
    made = {"file": path.name, "sha256": checkpoint.sha256(path)}
    shots = SHOTS if measured.few_shot else 0
    results = [
        {
            "task": "unseen text",
            "metric": "nats per token",
            "value": measured.text_loss,
            "n": measured.text_tokens,
        },
        _share("unseen text", "tokens right", measured.text_accuracy, measured.text_tokens),
        _share("questions", "exact match", measured.exact_match, QUESTIONS) | {"shots": shots},
        _share("pairs", "right answer likelier", measured.pair_accuracy, PAIRS),
    ]
    evaluation = {
        "checkpoint": made | {key: state[key] for key in ("stage", "step", "tokens")},
        "settings": {"tasks": ["builtin"]},
        "versions": versions(),
        "results": results,
    }
    add_evaluation(path.parent / FILE, evaluation)


def _share(task: str, metric: str, value: float, n: int) -> dict[str, Any]:
    """A result with the standard error of a share."""
    error = math.sqrt(value * (1 - value) / n)
    return {"task": task, "metric": metric, "value": value, "stderr": error, "n": n}


def unseen_questions(tokenizer: Tokenizer, split: str, count: int) -> list[Question]:
    """The first chats of a split of the built-in tasks, as questions with one right answer."""
    template = ChatTemplate.of(tokenizer)
    chats = [builtin_tasks.chat(split, i) for i in range(count)]
    return [
        Question(
            render_prompt(chat["messages"][:-1], tokenizer, template),
            tokenizer.encode(chat["answer"]),
            known=True,
        )
        for chat in chats
    ]


def dialogues(path: Path) -> list[list[Message]]:
    """Three short conversations on unseen questions; the likeliest answers."""
    model, tokenizer, template = load_model(path)
    return [
        _converse(model, tokenizer, template, [_asked(kind, number) for kind in kinds])
        for number, kinds in enumerate([("talk", "add"), ("subtract",), ("reverse", "larger")])
    ]


def _asked(kind: str, number: int) -> str:
    return builtin_tasks.task("heldout", number, kinds=(kind,)).prompt


def _converse(
    model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, questions: Sequence[str]
) -> list[Message]:
    messages: list[Message] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = render_prompt(messages, tokenizer, template)
        room = min(NEW_TOKENS, model.config.max_seq_len - len(prompt))
        (ids,) = generate(model, [prompt], room, temperature=0.0, stop_ids=[tokenizer.eos_id])
        messages.append({"role": "assistant", "content": tokenizer.decode(ids).strip()})
    return messages


def as_dict(
    own: Sequence[Own], measured: Sequence[Measured], talks: list[list[Message]]
) -> dict[str, Any]:
    """All of it as plain values, for a file."""
    return {
        "stages": [asdict(stage) for stage in own],
        "measured": [asdict(one) for one in measured],
        "dialogues": talks,
    }


# ---------------------------------------------------------------------------------------------
# Tables


def own_table(own: Sequence[Own]) -> str:
    """A line for each stage: its measure before and after, tokens, time."""
    rows = [("stage", "its own measure", "before", "after", "tokens", "training")]
    for o in own:
        values = (_value(o.measure, value) for value in (o.before, o.after))
        rows.append((o.name, o.measure, *values, human_count(o.tokens), human_time(o.seconds)))
    return _table(rows, left=2)


def common_table(measured: Sequence[Measured]) -> str:
    """A line for each checkpoint: its shares in percent, with the change since the one before."""
    rows = [("after", "text, loss", *chain.from_iterable((title, "") for title in SHARED))]
    before: Measured | None = None
    for m in measured:
        row = [m.name, f"{m.text_loss:.2f}"]
        for name in SHARED.values():
            share = getattr(m, name)
            mark = "*" * (m.few_shot and name == "exact_match")
            row += [f"{share:.1%}{mark}", _points(share, getattr(before, name)) if before else ""]
        rows.append(tuple(row))
        before = m
    return _table(rows, left=1)


def largest_fall(measured: Sequence[Measured]) -> tuple[str, Measured, Measured, float]:
    """What was lost the most of what an earlier stage had taught.

    Of each measure the value after the stage that teaches it (the first, the second, the third) is
    compared with those after all later stages.

    Returns:
        The measure's title, the two checkpoints, and the change as a share, negative for a fall.
    """
    changes = [
        (title, teacher, later, getattr(later, name) - getattr(teacher, name))
        for number, (title, name) in enumerate(SHARED.items())
        for teacher in measured[number : number + 1]
        for later in measured[number + 1 :]
    ]
    return min(changes, key=lambda change: change[-1])


def remarks(measured: Sequence[Measured]) -> list[str]:
    """What the second table needs to be read rightly."""
    lines = []
    if any(m.few_shot for m in measured):
        lines.append(f"* knows no chat form: asked after {SHOTS} solved examples")
    if len(measured) > 1:
        title, teacher, later, change = largest_fall(measured)
        fell = f"largest fall of an earlier measure: {title}, {100 * change:+.1f} points from"
        none = "no later stage has brought an earlier measure down"
        lines.append(f"{fell} {teacher.name} to {later.name}" if change < 0 else none)
    return lines


def _points(after: float, before: float) -> str:
    return f"{round(100 * (after - before), 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"


def _value(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if "loss" in measure else f"{value:.1%}"


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns side by side, the first `left` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
