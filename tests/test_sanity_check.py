"""Every check of data and disks passes as things are, and fails when what it is for is broken; what
the script makes of all checks."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import sanity_check
from data.conversations import ChatSource
from data.preferences import PairSource
from data.prompts import PromptSource
from data.sources import SourceConfig
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.transformer import Transformer
from tests.train.test_sanity import assert_failed, assert_passed
from train import sanity, sanity_run
from train.sanity import Result, perform
from utils import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def check_source(source, tokenizer=TokenizerConfig()) -> Result:  # noqa: B008 (it is frozen)
    return perform(sanity_run.check_source, source, tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        SourceConfig(name="web", path="builtin:web", weight=1.0),
        ChatSource(name="chats", path="builtin:chats"),
        PairSource(name="pairs", path="builtin:pairs"),
        PromptSource(name="prompts", path="builtin:prompts", verifier="number"),
    ],
    ids=lambda source: source.name,
)
def test_sources_of_every_stage(source):
    assert_passed(check_source(source))
    assert "no tokenizer tried" in check_source(source, None).reason


def test_sources_that_cannot_be_used(tmp_path):
    def source(kind, rows: list | str, **values):
        path = tmp_path / "rows.jsonl"
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        return kind(name="rows", path=str(path), **values)

    good = [{"text": "naïve  text, 漢字\n"}] * 3
    assert_passed(check_source(source(SourceConfig, good, weight=1.0)))
    assert_failed(check_source(source(SourceConfig, "{", weight=1.0)), "no valid JSON")
    assert_failed(check_source(source(SourceConfig, [{"body": ""}], weight=1.0)), "text_field")
    assert_failed(check_source(source(SourceConfig, [{"text": " "}], weight=1.0)), "no usable row")
    unanswered = [{"messages": [{"role": "user", "content": "What?"}]}]
    assert_failed(check_source(source(ChatSource, unanswered)), "impossible order of roles 1")
    same = [{"prompt": "What?", "chosen": "This.", "rejected": "This."}]
    assert_failed(check_source(source(PairSource, same)), "chosen equal to rejected")
    wordy = [{"question": "1 + 1?", "answer": "two"}]
    assert_failed(check_source(source(PromptSource, wordy, verifier="number")), "no usable row")
    nowhere = SourceConfig(name="rows", path=str(tmp_path / "nowhere"), weight=1.0)
    assert_failed(check_source(nowhere), "no documents at")
    hub = ChatSource(name="hub", path="hub:nobody/nothing")  # the tests are offline
    assert_failed(check_source(hub), "could not get 'nobody/nothing'")


def test_tokenizers_that_lose_text():
    from tokenizers import normalizers

    web = SourceConfig(name="web", path="builtin:web", weight=1.0)
    lossy = train_tokenizer(["some text"], TokenizerConfig(vocab_size=300))
    assert_passed(check_source(web, lossy))
    lossy.inner.normalizer = normalizers.Lowercase()
    assert_failed(check_source(web, lossy), "does not give back")
    assert_failed(check_source(web, TokenizerConfig(path="./nowhere")), "no tokenizer.json")


def check_checkpoint(folder: Path) -> Result:
    torch.manual_seed(0)
    return perform(sanity_run.check_checkpoint, Transformer(sanity.MEMORIZER), folder)


def test_checkpoint(tmp_path, monkeypatch):
    assert_passed(check_checkpoint(tmp_path / "not/yet/there"))
    assert not list(tmp_path.iterdir())
    right = checkpoint.load
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: torch.load(path, weights_only=True))
        assert_failed(check_checkpoint(tmp_path), "a flipped bit is taken for good")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: right(path) | {"step": 2})
        assert_failed(check_checkpoint(tmp_path), "not read back as it was written")
    assert not list(tmp_path.iterdir())


def run_config(folder: Path, **train) -> SimpleNamespace:
    """A run's config, as far as the checks of its disks read it."""
    defaults = {"keep_checkpoints": 2, "mirror_dir": None, "wandb_project": None}
    (folder / "text.jsonl").write_text("x" * 1000)
    source = SourceConfig(name="text", path=str(folder / "text.jsonl"), weight=1.0)
    data = SimpleNamespace(sources=[source], cache_dir=str(folder / "cache"))
    return SimpleNamespace(
        name="run", runs_dir=str(folder / "runs"), model=sanity.MEMORIZER, data=data,
        train=SimpleNamespace(**defaults | train),
    )  # fmt: skip


def test_disk(tmp_path):
    config = run_config(tmp_path)
    result = perform(sanity_run.check_disk, config)
    assert_passed(result)
    needed = sanity.MEMORIZER.n_params * (3 * 12 + 4) + 500
    assert f"{sanity_run.human_bytes(needed)} needed" in result.reason
    assert_failed(perform(sanity_run.check_disk, run_config(tmp_path, keep_checkpoints=10**12)), "")
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/step_00000001.pt").write_bytes(bytes(needed))
    there_already = perform(sanity_run.check_disk, config).reason
    assert "0 B needed" in there_already or "500 B needed" in there_already


