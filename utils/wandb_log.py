"""Weights & Biases as a second place for the metrics, in a process of its own.

The run writes each line of `metrics.jsonl` into a pipe as well; a child process (this file, run as
`python -m utils.wandb_log`) reads it and talks to W&B. So nothing that W&B does, be it waiting for
a network, asking for a login, crashing or being absent, can stop or slow the run, and a run that is
killed ends the pipe, on which the child says goodbye and leaves. `WANDB_MODE=offline` and W&B's
other environment variables hold as usual.

The W&B run's id is kept in `wandb_id.txt` beside the metrics, and a resumed run goes on under it.
`step` is a metric and not W&B's own counter, which does not go back: after a resume or a rollback
the steps made again appear twice there, and once in `metrics.jsonl`.

Left out: artifacts, code and console capture.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from utils.logging import get_logger

PATIENCE_S = 60.0
BACKLOG_LINES = 10_000
AFTERMATH = "Training goes on, and metrics.jsonl has everything"


class WandbLog:
    """Passes lines of metrics on to W&B, or drops them.

    Args:
        project: the W&B project.
        run: the run's folder; its name is that of the W&B run.
        config: the run's resolved config, as plain values.
    """

    def __init__(self, project: str, run: Path, config: dict[str, Any]) -> None:
        about = {
            "project": project,
            "id": _run_id(run),
            "name": run.name,
            "dir": str(run.resolve()),
            "config": config,
        }
        self._backlog: deque[bytes] = deque(maxlen=BACKLOG_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.wandb_log", json.dumps(about)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which then closes the pipe
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        self._broken = False

    def write(self, line: str) -> None:
        """Hand over one JSON line; what the pipe has no room for waits for the next call."""
        self._backlog.append(f"{line}\n".encode())
        self._hand_over()

    def close(self) -> None:
        """Wait until W&B has everything, not longer than `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while self._hand_over() and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            get_logger().warning(
                f"W&B did not take the last metrics within {PATIENCE_S:.0f} s. {AFTERMATH}"
            )

    def _hand_over(self) -> bool:
        """Write what the pipe takes; return whether some is left for later."""
        while self._backlog and not self._broken:
            try:
                written = os.write(self._process.stdin.fileno(), self._backlog[0])
            except BlockingIOError:
                return True
            except OSError:
                self._broken = True  # the child has said why, unless it was killed
                get_logger().warning(f"W&B gets no more metrics. {AFTERMATH}")
                break
            line = self._backlog.popleft()
            if written < len(line):
                self._backlog.appendleft(line[written:])
        return False


def _run_id(run: Path) -> str:
    """The id in the run's folder; a new one, written there, for a new run."""
    path = run / "wandb_id.txt"
    if not path.exists() or not path.read_text().strip():  # empty: killed while writing it
        path.write_text(f"{uuid.uuid4().hex[:8]}\n")
    return path.read_text().strip()


def _send(about: dict[str, Any]) -> None:
    """The child: pass the lines on stdin to W&B until there are no more."""
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install wandb") from error
    settings = wandb.Settings(console="off", x_stats_pid=os.getppid())
    run = wandb.init(**about, resume="allow", save_code=False, settings=settings)
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        with contextlib.suppress(json.JSONDecodeError):  # the end of a killed run's last line
            run.log({key: x for key, x in json.loads(line).items() if x is not None})
    run.finish()


if __name__ == "__main__":
    try:
        _send(json.loads(sys.argv[1]))
    except Exception as error:  # W&B has many ways to fail, and all of them are harmless
        print(f"warning: W&B: {error}. {AFTERMATH}", flush=True)
        sys.exit(1)
