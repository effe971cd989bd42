"""Every command in README.md's code blocks, run, or read by the script that it calls.

`TABLE` says how. A command that it does not know fails, so that none is added untested.
"""

import argparse
import glob
import importlib
import inspect
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from tests.markdown import blocks, commands
from tests.tiny import Checkpoints
from utils.config import load_yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# ---------------------------------------------------------------------------------------------
# A folder in which commands find what they name


class World:
    """A copy of the checkout by links, in which small checkpoints and runs lie where they should.

    Attributes:
        names: the runs that configs, or `name=` in a command of the README, write.
    """

    def __init__(self, path: Path, made: Checkpoints, text: str) -> None:
        self.path, self.made = path, made
        for entry in ROOT.iterdir():
            if entry.name not in ("runs", "cache", ".git", ".venv"):
                (path / entry.name).symlink_to(entry)
        configs = [load_yaml(p) for p in sorted(ROOT.glob("configs/**/*.yaml"))]
        runs = {(c.get("runs_dir", "runs"), c["name"]) for c in configs if "name" in c}
        runs |= {("runs", name) for name in re.findall(r"\sname=(\w+)", text)}
        self.names = {f"{folder}/{name}": name for folder, name in runs}

    def run_of(self, file: str) -> str:
        """The run that writes this checkpoint; a name in capitals stands for any."""
        folder, _, name = file.removeprefix("./").rpartition("/")
        run = folder.removesuffix("/checkpoints")
        whole = run in self.names and name == f"{self.names[run]}_final.pt"
        step = run in self.names and folder != run and re.fullmatch(r"step_\d{8}\.pt", name)
        assert file.isupper() or whole or step, f"no config writes {file}; they write {self.names}"
        return run

    def checkpoint(self, file: str) -> None:
        """A tiny model's, where a command looks for it."""
        chat = not self.run_of(file).rpartition("/")[2].startswith("pretrain")
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {"name": path.parent.name, "data": {"sources": []}}
        Path(self.made.save("readme", chat, config=config)).replace(path)

    def run(self, folder: str) -> None:
        """Three steps of a run's metrics."""
        assert folder in self.names, f"no config writes {folder}; they write {self.names}"
        path = self.path / folder
        path.mkdir(parents=True, exist_ok=True)
        lines = [{"step": s, "time": s, "train/loss": 3.0 - s} for s in range(3)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path.parent / "plots").mkdir(exist_ok=True)  # of an earlier report on all of them
        (path.parent / "report.html").touch()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def world(tmp_path, made, monkeypatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, made, README)


# ---------------------------------------------------------------------------------------------
# How each kind of command is run


class Parsed(BaseException):  # no handler of the scripts' own catches it
    """Thrown by the parser of a script that is not to go on."""


def value_of(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def main_of(script: str) -> Callable[[list[str]], None]:
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).main


def parse(script: str, words: list[str]) -> argparse.Namespace:
    """What the script reads from its command line; it goes no further."""
    parser, argv, main = argparse.ArgumentParser.parse_args, sys.argv, main_of(script)

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(parser(self, args, namespace))

    sys.argv, argparse.ArgumentParser.parse_args = [script, *words], stop
    try:
        main(words) if inspect.signature(main).parameters else main()
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = argv, parser
    raise AssertionError(f"{script} has read no command line")


def stage(words: list[str], world: World) -> None:
    """A training: its config and overrides are read, and what it would take is told."""
    script, *arguments = words
    for flag in ("--base-model", "--resume-from", "--verifier-model"):
        if file := value_of(arguments, flag):
            world.run_of(file)
    arguments = [a for a in arguments if a != "--dry-run"]
    main_of(script)([*arguments, "--dry-run"])


