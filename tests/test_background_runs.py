"""Whole runs killed while workers tokenize: resumed, they are the run that tokenizes by itself."""

import random
import shutil
import signal

import pytest

from tests.pipeline import Fault
from tests.test_train_pretrain import (
    config,  # noqa: F401 (fixtures)
    pretrain,
    same,
    text,  # noqa: F401
    undisturbed,  # noqa: F401
)

WORKERS = ("data.workers=2", "data.max_cache_gb=0.00002")  # most shards are given up again
KILLS = {
    "first window": Fault("data.windows.ShardMaker._cut", 3),
    "ahead": Fault("data.windows.ShardMaker._cut", 6),
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


# What the run does while it reads: in the reading thread, the workers' threads and the loader's.
CALLS = {
    "data.windows.ShardMaker.shard": 60,
    "data.windows.ShardMaker._cut": 11,
    "data.workers._Worker.make": 11,
    "data.shards.ShardStore.add": 11,
    "data.shards.ShardStore.trim": 12,
    "data.shards.ShardStore.read": 50,
    "data.packing.RowPacker.next_row": 190,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments(undisturbed, config, tmp_path, seed):  # noqa: F811
    """Killed twice, then to the end. The log says where it was."""
    generator, runs = random.Random(seed), tmp_path / "runs"
    for _ in range(2):
        function = generator.choice(sorted(CALLS))
        fault = Fault(function, generator.randint(1, CALLS[function]))
        outcome = pretrain(config, *WORKERS, "--resume", fault=fault)
        shards = len(list((tmp_path / "cache").rglob("shard_*.safetensors")))
        print(
            f"seed {seed}: {fault.function} call {fault.call}, {shards} shards there "
            f"-> exit {outcome.code}"
        )
        assert outcome.code in (0, -signal.SIGKILL), outcome.err
    outcome = pretrain(config, *WORKERS, "--resume")
    assert outcome.code == 0, outcome.err
    assert same(runs, undisturbed)
