"""An evaluation from a checkpoint to its record in `eval.json`: `eval.py`, and a stage's end.

The record holds what is needed to get the same numbers again: command, versions, commit, sha256 of
the checkpoint, seeds, and for each task the hash of its config and of the very prompts and answers
that were used. While an evaluation goes on, results are kept beside it (`*.partial.jsonl`), so that
the same command goes on after an interruption; at its end they are removed, because they are only
good for the code that made them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from data.chat import ChatTemplate
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from train import setup
from train.likelihood import bits_per_byte
from train.setup import RuntimeConfig
from utils import checkpoint, report_evals
from utils.checkpoint import CheckpointError
from utils.config import ConfigError, validate
from utils.distributed import Distributed
from utils.logging import get_logger, human_time
from utils.versions import versions

INSTALL = "it needs lm-eval: pip install -r requirements-eval.txt"
BOOTSTRAP = 1000  # resamplings behind the standard errors that have no formula


@dataclass(frozen=True)
class Suite:
    """Tasks that belong together."""

    tasks: tuple[str, ...]
    limit: int | None = None
    """So many samples of each; None: all."""
    chat: bool = False
    """Prompts are conversations."""


SUITES = {
    "quick": Suite(("hellaswag", "arc_easy", "piqa"), limit=500),
    "base": Suite(
        ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa",
         "lambada_openai", "mmlu"),
    ),
    "chat": Suite(("gsm8k", "arc_easy", "arc_challenge", "hellaswag"), chat=True),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides an evaluation's numbers."""

    tasks: tuple[str, ...] = ()
    bpb: tuple[str, ...] = ()
    """Text files."""
    limit: int | None = None
    num_fewshot: int | None = None
    """None: as each task has it."""
    chat: bool = False
    """Prompts are conversations, in the checkpoint's template."""
    seed: int = 0


@dataclass(frozen=True)
class Means:
    """Where things are and what computes; nothing that would change a number beyond rounding."""

    data_dir: Path | None = None
    include_path: Path | None = None
    batch_tokens: int | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    out: Path | None = None
    """The record's file; None: eval.json beside the checkpoint."""


def evaluate_checkpoint(
    path: Path, settings: Settings, means: Means, dist: Distributed, command: str
) -> dict[str, Any]:
    """Measure a checkpoint and add the record to its `eval.json`.

    Tasks that cannot run are warned of.

    Returns:
        The record.

    Raises:
        ConfigError: nothing could run, or a mistake of the user's.
    """
    began = time.time()
    out = means.out or path.parent / report_evals.FILE
    _check_writable(out)  # now and not at the end
    state = _load(path, settings)
    texts = {name: _read_text(Path(name)) for name in settings.bpb}
    loaded, missing = _load_tasks(settings, means)
    for line in missing:
        get_logger().warning(line)
    if not loaded and not texts:
        raise ConfigError("\n  ".join(["nothing could be evaluated:", *missing]))

    config = validate(ModelConfig, state["model_config"], str(path))
    model = setup.build_model(config, means.runtime, dist)
    model.load_state_dict(state.pop("model"))
    model.eval()
    tokenizer = Tokenizer.from_state(state["tokenizer"])
    record = _origin(path, state, settings, command, model)
    record["not_run"] = missing
    record["results"] = [
        _bpb_row(name, bits_per_byte(model, tokenizer, text, means.batch_tokens))
        for name, text in texts.items()
    ]
    if loaded:
        partial = out.with_suffix(".partial.jsonl")
        outcome = _run(model, tokenizer, state, loaded, settings, means, record, partial)
        record["results"] += _rows(outcome, loaded)
        record["tasks"] = _identities(outcome)
        record["seeds"] = {k: v for k, v in outcome["config"].items() if k.endswith("_seed")}
    record["seconds"] = round(time.time() - began, 1)
    try:
        report_evals.add_evaluation(out, record)
    except ConfigError:
        get_logger().warning(report_evals.text_table(report_evals.rows_of(record)))
        raise
    if loaded:
        partial.unlink(missing_ok=True)
    get_logger().info(f"evaluated in {human_time(record['seconds'])}: {out}")
    return record


def evaluate_final(path: Path, train: dict[str, Any], dist: Distributed) -> None:
    """The benchmarks that a run's config asks for; without them the run is finished all the same.

    Args:
        train: the config's section `train`, as plain values.
    """
    tasks, folder = train.get("eval_tasks"), train.get("eval_data_dir")
    if not tasks:
        return
    command = f"python eval.py --checkpoint {path} --tasks {','.join(tasks)}"
    command += f" --data-dir {folder}" if folder else ""
    means = Means(data_dir=Path(folder) if folder else None)
    try:
        evaluate_checkpoint(path, Settings(tuple(tasks)), means, dist, command)
    except Exception as error:
        get_logger().warning(f"not evaluated ({error}); to try again: {command}")


