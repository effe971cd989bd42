"""eval.py as its users meet it: checkpoints of every stage, no network, kills, and the record."""

import json
import re
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import eval as eval_script
from data import builtin
from data.chat import ChatTemplate
from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from models.verifier import Verifier
from tests.local_tasks import write_tasks
from tests.pipeline import Fault, run
from train.harness_run import SUITES
from train.setup import TrainConfig
from utils import checkpoint, report_evals
from utils.config import ConfigError, plain, validate
from utils.report import read_run, write_report
from utils.report_evals import FILE, HEAD, add_evaluation, read_evaluations, rows_of, text_table

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs requirements-eval.txt"
)
SHAPE = ModelConfig(
    vocab_size=400, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=48, max_seq_len=96
)
OWN = ("own_choice", "own_text", "own_answer")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [builtin.document(d, i) for i in range(30) for d in builtin.DOMAINS]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture
def save(tmp_path, tokenizer):
    """Writes the checkpoint that a stage would; returns its path."""

    def write(stage: str = "sft") -> Path:
        torch.manual_seed(0)
        model = (Verifier if stage == "verifier" else Transformer)(SHAPE)
        template = None if stage == "pretrain" else ChatTemplate.of(tokenizer).state_dict()
        values = {
            "stage": stage, "step": 7, "tokens": 1234, "model": model.state_dict(),
            "model_config": plain(SHAPE), "tokenizer": tokenizer.state_dict(),
            "chat_template": template, "config": {"name": "x"},
        }  # fmt: skip
        path = tmp_path / "run" / "x_final.pt"
        checkpoint.save(path, values)
        return path

    return write


def evaluate(path: Path, *argv: object) -> dict:
    """In this process, where the harness's index of tasks is made once; returns the record."""
    eval_script.main(["--checkpoint", str(path), *map(str, argv)])
    return record(path)


def record(path: Path) -> dict:
    return read_evaluations(path.parent / FILE)[-1]


@needs_harness
@pytest.mark.parametrize("stage", ["pretrain", "sft", "pref", "rlvr"])
def test_a_checkpoint_of_each_stage(save, tasks, capsys, stage):
    path = save(stage)
    made = evaluate(path, "--tasks", ",".join(OWN), "--include-path", tasks)
    assert made["checkpoint"] == {
        "file": "x_final.pt", "stage": stage, "step": 7, "tokens": 1234,
        "sha256": checkpoint.sidecar(path).read_text().split()[0],
    }  # fmt: skip
    rows = {(r["task"], r["metric"]): r for r in made["results"]}
    assert rows["own_choice", "acc"]["n"] == 12 and rows["own_choice", "acc"]["shots"] == 1
    assert rows["own_choice", "acc"]["stderr"] > 0
    assert rows["own_text", "bits_per_byte"]["value"] > 1
    assert ("own_answer", "exact_match") in rows
    assert text_table(rows_of(made)) in capsys.readouterr().out
    conversations = ("--tasks", "own_choice", "--include-path", tasks, "--apply-chat-template")
    if stage == "pretrain":
        with pytest.raises(ConfigError, match="has no chat template"):
            evaluate(path, *conversations)
        return
    asked = evaluate(path, *conversations)
    assert asked["settings"]["chat"] is True
    hashes = [e["tasks"]["own_choice"]["samples_sha256"] for e in (made, asked)]
    assert hashes[0] != hashes[1]


def test_a_verifier_is_refused(save):
    path = save("verifier")
    with pytest.raises(ConfigError, match="is a verifier"):
        evaluate(path, "--bpb", "README.md")
    assert not (path.parent / FILE).exists()


