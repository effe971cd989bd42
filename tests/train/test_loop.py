"""The step: averaging by weight, clipping, skipping what is not finite, metrics between lines.

And the loop around it: what its throughput counts, and its bench."""

import copy
import io
import json
import signal
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bench import loop as loop_bench
from data.packing import IGNORE, make_batch, pack_rows
from data.streaming import Prefetcher
from models.config import ModelConfig
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train.evals import held_out_loss
from train.loop import LoopConfig, StopRequest, Training, fit, train_step
from train.loss import cross_entropy_loss
from train.stability import Stability
from utils.checkpoint import Checkpointer
from utils.config import ConfigError
from utils.cost_tracker import CostTracker
from utils.distributed import Distributed
from utils.logging import MetricsLog, read_metrics

SHAPE = ModelConfig(
    vocab_size=50, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=48, max_seq_len=16
)
DIST = Distributed(0, 1, 0, torch.device("cpu"))


def rows(seed: int = 0) -> list:
    """Eight packed rows of 16 tokens; some targets are taken out, a different number in each."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, 50, n).astype(np.uint16) for n in (16, 20, 12, 33, 9, 38)]
    packed = pack_rows(documents, 16, 4)
    assert len(packed) == 8
    for i, row in enumerate(packed):
        row[0].targets[: i * len(row[0]) // 8] = IGNORE
    return packed


def batches(micro_batch: int, seed: int = 0) -> list:
    packed = rows(seed)
    return [make_batch(packed[i : i + micro_batch], 16, 4) for i in range(0, 8, micro_batch)]


def training(**optim) -> Training:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    optimizer = make_optimizer(model.named_parameters(), OptimConfig(**optim))
    return Training(
        model,
        optimizer,
        Schedule(ScheduleConfig(), 100),
        iter(()),
        CostTracker(None, None),
        {},
    )


def gradients(micro_batch: int, monkeypatch) -> list[torch.Tensor]:
    run, kept = training(), []

    def keep_gradients() -> None:
        kept.extend(p.grad.clone() for p in run.model.parameters())

    monkeypatch.setattr(run.optimizer, "step", keep_gradients)
    train_step(run, batches(micro_batch), cross_entropy_loss, 0.0, DIST)
    return kept


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_one_batch(monkeypatch, micro_batch):
    """The weights of the micro-batches differ: averaging their means would be wrong."""
    weights = [b.weight for b in batches(micro_batch)]
    assert len(set(weights)) > 1
    whole, parts = gradients(8, monkeypatch), gradients(micro_batch, monkeypatch)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


def test_the_gradient_is_that_of_the_mean_over_targets(monkeypatch):
    """Against the obvious: whole logits, torch's own cross-entropy."""
    model = training().model
    (batch,) = batches(8)
    logits = model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    for parameter, gradient in zip(model.parameters(), gradients(2, monkeypatch), strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * parameter.grad.norm()


def test_a_step_without_targets_moves_nothing():
    """Momentum of the steps before would; and it is no spike."""
    run = training(lr=0.01)
    train_step(run, batches(8), cross_entropy_loss, 1.0, DIST)
    before = [parameter.clone() for parameter in run.model.parameters()]
    (empty,) = batches(8)
    empty.targets.fill_(IGNORE)
    empty.weight = 0.0
    train_step(run, [empty], cross_entropy_loss, 1.0, DIST)
    for parameter, earlier in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(parameter, earlier)
    taken = run.averages.take()
    assert (run.step, taken["steps"], taken["skipped"]) == (2, 1, 0)
    train_step(run, batches(8), cross_entropy_loss, 1.0, DIST)
    assert not torch.equal(next(run.model.parameters()), before[0])


@pytest.mark.parametrize("clip_norm", [0.0, 0.05, 1e9])
def test_a_step_is_that_of_clipped_adamw(clip_norm):
    run, reference = training(lr=0.01), training(lr=0.01)
    plain = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k in ("params", "weight_decay")}
         for g in reference.optimizer.param_groups],
        lr=0.01, betas=(0.9, 0.95),
    )  # fmt: skip
    for seed in range(3):
        train_step(run, batches(4, seed), cross_entropy_loss, clip_norm, DIST)
        (batch,) = batches(8, seed)
        loss, _ = cross_entropy_loss(reference.model, batch)
        (loss / batch.weight).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(reference.model.parameters(), clip_norm)
        plain.step()
        plain.zero_grad()
    for ours, theirs in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(poison):
    """Weights, moments and step count stay; the next good step is what it would have been."""

    def poisoned(model, batch):
        loss, metrics = cross_entropy_loss(model, batch)
        return loss * poison, metrics

    run = training()
    train_step(run, batches(8), cross_entropy_loss, 1.0, DIST)
    before = copy.deepcopy(run.model.state_dict())
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    run.averages.take()
    train_step(run, batches(8, 1), poisoned, 1.0, DIST)
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    for index, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[index][k], v) for k, v in state.items())
    taken = run.averages.take()
    assert (taken["skipped"], taken["steps"], taken["weight"]) == (1.0, 0.0, 0.0)
    assert run.step == 2, "the data of a skipped step is not seen again"


def test_the_logged_loss_is_the_mean_over_all_targets_since_the_last_line():
    run, total, weight = training(lr=1e-9), 0.0, 0.0
    for seed in range(3):
        train_step(run, batches(2, seed), cross_entropy_loss, 1.0, DIST)
        for batch in batches(8, seed):
            total += cross_entropy_loss(run.model, batch)[0].item()
            weight += batch.weight
    taken = run.averages.take()
    assert taken["loss"] / taken["weight"] == pytest.approx(total / weight, rel=1e-4)
    assert run.averages.take() == {}


