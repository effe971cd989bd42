"""Training stages one after another, each in a process of its own: `make demo`'s machinery.

A stage is its script, run with --resume, so that a chain that was stopped anywhere goes on from the
last checkpoint. Two things that a script alone cannot know are seen to here: a stage that has ended
is not begun again, and one that grew from another base than the one that is there now is refused.
What a stage prints goes to its `console.log`; the terminal gets one live line and what matters.

Left out: stages side by side, and other machines.
"""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.config import ConfigError, load_yaml
from utils.logging import human_time
from utils.terminal import DIM, paint

ROOT = Path(__file__).resolve().parents[1]
STEP = re.compile(r"step +([\d,]+)/([\d,]+) ")  # how `console_line` begins
TICK_SECONDS = 1.0  # the live line's clock
KEPT_LINES = 60  # of the output, to show of a stage that fails


@dataclass(frozen=True)
class Stage:
    """A script, its config, and what it starts from. The config's `name` is its file's."""

    script: str
    config: Path
    runs_dir: Path
    about: str
    base: Stage | None = None

    @property
    def name(self) -> str:
        return self.config.stem

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def final(self) -> Path:
        return self.folder / f"{self.name}_final.pt"

    def command(self) -> list[str]:
        """What to type after `python` to start it, or to go on with it."""
        base = ["--base-model", str(self.base.final)] if self.base else []
        elsewhere = load_yaml(self.config).get("runs_dir") != str(self.runs_dir)
        place = [f"runs_dir={self.runs_dir}"] if elsewhere else []
        return [self.script, "--config", str(self.config), *base, "--resume", *place]

    def finished(self) -> bool:
        """Whether its final checkpoint is there, whole, and of the config as it is now."""
        if not self.final.exists():
            return False
        try:
            state = checkpoint.load(self.final)
        except CheckpointError:  # the last step's checkpoint gives it anew
            return False
        given = load_yaml(self.config)
        if isinstance(given.get("model"), str):
            given["model"] = load_yaml(ROOT / given["model"])
        return _agrees(given | {"runs_dir": state["config"].get("runs_dir")}, state["config"])


def _agrees(given: Any, resolved: Any) -> bool:
    """Whether a config holds everything that its file gives; the rest are defaults.

    A key that the config is too old to have does not agree: its stage, which knows the default, is
    run again, and goes on from its last step or refuses to.
    """
    if isinstance(given, dict):
        known = resolved if isinstance(resolved, dict) else {}
        return all(key in known and _agrees(value, known[key]) for key, value in given.items())
    if isinstance(given, list) and isinstance(resolved, list):
        return len(given) == len(resolved) and all(map(_agrees, given, resolved))
    return given == resolved