@needs_harness
def test_the_record_repeats_itself(save, tasks):
    """The same command gives the same numbers and replaces its record; another adds one."""
    path = save()
    command = ("--tasks", "own_choice,own_answer", "--include-path", tasks, "--limit", 5)
    first = evaluate(path, *command)
    assert "--limit 5" in first["command"] and first["settings"]["limit"] == 5
    assert {"torch", "lm-eval", "commit"} <= first["versions"].keys()
    assert first["seeds"]["fewshot_seed"] == 1234
    again = evaluate(path, *command, "--batch-tokens", 50)
    assert read_evaluations(path.parent / FILE) == [again]
    assert again["tasks"] == first["tasks"]
    assert [r | {"value": pytest.approx(r["value"])} for r in again["results"]] == first["results"]
    other = evaluate(path, *command, "--num-fewshot", 2)
    assert read_evaluations(path.parent / FILE) == [again, other]
    hashes = [e["tasks"]["own_choice"]["samples_sha256"] for e in (again, other)]
    assert hashes[0] != hashes[1]
    assert not list(path.parent.glob("*partial*"))


@needs_harness
def test_a_killed_evaluation_goes_on(save, tasks, tmp_path, capsys):
    path = save()
    command = ("--tasks", ",".join(OWN), "--include-path", tasks, "--batch-tokens", 100)
    whole = evaluate(path, *command)
    (path.parent / FILE).unlink()
    partial, log = path.parent / "eval.partial.jsonl", tmp_path / "log"
    kept = 0
    for call in (3, 5):
        fault = Fault("train.harness.Finished.add", call)
        assert run("eval", "--checkpoint", path, *command, log=log, fault=fault).code == -9
        lines = partial.read_bytes()
        assert len(lines) > kept
        kept = len(lines)
        partial.write_bytes(lines[:-3])  # torn, as a kill within a write leaves it
    capsys.readouterr()
    assert evaluate(path, *command)["results"] == whole["results"]
    assert "going on from" in capsys.readouterr().out
    assert not partial.exists()


@needs_harness
def test_data_of_a_folder_and_a_line_for_what_is_missing(save, tmp_path, capsys):
    data = tmp_path / "data"
    rows = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(6)]
    (data / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "gsm8k" / f"{split}.jsonl").write_text(text)
    path = save()
    command = ("--data-dir", data, "--num-fewshot", 1, "--limit", 2)
    made = evaluate(path, "--tasks", "gsm8k,hellaswag", *command)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "hellaswag" in line]
    assert f"`hf download Rowan/hellaswag --repo-type dataset --local-dir {data}/hellaswag`" in line
    assert made["not_run"] == [line.removeprefix("warning: ")]
    assert {r["task"] for r in made["results"]} == {"gsm8k"}
    (data / "gsm8k" / "train.jsonl").unlink()  # what the solved example would come from
    with pytest.raises(ConfigError, match="nothing could be evaluated") as caught:
        evaluate(path, "--tasks", "hellaswag,gsm8k", *command)
    _, *lines = str(caught.value).splitlines()
    assert lines[0].startswith("  hellaswag: no data (")
    assert lines[1].startswith("  gsm8k: no data (its data has no split 'train')")
    (data / "gsm8k" / "test.jsonl").rename(data / "gsm8k" / "gsm8k_test.jsonl")
    with pytest.raises(ConfigError, match=r"gsm8k holds gsm8k_test\.jsonl, and no .* begins with"):
        evaluate(path, "--tasks", "gsm8k", *command)
    with pytest.raises(ConfigError, match="--data-dir nowhere is no folder"):
        evaluate(path, "--tasks", "gsm8k", "--data-dir", "nowhere")


@needs_harness
def test_parquet_files_as_the_hub_has_them(tmp_path):
    import datasets

    from train.harness_tasks import find_files, local_data

    rows = [{"question": "q", "answer": str(i)} for i in range(4)]
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for i in range(2):
        table = datasets.Dataset.from_list(rows[2 * i : 2 * i + 2])
        table.to_parquet(folder / f"test-0000{i}-of-00002.parquet")
    (folder / "README.md").write_text("no data")
    assert set(find_files(tmp_path, "x", "openai/gsm8k", "main")) == {"test"}
    assert find_files(tmp_path, "x", "openai/gsm8k", "socratic") == {}
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}")  # of one task: which, of several?
    assert find_files(tmp_path, "x", "openai/gsm8k", "socratic", many=True) == {}
    assert set(find_files(tmp_path, "x", "openai/gsm8k", "main", many=True)) == {"test"}
    with local_data("x", tmp_path, asked := []):
        found = datasets.load_dataset("openai/gsm8k", "main")
    assert found["test"].to_list() == rows and asked == ["openai/gsm8k"]


