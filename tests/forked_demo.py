"""The demo whose stages are forks of it: torch is imported once, and a stage can be made to kill.

The first argument is empty, or a stage, a number and whom to kill: "sft 7 demo stage" sends SIGKILL
to the demo and then to the stage itself, just before the stage's seventh step.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import train.loop
import utils.chain
from scripts import demo
from utils.command_line import run_script


class Fork:
    """As much of a subprocess.Popen as a chain uses."""

    def __init__(self, command: list[str], lock: int) -> None:
        read, write = os.pipe()
        self.stdout = os.fdopen(read, "rb")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.stdout.close()
            _be_stage(command, write)
        os.close(write)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _be_stage(command: list[str], out: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
        stage, *call_and_victims = FAULT or [""]
        if Path(command[command.index("--config") + 1]).stem == stage:
            _kill_at(int(call_and_victims[0]), call_and_victims[1:])
        sys.argv = command
        run_script(importlib.import_module(command[0].removesuffix(".py")).main)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill_at(call: int, victims: list[str]) -> None:
    train_step, calls = train.loop.train_step, []

    def killing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            for victim in victims:
                os.kill({"demo": os.getppid, "stage": os.getpid}[victim](), signal.SIGKILL)
        return train_step(*args, **kwargs)

    train.loop.train_step = killing


def main(argv: list[str]) -> None:
    global FAULT
    FAULT = argv[0].split()
    utils.chain.start = Fork
    demo.main(argv[1:])
