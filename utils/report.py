"""A run as one page: `report.html`, with every plot inside it, and `plots/*.png` beside it.

Read from what the run wrote (`metrics.jsonl`, `samples.jsonl`, `config.yaml`, `versions.yaml`,
`eval.json`), so that it can be made while the run goes on, after it, or on another machine. Runs of
one stage are drawn into the same axes, stages one below the other. Whatever number a stage reports
gets its curve without being announced here: `PANELS` only arranges those that every stage has.

`read_run` and `panels_of` say what is drawn, `utils/report_plots.py` draws it, and
`utils/report_page.py` makes the page. Left out: zooming and live reloading; W&B has them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils import report_evals
from utils.config import ConfigError, load_yaml
from utils.logging import read_metrics

STAGES = ("pretrain", "sft", "pref", "verifier", "rlvr")  # the order on the page
HELD_OUT = "held-out"
METRICS = "metrics.jsonl"


@dataclass
class Run:
    """What a run's folder holds; `stage` is its own or, in older runs, told by its metrics."""

    name: str
    path: Path
    stage: str
    lines: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, Any]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; what was not finite is left out."""
        points = [(line["step"], line[key]) for line in self.lines if _is_number(line.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def metrics(self) -> list[str]:
        """Every metric that has a number, in the order of appearance."""
        found = (key for line in self.lines for key, value in line.items() if _is_number(value))
        return [key for key in dict.fromkeys(found) if key not in ("step", "time")]

    def measured_once(self) -> list[str]:
        """What was measured a single time in a run that has been evaluated more often."""
        if len(self.curve("val/loss")[0]) < 2:
            return []
        return [key for key in self.metrics() if len(self.curve(key)[0]) == 1]


@dataclass
class Curve:
    """One line of a panel; `run` and `style` choose its colour and its dashes."""

    label: str
    run: int
    style: int
    steps: list[int]
    values: list[float]
    sparse: bool = False
    """Measured now and then: drawn with a marker at each point."""


@dataclass
class Panel:
    """One plot."""

    slug: str
    title: str
    unit: str
    curves: list[Curve]
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(run, step) of what is marked on its curve: steps that were skipped."""


# Panels of every stage: title, unit, and the metrics in it with their labels.
PANELS = (
    ("Loss", "", {"train/loss": "training", "val/loss": HELD_OUT}),
    ("Learning rate", "", {"train/lr": ""}),
    ("Gradient norm", "", {"train/grad_norm": ""}),
    ("Throughput", "tokens/s", {"train/tokens_per_sec": ""}),
    ("Model FLOPs utilisation", "%", {"train/mfu": ""}),
    (
        "GPU memory",
        "GB",
        {"gpu/memory_allocated_gb": "allocated, peak", "gpu/memory_reserved_gb": "reserved, peak"},
    ),
    ("Cost", "$", {"cost/usd_spent": ""}),
)
SKIPPED = "stability/skipped_steps"
# Functions of what is drawn, or of time alone.
NOT_DRAWN = {
    "train/tokens", "train/progress_percent", "cost/eta_hours", "cost/tokens_per_dollar",
    "val/ppl", "sft/val_loss", SKIPPED,
}  # fmt: skip
SPELLED = {"frac": "share", "kl": "KL", "logp": "log-probability", "z": "z-score"}
SHARES = ("_frac", "accuracy", "exact_match", "pass_rate")  # ends of metrics that are shares


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several together, and its plots.

    Args:
        out: the page; by default `report.html` in the run's folder, or in the one that several
            runs have in common.

    Returns:
        The page's path.

    Raises:
        ConfigError: a folder holds no run, or the page cannot be written.
    """
    from utils.report_page import page
    from utils.report_plots import draw

    stages = by_stage([read_run(folder) for folder in folders])
    runs = [run for members in stages.values() for run in members]
    _make_names_differ(runs)
    common = Path(os.path.commonpath([run.path.resolve() for run in runs]))
    out = Path(out) if out else common / "report.html"
    try:
        plots = out.parent / "plots"
        plots.mkdir(parents=True, exist_ok=True)
        sections = []
        for stage, members in stages.items():
            panels = list(panels_of(members))
            drawings = [draw(p, members, plots / f"{stage}_{p.slug}.png") for p in panels]
            sections.append((stage, members, list(zip(panels, drawings, strict=True))))
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(page(runs, sections), encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: not written: {error.strerror}") from error
    return out


def runs_among(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """What holds a run, or is not there at all; and what else lies among them, as in `runs/demo/*`.

    The second is empty if there is no run.
    """
    others = [p for p in paths if Path(p).exists() and not (Path(p) / METRICS).is_file()]
    runs = [p for p in paths if p not in others]
    return (runs, others) if runs else (list(paths), [])


def read_run(folder: str | Path) -> Run:
    """Everything a report needs of a run, whole or still going.

    Raises:
        ConfigError: there is no run.
    """
    path = Path(folder)
    if not (path / METRICS).is_file():
        raise ConfigError(
            f"{path} holds no run (no {METRICS}): give the folder of one, runs/<name>"
        )
    lines = read_metrics(path / METRICS)
    samples, versions = path / "samples.jsonl", _yaml(path / "versions.yaml")
    return Run(
        name=path.resolve().name,
        path=path,
        stage=str(versions.pop("stage", None) or _stage_told_by(lines)),
        lines=lines,
        samples=read_metrics(samples) if samples.is_file() else [],
        config=_yaml(path / "config.yaml"),
        versions=versions,
        evaluations=_evaluations(path / report_evals.FILE),
    )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return load_yaml(path) if path.is_file() else {}
    except (ConfigError, yaml.YAMLError):  # being written at this moment
        return {}


def _evaluations(path: Path) -> list[dict[str, Any]]:
    try:
        return report_evals.read_evaluations(path)
    except ConfigError:  # a foreign file of that name is no reason to go without a report
        return []


def _stage_told_by(lines: list[dict[str, Any]]) -> str:
    kinds = {key.partition("/")[0] for line in lines for key in line}
    return next((stage for stage in ("rlvr", "pref", "sft") if stage in kinds), "pretrain")


def _make_names_differ(runs: list[Run]) -> None:
    """Two runs of one name are told apart by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)


