"""The mirror holds what it says it holds, and no fault of its disk reaches the run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import checkpoint, mirror
from utils.checkpoint import Checkpointer
from utils.config import ConfigError
from utils.mirror import Mirror, open_mirror

ROOT = Path(__file__).parents[2]


def save(run: Path, *steps: int) -> None:
    """Write checkpoints of some 40 kB and a metrics file."""
    for step in steps:
        values = {"step": step, "model": torch.full((10_000,), float(step))}
        checkpoint.save(run / f"checkpoints/step_{step:08d}.pt", values)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}}}\n')


def copy_now(run: Path, folder: Path) -> None:
    Mirror(run, folder).close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "mirror").mkdir()
    return tmp_path / "runs/tiny"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mirror"


def test_the_runs_own_folder_is_no_mirror(tmp_path):
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for same in ("runs", "link", "runs/tiny/.."):
        with pytest.raises(ConfigError, match="is where the run itself lies"):
            open_mirror(run, str(tmp_path / same), resume=True)


def test_each_written_checkpoint_is_copied_and_rotated(run, folder):
    checkpointer = Checkpointer(run / "checkpoints", 2, Mirror(run, folder))
    for step in (10, 20, 30):
        checkpointer.save(step, {"step": step, "model": torch.ones(10)})
    checkpointer.close()
    checkpointer.mirror.close()
    newest = "checkpoints/step_00000030.pt"
    ours, theirs = files(run), files(folder / "tiny")
    assert {newest, f"{newest}.sha256"} <= theirs.keys()
    assert theirs.items() <= ours.items(), "nothing that rotation took, and the same bytes"


def test_restoring_brings_back_the_newest_and_the_metrics(run, folder):
    save(run, 10)
    copy_now(run, folder)
    save(run, 20)
    copy_now(run, folder)
    before = files(run)
    shutil.rmtree(run)
    assert Mirror(run, folder).restore()
    brought = files(run)
    assert "checkpoints/step_00000020.pt" in brought
    assert brought.items() <= before.items()
    assert not Mirror(run, folder).restore(newer_than="step_00000020.pt")


def test_all_that_a_run_writes_is_mirrored_and_comes_back(run, folder):
    """The names are those that `open_run`, W&B and the report write."""
    save(run, 10)
    for name in ("config.yaml", "versions.yaml", "samples.jsonl", "wandb_id.txt", "report.html"):
        (run / name).write_text(name)
    (run / "tiny_final.pt").write_bytes(b"weights")
    copy_now(run, folder)
    before = files(run)
    assert files(folder / "tiny") == before
    shutil.rmtree(run)
    assert Mirror(run, folder).restore()
    assert files(run) == {k: v for k, v in before.items() if k != "tiny_final.pt"}


def test_restoring_passes_over_a_damaged_copy(run, folder):
    for step in (10, 20):
        save(run, step)
        copy_now(run, folder)
    damaged = folder / "tiny/checkpoints/step_00000020.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    shutil.rmtree(run)
    assert Mirror(run, folder).restore()
    step, state = Checkpointer(run / "checkpoints", 2).latest()
    assert step.name == "step_00000010.pt"
    assert state["step"] == 10


def test_a_damaged_checkpoint_is_not_mirrored(run, folder, capsys):
    save(run, 10)
    copy_now(run, folder)
    save(run, 20)
    (run / "checkpoints/step_00000020.pt").write_bytes(b"not what was written")
    copy_now(run, folder)
    assert "step_00000020.pt is damaged" in capsys.readouterr().out
    names = sorted(p.name for p in (folder / "tiny/checkpoints").glob("*"))
    assert names == ["step_00000010.pt", "step_00000010.pt.sha256"]


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def lose_its_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "tiny/checkpoints")
    (folder / "tiny/checkpoints").write_text("")


@pytest.mark.parametrize("fault", [vanish, become_a_file, lose_its_checkpoints])
def test_a_mirror_that_goes_is_reported_once_and_caught_up_with(run, folder, capsys, fault):
    one = Mirror(run, folder)
    save(run, 10)
    one.close()
    fault(folder)
    for step in (20, 30):
        save(run, step)
        one.close()
    assert capsys.readouterr().out.count("warning: mirror") == 1
    assert sorted(p.name for p in run.rglob("*.pt")) == [f"step_000000{n}0.pt" for n in (1, 2, 3)]
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
        folder.mkdir()
    else:
        (folder / "tiny/checkpoints").unlink()
    one.close()
    assert "up to date again" in capsys.readouterr().out
    assert (folder / "tiny/checkpoints/step_00000030.pt").exists()


def test_a_full_mirror_keeps_what_it_has(run, folder):
    """A size limit stands for the full disk: the second checkpoint does not fit."""
    save(run, 10)
    copy_now(run, folder)
    before = files(folder)
    save(run, 20)
    code = (
        "import resource, sys; from utils.mirror import Mirror\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "Mirror(sys.argv[1], sys.argv[2]).close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("warning: mirror") == 1
    assert "File too large. Training goes on without it" in done.stdout
    after = files(folder)
    assert after.pop("tiny/metrics.jsonl") == (run / "metrics.jsonl").read_bytes()
    before.pop("tiny/metrics.jsonl")
    assert after == before


def test_a_mount_that_hangs_is_left_alone(run, folder, monkeypatch, capsys):
    """A named pipe that nobody writes to stands for it: opening it never returns."""
    run.mkdir(parents=True)
    os.mkfifo(run / "metrics.jsonl")
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.1)
    copy_now(run, folder)
    assert "still copying, left unfinished" in capsys.readouterr().out
