"""The helper that runs stage scripts: what it says of processes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.pipeline import Fault, Run, _is_stopped, _writers


def test_a_process_is_stopped_only_while_it_lives_and_stands_still():
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            assert not _is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert _is_stopped(process.pid)
        finally:
            process.kill()
    assert not _is_stopped(process.pid)  # and gone


def test_waiting_for_a_stop_that_never_comes_ends(tmp_path):
    never = Fault("train_pretrain.main", 1, signal.SIGSTOP, after=str(tmp_path / "never"))
    run = Run("train_pretrain", [], tmp_path / "log", never)
    with pytest.raises(TimeoutError, match="not stopped"):
        run.until_stopped(timeout_s=0.5)
    run.process.join()


def test_writers_are_those_of_one_log(tmp_path):
    log = tmp_path / "log"
    with log.with_suffix(".out").open("w") as out:
        command = [sys.executable, "-c", "input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out) as process:
            assert _writers(log) == [f"/proc/{process.pid}/fd/1"]
            process.communicate(b"\n")
    assert _writers(log) == []
