"""Reports against the files they are made from: every number, any state of a run, no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import report
from train.setup import _draw
from utils.config import ConfigError
from utils.logging import RunDirectory, read_metrics
from utils.report import by_stage, panels_of, read_run, write_report
from utils.report_evals import side_by_side
from utils.report_plots import draw, tick_text

VOID = {"meta", "br"}
NASTY = "</script><script>alert(1)</script> & <b>"


def training_line(step: int, **more: object) -> dict:
    line = {
        "train/loss": 9 / (step + 1), "train/grad_norm": step % 7, "train/lr": 1e-3 / (step + 1),
        "stability/skipped_steps": 0, "train/tokens": 9 * step, "train/tokens_per_sec": 4e5 + step,
        "train/mfu": 0.4, "cost/usd_spent": step / 7, "gpu/memory_allocated_gb": 86.1,
    }  # fmt: skip
    return {"step": step, "time": 1e9 + step} | line | more


def evaluation_line(step: int, **more: object) -> dict:
    line = {"val/loss": 9 / (step + 2), "web_val_loss": 9 / (step + 3), "math_val_loss": 8.0}
    return {"step": step, "time": 1e9 + step} | line | more


LINES = [
    evaluation_line(0),
    *(training_line(step) for step in range(10, 60, 10)),
    evaluation_line(50),
]


@pytest.fixture
def make(tmp_path):
    """Writes a run's folder: lines, samples and what else a stage leaves there."""

    def write(name: str, lines: list[dict] = LINES, stage: str = "pretrain", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, **config}))
        found = {"stage": stage, "commit": "abc123def456", "torch": "2.13.0"}
        (folder / "versions.yaml").write_text(yaml.safe_dump(found))
        return folder

    return write


def embedded(page: str) -> dict[str, list[dict]]:
    return json.loads(re.search(r'<script [^>]*id="metrics">(.*?)</script>', page)[1])


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects the cells of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.cells = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_its_numbers_are_those_of_the_metrics(make):
    folder = make("a")
    page = write_report([folder]).read_text()
    assert embedded(page) == {"a": LINES}
    cells = Balanced(page).cells
    for key in ("train/loss", "val/loss", "web_val_loss", "train/mfu"):
        values = [line[key] for line in LINES if key in line]
        place = cells.index(key)
        shown = [float(cell) for cell in cells[place + 1 : place + 5]]
        assert shown == [values[0], values[-1], min(values), max(values)]


def test_every_metric_is_drawn_with_all_its_points(make):
    extra = {"rlvr/reward": 0.5, "pref/val_kl": 1.0, "a/x": 2, "b/x": 1, "brand_new": 3}
    lines = [training_line(s, **extra) for s in (10, 20)] + [evaluation_line(s) for s in (10, 20)]
    run = read_run(make("a", lines, stage="rlvr"))
    curves = [(c.steps, c.values) for panel in panels_of([run]) for c in panel.curves]
    for key in ("train/loss", "val/loss", "web_val_loss", "train/lr", "train/mfu", *extra):
        assert run.curve(key) in curves
        assert len(run.curve(key)[1]) == 2
    assert len({panel.slug for panel in panels_of([run])}) == len(list(panels_of([run])))


def test_training_and_held_out_share_a_plot(make):
    lines = [{"step": s, "time": 0, "pref/kl": 1.0, "pref/val_kl": 2.0} for s in (0, 1)]
    (panel,) = panels_of([read_run(make("a", lines))])
    assert panel.title == "KL"
    assert [(c.label, c.values) for c in panel.curves] == [
        ("training", [1.0, 1.0]),
        ("held-out", [2.0, 2.0]),
    ]


def test_it_needs_no_network(make):
    page = write_report([make("a")]).read_text()
    assert "http" not in page
    assert "//" not in page.replace("<!doctype", "")
    assert "@import" not in page
    assert all(link.startswith("#") for link in re.findall(r"url\((.*?)\)", page))
    for tag, attributes in Balanced(page).tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert "src" not in attributes
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")


