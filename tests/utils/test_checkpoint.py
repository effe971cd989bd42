"""Checkpoints: what is saved comes back, and no crash, full disk or damage loses the last one.

Faults are real: processes are killed at every file operation, the kernel refuses to write, and
bytes on disk are changed. A child is forked for each, so that limits and signals stay inside it.
"""

import hashlib
import itertools
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.checkpoint import (
    FORMAT_VERSION,
    Checkpointer,
    CheckpointError,
    load,
    save,
    snapshot,
)


def payload(step: int, size: int = 1000) -> dict[str, Any]:
    """A small checkpoint, which tells its step by its values."""
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}, "loader": [1, "a"]}


def assert_is(loaded: dict[str, Any], step: int) -> None:
    expected = payload(step)
    assert loaded["step"] == step
    assert torch.equal(loaded["model"]["weight"][:1000], expected["model"]["weight"])


def in_child(function: Callable[[], None]) -> int:
    """Run `function` in a forked process and return its exit code (minus the signal, if killed)."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond `size`: a full disk, but for the error's number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped bit":
        data[len(data) // 2] ^= 1
    elif kind == "truncated":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    elif kind == "foreign":
        data[:] = b"<html>quota exceeded</html>"
    path.write_bytes(data)


# ---- one file ----


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    values = {
        "model": {"embedding": weight, "head": weight.detach(), "half": weight.bfloat16()},
        "rng": (3, (1, 2**70), None),
        "plain": [True, 1.5, "text", b"bytes", {"nested": {7: []}}],
    }
    save(tmp_path / "a.pt", values)
    loaded = load(tmp_path / "a.pt")
    assert loaded["format_version"] == FORMAT_VERSION
    assert (loaded["rng"], loaded["plain"]) == (values["rng"], values["plain"])
    for name, tensor in values["model"].items():
        assert torch.equal(loaded["model"][name], tensor)
        assert loaded["model"][name].dtype == tensor.dtype
    assert loaded["model"]["embedding"].data_ptr() == loaded["model"]["head"].data_ptr()


def test_the_sidecar_is_what_sha256sum_writes(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", payload(1))
    digest = hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert (tmp_path / "a.pt.sha256").read_text() == f"{digest}  a.pt\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "a.pt.sha256"]


def test_a_view_does_not_bring_its_storage(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", {"row": torch.randn(1000, 1000)[3], "column": torch.ones(1).expand(9)})
    assert (tmp_path / "a.pt").stat().st_size < 20_000


def test_a_snapshot_is_independent_of_what_it_copied() -> None:
    source = {"a": torch.ones(3), "b": [torch.ones(3)], "c": {"d": 1}}
    copy = snapshot(source)
    source["a"].zero_()
    source["b"][0].zero_()
    source["c"]["d"] = 2
    assert copy["a"].sum() == copy["b"][0].sum() == 3
    assert copy["c"]["d"] == 1


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1, 2}, Path("x"), torch.nn.ReLU()])
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="plain values and tensors"):
        save(tmp_path / "a.pt", {"deep": [{"x": value}]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "empty", "foreign"])
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    save(path, payload(1))
    damage(path, kind)
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged, its sha256 is not the one in"):
        load(path)
    if kind != "flipped bit":  # which only the sidecar can tell
        (tmp_path / "a.pt.sha256").unlink()
        with pytest.raises(CheckpointError, match=r"a\.pt: damaged or not a checkpoint"):
            load(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt: cannot be read: No such file"):
        load(tmp_path / "gone.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="format version None"):
        load(tmp_path / "list.pt")
    torch.save({"format_version": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="format version 99, but this code reads version 1"):
        load(tmp_path / "new.pt")
    torch.save({"x": Path("code")}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("name: a\n")
    for name in ("code.pt", "text.pt"):
        with pytest.raises(CheckpointError, match="damaged or not a checkpoint") as refusal:
            load(tmp_path / name)
        assert "arbitrary code" not in str(refusal.value)  # torch's advice is to allow it


def test_a_missing_sidecar_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.pt", payload(1))
    (tmp_path / "a.pt.sha256").unlink()
    assert_is(load(tmp_path / "a.pt"), 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"warning: {tmp_path}/a.pt: not verified, a.pt.sha256 is missing"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, payload(1))

    def fill() -> None:
        limit_file_size(20_000)
        try:
            save(path, payload(2, size=100_000))
        except CheckpointError as error:
            sys.exit(7 if str(error) == f"{path}: not saved: File too large" else str(error))

    assert in_child(fill) == 7
    assert_is(load(path), 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "a.pt.sha256"]


def kill_at(event: str, number: int, folder: Path) -> None:
    """Kill this process just before its `number`-th file operation of that kind in `folder`."""
    seen = itertools.count(1)

    def hook(name: str, arguments: tuple) -> None:
        if name == event and str(arguments[0]).startswith(str(folder)) and next(seen) == number:
            signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("event", "number"),
    [("open", 1), ("open", 2), ("os.remove", 1), ("os.rename", 1), ("os.rename", 2), ("open", 3)],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_kill_at_any_file_operation_leaves_the_old_file_or_the_new(
    tmp_path: Path, event: str, number: int, existing: bool
) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    path = tmp_path / "step_00000007.pt"
    if existing:
        save(path, payload(1))

    def die() -> None:
        kill_at(event, number, tmp_path)
        save(path, payload(2))

    assert in_child(die) == -signal.SIGKILL
    found = checkpointer.latest()
    if found is None:
        assert not existing
    else:
        assert_is(found[1], found[1]["step"])
        assert found[1]["step"] in ([1, 2] if existing else [2])
    assert not list(tmp_path.glob(".*"))
    save(path, payload(3))
    assert_is(load(path), 3)


def test_a_kill_in_the_middle_of_writing(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    save(path, payload(1))

    def die() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process; Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_file_size(20_000)
        save(path, payload(2, size=100_000))

    assert in_child(die) == -signal.SIGXFSZ
    (torn,) = tmp_path.glob(".*.tmp")
    assert torn.stat().st_size > 0
    assert_is(Checkpointer(tmp_path, keep_last=1).latest()[1], 1)
    assert not torn.exists()


# ---- a run's checkpoints ----


def steps_in(directory: Path) -> list[int]:
    """The steps whose checkpoint is there, after checking that sidecars and files match."""
    files = sorted(path.name for path in directory.glob("*.pt"))
    assert sorted(path.name for path in directory.glob("*.sha256")) == [
        f"{f}.sha256" for f in files
    ]
    return [int(name[5:13]) for name in files]


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", keep_last=2)


def test_the_last_ones_are_kept(checkpointer: Checkpointer) -> None:
    assert checkpointer.latest() is None
    for step in (1, 20, 300):
        checkpointer.save(step, payload(step))
    checkpointer.close()
    assert steps_in(checkpointer.directory) == [20, 300]
    assert checkpointer.failures() == []
    path, loaded = checkpointer.latest()
    assert path.name == "step_00000300.pt"
    assert_is(loaded, 300)


def test_training_may_go_on_while_a_checkpoint_is_written(checkpointer: Checkpointer) -> None:
    state = payload(1)
    checkpointer.save(1, state)
    state["model"]["weight"].zero_()
    checkpointer.wait()
    assert_is(checkpointer.latest()[1], 1)


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "empty", "foreign"])
def test_damaged_ones_are_skipped_with_a_line_each(
    checkpointer: Checkpointer, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer.keep_last = 3
    for step in (1, 2, 3):
        checkpointer.save(step, payload(step))
    checkpointer.wait()
    for step in (2, 3):
        damage(checkpointer.directory / f"step_{step:08d}.pt", kind)
    assert_is(checkpointer.latest()[1], 1)
    third, second = capsys.readouterr().out.splitlines()
    assert third.startswith(f"warning: skipping {checkpointer.directory}/step_00000003.pt: damaged")
    assert second.startswith(
        f"warning: skipping {checkpointer.directory}/step_00000002.pt: damaged"
    )
    damage(checkpointer.directory / "step_00000001.pt", kind)
    assert checkpointer.latest() is None


def test_rotation_after_a_fall_back_keeps_the_good_one(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        checkpointer.save(step, payload(step))
    checkpointer.wait()
    for step in (20, 30):
        damage(tmp_path / f"step_{step:08d}.pt", "truncated")
    resumed = Checkpointer(tmp_path, keep_last=1)
    assert_is(resumed.latest()[1], 10)
    resumed.save(15, payload(15))
    resumed.wait()
    assert steps_in(tmp_path) == [15]
    assert_is(resumed.latest()[1], 15)


def test_a_full_disk_is_reported_and_removes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "step_00000001.pt", payload(1))

    def fill() -> None:
        limit_file_size(20_000)
        checkpointer = Checkpointer(tmp_path, keep_last=1)
        checkpointer.save(2, payload(2, size=100_000))
        checkpointer.wait()
        (failure,) = checkpointer.failures()
        assert failure.endswith("step_00000002.pt: not saved: File too large")
        assert checkpointer.failures() == []
        assert steps_in(tmp_path) == [1]
        checkpointer.save(3, payload(3, size=10))
        checkpointer.wait()
        assert checkpointer.failures() == []
        sys.exit(7)

    assert in_child(fill) == 7
    assert steps_in(tmp_path) == [3]


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/a\.pt: not saved: "):
        save(tmp_path / "file" / "a.pt", payload(1))


def test_keep_last_must_leave_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last \(0\)"):
        Checkpointer(tmp_path, keep_last=0)


@pytest.mark.gpu
def test_a_snapshot_from_the_gpu_is_exact_and_compact(tmp_path: Path) -> None:
    weight = torch.randn(1000, 1000, device="cuda")
    values = {"a": weight, "tied": weight.detach(), "row": weight[3], "host": torch.ones(2)}
    copy = snapshot(values)
    expected = weight.clone()
    weight.zero_()
    assert torch.equal(copy["a"], expected.cpu())
    assert copy["tied"] is copy["a"]
    assert torch.equal(copy["row"], expected[3].cpu())
    assert copy["a"].is_pinned()
    save(tmp_path / "a.pt", copy)
    assert torch.equal(load(tmp_path / "a.pt", "cuda")["a"], expected)
