"""Metrics in JSON lines, a console line worth reading, and the run directory.

`metrics.jsonl` is the record: one flushed line for each report, so that a kill loses at most the
line being written, cut back to the checkpoint's step on resume so that no step appears twice.

Left out: plots (`utils/report.py`).
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import ConfigError, save_yaml
from utils.terminal import discard_stdout

if TYPE_CHECKING:
    from utils.wandb_log import WandbLog


class _Console(logging.Handler):
    """Prints plain lines to stdout, whatever stdout is at that moment.

    What fails there stops nothing: Ctrl-C ends the `tee` of `python ... | tee log` as well, and a
    log may fill its disk.
    """

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        try:
            print(f"{prefix}{record.getMessage()}", flush=True)
        except BrokenPipeError:
            discard_stdout()
        except (OSError, ValueError):  # a full disk; a closed file
            pass


def get_logger() -> logging.Logger:
    """Return the project's logger: plain lines on stdout, from rank 0 alone under torchrun."""
    logger = logging.getLogger("smol")
    if not logger.handlers:
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.disabled = os.environ.get("RANK", "0") != "0"
    return logger


class MetricsLog:
    """Appends one JSON object per report to a file, and passes it on to `wandb` if there is one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.wandb: WandbLog | None = None
        self._file = self.path.open("a", encoding="utf-8")
        self._failing = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append `step`, the time and `values`; NaN and infinity become null, which JSON can hold.

        A full disk is warned of once and stops nothing; the lines wait in the file's buffer.
        """
        line = {"step": step, "time": time.time()}
        line |= {key: _finite(value) for key, value in values.items()}
        text = json.dumps(line)
        if self.wandb:
            self.wandb.write(text)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failing:
                get_logger().warning(f"{self.path}: not written: {error.strerror}")
            self._failing = True

    def cut_back(self, step: int, evaluated: bool = True) -> None:
        """Drop what a run resumed at `step` will report again, and torn lines; see `cut_back`."""
        self._close_file()
        cut_back(self.path, step, evaluated)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file, and W&B; what a full disk still holds back is lost."""
        self._close_file()
        if self.wandb:
            self.wandb.close()

    def _close_file(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without those torn by a kill."""
    return [values for _, values in _whole_lines(Path(path))]


def cut_back(path: str | Path, step: int, evaluated: bool = True) -> None:
    """Rewrite a JSON-lines file without torn lines and those whose `step` is later, atomically.

    A step is evaluated after it is logged; when it is not `evaluated` yet, only the lines of its
    training are kept.
    """
    path = Path(path)
    if not path.exists():
        return

    def kept(values: Mapping[str, Any]) -> bool:
        if values["step"] == step:
            return evaluated or "train/loss" in values
        return values["step"] < step

    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line for line, values in _whole_lines(path) if kept(values))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(values, dict) and "step" in values and line.endswith("\n"):
                yield line, values


class RunDirectory:
    """`<root>/<name>/`: where a run keeps its config, metrics, samples and checkpoints."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.path = Path(root) / name
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / f"{name}_final.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"

    def prepare(self, resume: bool, config: dict[str, Any]) -> None:
        """Make the directory and write `config.yaml`; one that holds a run must be resumed."""
        metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        if not resume and (metrics or any(self.path.rglob("*.pt"))):
            remedy = "continue it with --resume, choose another name, or delete the directory"
            raise ConfigError(f"{self.path} already holds a run: {remedy}")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        save_yaml(self.path / "config.yaml", config)


def human_count(number: float) -> str:
    """Three digits and a letter: 950, 524K, 1.57M, 10B."""
    for unit in ("", "K", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.1f}T"


def human_time(seconds: float) -> str:
    """The two largest units: 45 s, 3 m 20 s, 2 h 14 m, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    for big, small, size, part in (
        ("d", "h", 86400, 3600),
        ("h", "m", 3600, 60),
        ("m", "s", 60, 1),
    ):
        if total >= size:
            return f"{total // size} {big} {total % size // part} {small}"
    return f"{total} s"


def human_bytes(number: float) -> str:
    """Binary units: 512 B, 1.5 KiB, 7.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1023.5:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


_CONSOLE = (
    ("train/loss", lambda x: f"loss {x:.3f}"),
    ("val/loss", lambda x: f"val {x:.3f}"),
    ("pref/reward_accuracy", lambda x: f"accuracy {x:.1%}"),
    ("pref/val_reward_accuracy", lambda x: f"accuracy {x:.1%}"),
    ("sft/base_exact_match", lambda x: f"base exact {x:.1%}"),
    ("sft/exact_match", lambda x: f"exact {x:.1%}"),
    ("sft/stopped_frac", lambda x: f"stopped {x:.1%}"),
    ("rlvr/reward_mean", lambda x: f"reward {x:.3f}"),
    ("rlvr/pass_rate", lambda x: f"pass {x:.1%}"),
    ("rlvr/val_pass_at_1", lambda x: f"held-out pass@1 {x:.1%}"),
    ("rlvr/entropy", lambda x: f"entropy {x:.2f}"),
    ("train/grad_norm", lambda x: f"grad {x:.2f}"),
    ("train/lr", lambda x: f"lr {x:.1e}"),
    ("train/tokens_per_sec", lambda x: f"{human_count(x)} tok/s"),
    ("train/mfu", lambda x: f"MFU {x:.1%}"),
    ("cost/usd_spent", lambda x: f"${x:,.2f}"),
    ("cost/eta_hours", lambda x: f"ETA {human_time(x * 3600)}"),
)


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """One line with what of `values` a person watches, in columns that stay put."""
    head = f"step {step:>{len(f'{total_steps:,}')},}/{total_steps:,}  {step / total_steps:>6.1%}"
    return "  ".join([head, *(text(values[key]) for key, text in _CONSOLE if key in values)])