def test_the_plots_lie_beside_it_as_png(make):
    folder = make("a")
    write_report([folder])
    plots = sorted(folder.glob("plots/*.png"))
    slugs = {p.slug for p in panels_of([read_run(folder)])}
    assert {p.stem.removeprefix("pretrain_") for p in plots} == slugs
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots)


def test_skipped_steps_are_marked_where_their_count_grows(make):
    counts = {10: 0, 20: 0, 30: 2, 40: 2, 50: 3}
    lines = [training_line(s, **{"stability/skipped_steps": n}) for s, n in counts.items()]
    folder = make("a", lines)
    (panel,) = (p for p in panels_of([read_run(folder)]) if p.title == "Gradient norm")
    assert panel.marks == [(0, 30), (0, 50)]
    assert "steps skipped before 30, 50" in write_report([folder]).read_text()


def test_what_the_stability_monitor_saw_comes_last_and_only_if_it_saw_something(make):
    watched = {10: (0.0, 1.0), 20: (3.5, 1.0)}
    lines = [
        training_line(s, **{"stability/loss_z": z, "stability/rate_cut": cut})
        for s, (z, cut) in watched.items()
    ]
    titles = [p.title for p in panels_of([read_run(make("a", lines))])]
    assert titles[-1] == "Loss z-score"
    assert "Rate cut" not in titles
    assert "stability/rate_cut" in write_report([make("b", lines)]).read_text()


@pytest.mark.parametrize("count", [0, 1, 2, len(LINES)])
def test_a_run_that_has_just_begun(make, count):
    """Nothing yet, one line, two ...; the last one torn."""
    folder = make("a", LINES[:count])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "train/lo')
    (folder / "config.yaml").write_text("name: [a")  # being written
    page = write_report([folder]).read_text()
    Balanced(page)
    assert embedded(page) == {"a": LINES[:count]}


def test_values_that_were_not_finite_are_gaps(make):
    nothing = {"train/loss": None, "train/grad_norm": None, "val/loss": None}
    folder = make("a", [training_line(10), training_line(20, **nothing), training_line(30)])
    assert read_run(folder).curve("train/loss") == ([10, 30], [9 / 11, 9 / 31])
    Balanced(write_report([folder]).read_text())
    nowhere = make("b", [training_line(s, **nothing) for s in (10, 20)])
    assert "Loss" not in [p.title for p in panels_of([read_run(nowhere)])]
    Balanced(write_report([nowhere]).read_text())


def test_runs_of_one_stage_share_their_axes(make):
    one = make("one", optim={"lr": 0.1, "eps": 1e-8})
    two = make("two", LINES[:-2], optim={"lr": 0.2, "eps": 1e-8})
    runs = [read_run(one), read_run(two)]
    panels = {p.title: p for p in panels_of(runs)}
    assert [c.label for c in panels["Learning rate"].curves] == ["one", "two"]
    assert [c.run for c in panels["Held-out loss, web"].curves] == [0, 1]
    assert len(panels["Loss"].curves) == 4
    out = write_report([one, two])
    assert out == one.parent / "report.html"
    page = out.read_text()
    assert embedded(page) == {"one": LINES, "two": LINES[:-2]}
    cells = Balanced(page).cells
    place = cells.index("optim.lr")
    assert cells[place : place + 3] == ["optim.lr", "0.1", "0.2"]
    assert "optim.eps" not in cells


def test_stages_follow_one_another(make):
    stages = ("rlvr", "pretrain", "pref", "sft")
    folders = [make(stage, stage=stage) for stage in stages]
    assert list(by_stage([read_run(f) for f in folders])) == ["pretrain", "sft", "pref", "rlvr"]
    page = write_report(folders).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[0] == "Pretraining"
    assert headings[3].startswith("Reinforcement learning")


@pytest.mark.parametrize(
    ("key", "stage"),
    [("sft/exact_match", "sft"), ("pref/kl", "pref"), ("rlvr/reward", "rlvr"), ("x", "pretrain")],
)
def test_the_stage_of_a_run_without_versions_is_told_by_its_metrics(make, key, stage):
    folder = make("a", [evaluation_line(0, **{key: 1.0})])
    (folder / "versions.yaml").unlink()
    assert read_run(folder).stage == stage