def by_stage(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each stage, in the order in which a model passes through them."""
    known = [stage for stage in STAGES if any(run.stage == stage for run in runs)]
    stages = dict.fromkeys([*known, *(run.stage for run in runs)])
    return {stage: [run for run in runs if run.stage == stage] for stage in stages}


def panels_of(runs: Sequence[Run]) -> Iterator[Panel]:
    """The plots of runs of one stage: those of every stage, and one for each other metric."""
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics()))
    arranged = {key for _, _, metrics in PANELS for key in metrics}
    domains = [k for k in keys if k.endswith("_val_loss") and "/" not in k]
    yield from _panel(runs, *PANELS[0])
    # Domains share a plot unless that is needed to tell runs apart.
    names = {key: key.removesuffix("_val_loss") for key in domains}
    if len(runs) == 1:
        yield from _panel(runs, "Held-out loss by domain", "", names, sparse=True)
    else:
        for key, name in names.items():
            yield from _panel(runs, f"Held-out loss, {name}", "", {key: ""}, sparse=True)
    once = {key for run in runs for key in run.measured_once()}
    others = [
        key
        for key in keys
        if key not in arranged | NOT_DRAWN | once | set(domains) and not key.endswith("_val_ppl")
    ]
    watched = [key for key in others if key.startswith("stability/")]
    yield from _other_panels(runs, [key for key in others if key not in watched])
    for title, unit, metrics in PANELS[1:]:
        yield from _panel(runs, title, unit, metrics)
    # Where nothing has happened there is nothing to see.
    yield from _other_panels(runs, [key for key in watched if _changes(runs, key)])


def _changes(runs: Sequence[Run], key: str) -> bool:
    return any(len(set(run.curve(key)[1])) > 1 for run in runs)


def _other_panels(runs: Sequence[Run], keys: list[str]) -> Iterator[Panel]:
    """One for each metric, together with what was measured of it on held-out data."""
    titles = [words(key) for key in keys]
    for key, title in zip(keys, titles, strict=True):
        prefix, _, name = key.rpartition("/")
        if name.startswith("val_") and f"{prefix}/{name.removeprefix('val_')}" in keys:
            continue
        held_out = f"{prefix}/val_{name}"
        pair = {key: "training", held_out: HELD_OUT} if held_out in keys else {key: ""}
        where = f" ({prefix})" if titles.count(title) > 1 else ""
        yield from _panel(runs, title + where, "%" if key.endswith(SHARES) else "", pair)


def words(key: str) -> str:
    """A metric's name as a title: `pref/val_reward_margin` is `Held-out reward margin`."""
    name = key.rpartition("/")[2]
    if name.startswith("val_"):
        name = f"{HELD_OUT} {name.removeprefix('val_')}"
    text = " ".join(SPELLED.get(word, word) for word in re.split("[_ ]", name))
    return text[:1].upper() + text[1:]


def _panel(
    runs: Sequence[Run], title: str, unit: str, metrics: dict[str, str], sparse: bool = False
) -> Iterator[Panel]:
    """The panel, if any run has any of its metrics."""
    curves = []
    for number, run in enumerate(runs):
        for style, (key, label) in enumerate(metrics.items()):
            steps, values = run.curve(key)
            if not steps:
                continue
            names = [run.name] * (len(runs) > 1) + [label] * bool(label)
            rare = sparse or label == HELD_OUT or len(steps) <= 2
            curves.append(Curve(", ".join(names), number, style, steps, values, rare))
    if curves:
        slug = re.sub("[^a-z0-9]+", "_", title.lower()).strip("_")
        marks = list(_skips(runs)) if title == "Gradient norm" else []
        yield Panel(slug, title, unit, curves, marks)


def _skips(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Where the count of skipped steps has grown: at the first log line after each."""
    for number, run in enumerate(runs):
        before = 0
        for step, count in zip(*run.curve(SKIPPED), strict=True):
            if count > before:
                yield number, step
            before = count


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
