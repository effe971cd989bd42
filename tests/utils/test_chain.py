"""What a chain shows of a stage, and when it takes a config for the one that a run had."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from utils import chain, checkpoint
from utils.chain import Progress, Stage, _agrees, _lines, alone, check_base, run_stage
from utils.config import ConfigError

TRAINED = "step {:>3}/100  {:.1f}%  loss 3.000  9.1K tok/s  ETA 5 s"
EVALUATED = "step {:>3}/100  {:.1f}%  val 2.000"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO) -> list[str]:
    """What is on the screen when each line has been written: `\\r\\033[K` takes a line away."""
    return [line.rpartition("\r\033[K")[2] for line in out.getvalue().split("\n")]


def feed(progress: Progress) -> None:
    progress.show("the loader is ready")
    progress.show(EVALUATED.format(0, 0))
    for step in range(2, 101, 2):
        progress.show(TRAINED.format(step, step))
        progress.show("")
    progress.show("warning: this is bad")
    progress.show(EVALUATED.format(100, 100))
    progress.clear()


def test_plain_output_is_a_line_for_each_tenth_evaluations_and_warnings():
    out = io.StringIO()
    feed(Progress(out))
    lines = [line.split("s  ", 1)[1] for line in out.getvalue().splitlines()]
    trained = [TRAINED.format(step, step) for step in range(10, 101, 10)]
    first, last = EVALUATED.format(0, 0), EVALUATED.format(100, 100)
    assert lines == [first, *trained, "warning: this is bad", last]


def test_in_a_terminal_one_line_is_redrawn_and_evaluations_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    feed(Progress(out))
    assert [line[13:] for line in shown(out)] == [
        EVALUATED.format(0, 0), "warning: this is bad", EVALUATED.format(100, 100), "",
    ]  # fmt: skip
    assert all(len(part) < 40 for part in out.getvalue().split("\r\033[K") if "\n" not in part)
    assert out.getvalue().count("step  50/100") == 2, "once when it came, once for the clock"


def test_the_error_of_a_stage_begins_with_its_message():
    progress = Progress(io.StringIO())
    for line in ("tokenizing 5%", "warning: x", "error: optim.lr is wrong", "  it is -1"):
        progress.show(line)
    assert progress.error() == "error: optim.lr is wrong\n  it is -1"


@pytest.mark.parametrize(
    ("given", "resolved", "agree"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 3e-4}, {"a": 0.0003}, True),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2], "c": 0}}, True),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 0}]}, True),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": {"b": 1, "new": 2}}, {"a": {"b": 1}}, False),
        ({"a": 1}, {"a": 2}, False),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ({"a": {"b": 1}}, {"a": None}, False),
    ],
)
def test_a_config_agrees_when_it_holds_all_that_its_file_gives(given, resolved, agree):
    assert _agrees(given, resolved) is agree


@pytest.mark.parametrize("earlier_version", [False, True])
def test_the_base_of_a_stage_is_known_by_its_weights(tmp_path, earlier_version):
    base = Stage("a.py", Path("a.yaml"), tmp_path, "the base")
    stage = Stage("b.py", Path("b.yaml"), tmp_path, "grows from it", base)

    def finish(weight: float, **config) -> None:
        checkpoint.save(base.final, {"model": {"w": torch.tensor([weight])}, "config": config})

    finish(1.0)
    if earlier_version:  # it noted the file's digest
        stage.folder.mkdir()
        digest = hashlib.sha256(base.final.read_bytes()).hexdigest()
        (stage.folder / "base.sha256").write_text(f"{digest}  {base.final}\n")
    check_base(stage)
    finish(1.0, new_key=3)
    check_base(stage)
    finish(2.0)
    with pytest.raises(ConfigError, match=r"grew from another .*a_final\.pt"):
        check_base(stage)


def test_lines_come_whole_however_they_are_written():
    write = "import os\nfor c in b'one\\ntw\\xc3\\xb6\\r30%\\r\\n\\nend': os.write(1, bytes([c]))"
    with subprocess.Popen([sys.executable, "-c", write], stdout=subprocess.PIPE) as process:
        assert [line for line in _lines(process.stdout) if line] == ["one", "twö", "30%", "end"]


def test_the_lock_is_held_by_a_child_that_outlives_its_parent(tmp_path, capsys):
    with alone(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=(lock,))
    entered = threading.Event()

    def enter() -> None:
        with alone(tmp_path):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.3)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    assert entered.wait(300)
    waiting.join()
    assert "waiting" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_stage_starts_reaches_it(tmp_path, monkeypatch, number):
    start = chain.start

    def start_in_vain(command: list[str], lock: int) -> subprocess.Popen:
        signal.raise_signal(number)
        return start(["-c", "import time; time.sleep(600)"], lock)

    monkeypatch.setattr(chain, "start", start_in_vain)
    (tmp_path / "sft.yaml").write_text("name: sft\n")
    stage = Stage("none.py", tmp_path / "sft.yaml", tmp_path, "nothing")
    with alone(tmp_path) as lock:
        assert run_stage(stage, Progress(io.StringIO()), lock) == 128 + number


def test_a_signal_that_comes_while_one_is_passed_on_is_passed_on_once():
    """Twice, Ctrl-C would leave the stage without saving."""
    sent = []

    class Process:
        def send_signal(self, number):
            sent.append(number)
            if len(sent) == 1:
                signals._handle(signal.SIGINT, None)

    with chain._PassedOn() as signals:
        signals._handle(signal.SIGTERM, None)
        signals.to(Process())
        signals._handle(signal.SIGTERM, None)
    assert sent == signals.caught == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
