"""Runs of stage scripts in processes of their own, cheap enough to be killed by the dozen.

A fork server imports torch once; each run is a fork of it with its own stdout, and can be made to
kill itself (SIGKILL) or to get a signal just before the n-th call of any function.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("time", "train/tokens_per_sec", "train/mfu", "cost/", "gpu/", "rlvr/rollout_")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "pyarrow", "tokenizers", "train_pretrain"])


class Fault(NamedTuple):
    """Send `signal` to the run just before call number `call` (from 1) of `function`.

    Attributes:
        signal: 0 for none, to wait only.
        after: wait for a file like this (a glob) first, which a thread or a process writes.
    """

    function: str
    call: int
    signal: int = signal.SIGKILL
    after: str = ""


@dataclass
class Outcome:
    code: int
    out: str
    err: str


class Run:
    """A started run."""

    def __init__(
        self,
        script: str,
        argv: list[str],
        log: Path,
        fault: Fault | list[Fault] | None = None,
        largest_file: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        faults = [fault] if isinstance(fault, Fault) else fault or []
        arguments = (script, argv, str(log), faults, largest_file, env or {})
        self.process = CONTEXT.Process(target=_child, args=arguments)
        self.process.start()

    def until_stopped(self, timeout_s: float = 1200) -> None:
        """Wait for a fault that sends SIGSTOP."""
        deadline = time.monotonic() + timeout_s
        while not _is_stopped(self.process.pid):
            assert self.process.is_alive(), f"it ended before: {_read(self.log, 'err')}"
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"not stopped after {timeout_s} s: {_read(self.log, 'out')}")
            time.sleep(0.01)

    def wait(self, timeout_s: float = 1200) -> Outcome:
        """Until the run, and whatever it has started and left behind, has ended."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout_s} s: {_read(self.log, 'out')}")
        deadline = time.monotonic() + timeout_s
        while _writers(self.log):
            assert time.monotonic() < deadline, "what it has started lives on"
            time.sleep(0.01)
        return Outcome(self.process.exitcode, *(_read(self.log, kind) for kind in ("out", "err")))


def run(
    script: str,
    *argv: object,
    log: Path,
    fault: Fault | list[Fault] | None = None,
    largest_file: int | None = None,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a stage script to its end; a file beyond `largest_file` bytes fails as on a full disk."""
    return Run(script, list(map(str, argv)), log, fault, largest_file, env).wait()


def _read(log: Path, kind: str) -> str:
    return log.with_suffix(f".{kind}").read_text()


def _is_stopped(pid: int) -> bool:
    """Whether a SIGSTOP has reached all threads of a process, and there is one."""
    states = []
    for status in glob.glob(f"/proc/{pid}/task/*/status"):
        with contextlib.suppress(OSError):  # it has ended
            states.append("T (stopped)" in Path(status).read_text())
    return bool(states) and all(states)


def _writers(log: Path) -> list[str]:
    """The stdout and stderr of processes that are a run's."""
    found = []
    # Not Path.glob, which fails where a process ends meanwhile.
    for stream in glob.glob("/proc/[0-9]*/fd/[12]"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if Path(stream).readlink().with_suffix("") == log.resolve():
                found.append(stream)
    return found


def _child(
    script: str,
    argv: list[str],
    log: str,
    faults: list[Fault],
    largest_file: int | None,
    env: dict[str, str],
) -> None:
    os.chdir(ROOT)
    os.environ.update(env)
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        descriptor = os.open(
            Path(log).with_suffix(f".{kind}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        )
        os.dup2(descriptor, stream.fileno())
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(script)
    for fault in faults:
        _install(fault)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [f"{script}.py", *argv]
    from utils.command_line import run_script

    run_script(module.main)


def _install(fault: Fault) -> None:
    owner_name, _, attribute = fault.function.rpartition(".")
    owner = _resolve(owner_name)
    original, calls = getattr(owner, attribute), itertools.count(1)

    def counted(*args: object, **kwargs: object) -> object:
        if next(calls) == fault.call:  # of any thread
            while fault.after and not glob.glob(fault.after):
                time.sleep(0.01)
            os.kill(os.getpid(), fault.signal)
        return original(*args, **kwargs)

    setattr(owner, attribute, counted)


def _resolve(name: str) -> object:
    """A module, or a class inside one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def numbers(metrics: Path) -> list[dict]:
    """A run's metrics without what depends on the clock."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]
