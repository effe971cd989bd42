"""Whole runs killed while workers tokenize: resumed, they are the run that tokenizes by itself."""

import random
import shutil
import signal
import time

import pytest

from tests.pipeline import Fault, Run
from tests.test_train_pretrain import (
    config,  # noqa: F401 (fixtures)
    numbers,
    pretrain,
    same,
    text,  # noqa: F401
    undisturbed,  # noqa: F401
)

WORKERS = ("data.workers=2", "data.max_cache_gb=0.00002")  # most shards are given up again
KILLS = {
    "first window": Fault("data.windows.ShardMaker._cut", 3),
    "ahead": Fault("data.windows.ShardMaker._cut", 11),
    "a shard done": Fault("data.shards.ShardStore.add", 9),
    "given up": Fault("data.shards.ShardStore.trim", 3),
    "training": Fault("train.loop.train_step", 13),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_while_workers_tokenize(undisturbed, config, tmp_path, moment):  # noqa: F811
    outcome = pretrain(config, *WORKERS, fault=KILLS[moment])
    assert outcome.code == -signal.SIGKILL, outcome.err
    outcome = pretrain(config, *WORKERS, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_a_resume_on_an_empty_disk(undisturbed, config, tmp_path):  # noqa: F811
    pretrain(config, *WORKERS, fault=KILLS["training"])
    shutil.rmtree(tmp_path / "cache")
    outcome = pretrain(config, "--resume", "data.workers=1")
    assert outcome.code == 0, outcome.err
    assert same(tmp_path / "runs", undisturbed)


def test_a_mistake_in_the_text_ends_the_run_in_one_message(config, text):  # noqa: F811
    """The broken row comes to light in the background, after training has begun."""
    path = config.parent / "broken.jsonl"
    path.write_bytes((text / "web.jsonl").read_bytes() + b'{"tex": "no"}\n')
    outcome = pretrain(config, "data.workers=2", f"data.sources.0.path={path}")
    assert outcome.code == 2
    assert "row 120 has no field 'text'" in outcome.err
    assert "Traceback" not in outcome.err


def started(config, *argv: object) -> tuple[Run, float]:  # noqa: F811
    """A run whose model is built, so that it begins to read, and the time then."""
    log = config.parent / "log"
    log.with_suffix(".out").unlink(missing_ok=True)
    running = Run("train_pretrain", ["--config", str(config), *WORKERS, *argv], log)
    while running.process.is_alive():
        if log.with_suffix(".out").exists() and "model:" in log.with_suffix(".out").read_text():
            break
        time.sleep(0.002)
    return running, time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments(undisturbed, config, tmp_path, seed):  # noqa: F811
    """By the clock, so anywhere; twice, then to the end. The log says where it was."""
    generator, runs = random.Random(seed), tmp_path / "runs"
    running, began = started(config, "name=timed")
    running.wait()
    whole_s = time.monotonic() - began
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        seconds = generator.uniform(0, whole_s / 2)  # each goes on where the one before was
        running, began = started(config, "--resume")
        time.sleep(seconds)
        running.process.kill()
        outcome = running.wait()
        metrics = runs / "pretrain/metrics.jsonl"
        steps = [line["step"] for line in numbers(metrics)] if metrics.exists() else []
        shards = len(list((tmp_path / "cache").rglob("shard_*.safetensors")))
        print(
            f"seed {seed}: killed after {seconds:.2f} of {whole_s:.2f} s, last step logged "
            f"{max(steps, default=None)}, {shards} shards there -> exit {outcome.code}"
        )
        assert outcome.code in (0, -signal.SIGKILL), outcome.err
    outcome = pretrain(config, *WORKERS, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(runs, undisturbed)