def test_mirror(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "file").write_text("")
    assert perform(sanity_run.check_mirror, run_config(tmp_path)).status == "SKIP"
    config = run_config(tmp_path, mirror_dir=str(tmp_path / "mirror"))
    assert_passed(perform(sanity_run.check_mirror, config))
    assert not list((tmp_path / "mirror").iterdir())
    config.model = SimpleNamespace(n_params=10**15)
    assert_failed(perform(sanity_run.check_mirror, config), "free")
    for place in ("file", "not_mounted"):
        config = run_config(tmp_path, mirror_dir=str(tmp_path / place))
        assert_failed(perform(sanity_run.check_mirror, config), "is no folder: mount the drive")


@pytest.fixture
def server():
    """A port on which something answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_wandb(tmp_path, monkeypatch, server):
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = run_config(tmp_path, wandb_project="test")

    def check() -> Result:
        return perform(sanity_run.check_wandb, config)

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert_failed(check(), "does not answer")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert_passed(check())
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert_failed(check(), "not logged in")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password 0123\n")
    assert_passed(check())
    monkeypatch.setattr(sanity_run.importlib.util, "find_spec", lambda name: None)
    assert check().status == "SKIP"
    assert perform(sanity_run.check_wandb, run_config(tmp_path)).status == "SKIP"


# ---------------------------------------------------------------------------------------------
# The script

NO_NETWORK = """
import socket
def refuse(*_):
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def script(folder: Path, *argv: str, largest_file: int | None = None):
    """The script in a process of its own, without network, in an empty folder."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    alone = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, ROOT / "sanity_check.py", *argv],
        env=os.environ | alone,
        cwd=folder,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


def test_alone_it_passes_on_a_cpu_without_network(tmp_path):
    done = script(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["PASS"] * 12 + ["SKIP"] * 3
    assert lines[-1] == "12 PASS, 0 FAIL, 3 SKIP"
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"]


def test_a_full_disk(tmp_path):
    """A size limit stands for it; the other checks go on, and the exit code tells."""
    done = script(tmp_path, largest_file=50_000)
    assert done.returncode == 1
    assert "FAIL  checkpoint" in done.stdout
    assert "not saved: File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "11 PASS, 1 FAIL, 3 SKIP"


def check(*argv: str) -> int:
    """The exit code of the script, run here."""
    try:
        sanity_check.main(list(argv))
    except SystemExit as left:
        return left.code
    return 0


@pytest.fixture
def config(tmp_path) -> Path:
    """A pretraining config of a small model."""
    values = {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "model": sanity.MEMORIZER.model_dump(),
        "tokenizer": {"vocab_size": 300},
        "data": {
            "seq_len": 64,
            "cache_dir": str(tmp_path / "cache"),
            "sources": [{"name": "web", "path": "builtin:web", "weight": 1.0}],
        },
        "train": {"batch_tokens": 512, "micro_batch": 4, "steps": 10},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_config_is_checked_and_its_faults_are_found(config, tmp_path, capsys):
    assert check("--config", str(config)) == 0
    assert "this config's 90,432" in capsys.readouterr().out
    faults = {
        "data.sources.0.path=nowhere": "source web",
        "train.keep_checkpoints=1000000000000": "disk",
        "runtime.attention=fa4": "attention kernels",
        f"train.mirror_dir={tmp_path / 'nowhere'}": "mirror",
        "tokenizer.path=./nowhere": "source web",
    }
    assert check("--config", str(config), *faults) == 1
    lines = capsys.readouterr().out.splitlines()
    failures = {line[4:24].strip() for line in lines if line.startswith("FAIL")}
    assert failures == set(faults.values())
    assert check("--config", str(config), "train.batch_tokens=4096000000",
                 "train.micro_batch=4000000") == 1  # fmt: skip
    assert "FAIL  device" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "rlvr"])
def test_the_configs_of_all_stages(stage, tmp_path, capsys):
    file = ROOT / f"configs/demo/{stage}.yaml"
    assert check("--config", str(file), f"runs_dir={tmp_path}") == 0
    assert "PASS  source" in capsys.readouterr().out


def test_mistakes_are_told_as_the_stage_tells_them(config, tmp_path):
    with pytest.raises(sanity_check.ConfigError, match="unknown key, did you mean 'lr'"):
        check("--config", str(config), "optim.lrr=1")
    with pytest.raises(sanity_check.ConfigError, match="is no flag"):
        check("--confg", "x")
    ambiguous = tmp_path / "chat.yaml"
    values = yaml.safe_load(config.read_text())
    values["data"]["sources"][0]["path"] = "rows.jsonl"
    del values["tokenizer"]
    ambiguous.write_text(yaml.safe_dump(values))
    with pytest.raises(sanity_check.ConfigError, match="fits pretrain and sft: add --stage"):
        check("--config", str(ambiguous))
    assert check("--config", str(ambiguous), "--stage", "sft") == 1  # there are no rows
