"""The Colab notebook from its first cell to its last, on a CPU, with Drive and GPU stood in for."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from utils import checkpoint

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "scripts/colab_setup.ipynb").read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if "outputs" in cell}


class Kernel:
    """Runs cells in one namespace, as Jupyter does, and keeps what they display."""

    def __init__(self, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work, self.namespace, self.displayed = work, {"__name__": "__main__"}, []
        display = ModuleType("IPython.display")
        display.HTML = lambda data: SimpleNamespace(data=data)
        display.Image = lambda filename: SimpleNamespace(data=Path(filename).read_bytes())
        display.display = self.displayed.append
        monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", display)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(ROOT / "scripts")
        monkeypatch.setenv("SMOL_TRIAL", "1")
        monkeypatch.setenv("SMOL_WORK", str(work))

    def run(self, name: str) -> None:
        exec(compile(CODE[name], f"cell {name}", "exec"), self.namespace)


def resumed_at(out: str) -> int:
    """The step that a training has gone on from."""
    (line,) = (line for line in out.splitlines() if line.startswith("resuming from"))
    return int(line.rpartition("step ")[2])


def test_every_cell_runs_and_training_goes_on_where_it_was(tmp_path, monkeypatch, capfd):
    kernel = Kernel(tmp_path, monkeypatch)
    run, drive = tmp_path / "runs/pretrain", tmp_path / "drive/pretrain"
    printed = {}
    for name in CODE:
        kernel.run(name)
        printed[name] = capfd.readouterr().out
        if name == "pretrain":  # disconnected after step 1: the disk is gone, Drive has its copy
            whole = checkpoint.load(run / "pretrain_final.pt")
            assert (whole["step"], (drive / "pretrain_final.pt").exists()) == (2, True)
            kept = checkpoint.load(run / "checkpoints/step_00000001.pt")
            shutil.rmtree(run)
            for lost in drive.rglob("*.pt*"):
                lost.unlink()
            checkpoint.save(drive / "checkpoints/step_00000001.pt", kept)
            kernel.run(name)
            assert resumed_at(capfd.readouterr().out) == 1
            again = checkpoint.load(run / "pretrain_final.pt")
            assert again["step"] == 2
            assert again["tokens"] == whole["tokens"]
    assert "0 FAIL" in printed["sanity"]
    assert "1,049,728" in printed["gpu"]
    assert printed["chat"].startswith("model: ")
    assert len(printed["chat"]) > len("model: \n")
    images, pages = kernel.displayed[::2], kernel.displayed[1::2]
    assert [i.data[:4] for i in images] == [b"\x89PNG"] * 2
    assert all("<iframe" in p.data and "Loss" in p.data for p in pages)


def test_a_cell_whose_script_fails_stops_run_all(tmp_path, monkeypatch, capfd):
    kernel = Kernel(tmp_path, monkeypatch)
    for name in ("parameters", "code"):
        kernel.run(name)
    with pytest.raises(RuntimeError, match=r"train_pretrain\.py ended with exit code 2"):
        kernel.namespace["run"]("train_pretrain.py", "--config", "no/such.yaml")
    assert "no/such.yaml" in capfd.readouterr().out


def script(name: str, *arguments: object) -> None:
    importlib.import_module(name.removesuffix(".py")).main([str(a) for a in arguments])


def test_stopping_a_cell_lets_the_training_save(tmp_path, monkeypatch, capfd):
    kernel = Kernel(tmp_path, monkeypatch)
    for name in ("parameters", "code"):
        kernel.run(name)
    (tmp_path / "training.py").write_text(
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "print('step 1')\n"
        "signal.sigwait({signal.SIGTERM})\n"
        "print('saved')\n"
    )

    def show(*texts: str, **how: object) -> None:
        print(*texts, **how)
        if texts == ("step 1\n",):
            raise KeyboardInterrupt  # what the stop button sends

    kernel.namespace["print"] = show
    with pytest.raises(KeyboardInterrupt):
        kernel.namespace["run"](tmp_path / "training.py")
    assert capfd.readouterr().out.endswith("step 1\nsaved\n")


def test_without_the_code_the_notebook_asks_for_its_address(tmp_path, monkeypatch):
    kernel = Kernel(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    kernel.run("parameters")
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        kernel.run("code")


GPUS = {  # name, MiB, compute capability -> rows, precision, device that costs are told for
    "Tesla T4, 15360, 7.5": ("2", "fp32", "T4"),
    "NVIDIA L4, 23034, 8.9": ("16", "bf16", "L4"),
    "NVIDIA A100-SXM4-40GB, 40960, 8.0": ("32", "bf16", "A100"),
    "NVIDIA A100-SXM4-80GB, 81920, 8.0": ("64", "bf16", "A100"),
    "NVIDIA H100 80GB HBM3, 81559, 9.0": ("64", "bf16", "H100"),
}


@pytest.mark.parametrize("length", [{}, {"TOKENS": 100_000_000, "BATCH_TOKENS": 65_536}])
@pytest.mark.parametrize("answer", GPUS)
def test_settings_for_each_gpu_make_a_valid_run(tmp_path, monkeypatch, capfd, answer, length):
    """Beyond the trial: the real configs, with a GPU that is only told of."""
    kernel = Kernel(tmp_path, monkeypatch)
    for name in ("parameters", "code"):
        kernel.run(name)
    kernel.namespace["run"] = script  # in this process, where torch is imported once
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    kernel.namespace |= {"TRIAL": False, **length}
    monkeypatch.chdir(ROOT)
    kernel.run("gpu")
    out = capfd.readouterr().out
    rows, precision, device = GPUS[answer]
    machine = kernel.namespace["MACHINE"]
    assert f"train.micro_batch={min(int(rows), 32) if length else rows}" in machine
    assert f"runtime.precision={precision}" in machine
    assert "137,850,624" in out
    assert f"on one {device} " in out
    script("train_sft.py", *kernel.namespace["SFT"], "--dry-run")


def test_the_file_is_a_notebook_without_outputs():
    """nbformat 4.5: ids of letters, digits, - and _, each once; one cell of parameters on top."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(i.replace("-", "").replace("_", "").isalnum() and len(i) <= 64 for i in ids)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            keys |= {"outputs", "execution_count"}
        assert set(cell) == keys
        assert "".join(cell["source"]).splitlines(keepends=True) == cell["source"]
    assert next(iter(CODE)) == "parameters"
    text = json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"
    assert (ROOT / "scripts/colab_setup.ipynb").read_text(encoding="utf-8") == text