def check_base(stage: Stage) -> None:
    """Note which base a stage grows from, or find that noted before.

    Raises:
        ConfigError: it was another one, so that going on would mix two models' lives.
    """
    if stage.base is None:
        return
    # Of the weights: a base that is finished anew, under other bookkeeping, is the same base.
    digest = checkpoint.weights_fingerprint(checkpoint.load(stage.base.final)["model"])
    of_file = checkpoint.sha256(stage.base.final)  # in records of earlier versions
    record = stage.folder / "base.sha256"
    if record.exists() and record.read_text().split()[0] not in (digest, of_file):
        raise ConfigError(
            f"{stage.folder} grew from another {stage.base.final} than the one that is there now: "
            f"delete {stage.folder} to train it anew, or restore that file"
        )
    stage.folder.mkdir(parents=True, exist_ok=True)
    temporary = record.with_name(f".{record.name}.tmp")
    temporary.write_text(f"{digest}  {stage.base.final}\n")
    temporary.replace(record)


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Holds a folder's lock, waiting for it if need be; gives the file descriptor that holds it.

    A stage inherits the descriptor: one that outlives a killed chain by a few steps keeps the next
    chain waiting, and two processes never write to one run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process is at work in {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class Progress:
    """A stage's output, condensed: a live line in a terminal, else a line for every tenth.

    Evaluations and warnings stay on the screen either way.
    """

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.live = out.isatty()
        self.began = time.monotonic()
        self.line = "starting"
        self.tenth = -1
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)

    def show(self, line: str) -> None:
        """Take a line of the stage's output; an empty one only moves the clock."""
        step = STEP.match(line)
        if not step and line:
            self.kept.append(line)
        if line.startswith("warning: "):
            self._keep(line)
        elif step:
            done, total = (int(number.replace(",", "")) for number in step.groups())
            tenth, self.tenth = self.tenth, 10 * done // total
            if "tok/s" not in line or (self.tenth > tenth and not self.live):
                self._keep(line)
        self.line = line or self.line
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text = f"  {self.elapsed():>9}  {self.line}"[:width]
            print(f"\r\033[K{paint(text, DIM, self.out)}", end="", file=self.out, flush=True)

    def elapsed(self) -> str:
        return human_time(time.monotonic() - self.began)

    def clear(self) -> None:
        """Take the live line away."""
        if self.live:
            print("\r\033[K", end="", file=self.out, flush=True)

    def error(self) -> str:
        """What a failed stage said last: from its error message on, if there is one."""
        lines = list(self.kept)
        starts = [i for i, s in enumerate(lines) if s.startswith(("error: ", "Traceback "))]
        return "\n".join(lines[starts[-1] if starts else -10 :])

    def _keep(self, line: str) -> None:
        self.clear()
        print(f"  {self.elapsed():>9}  {line}", file=self.out, flush=True)


def run_stage(stage: Stage, progress: Progress, lock: int) -> int:
    """Run a stage to its end, or go on with it.

    Returns:
        0 when its final checkpoint is written, else a code to exit with: the script's own, or
        128 + the signal that stopped it.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    with (
        (stage.folder / "console.log").open("a", encoding="utf-8") as log,
        _PassedOn() as signals,
        start(stage.command(), lock) as process,
    ):
        signals.to(process)
        for line in _lines(process.stdout):
            if line:
                log.write(line + "\n")
                log.flush()
            progress.show(line)
        code = process.wait()
    progress.clear()
    if signals.caught:
        return 128 + signals.caught[0]
    if code == 0 and not stage.final.exists():  # stopped by a signal of its own, everything saved
        return 128 + signal.SIGTERM
    return 128 - code if code < 0 else code


def start(command: list[str], lock: int) -> subprocess.Popen:
    """Python with this command line, its output as one pipe; it holds the lock too."""
    # Threads that wait should sleep: spinning ones take the cores from each other when it is busy.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the terminal's Ctrl-C comes through `_PassedOn` alone
        pass_fds=(lock,),
    )


class _PassedOn:
    """Ctrl-C and SIGTERM go to the stage, which saves and ends.

    Attributes:
        caught: their numbers; those that come before there is a process go to it once there is.
    """

    def __init__(self) -> None:
        self.caught: list[int] = []
        self._waiting: deque[int] = deque()
        self._process: subprocess.Popen | None = None

    def to(self, process: subprocess.Popen) -> None:
        self._process = process
        self._pass_on()

    def __enter__(self) -> _PassedOn:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.caught.append(number)
        self._waiting.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        """Each once, though another may come at any moment."""
        with suppress(IndexError):
            while self._process:
                self._process.send_signal(self._waiting.popleft())

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _lines(pipe: BinaryIO) -> Iterator[str]:
    """A pipe's lines as they come, progress bars' too, and "" when none has come for a tick."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(TICK_SECONDS):
                yield ""
                continue
            piece = os.read(pipe.fileno(), 65536)
            *whole, rest = re.split(rb"[\r\n]+", rest + piece)
            yield from (line.decode(errors="replace") for line in whole if line.strip())
            if not piece:
                if rest.strip():
                    yield rest.decode(errors="replace")
                return
