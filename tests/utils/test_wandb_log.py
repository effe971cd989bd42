"""W&B gets the metrics when it can; whatever it does, the run and its JSONL are untouched."""

import os
import signal
import time

import pytest

from utils import wandb_log
from utils.logging import MetricsLog, read_metrics
from utils.wandb_log import WandbLog

LINES = 30


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder, in a home without a login."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setattr(wandb_log, "PATIENCE_S", 600.0)
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny"


def log_all(run, lines: int = LINES) -> None:
    log = MetricsLog(run / "metrics.jsonl")
    log.wandb = WandbLog("project", run, {"seed": 0})
    for step in range(lines):
        log.write(step, {"train/loss": float(step), "train/odd": float("nan")})
    log.close()


def recorded(run) -> list[bytes]:
    """What W&B keeps on disk for each time that the run was started, offline."""
    return [path.read_bytes() for path in run.glob("wandb/offline-run-*/run-*.wandb")]


def test_offline_and_again_under_the_same_id(run, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_all(run)
    name = (run / "wandb_id.txt").read_text().strip()
    time.sleep(1.1)  # W&B names its folder by the second
    log_all(run)
    assert len(list(run.glob(f"wandb/offline-run-*-{name}"))) == 2
    for record in recorded(run):
        assert record.count(b"train/loss") >= LINES
    assert "warning" not in capfd.readouterr().out


def assert_the_run_is_untouched(run) -> None:
    assert [line["train/loss"] for line in read_metrics(run / "metrics.jsonl")] == [*range(LINES)]


def test_logged_out(run, capfd):
    log_all(run)
    assert_the_run_is_untouched(run)
    assert "warning: W&B: " in capfd.readouterr().out


def test_unreachable(run, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    log_all(run)
    assert_the_run_is_untouched(run)
    assert "warning: W&B: " in capfd.readouterr().out


def test_absent(run, tmp_path, monkeypatch, capfd):
    (tmp_path / "wandb.py").write_text("raise ImportError('no W&B here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log_all(run)
    assert_the_run_is_untouched(run)
    assert "no W&B here; pip install wandb. Training goes on" in capfd.readouterr().out


def test_stuck(run, tmp_path, monkeypatch, capfd):
    """Its child takes nothing: a pipe's worth of lines and more must not hold the run."""
    (tmp_path / "wandb.py").write_text("import time\ntime.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(wandb_log, "PATIENCE_S", 0.5)
    log_all(run, 5_000)
    assert len(read_metrics(run / "metrics.jsonl")) == 5_000
    assert "did not take the last metrics" in capfd.readouterr().out


def test_crashing(run, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLog(run / "metrics.jsonl")
    log.wandb = WandbLog("project", run, {})
    os.kill(log.wandb._process.pid, signal.SIGKILL)
    log.wandb._process.wait()
    for step in range(LINES):
        log.write(step, {"train/loss": float(step)})
    log.close()
    assert_the_run_is_untouched(run)
    assert capfd.readouterr().out.count("W&B gets no more metrics") == 1


def test_a_killed_run_takes_its_child_along(run, monkeypatch):
    """The pipe ends with the process that wrote to it; W&B's record of it is whole."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLog("project", run, {})
    log.write('{"step": 1, "train/loss": 2.0}')
    log.write('{"step": 2, "train/lo')
    log._process.stdin.close()  # as the kernel does for a killed process
    assert log._process.wait(600) == 0
    assert recorded(run)[0].count(b"train/loss") >= 1
