"""The page of a report: everything in one HTML file that needs no network and no script.

Beside what is seen, the page holds every line of `metrics.jsonl` as JSON, in the script
element `metrics`, so that a saved report is enough to draw it anew.
"""

import json
import time
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import yaml

from utils import report_evals
from utils.logging import human_count, human_time
from utils.report import SHARES, Curve, Panel, Run, words
from utils.report_plots import colour, style_variables, tick_text

STAGE_NAMES = {
    "pretrain": "Pretraining", "sft": "Supervised fine-tuning", "pref": "Preferences",
    "verifier": "Verifier", "rlvr": "Reinforcement learning with verifiable rewards",
}  # fmt: skip
SAMPLES_SHOWN = 6
STILL_GOING_SECONDS = 600  # a run whose last line is younger, and which has not ended, goes on

PLACES = ("name", "runs_dir", "data.cache_dir")  # settings in which all runs differ

Section = tuple[str, list[Run], list[tuple[Panel, str]]]

STYLE = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --text: #111827; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161c24; --text: #e6ebf1; DARK }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1240px; background: var(--page);
  color: var(--text); font: 15px/1.5 var(--font) }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.02em }
h2 { font-size: 20px; margin: 40px 0 14px; letter-spacing: -.01em }
h1 + .quiet { margin-bottom: 18px } h3 { font-size: 15px; margin: 0 }
.quiet { color: var(--ink); margin: 0 }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 16px 18px; margin: 0 0 16px; min-width: 0 }
.runs, .plots { display: grid; gap: 16px; --least: min(100%, 350px);
  grid-template-columns: repeat(auto-fit, minmax(var(--least), 1fr)) }
.plots { grid-template-columns: repeat(auto-fill, minmax(var(--least), 1fr)) }
.runs .card, .plots .card { margin: 0 }
.facts { display: flex; flex-wrap: wrap; gap: 10px 26px; margin: 12px 0 0 }
.facts dt { color: var(--ink); font-size: 12px } .facts dd { margin: 0; font-size: 19px;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.plots svg { display: block; width: 100%; height: auto }
.plots svg text { font-family: var(--font) !important }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 8px; padding: 0;
  list-style: none; color: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums }
.legend b { color: var(--text); font-weight: 600 }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px }
.state { float: right; font-size: 12px; padding: 2px 10px; border-radius: 99px;
  border: 1px solid var(--grid); color: var(--ink) }
.alert { color: var(--alert) }
details { margin: 0 0 10px } summary { cursor: pointer; font-weight: 600; padding: 4px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  width: 100% }
th, td { text-align: left; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top }
th { color: var(--ink); font-weight: 500 } td.number, th.number { text-align: right }
pre { overflow-x: auto; font-size: 12.5px; line-height: 1.45; margin: 8px 0 }
.sample { border-top: 1px solid var(--grid); padding: 12px 0; overflow-wrap: anywhere }
h3 + .sample { border: 0 }
.sample p { margin: 0; white-space: pre-wrap } .sample .quiet { font-size: 13px }
.answers { display: grid; gap: 6px 16px; grid-template-columns: max-content 1fr; margin-top: 6px }
"""


def page(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """The whole document."""
    title = ", ".join(run.name for run in runs)
    style = STYLE.replace("LIGHT", style_variables(False)).replace("DARK", style_variables(True))
    written = time.strftime("%Y-%m-%d %H:%M")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">Report of {written}, from metrics.jsonl</p>',
        *report_evals.side_by_side([(run.name, run.evaluations) for run in runs]),
        *(part for section in sections for part in _section(*section)),
        "<h2>Numbers</h2>",
        *map(_numbers, runs),
        "<h2>How it was made</h2>",
        *map(_origin, runs),
    ]
    head = (
        f'<meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style>"
    )
    data = json.dumps({run.name: run.lines for run in runs}).replace("<", "\\u003c")
    script = f'<script type="application/json" id="metrics">{data}</script>'
    return (
        "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, script])
        + "\n</body></html>\n"
    )


def _section(stage: str, runs: list[Run], drawn: list[tuple[Panel, str]]) -> Iterator[str]:
    yield f"<h2>{escape(STAGE_NAMES.get(stage, stage))}</h2>"
    several = len(runs) > 1
    yield '<div class="runs">'
    for number, run in enumerate(runs):
        yield _summary(run, number if several else None)
    yield "</div><br>"
    if several:
        yield from _differences(runs)
    yield '<div class="plots">'
    for panel, svg in drawn:
        yield _plot(panel, svg, len(runs))
    yield "</div><br>"
    for run in runs:
        yield from report_evals.section(run.name, run.evaluations)
        yield from _samples(run)


# ---------------------------------------------------------------------------------------------
# A run at a glance


def _summary(run: Run, number: int | None) -> str:
    facts = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(run))
    dot = "" if number is None else _dot(number)
    return (
        f'<div class="card"><span class="state">{_state(run)}</span>'
        f'<h3>{dot}{escape(run.name)}</h3><dl class="facts">{facts}</dl></div>'
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    if not run.lines:
        return
    yield "steps", f"{run.lines[-1]['step']:,}"
    for key, name, text in (
        ("train/tokens", "tokens", human_count),
        ("val/loss", "held-out loss", "{:.4f}".format),
        ("cost/usd_spent", "spent", "${:,.2f}".format),
    ):
        _, values = run.curve(key)
        if values:
            yield name, text(values[-1])
    for key, name, unit in (
        ("train/tokens_per_sec", "tokens/s, median", ""),
        ("train/mfu", "MFU, median", "%"),
    ):
        _, values = run.curve(key)
        if values:
            yield name, tick_text(sorted(values)[len(values) // 2], unit)
    yield "wall time", human_time(run.lines[-1]["time"] - run.lines[0]["time"])
    _, skipped = run.curve("stability/skipped_steps")
    if skipped and skipped[-1]:
        yield "steps skipped", f"{skipped[-1]:,.0f}"
    for key in run.measured_once():
        yield (
            words(key).lower(),
            tick_text(run.curve(key)[1][0], "%" if key.endswith(SHARES) else ""),
        )


def _state(run: Run) -> str:
    _, progress = run.curve("train/progress_percent")
    done = progress[-1] if progress else 0.0
    if any(run.path.glob("*_final.pt")):
        return "finished"
    age = time.time() - run.lines[-1]["time"] if run.lines else 0.0
    return f"{'running' if age < STILL_GOING_SECONDS else 'stopped'}, {done:.0f}%"


def _dot(index: int) -> str:
    return f'<span class="dot" style="background: var(--c{index % 8})"></span>'


def _differences(runs: list[Run]) -> Iterator[str]:
    """The settings in which runs of one stage differ."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in PLACES)
    rows = [
        [key, *(str(values.get(key, "-")) for values in flat)]
        for key in keys
        if len({str(values.get(key)) for values in flat}) > 1
    ]
    if rows:
        table = _table(["setting", *(run.name for run in runs)], rows)
        yield f'<div class="card"><h3>Settings that differ</h3>{table}</div>'


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# ---------------------------------------------------------------------------------------------
# Plots and samples


