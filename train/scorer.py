"""Scores with libraries that are not to be trusted with a model's text, in a process of their own.

sympy, on which math-verify builds, can compute for ever on a short formula; a regular expression
can take exponential time; some of reasoning-gym's scorers hand the text to `eval`. So each runs in
a process that lives on (importing sympy takes a second) and answers one question at a time. When an
answer takes too long, or the process dies of it, the completion scores 0 and the process is
replaced. There is no SIGALRM in this, so it works in any thread. The limit is wall time: on a
machine under load an answer may score 0 that would otherwise have come just in time.

The process is in the sandbox. Where there is none, it is a plain one with a limit on its memory,
but not for a library that evaluates the text as code: that is refused.

Left out: several processes for each verifier; a math answer takes 1 to 20 ms.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from train import sandbox, scorer_inside
from train.sandbox import Limits
from utils.config import ConfigError

EVALUATES_TEXT = ("reasoning_gym",)
LIMITS = Limits(cpu_s=3_600, memory_mib=2_048)  # of a process's whole life; then it is replaced
START_S = 60.0
ANSWER_S = 5.0


class Scorer:
    """One verifier of `scorer_inside.SCORERS`; called with (completion, answer), gives the score.

    Raises:
        ConfigError: its package is not installed, or cannot run here.
    """

    def __init__(self, name: str, answer_s: float | None = None) -> None:
        package = scorer_inside.PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            hint = package.replace("_", "-")
            raise ConfigError(f"verifier '{name}' needs {hint}: `pip install {hint}`")
        self.sandboxed = sandbox.unavailable() is None
        if name in EVALUATES_TEXT and not self.sandboxed:
            raise ConfigError(
                f"verifier '{name}' evaluates a completion's text as code, and the sandbox for "
                f"that is unavailable: {sandbox.unavailable()}"
            )
        self.name = name
        self.answer_s = ANSWER_S if answer_s is None else answer_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def __call__(self, completion: str, answer: str) -> float:
        with self._lock:
            line = self._ask_twice([completion, answer])
        score = json.loads(line or b"0.0")
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            sandbox.kill(self._process)
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                self._process.stdin.close()
            self._process.stdout.close()
            self._folder.cleanup()
            self._process = None

    def _ask_twice(self, question: list[str]) -> bytes | None:
        """Ask, and again if the process died: it may have done so with the thread it came from."""
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                self._start()
            line = self._ask(question, self.answer_s)
            if line:
                return line
            self.close()
            if line is None:
                break
        return None

    def _start(self) -> None:
        self.close()
        self._folder = tempfile.TemporaryDirectory()
        paths = [path for path in sys.path if path.endswith("-packages") and Path(path).is_dir()]
        if self.sandboxed:
            text = Path(scorer_inside.__file__).read_text()
            self._process = sandbox.start(text, paths, LIMITS, Path(self._folder.name))
        else:
            self._process = _plain_process(self._folder.name)
        problem = json.loads(self._ask([paths, self.name], START_S) or '"no answer"')
        if problem:
            self.close()
            raise ConfigError(f"verifier '{self.name}' does not start: {problem}")

    def _ask(self, message: list, seconds: float) -> bytes | None:
        """The line that comes in answer to a message; None if none comes in time, b"" if the
        process has died."""
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        line = b""
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 1 << 12)
                if not chunk:
                    return b""
                line += chunk
        return line


def _plain_process(folder: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-I", scorer_inside.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
    )
    if hasattr(resource, "prlimit"):
        most = LIMITS.memory_mib << 20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
    return process