def test_two_runs_of_one_name_stay_apart(make):
    folders = [make("x/pretrain"), make("y/pretrain", LINES[:3])]
    page = write_report(folders).read_text()
    assert embedded(page) == {str(folders[0]): LINES, str(folders[1]): LINES[:3]}


def test_samples_settings_and_versions_are_shown_as_they_are(make):
    folder = make("a", data={"note": NASTY})
    samples = [
        {"step": s, "time": 0, "prompt": NASTY, "answer": f"answer {s} {NASTY}", "expected": "7"}
        for s in (0, 25, 50)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    page = write_report([folder]).read_text()
    parsed = Balanced(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert "answer 0 &lt;/script&gt;" in page
    assert "answer 50" in page
    assert "answer 25" not in page
    assert {"abc123def456", "2.13.0"} <= set(parsed.cells)


def test_a_drawing_is_sound_and_takes_its_colours_from_the_page(make, tmp_path):
    run = read_run(make("a"))
    for panel in panels_of([run]):
        svg = draw(panel, [run], tmp_path / "plot.png")
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert not re.findall(r"#[0-9a-f]{6}", svg)
        for index in range(len(panel.curves)):
            assert f"var(--c{index})" in svg


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.3762, "%", "37.6%"), (4e5, "tokens/s", "400K"), (2e-5, "", "2e-5"), (3.5, "", "3.5")],
)
def test_numbers_at_an_axis(value, unit, text):
    assert tick_text(value, unit) == text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run \(no metrics.jsonl\): give the folder"):
        write_report([tmp_path])


def test_what_lies_beside_runs_is_left_out(make, tmp_path, capsys, monkeypatch):
    for name, stage in (("a", "sft"), ("b", "pretrain")):
        make(name, stage=stage)
    monkeypatch.chdir(tmp_path)
    for others in ("", "no runs, left out: plots, report.html\n"):
        report.main(sorted(path.name for path in tmp_path.iterdir()))
        assert capsys.readouterr().out == f"{others}report: {tmp_path / 'report.html'}\n"
    assert "<h1>b, a</h1>" in (tmp_path / "report.html").read_text()  # in the order of a life
    with pytest.raises(ConfigError, match="gone holds no run"):
        report.main(["a", "plots", "gone"])
    with pytest.raises(ConfigError, match="plots holds no run"):
        report.main(["plots", "report.html"])


def evaluation(value: float, shots: int | None, chat: bool = False) -> dict:
    result = {"task": "gsm8k", "metric": "exact_match", "value": value, "n": 9, "shots": shots}
    return {
        "checkpoint": {"file": "a.pt", "step": 1},
        "settings": {"chat": chat},
        "results": [result, result | {"task": f"alone_{shots}"}],
    }


def test_side_by_side_stands_what_was_asked_alike():
    runs = [
        ("a", [evaluation(0.3, 5), evaluation(0.2, 0, chat=True), evaluation(0.4, 5)]),
        ("b", [evaluation(0.25, 5), evaluation(0.1, 0)]),
    ]
    (html,) = side_by_side(runs)
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert [re.findall(r"<t[dh]>(.*?)</t", row) for row in rows[1:5]] == [
        ["gsm8k", "exact_match", "9", "5", "", "", "0.4000", "0.2500"],
        ["gsm8k", "exact_match", "9", "0", "", "as conversations", "0.2000", ""],
        ["gsm8k", "exact_match", "9", "0", "", "", "", "0.1000"],
        ["alone_5", "exact_match", "9", "5", "", "", "0.4000", "0.2500"],
    ]
    assert list(side_by_side([("a", runs[0][1]), ("c", [])])) == []


def test_a_report_that_fails_does_not_fail_the_run(make, capsys):
    folder = make("a")
    (folder / "plots").write_text("in the way")
    _draw(RunDirectory(folder.parent, "a"))
    assert "warning: no report" in capsys.readouterr().out
    assert read_metrics(folder / "metrics.jsonl") == LINES
