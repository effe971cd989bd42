"""Metrics survive kills and full disks; lines are valid JSON; numbers read well."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import ConfigError, load_yaml
from utils.logging import (
    MetricsLog,
    RunDirectory,
    console_line,
    cut_back,
    get_logger,
    human_bytes,
    human_count,
    human_time,
    read_metrics,
)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_lines_are_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"loss": float("nan"), "norm": float("inf"), "lr": 1e-3, "skipped": 2})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse_constant)
    assert values.pop("time") > 1.7e9
    assert values == {"step": 10, "loss": None, "norm": None, "lr": 1e-3, "skipped": 2}


def test_a_killed_process_loses_no_written_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from utils.logging import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "log.write(1, {'loss': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, path], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [line["loss"] for line in read_metrics(path)] == [2.0]


def test_cut_back_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 20, 30):
        log.write(step, {"loss": step / 10})
    with path.open("a") as file:
        file.write('{"step": 15, "lo')
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 20, 30]
    log.cut_back(20)
    log.write(21, {"loss": 9.0})
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 20, 21]
    assert len(path.read_text().splitlines()) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_cut_back_of_what_is_not_there(tmp_path: Path) -> None:
    cut_back(tmp_path / "samples.jsonl", 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", ['{"step": 3}', '{"step": 3, "a', "17\n", '"text"\n', "\x00\x00"])
def test_torn_lines_are_not_read(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert read_metrics(path) == [{"step": 1}]


def test_a_full_disk_is_warned_of_once_and_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from utils.logging import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))\n"
        "for step in range(5): log.write(step, {'loss': 1.0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "log.write(5, {'loss': 1.0})\n"
    )
    path = tmp_path / "metrics.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, path]
    output = subprocess.check_output(command, env=environment, text=True)
    assert output == f"warning: {path}: not written: {os.strerror(27)}\n"
    assert [line["step"] for line in read_metrics(path)] == list(range(6))


def test_console_line_shows_what_is_there() -> None:
    values = {
        "train/loss": 3.21449, "val/loss": 3.3009, "train/grad_norm": 0.412, "train/lr": 3e-3,
        "train/tokens_per_sec": 412_345.0, "train/mfu": 0.4123, "cost/usd_spent": 1.3222,
        "cost/eta_hours": 2 + 14 / 60, "web_val_loss": 3.1,
    }  # fmt: skip
    assert console_line(1200, 20_000, values) == (
        "step  1,200/20,000    6.0%  loss 3.214  val 3.301  grad 0.41  lr 3.0e-03  "
        "412K tok/s  MFU 41.2%  $1.32  ETA 2 h 14 m"
    )
    assert console_line(20_000, 20_000, {}) == "step 20,000/20,000  100.0%"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1K"), (524_288, "524K"), (999_400, "999K"),
     (999_600, "1M"), (1_572_864, "1.57M"), (653_207_040, "653M"), (10e9, "10B"), (2e12, "2.0T"),
     (-1500, "-1.5K"), (0.25, "0.25")],
)  # fmt: skip
def test_human_count(number: float, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (59.7, "1 m 0 s"), (200, "3 m 20 s"), (8040, "2 h 14 m"),
     (100 * 3600, "4 d 4 h"), (float("inf"), "?"), (float("nan"), "?")],
)  # fmt: skip
def test_human_time(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(512, "512 B"), (1536, "1.5 KiB"), (1024**2 - 1, "1.0 MiB"), (7.3 * 2**30, "7.3 GiB")],
)
def test_human_bytes(number: float, text: str) -> None:
    assert human_bytes(number) == text


def test_a_directory_with_a_run_in_it_is_refused_unless_resumed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "pretrain")
    run.prepare(False, {"name": "pretrain", "lr": 3e-4})
    assert load_yaml(run.path / "config.yaml") == {"name": "pretrain", "lr": 3e-4}
    run.prepare(False, {"name": "pretrain"})  # a start that failed before its first step
    for traces in (run.metrics, run.checkpoints / "step_00000010.pt", run.final):
        traces.write_text("x")
        with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
            run.prepare(False, {})
        run.prepare(True, {"lr": 1})
        assert load_yaml(run.path / "config.yaml") == {"lr": 1}
        traces.unlink()


def test_the_logger_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger().info("hello")
    get_logger().warning("careful")
    assert capsys.readouterr().out == "hello\nwarning: careful\n"


def test_only_rank_0_prints() -> None:
    code = "from utils.logging import get_logger; get_logger().warning('x')"
    for rank, expected in (("0", "warning: x\n"), ("1", "")):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RANK": rank}
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, env=environment, text=True) == expected


TALKS = """
import sys
from utils.command_line import run_script
from utils.logging import get_logger
def main(argv):
    get_logger().info("first")
    sys.stdin.read()
    for _ in range(3):
        get_logger().info("later")
    print("done", file=sys.stderr)
run_script(main)
"""


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_console_that_takes_nothing_stops_nothing(reader: str) -> None:
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    out = os.open("/dev/full", os.O_WRONLY) if reader == "full" else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", TALKS],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.PIPE,
    ) as process:
        if reader == "gone":
            assert process.stdout.readline() == b"first\n"
            process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"done\n"
    assert process.returncode == 0