def test_held_out_loss_per_domain_and_of_the_mixture():
    model = training().model
    held_out = {"web": batches(4, 0), "code": batches(8, 1)}
    values = held_out_loss(model, held_out, {"web": 0.9, "code": 0.1}, cross_entropy_loss, DIST)
    for domain, seed in (("web", 0), ("code", 1)):
        (batch,) = batches(8, seed)
        expected = cross_entropy_loss(model, batch)[0].item() / batch.weight
        assert values[f"{domain}_val_loss"] == pytest.approx(expected, rel=1e-5)
        assert values[f"{domain}_val_ppl"] == pytest.approx(np.exp(expected), rel=1e-4)
    mixed = 0.9 * values["web_val_loss"] + 0.1 * values["code_val_loss"]
    assert values["val/loss"] == pytest.approx(mixed)


def test_a_signal_while_a_line_is_written_is_remembered(monkeypatch):
    """The handler cannot write to what the interrupted `print` has locked."""

    class Disk(io.RawIOBase):
        written = b""

        def writable(self) -> bool:
            return True

        def write(self, data: memoryview) -> int:
            if not stop.requested:
                signal.raise_signal(signal.SIGTERM)
            Disk.written += bytes(data)
            return len(data)

    stop = StopRequest()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Disk())))
            print("a line", flush=True)
    finally:
        stop.restore()
    assert stop.requested
    assert Disk.written == b"a line\n"


class Loader:
    """The same batches over and over; a step takes a second of the test's own clock."""

    now = 0.0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list:
        self.now += 1
        return batches(8)

    def state_dict(self) -> dict:
        return {}


def test_throughput_counts_saves_and_leaves_out_evaluations_and_the_first_step(
    tmp_path, monkeypatch
):
    run, loader = training(), Loader()
    run.loader, run.schedule = loader, Schedule(ScheduleConfig(), 8)
    run.cost = CostTracker(None, None, clock=lambda: loader.now)
    loader.now += 500  # from the start of the program to that of the loop

    def evaluate() -> dict:
        loader.now += 1000
        return {}

    def save(self: Checkpointer, step: int, payload: dict) -> None:
        loader.now += 4

    monkeypatch.setattr(Checkpointer, "save", save)
    config = LoopConfig(log_every=2, eval_every=2, save_every=4)
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    fit(run, cross_entropy_loss, config, Checkpointer(tmp_path, 1), metrics, DIST, evaluate)
    lines = {m["step"]: m for m in read_metrics(metrics.path) if "train/loss" in m}
    speeds = {step: line["train/tokens_per_sec"] for step, line in lines.items()}
    a_step = 8 * 16
    assert speeds == {2: a_step / 1, 4: 2 * a_step / 2, 6: 2 * a_step / (2 + 4), 8: 2 * a_step / 2}


def test_the_bench_of_the_loop_runs_it_with_and_without_its_parts(capsys, tmp_path, monkeypatch):
    """Three steps of each, of which the last two are timed; all begin alike."""
    done: dict[str, list] = {}  # what each variant saved, how often it watched and read ahead

    def run(variant: str, bench: loop_bench.Bench) -> loop_bench.Round:
        done[variant] = []
        return original_run(variant, bench)

    def spy(cls: type, name: str, event: Callable) -> None:
        original = getattr(cls, name)

        def method(self: object, *args: object) -> object:
            if done:  # after the turn that warms up
                list(done.values())[-1].append(event(self, *args))
            return original(self, *args)

        monkeypatch.setattr(cls, name, method)

    original_run = loop_bench.run
    monkeypatch.setattr(loop_bench, "run", run)
    spy(Checkpointer, "save", lambda self, step, _: f"saved {step}")
    spy(Stability, "accept", lambda self, *_: "watched" if self.config else "not watched")
    spy(Prefetcher, "__init__", lambda self, _: "read ahead")
    sizes = "--micro-batch 1 --accumulate 2 --steps 2 --warmup 1 --rounds 1 --save-every 1"
    where = ["--shape", "tiny", "--device", "cpu", "--folder", str(tmp_path)]
    loop_bench.main([*where, *sizes.split(), "--variants", "all"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]

    watched = ["watched", "saved 1", "watched", "saved 2", "watched", "saved 3"]
    whole = ["read ahead", *watched]
    assert done == {
        "bare": [],
        "fit": whole,
        "fit-logging": whole,
        "fit-stability": [event.replace("watched", "not watched") for event in whole],
        "fit-saves": ["read ahead", *["watched"] * 3, "saved 3"],
        "fit-prefetch": watched,
        "fit-packing": watched,
        "fit-copies": watched,
    }
    for variant, result in results.items():
        assert [len(ms) for ms in result["ms"]] == [2]
        # That after the warm-up and that at the end are not timed.
        assert result["saves"] == (0 if variant in ("bare", "fit-saves") else 1)
        if variant == "fit-logging":
            assert result["first_loss"] is None
        else:
            assert result["first_loss"] == pytest.approx(results["bare"]["first_loss"], rel=1e-5)
        for ratio, bare, ours in zip(
            result["of_bare"], results["bare"]["ms"], result["ms"], strict=True
        ):
            assert ratio == pytest.approx(sum(bare) / sum(ours), rel=1e-3)
    assert not list(tmp_path.iterdir())


def test_the_bench_of_the_loop_refuses_what_does_not_fit(capsys):
    with pytest.raises(SystemExit):
        loop_bench.main(["--variants", "bare,fit-lagging"])
    assert "no variant 'fit-lagging'" in capsys.readouterr().err
    config = ["--device", "cpu", "--data", "configs/demo/pretrain.yaml", "data.seq_len=512"]
    with pytest.raises(ConfigError, match=r"data.seq_len \(512\) must not exceed the model's"):
        loop_bench.main(config)