def torchrun(words: list[str], world: World) -> None:
    """As on that many GPUs, among which a batch must divide."""
    args = torchrun_parser().parse_args(words[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", args.nproc_per_node)
        stage([args.training_script, *args.training_script_args], world)


def prepare_data(words: list[str], world: World) -> None:
    main_of(words[0])([*(w for w in words[1:] if w != "--dry-run"), "--dry-run"])


def sanity_check(words: list[str], world: World) -> None:
    """Its checks have tests of their own; a config's data may be on the hub."""
    module = importlib.import_module("sanity_check")
    args, overrides = module.parse_arguments(words[1:])
    if args.base_model:
        world.run_of(str(args.base_model))
    if args.config:
        module.load_stage_config(args.config, overrides, args.stage)


def inference(words: list[str], world: World) -> None:
    script, *arguments = words
    world.checkpoint(value_of(arguments, "--checkpoint") or "")
    if file := value_of(arguments, "--prompts-file"):
        (world.path / file).write_text(json.dumps({"prompt": "The old mill"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n/exit\n")))
        main_of(script)([*arguments, "--max-new-tokens", "4", "--device", "cpu"])


def evaluate(words: list[str], world: World) -> None:
    """Bits per byte are measured; of benchmarks, which need the hub, the command is read."""
    module = importlib.import_module("eval")
    args = parse(words[0], words[1:])
    settings = module.read_settings(args)
    world.checkpoint(str(args.checkpoint))
    if settings.bpb and not settings.tasks:
        for file in settings.bpb:
            if not Path(file).exists():
                Path(file).write_text("The old mill by the river.\n" * 20)
        module.main(words[1:])


def export(words: list[str], world: World) -> None:
    world.checkpoint(value_of(words, "--checkpoint") or "")
    out = value_of(words, "--out") or ""
    main_of(words[0])(words[1:])
    assert (world.path / out / "config.json").exists()


def report(words: list[str], world: World) -> None:
    """Globs stand for the runs that configs write."""
    folders = parse(words[0], words[1:]).runs
    for folder in folders:
        for name in world.names:
            if folder == name or (glob.has_magic(folder) and Path(name).match(folder)):
                world.run(name)
    expanded = {f: sorted(glob.glob(f)) or [f] for f in folders}
    main_of(words[0])(list(itertools.chain(*(expanded.get(w, [w]) for w in words[1:]))))
    assert [page for page in world.path.rglob("report.html") if page.stat().st_size]


def bench(words: list[str], world: World) -> None:
    """Most need a GPU; a script that is called by its path must find the repository from there."""
    script = words[0] if words[0] != "-m" else words[1].replace(".", "/") + ".py"
    parse(script, words[2 if words[0] == "-m" else 1 :])
    if words[0] != "-m":
        command = [sys.executable, str(ROOT / script), "--help"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def make(words: list[str], world: World) -> None:
    targets = [w for w in words[1:] if "=" not in w]
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert set(targets) <= set(known), f"the Makefile has {', '.join(known)}"
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def pip(words: list[str], world: World) -> None:
    """Files are there; packages are among those that some requirements file names."""
    named = "\n".join(p.read_text() for p in ROOT.glob("requirements*.txt"))
    takes_file = {"-r", "--requirement", "-c", "--constraint"}
    for before, word in itertools.pairwise(words[words.index("install") :]):
        if before in takes_file:
            assert (ROOT / word).is_file(), f"there is no {word}"
        elif not word.startswith("-"):
            package = re.split(r"[<>=~\[]", word)[0]
            assert re.search(rf"^{re.escape(package)}\b", named, re.MULTILINE), package


def run_pytest(words: list[str], world: World) -> None:
    for word in words:
        if word.startswith("tests"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def file_is_there(words: list[str], world: World) -> None:
    assert (ROOT / words[0]).is_file()
    compile((ROOT / words[0]).read_text(), words[0], "exec")


def nothing(words: list[str], world: World) -> None:
    """It concerns other programs, or the place where the reader puts the checkout."""


PYTHON = r"(\S*/)?python3? "
TABLE: tuple[tuple[str, Callable[[list[str], World], None]], ...] = (
    (PYTHON + r"(-m pip install .+)", pip),
    (r"()(pip install .+)", pip),
    (PYTHON + r"(train_(pretrain|sft|pref|rlvr)\.py .+)", stage),
    (r"()(torchrun .+)", torchrun),
    (PYTHON + r"(prepare_data\.py .+)", prepare_data),
    (PYTHON + r"(sanity_check\.py.*)", sanity_check),
    (PYTHON + r"(inference\.py .+)", inference),
    (PYTHON + r"(eval\.py .+)", evaluate),
    (PYTHON + r"(export_hf\.py .+)", export),
    (PYTHON + r"(report\.py .+)", report),
    (PYTHON + r"(bench/\w+\.py.*|-m bench\.\w+.*)", bench),
    (PYTHON + r"(scripts/\w+\.py)", file_is_there),
    (PYTHON + r"(-m pytest.*)", run_pytest),
    (PYTHON + r"(-m venv \S+)", nothing),
    (r"()(make .+)", make),
    (r"()(git clone \S.*|cd \S+)", nothing),
    (r"()(source \S+/bin/activate|export \w+=\S*|(hf auth|huggingface-cli|wandb) login)", nothing),
)


def check(command: str, world: World) -> None:
    """Run a command, or as much of it as `TABLE` says; what it does not know fails."""
    settings = re.match(r"([A-Z_]+=\S+ )*", command)[0]
    for pattern, handler in TABLE:
        if found := re.fullmatch(pattern, command.removeprefix(settings)):
            with pytest.MonkeyPatch.context() as patch:
                for setting in settings.split():
                    patch.setenv(*setting.split("=", 1))
                handler(shlex.split(found[2]), world)
            return
    pytest.fail(
        f"no line of TABLE in tests/test_readme.py knows how to try `{command}`: add one, or, if "
        "this is output, put it into a ```text fence"
    )


# ---------------------------------------------------------------------------------------------
# The tests


@pytest.mark.parametrize("command", commands(README))
def test_a_command_of_the_readme(command, world):
    check(command, world)


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py", "inference.py"])
def test_the_readme_shows_the_scripts(script):
    """Commands are found at all."""
    assert any(script in command for command in commands(README))


def test_python_in_the_readme_compiles():
    for block in blocks(README):
        if block.language in ("python", "py"):
            compile(block.text, "README.md", "exec")


MARKDOWN = r"""
Text with `python inline.py`.

    git clone <here> && cd there   # a comment
    runs/<name>/            config.yaml, and others

1. A list
    with a continuation

```bash
$ python a.py --x "a # b" \
    --y 1

# all of it a comment
make test     # the tests
python b.py  --double
```

```text
loss 3.1
```
    python not_a_block.py
"""


def test_how_commands_are_found():
    assert commands(MARKDOWN.replace('"a # b"', "ab")) == [
        "git clone <here>", "cd there", "python a.py --x ab --y 1", "make test",
        "python b.py  --double",
    ]  # fmt: skip


CONFIG = "--config configs/pretrain_160m.yaml"
MISTAKES = {  # and what is said of them
    "cargo run": "no line of TABLE",
    "python evaluate.py --checkpoint FILE": "no line of TABLE",
    "python train_pretrain.py --config configs/pretrain_1b.yaml": "No such file",
    f"python train_pretrain.py {CONFIG} optim.learning_rate=1": "unknown key",
    f"python train_pretrain.py {CONFIG} --continue": "is no flag",
    "python train_sft.py --config FILE --base-model runs/a/a_final.pt": "no config writes",
    f"torchrun --nproc_per_node 7 train_pretrain.py {CONFIG}": "world_size",
    f"torchrun --gpus 2 train_pretrain.py {CONFIG}": "usage",
    f"python prepare_data.py {CONFIG} data.worker=2": "unknown key",
    "python sanity_check.py --config configs/none.yaml": "No such file",
    "python inference.py --checkpoint FILE --prompt a --text b": "--text b",
    "python eval.py --checkpoint FILE --suite all": "is none of",
    "python export_hf.py --checkpoint runs/demo/dpo/final.pt --out o": "no config writes",
    "python report.py runs/none": "holds no run",
    "python -m bench.step --shapes 160m": "--shapes",
    "python bench/none.py": "No module named",
    "make tests": "the Makefile has",
    "pip install -r requirements-none.txt": "there is no",
    "pip install some-package": "some-package",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_command_that_has_rotted_fails(command, world, capsys):
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as failure:
        check(command, world)
    assert MISTAKES[command] in f"{failure.value}{capsys.readouterr().err}"


RIGHT = (
    "python report.py runs/demo/*", "python report.py runs/demo/sft --out compared/report.html",
    "python inference.py --checkpoint runs/demo/dpo/dpo_final.pt --interactive",
    "python inference.py --checkpoint FILE --prompts-file prompts.jsonl --out answers.jsonl",
    "python eval.py --checkpoint runs/demo/pretrain/pretrain_final.pt --bpb README.md",
    "python eval.py --checkpoint FILE --suite quick", "python sanity_check.py",
    f"torchrun --nproc_per_node 2 train_pretrain.py {CONFIG}",
    f"torchrun --standalone --nproc_per_node=8 train_pretrain.py {CONFIG} train.micro_batch=48",
    "OMP_NUM_THREADS=1 python prepare_data.py --config configs/pretrain_160m.yaml data.workers=4",
    "python train_rlvr.py --config configs/rlvr.yaml --base-model runs/dpo/dpo_final.pt",
    "python -m bench.step --shape 160m --micro-batch 96", "python bench/loader.py --repeats 2",
    "pip install --no-build-isolation 'flash-attn>=2.8'", "pip install -r requirements-eval.txt",
)  # fmt: skip


@pytest.mark.parametrize("command", RIGHT)
def test_a_command_that_is_right_passes(command, world):
    check(command, world)
