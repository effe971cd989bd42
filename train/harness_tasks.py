"""Which benchmarks are run, and where their data comes from: the hub, or a folder.

A machine without network reads the files of a folder DIR, whatever fetched them:

    DIR/gsm8k/test.jsonl                          DIR/<task>/<split>.<jsonl|json|parquet>[.gz]
    DIR/gsm8k/main/test-00000-of-00001.parquet    a dataset of the hub as `hf download` leaves it

A task whose data is nowhere is told of in one line, with what to fetch, and the others run.

Left out: datasets that are made by scripts; the hub's library no longer runs those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from data.sources import BrokenRow, SourceConfig, list_files, read_records
from utils.config import ConfigError
from utils.logging import get_logger

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "dev", "test": "test", "auxiliary_train": "auxiliary_train"}  # fmt: skip


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, include_path: Path | None = None
) -> tuple[list[Task | Group], list[str]]:
    """The tasks that can run, and for each that cannot a line that says why.

    Args:
        names: of tasks, groups or tags, or paths of task files.
        data_dir: the folder that is looked into first.
        include_path: a folder of task files (lm-eval's YAML) beside the harness's own.

    Raises:
        ConfigError: a name that nobody knows.
    """
    manager = _manager_of(names, include_path)
    loaded: list[Task | Group] = []
    missing = []
    for name in dict.fromkeys(names):
        asked: list[str] = []
        try:
            with local_data(name, data_dir, asked, _is_many(name, manager)):
                found = manager.load([name])
        except Exception as error:  # whatever a dataset or the hub may raise, other tasks can run
            missing.append(_why_missing(name, asked[-1] if asked else None, data_dir, error))
        else:
            group = found["groups"].get(name)
            loaded += [group] if group else found["tasks"].values()
    return loaded, missing


def _manager_of(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """The index that knows all names; that of the harness's 14,000 tasks takes seconds."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if not _unknown(names, own):
        return own
    everything = _all_tasks(include_path)
    if unknown := _unknown(names, everything):
        lines = []
        for name in unknown:
            near = get_close_matches(name, everything.all_tasks, n=3)
            lines.append(f"unknown task '{name}'" + (f", nearest: {', '.join(near)}" * bool(near)))
        raise ConfigError("; ".join(lines))
    return everything


@functools.cache
def _all_tasks(include_path: Path | None) -> TaskManager:
    return TaskManager(include_path=include_path)


def _is_many(name: str, manager: TaskManager) -> bool:
    """Whether a name stands for several tasks."""
    return name in (*manager.all_groups, *manager.all_tags)


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [n for n in names if n not in manager.task_index and not Path(n).is_file()]


def _why_missing(name: str, dataset: str | None, data_dir: Path | None, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, KeyError) and dataset:
        reason = f"its data has no split {reason}"
    if dataset is None or dataset in ("json", "parquet", "csv", "text"):
        return f"{name}: cannot be loaded: {reason}"
    folder = f"{data_dir or 'DIR'}/{dataset.rpartition('/')[2]}"
    there = sorted(path.name for path in Path(folder).glob("*.*")) if data_dir else []
    if there and not find_files(data_dir, name, dataset, None):
        return (
            f"{name}: {folder} holds {', '.join(there[:3])}, and no jsonl, json or parquet whose "
            f"name begins with one of {', '.join(SPLITS)}"
        )
    return (
        f"{name}: no data ({reason}). Where there is network: `hf download {dataset} "
        f"--repo-type dataset --local-dir {folder}`; then give --data-dir {data_dir or 'DIR'}"
    )


# ---------------------------------------------------------------------------------------------
# Local files


@contextmanager
def local_data(
    task: str, data_dir: Path | None, asked: list[str], many: bool = False
) -> Iterator[None]:
    """Datasets come from `data_dir` where it has them, else from where they would.

    The harness's tasks all call `datasets.load_dataset`, many from code of their own, so that is
    what is replaced while they are made.

    Args:
        asked: gets the name of each dataset that is asked for.
        many: `task` stands for several, each with a subset of its own.
    """
    hub = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append(path)
        files = {} if data_dir is None else find_files(data_dir, task, path, name, many)
        if not files:
            return hub(path, name, **options)
        splits = {split: _read(split, paths) for split, paths in files.items()}
        get_logger().info(f"{task}: data from {next(iter(files.values()))[0].parent}")
        return datasets.DatasetDict(splits)

    with patch.object(datasets, "load_dataset", load):
        yield


def find_files(
    data_dir: Path, task: str, dataset: str, subset: str | None, many: bool = False
) -> dict[str, list[Path]]:
    """The files of each split in the first folder that has any; see the module's text."""
    short = dataset.rpartition("/")[2]
    homes = [data_dir / part for part in (short, dataset)]
    subsets = [home / subset for home in homes] if subset else []
    # The files of one task may lie above its subset's folder; with many none would be told apart.
    above = [] if many and subset else [data_dir / task, *homes]
    for home in (*above[:1], *subsets, *above[1:]):
        for folder in (home, home / "data"):
            files: dict[str, list[Path]] = {}
            for path in sorted(folder.glob("*.*")) if folder.is_dir() else []:
                split = SPLITS.get(path.name.partition(".")[0].partition("-")[0])
                if split and any(kind in path.suffixes for kind in (".jsonl", ".json", ".parquet")):
                    files.setdefault(split, []).append(path)
            if files:
                return files
    return {}


def _read(split: str, paths: list[Path]) -> datasets.Dataset:
    rows = []
    for path in paths:
        for file in list_files(SourceConfig(name=split, path=str(path), weight=1.0)):
            for number, record in enumerate(read_records(split, file)):
                if isinstance(record, BrokenRow):
                    raise ConfigError(f"{path} row {number}: {record.detail}")
                rows.append(record)
    return datasets.Dataset.from_list(rows)