@needs_harness
def test_unknown_names_are_told_with_the_nearest(save):
    with pytest.raises(ConfigError, match=r"^unknown task 'hellaswagg', nearest: .*hellaswag"):
        evaluate(save("pretrain"), "--tasks", "hellaswagg,gsm8k")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to evaluate: give --tasks, --suite or --bpb"),
        (("--suite", "quik"), "--suite 'quik' is none of quick, base, chat"),
        (("--suite", "chat"), "has no chat template"),
        (("--bpb", "missing.txt"), "--bpb missing.txt: No such file"),
        (("--bpb", "README.md", "--out", "README.md"), "README.md is not a file of evaluations"),
        (
            ("--bpb", "README.md", "--out", "README.md/e.json"),
            r"e.json: cannot be written \(.*--out",
        ),
    ],
)
def test_mistakes(save, argv, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(save("pretrain"), *argv)


@needs_harness
def test_what_cannot_run_is_exit_code_2(save, tmp_path, tasks):
    own = tasks / "own_choice.yaml"
    broken = yaml.safe_load(own.read_text()) | {"task": "broken", "dataset_path": "nobody/nothing"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    command = ("--tasks", "broken", "--include-path", tmp_path)
    outcome = run("eval", "--checkpoint", save(), *command, log=tmp_path / "log")
    assert outcome.code == 2
    assert "error: nothing could be evaluated:\n  broken: no data (" in outcome.err
    assert "Traceback" not in outcome.err


def test_scores_that_cannot_be_stored_are_shown(save, tmp_path, monkeypatch, capsys):
    def full(path: Path, evaluation: dict) -> None:
        raise ConfigError(f"{path}: not written: No space left on device")

    monkeypatch.setattr(report_evals, "add_evaluation", full)
    out = tmp_path / "new folder" / "e.json"
    with pytest.raises(ConfigError, match="No space left"):
        evaluate(save("pretrain"), "--bpb", "LICENSE", "--out", str(out))
    assert re.search(r"LICENSE +bits_per_byte", capsys.readouterr().out)


def test_bits_per_byte_need_no_harness(save, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(builtin.document("web", 500) * 4, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith(("lm_eval.", "train.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    made = evaluate(save("pretrain"), "--bpb", text)
    (row,) = made["results"]
    assert (row["task"], row["n"]) == ("text.txt", len(text.read_bytes()))
    assert 2 < row["value"] < 10  # as random as the model
    with pytest.raises(ConfigError, match=r"pip install -r requirements-eval.txt"):
        evaluate(save("pretrain"), "--tasks", "hellaswag")


@needs_harness
def test_the_names_in_the_suites_are_those_of_the_harness():
    from train.harness_tasks import _all_tasks

    assert all(set(suite.tasks) <= set(_all_tasks(None).all_tasks) for suite in SUITES.values())


@needs_harness
def test_groups_are_one_row_and_their_members_are_kept(save, tasks):
    group = {
        "group": "own", "task": ["own_choice", "own_spaced"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }  # fmt: skip
    (tasks / "own.yaml").write_text(yaml.safe_dump(group))
    made = evaluate(save(), "--tasks", "own", "--include-path", tasks)
    results = {r["task"]: r for r in made["results"] if r["metric"] == "acc"}
    assert results["own"]["n"] == 24 and results["own"]["part_of"] is None
    assert results["own_choice"]["part_of"] == "own"
    assert [row[0] for row in rows_of(made)] == ["own"]


@needs_harness
def test_a_run_ends_with_the_benchmarks_of_its_config(tasks, tmp_path):
    """From the config to the report; a benchmark that is not there does not fail the run."""
    values = {
        "name": "small", "runs_dir": str(tmp_path / "runs"), "model": plain(SHAPE),
        "tokenizer": {"vocab_size": 400},
        "data": {
            "seq_len": 32, "cache_dir": str(tmp_path / "cache"), "shard_megabytes": 0.01,
            "held_out_fraction": 0.3,
            "sources": [{"name": "web", "weight": 1, "path": str(tmp_path / "text.jsonl")}],
        },
        "train": {
            "batch_tokens": 128, "micro_batch": 4, "steps": 2,
            "eval_tasks": [str(tasks / "own_choice.yaml"), str(tmp_path / "broken.yaml")],
        },
    }  # fmt: skip
    texts = [json.dumps({"text": builtin.document("web", i)}) for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    broken = yaml.safe_load((tasks / "own_choice.yaml").read_text())
    broken |= {"task": "broken", "dataset_path": "nobody/nothing"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    outcome = run("train_pretrain", "--config", config, log=tmp_path / "log")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "small"
    (made,) = read_run(folder).evaluations
    assert made["checkpoint"]["step"] == 2 and "eval.py --checkpoint" in made["command"]
    assert f"warning: {tmp_path}/broken.yaml: no data" in outcome.out
    page = (folder / "report.html").read_text()
    assert "Benchmarks of small" in page
    assert all(f"<td>{cell}</td>" in page for row in rows_of(made) for cell in row)


def test_benchmarks_of_a_config_without_the_harness_are_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("train.setup.find_spec", lambda name: None)
    values = {"batch_tokens": 8, "micro_batch": 1, "steps": 1}
    assert validate(TrainConfig, values, "x").eval_tasks == ()
    with pytest.raises(ConfigError, match=r"eval_tasks needs lm-eval: pip install -r"):
        validate(TrainConfig, values | {"eval_tasks": ["hellaswag"]}, "x")


# ---------------------------------------------------------------------------------------------
# The record and how it is shown


def made_up(task: str, sha256: str = "a", **changes: object) -> dict:
    result = {"task": task, "metric": "acc", "value": 0.25, "stderr": None, "n": 1000}
    return {
        "checkpoint": {"sha256": sha256, "file": "<x>.pt", "step": 1},
        "settings": {"tasks": [task]}, "results": [result | changes],
    }  # fmt: skip


def test_evaluations_are_kept_by_checkpoint_and_settings(tmp_path):
    path = tmp_path / FILE
    assert read_evaluations(path) == []
    for evaluation in (made_up("a"), made_up("b"), made_up("a", "other"), made_up("a", value=0.5)):
        add_evaluation(path, evaluation)
    assert read_evaluations(path) == [made_up("b"), made_up("a", "other"), made_up("a", value=0.5)]
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "[]", '{"evaluations": 3}', '{"evaluations": [{}]}'])
def test_a_foreign_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a file of evaluations"):
        add_evaluation(path, made_up("a"))
    assert path.read_text() == text


def test_the_report_shows_benchmarks_beside_published_scores(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "time": 1, "train/loss": 2}\n')
    add_evaluation(tmp_path / "one" / FILE, made_up("hellaswag", stderr=0.0125))
    page = write_report([tmp_path / "one", tmp_path / "two"]).read_text()
    assert "Benchmarks of one" in page and "Benchmarks of two" not in page
    assert "<td>± 0.0125</td>" in page and "&lt;x&gt;.pt" in page
    assert "hellaswag: SmolLM2-135M (2T tokens) 0.421 (its model card)" in page
    (tmp_path / "two" / FILE).write_text("torn")
    assert "Benchmarks of two" not in write_report([tmp_path / "two"]).read_text()


def test_the_table_has_a_column_for_each_cell():
    rows = rows_of(made_up("a", filter="strict", version=3.0, shots=5))
    head, row = text_table(rows).splitlines()
    assert rows == [("a", "acc, strict", "0.2500", "", "1,000", "5", "3.0")]
    starts = [found.start() for found in re.finditer(r"\S+( \S+)*", head)]
    assert [head[a:b].strip() for a, b in pairwise([*starts, None])] == list(HEAD)
    assert tuple(row[a:b].strip() for a, b in pairwise([*starts, None])) == rows[0]