def _check_writable(out: Path) -> None:
    """Raises ConfigError where the record could not be put; makes its folder."""
    report_evals.read_evaluations(out)  # a foreign file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}); name another file with --out"
        ) from error


def _load(path: Path, settings: Settings) -> dict[str, Any]:
    state = checkpoint.load(path)
    if state["stage"] == "verifier":
        raise CheckpointError(
            f"{path} is a verifier, which scores answers and has no language model's head: "
            "evaluate the checkpoint of another stage"
        )
    if settings.chat and not state["chat_template"]:
        raise ConfigError(
            f"{path} is of stage '{state['stage']}' and has no chat template: evaluate it without "
            "--apply-chat-template and without the suite 'chat'"
        )
    return state


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--bpb {path}: {reason}") from error
    if not text:
        raise ConfigError(f"--bpb {path}: the file is empty")
    return text


def _load_tasks(settings: Settings, means: Means) -> tuple[list, list[str]]:
    if not settings.tasks:
        return [], []
    if means.data_dir and not means.data_dir.is_dir():
        raise ConfigError(f"--data-dir {means.data_dir} is no folder")
    try:
        from train.harness_tasks import load_tasks
    except ImportError as error:
        raise ConfigError(f"no benchmark can run ({error}): {INSTALL}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return load_tasks(settings.tasks, means.data_dir, means.include_path)


def _run(
    model: Transformer,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    loaded: Sequence[Any],
    settings: Settings,
    means: Means,
    record: dict[str, Any],
    partial: Path,
) -> dict[str, Any]:
    """What lm-eval's own `simple_evaluate` gives for these tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from train.harness import Finished, HarnessModel

    identity = {key: record[key] for key in ("versions", "numerics")}
    identity |= {"sha256": record["checkpoint"]["sha256"]}
    finished = Finished(partial, json.dumps(identity, sort_keys=True))
    if finished.results:
        get_logger().info(f"going on from {len(finished.results):,} results in {partial}")
    template = ChatTemplate.from_state(state["chat_template"]) if settings.chat else None
    harness = HarnessModel(model, tokenizer, template, means.batch_tokens, finished, settings.seed)
    try:
        return simple_evaluate(
            model=harness,
            tasks=list(loaded),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP,
            apply_chat_template=settings.chat,
            task_manager=TaskManager(include_defaults=False),
            random_seed=settings.seed,
        )
    except ValueError as error:  # overlapping groups, tasks that run code, texts that do not fit
        raise ConfigError(f"evaluation stopped: {error}") from error


# ---------------------------------------------------------------------------------------------
# The record


def _origin(
    path: Path, state: dict[str, Any], settings: Settings, command: str, model: Transformer
) -> dict[str, Any]:
    """Everything but what was measured."""
    values = asdict(settings)
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checkpoint": {
            "file": path.name,
            "sha256": checkpoint.sha256(path),
            "stage": state["stage"],
            "step": state["step"],
            "tokens": state["tokens"],
        },
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
        "numerics": {
            "activations": str(model.dtype).removeprefix("torch."),
            "attention": model.attention_kernel()[0],
        },
        "versions": versions() | _harness_version(),
    }


def _harness_version() -> dict[str, str]:
    try:
        return {"lm-eval": metadata.version("lm_eval")}
    except metadata.PackageNotFoundError:
        return {}


def _bpb_row(name: str, measured: dict[str, float]) -> dict[str, Any]:
    return {
        "task": Path(name).name,
        "metric": "bits_per_byte",
        "value": measured["bits_per_byte"],
        "n": measured["bytes"],
        "tokens": measured["tokens"],
    }


def _rows(outcome: dict[str, Any], loaded: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """A row for each metric of each task and group; what is inside a group names the outermost."""
    from lm_eval.api.group import Group

    n = {name: counted["effective"] for name, counted in outcome["n-samples"].items()}
    part_of = {}
    for root in loaded:
        if not isinstance(root, Group):
            continue
        inner = root.get_all_groups()
        tasks = [task.task_name for task in root.get_all_tasks()]
        part_of |= dict.fromkeys([*tasks, *(group.name for group in inner)], root.name)
        for group in (root, *inner):
            n[group.name] = sum(n[task.task_name] for task in group.get_all_tasks())
    for name, values in (outcome["results"] | outcome.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield {
                "task": name,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": error if isinstance(error, float) else None,
                "n": n[name],
                "shots": outcome["n-shot"].get(name),
                "version": outcome["versions"].get(name),
                "higher_is_better": outcome["higher_is_better"].get(name, {}).get(metric),
                "part_of": part_of.get(name),
            }


def _identities(outcome: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked in each task: hashes of its config and of its samples in their order."""
    found = {}
    for name, config in outcome["configs"].items():
        samples = [
            [sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")]
            for sample in outcome["samples"][name]
        ]
        found[name] = {
            "dataset": config.get("dataset_path"),
            "subset": config.get("dataset_name"),
            "config_sha256": _digest(config),
            "samples_sha256": _digest(samples),
        }
    return found


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
