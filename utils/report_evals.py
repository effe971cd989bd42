"""`eval.json`: what a run's checkpoints scored on benchmarks, and how it is shown.

The file lies beside the checkpoint and holds a list, newest last; an evaluation made again with the
same checkpoint and settings takes the place of its predecessor. `train/harness_run.py` fills it;
the run's report and the command line show it with the same words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import ConfigError

FILE = "eval.json"
HEAD = ("task", "metric", "value", "± standard error", "n", "shots", "version")


class Reference(NamedTuple):
    """A published score, in percent."""

    model: str
    percent: float
    source: str


# Landmarks, not comparisons: their authors measured with harnesses of their own.
REFERENCES = {
    "hellaswag": (Reference("SmolLM2-135M (2T tokens)", 42.1, "its model card"),),
    "gsm8k": (
        Reference("SmolLM2-135M (2T tokens)", 1.4, "its model card"),
        Reference("nanochat d20 (561M) after SFT", 4.6, "its authors' report"),
        Reference("nanochat d20 (561M) after RL", 7.6, "its authors' report"),
    ),
}


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a file; none if it is not there.

    Raises:
        ConfigError: it holds something else.
    """
    if not path.exists():
        return []
    try:
        evaluations = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        if all("results" in e and "checkpoint" in e for e in evaluations):
            return evaluations
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} is not a file of evaluations; move it, or write to another --out")


def add_evaluation(path: Path, evaluation: dict[str, Any]) -> None:
    """Append to the file, in place of one of the same checkpoint and settings; atomically.

    Raises:
        ConfigError: the file holds something else, or cannot be written.
    """
    kept = [e for e in read_evaluations(path) if _identity(e) != _identity(evaluation)]
    text = json.dumps({"evaluations": [*kept, evaluation]}, indent=2, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: not written: {error.strerror}") from error


def _identity(evaluation: dict[str, Any]) -> object:
    return evaluation["checkpoint"]["sha256"], evaluation.get("settings")


def rows_of(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells under `HEAD`, without the parts of groups."""
    rows = []
    for result in evaluation["results"]:
        if result.get("part_of"):
            continue
        name = result["metric"]
        if result.get("filter") not in (None, "none"):
            name += f", {result['filter']}"
        error, shots = result.get("stderr"), result.get("shots")
        rows.append(
            (
                result["task"],
                name,
                f"{result['value']:.4f}",
                "" if error is None else f"± {error:.4f}",
                f"{result['n']:,}",
                "" if shots is None else str(shots),
                "" if result.get("version") is None else str(result["version"]),
            )
        )
    return rows


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns that stay put, under `HEAD`."""
    rows = [HEAD, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def side_by_side(named: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Iterator[str]:
    """What several runs were measured on; a column for each, its newest values.

    What was asked in another way (more samples, solved examples, a conversation, another version of
    the task) stands in a row of its own.
    """
    newest = {
        name: {
            (task, metric, n, shots, version, _form(evaluation)): value
            for evaluation in evaluations
            for task, metric, value, _, n, shots, version in rows_of(evaluation)
        }
        for name, evaluations in named
    }
    ways = dict.fromkeys(way for values in newest.values() for way in values)
    runs_of: dict[tuple[str, ...], set[str]] = {}
    for name, values in newest.items():
        for way in values:
            runs_of.setdefault(way[:2], set()).add(name)
    rows = [
        (*way, *(values.get(way, "") for values in newest.values()))
        for measure, names in runs_of.items()
        for way in ways
        if way[:2] == measure and len(names) > 1
    ]
    if not rows:
        return
    table = _html_table((*HEAD[:2], *HEAD[4:], "asked", *newest), rows)
    yield f'<div class="card"><h3>Benchmarks side by side</h3>{table}</div>'


def _form(evaluation: dict[str, Any]) -> str:
    return "as conversations" if evaluation.get("settings", {}).get("chat") else ""


def references_of(tasks: Sequence[str]) -> Iterator[str]:
    """Published scores of well-known small models on these tasks, a line each."""
    for task in dict.fromkeys(tasks):
        for reference in REFERENCES.get(task, ()):
            yield f"{task}: {reference.model} {reference.percent / 100:.3f} ({reference.source})"


def section(name: str, evaluations: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A run's evaluations as a part of its report."""
    if not evaluations:
        return
    rows, tasks = [], []
    for evaluation in evaluations:
        made = evaluation["checkpoint"]
        where = f"{made.get('file', '?')}, step {made.get('step', '?')}"
        where += _form(evaluation) and f", {_form(evaluation)}"
        rows += [(where, *cells) for cells in rows_of(evaluation)]
        tasks += [result["task"] for result in evaluation["results"]]
    lines = "".join(f'<p class="quiet">{escape(line)}</p>' for line in references_of(tasks))
    if lines:
        lines = (
            '<p class="quiet">Published scores of other models, from their authors and measured '
            f"with their own harnesses: landmarks, not comparisons.</p>{lines}"
        )
    table = _html_table(("checkpoint", *HEAD), rows)
    yield f'<div class="card"><h3>Benchmarks of {escape(name)}</h3>{table}{lines}</div>'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{heads}</tr>{body}</table></div>'