def _plot(panel: Panel, svg: str, n_runs: int) -> str:
    items = "".join(_legend(curve, panel.unit, n_runs) for curve in panel.curves)
    if panel.marks:
        steps = ", ".join(f"{step:,}" for _, step in panel.marks[:5])
        more = " …" if len(panel.marks) > 5 else ""
        items += f'<li class="alert">&times; steps skipped before {steps}{more}</li>'
    unit = f' <span class="quiet">{escape(panel.unit)}</span>' if panel.unit else ""
    svg = svg.replace("<svg ", f'<svg aria-label="{escape(panel.title)}" ', 1)
    return (
        f'<figure class="card"><h3>{escape(panel.title)}{unit}</h3>'
        f'<ul class="legend">{items}</ul>{svg}</figure>'
    )


def _legend(curve: Curve, unit: str, n_runs: int) -> str:
    label = f"{escape(curve.label)} " if curve.label else "last "
    return f"<li>{_dot(colour(curve, n_runs))}{label}<b>{_exact(curve.values[-1], unit)}</b></li>"


def _exact(value: float, unit: str) -> str:
    plain = unit or not 1e-3 <= abs(value) < 1000
    return tick_text(value, unit) if plain else f"{value:#.4g}"


def _samples(run: Run) -> Iterator[str]:
    """What the model wrote at its first and at its last evaluation."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        if isinstance(sample.get("prompt"), str) and "answer" in sample:
            answers.setdefault(sample["prompt"], []).append(sample)
    if not answers:
        return
    shown = "".join(map(_sample, list(answers.values())[:SAMPLES_SHOWN]))
    yield f'<div class="card"><h3>Samples of {escape(run.name)}</h3>{shown}</div>'


def _sample(samples: list[dict[str, Any]]) -> str:
    ends = [samples[0], samples[-1]] if len(samples) > 1 else samples
    rows = [(f"step {s['step']:,}", str(s["answer"])) for s in ends]
    if samples[-1].get("expected") is not None:
        rows.append(("expected", str(samples[-1]["expected"])))
    cells = "".join(
        f'<span class="quiet">{escape(name)}</span><p>{escape(text) or "(nothing)"}</p>'
        for name, text in rows
    )
    return (
        f'<div class="sample"><p><b>{escape(samples[0]["prompt"])}</b></p>'
        f'<div class="answers">{cells}</div></div>'
    )


# ---------------------------------------------------------------------------------------------
# Numbers and origin


def _numbers(run: Run) -> str:
    """First and last value of every metric, in all their digits."""
    rows = []
    for key in run.metrics():
        steps, values = run.curve(key)
        rows.append([key, values[0], values[-1], min(values), max(values), steps[-1]])
    head = ["metric", "first", "last", "smallest", "largest", "last at step"]
    return f"<details><summary>{escape(run.name)}</summary>{_table(head, rows)}</details>"


def _origin(run: Run) -> str:
    versions = "".join(_table(["", run.name], [[k, v] for k, v in run.versions.items()]))
    config = escape(yaml.safe_dump(run.config, sort_keys=False)) if run.config else ""
    return (
        f"<details><summary>{escape(run.name)}: versions and settings</summary>"
        f"{versions if run.versions else ''}<pre>{config}</pre></details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    header = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'
