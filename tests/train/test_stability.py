"""Spikes are skipped, escalated and survived: the run ends where it would have without them."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.packing import Batch, make_batch, pack_rows
from models.config import ModelConfig
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train import stability
from train.loop import LoopConfig, Training, fit, train_step
from train.loss import cross_entropy_loss
from train.stability import Stability, StabilityConfig
from utils.checkpoint import Checkpointer
from utils.config import ConfigError
from utils.cost_tracker import CostTracker
from utils.distributed import Distributed
from utils.logging import MetricsLog, read_metrics

SHAPE = ModelConfig(
    vocab_size=24, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ffn=48, max_seq_len=16
)
DIST = Distributed(0, 1, 0, torch.device("cpu"))
STEPS = 260
QUICK = StabilityConfig(
    window=32, calm_steps=4, cut_after=3, cut_steps=20, rollback_after=8, max_rollbacks=2
)


@dataclasses.dataclass
class Marked(Batch):
    fault: str = ""


def batch(index: int, fault: str = "") -> Marked:
    """Eight rows of a chain whose next token is one of three; or, as `noise`, of any tokens."""
    generator = np.random.default_rng(index)
    rows = generator.integers(0, 24, (8, 16))
    if fault != "noise":
        for t in range(1, 16):
            rows[:, t] = (rows[:, t - 1] * 5 + generator.integers(0, 3, 8)) % 24
    packed = pack_rows([row.astype(np.uint16) for row in rows], 16, 4)
    return Marked(**vars(make_batch(packed, 16, 4)), fault=fault)


class Loader:
    """Good batches 0, 1, 2, ... with bad ones put between: `faults` at given draws."""

    def __init__(self, faults: dict[int, str]) -> None:
        self.faults = faults
        self.draw = self.good = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        fault = self.faults.get(self.draw, "")
        self.draw, self.good = self.draw + 1, self.good + (not fault)
        return [batch(10_000 + self.draw if fault else self.good, fault)]

    def state_dict(self) -> dict:
        return {"draw": self.draw, "good": self.good}

    def load_state_dict(self, state: dict) -> None:
        self.draw, self.good = state["draw"], state["good"]


def loss_fn(model: Transformer, batch: Marked) -> tuple[torch.Tensor, dict]:
    if batch.fault == "damage":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.7)
    loss, metrics = cross_entropy_loss(model, batch)
    if batch.fault == "nan":
        loss = loss * float("nan")
    if batch.fault == "hundredfold":
        loss = loss * 100
    if batch.fault == "explosion":  # of the gradient alone
        loss = loss + 1e4 * (loss - loss.detach())
    if batch.fault == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    return loss, metrics


def start(faults: dict[int, str], kind: str = "adamw") -> Training:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    return Training(
        model,
        make_optimizer(model.named_parameters(), OptimConfig(kind=kind, lr=1e-2)),
        Schedule(ScheduleConfig(warmup_steps=10, decay_fraction=0.3), STEPS),
        Loader(faults),
        CostTracker(None, None),
        {},
    )


def training_lines(path: Path) -> dict[int, dict]:
    """The lines of the steps, without those of the evaluations."""
    return {line["step"]: line for line in read_metrics(path) if "train/loss" in line}


class Finished:
    """A run in a folder, trained to its end or its stop."""

    def __init__(
        self,
        folder,
        faults: dict[int, str],
        config: StabilityConfig = QUICK,
        resumed: bool = False,
        kind: str = "adamw",
    ) -> None:
        folder.mkdir(exist_ok=True)
        loop = LoopConfig(log_every=2, eval_every=10, save_every=20, stability=config)
        checkpointer = Checkpointer(folder / "checkpoints", 2)
        self.training = start(faults, kind)
        if resumed:
            self.training.load_state_dict(checkpointer.latest()[1])
        self.log = MetricsLog(folder / "metrics.jsonl")
        samples = MetricsLog(folder / "samples.jsonl")
        self.training.logs.append(samples)

        def evaluate() -> dict[str, float]:
            samples.write(self.training.step, {"answer": "one"})
            return {}

        self.done = fit(self.training, loss_fn, loop, checkpointer, self.log, DIST, evaluate)
        samples.close()
        checkpointer.close()
        self.last = list(training_lines(folder / "metrics.jsonl").values())[-1]

    @property
    def loss(self) -> float:
        with torch.no_grad():
            held_out = [batch(20_000 + i) for i in range(20)]
            losses = [cross_entropy_loss(self.training.model, b)[0].item() for b in held_out]
        return sum(losses) / sum(b.weight for b in held_out)


@pytest.fixture(scope="module")
def never_saw(tmp_path_factory) -> Finished:
    """A run on the good data alone."""
    return Finished(tmp_path_factory.mktemp("clean"), {})


@pytest.fixture(scope="module")
def muon_never_saw(tmp_path_factory) -> Finished:
    return Finished(tmp_path_factory.mktemp("clean_muon"), {}, kind="muon")


def span(first: int, steps: int, fault: str) -> dict[int, str]:
    return dict.fromkeys(range(first, first + steps), fault)


# name: (bad batches, steps skipped at least, rollbacks, whether the rate was cut)
SURVIVED = {
    "NaN": ({120: "nan"}, 1, 0, False),
    "NaN in the warm-up": ({3: "nan"}, 1, 0, False),
    "hundredfold loss": ({120: "hundredfold"}, 1, 0, False),
    "exploding gradient": ({120: "explosion"}, 1, 0, False),
    "five in a row": (span(120, 5, "hundredfold"), 5, 0, True),
    "a run of bad data": (span(110, 18, "noise"), 18, 2, True),
    "damaged weights": ({110: "damage"}, 8, 1, True),
}


@pytest.mark.parametrize("case", SURVIVED)
def test_a_survived_fault_leaves_the_loss_where_it_was(never_saw, tmp_path, case):
    faults, skipped, rollbacks, cut = SURVIVED[case]
    run = Finished(tmp_path / "run", faults)
    assert run.done
    assert run.loss == pytest.approx(never_saw.loss, abs=0.02)
    assert run.last["stability/skipped_steps"] >= skipped
    assert run.last["stability/rollbacks"] == rollbacks
    assert (run.training.stability.cut_until > 0) == cut


@pytest.mark.parametrize("case", ["hundredfold loss", "damaged weights"])
def test_so_it_is_with_muon(muon_never_saw, tmp_path, case):
    faults, skipped, rollbacks, _ = SURVIVED[case]
    run = Finished(tmp_path / "run", faults, kind="muon")
    assert run.done
    assert run.loss == pytest.approx(muon_never_saw.loss, abs=0.02)
    assert run.last["stability/skipped_steps"] >= skipped
    assert run.last["stability/rollbacks"] == rollbacks


def test_muon_learns_as_well_as_adamw(never_saw, muon_never_saw):
    """The entropy of the chain is ln 3, and its start is a token of 24 that nobody can know."""
    assert muon_never_saw.loss < never_saw.loss + 0.02


def test_good_data_is_hardly_ever_skipped(never_saw):
    assert never_saw.last["stability/skipped_steps"] <= 1


def test_without_the_gate_bad_data_is_learned_from(never_saw, tmp_path):
    """Until the end of the run, so that nothing makes it good; with the gate the data is passed
    over, in one rollback after the other, and the run goes on after it."""
    faults, patient = span(200, 60, "noise"), QUICK.model_copy(update={"max_rollbacks": 10})
    gate = Finished(tmp_path / "gate", faults, patient)
    without = Finished(tmp_path / "without", faults, QUICK.model_copy(update={"sigma": None}))
    assert without.last["stability/skipped_steps"] == 0
    assert without.loss > never_saw.loss + 0.2
    assert gate.last["stability/skipped_steps"] == 60
    assert gate.loss == pytest.approx(never_saw.loss, abs=0.02)


def test_a_cut_halves_the_rate_and_ends(tmp_path):
    run = Finished(tmp_path / "run", span(120, 4, "hundredfold"))
    lines = training_lines(tmp_path / "run/metrics.jsonl")
    assert lines[118]["train/lr"] == pytest.approx(1e-2)
    assert lines[130]["train/lr"] == pytest.approx(0.5e-2)
    assert lines[130]["stability/rate_cut"] == 0.5
    assert lines[150]["train/lr"] == pytest.approx(1e-2)
    assert run.last["stability/rate_cut"] == 1.0


def test_a_rollback_goes_past_the_span_and_no_step_is_logged_twice(tmp_path):
    run = Finished(tmp_path / "run", span(110, 9, "noise"))
    ((back_to, reached),) = run.training.stability.skipped_spans
    assert back_to == 100
    assert reached in (118, 120)
    assert run.training.stability.cut_until == back_to + QUICK.cut_steps
    for log, key in (("metrics", "train/loss"), ("samples", "answer")):
        steps = [m["step"] for m in read_metrics(tmp_path / f"run/{log}.jsonl") if key in m]
        assert steps == sorted(set(steps))
        assert len(steps) == {"metrics": STEPS // 2, "samples": STEPS // 10 + 1}[log]
    assert run.training.loader.draw == STEPS + reached - back_to


def test_it_stops_when_nothing_helps(tmp_path):
    with pytest.raises(ConfigError, match="8 steps were skipped in a row, after 2 rollbacks"):
        Finished(tmp_path / "run", span(110, 1000, "nan"))


@pytest.mark.parametrize(
    ("stop_at", "kind"), [(113, "adamw"), (119, "adamw"), (125, "adamw"), (119, "muon")]
)  # in the row, after the rollback, later
def test_a_run_resumed_amid_its_trouble_is_the_uninterrupted_run(tmp_path, stop_at, kind):
    faults = span(110, 9, "noise")
    whole = Finished(tmp_path / "whole", faults, kind=kind)
    part = Finished(tmp_path / "parts", faults | {stop_at: "stop"}, kind=kind)
    assert not part.done
    saved = part.training.stability
    rest = start({}, kind)
    rest.load_state_dict(Checkpointer(tmp_path / "parts/checkpoints", 2).latest()[1])
    for key, value in saved.device_state.items():
        assert torch.equal(rest.stability.device_state[key], value)
    rest = Finished(tmp_path / "parts", faults, resumed=True, kind=kind)
    assert rest.done
    for key, value in whole.training.model.state_dict().items():
        assert torch.equal(rest.training.model.state_dict()[key], value)
    one, two = whole.training.stability.state_dict(), rest.training.stability.state_dict()
    for key, value in one.pop("device_state").items():
        assert torch.equal(two["device_state"][key], value)
    assert one == {key: two[key] for key in one}


YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize(("norm", "has_targets"), [(0.0, NO), (0.0, YES), (0.1, NO)])
def test_steps_that_teach_nothing_make_no_spike_of_others(norm, has_targets):
    stability = Stability(StabilityConfig(window=8))
    for _ in range(8):
        assert stability.accept(torch.tensor(0.0), torch.tensor(norm), has_targets)
    assert (stability.device_state["kept"], stability.device_state["calm"]) == (0, 0)
    assert stability.accept(torch.tensor(2.0), torch.tensor(1.0), YES)
    assert (stability.device_state["kept"], stability.device_state["calm"]) == (1, 1)


def scored(history: list[float], value: float, config: StabilityConfig) -> tuple[bool, float]:
    stability = Stability(config)
    for x in history:
        stability.accept(torch.tensor(x), torch.tensor(1.0), YES)
    stability.device_state["peak"].zero_()
    good = stability.accept(torch.tensor(value), torch.tensor(1.0), YES)
    return bool(good), stability.device_state["peak"][0].item()


def test_the_score_is_that_of_the_docstring():
    config = StabilityConfig(window=8, sigma=3.0)
    history = [2.0, 2.5, 1.5, 2.2, 1.9, 2.4, 2.1, 1.8, 2.3, 2.0, 2.2]
    last = np.array(history[-8:])
    for value in (2.6, 3.0, 4.0):
        good, z = scored(history, value, config)
        assert z == pytest.approx((value - last.mean()) / last.std(), rel=1e-4)
        assert good == (z <= 3.0)


def test_nothing_is_a_spike_before_half_a_window_or_within_one_percent():
    config = StabilityConfig(window=8, sigma=3.0)
    assert scored([2.0, 2.1, 2.0], 200.0, config)[0]
    assert not scored([2.0, 2.1, 2.0, 2.1], 200.0, config)[0]
    assert scored([2.0] * 8, 2.05, config)[0]
    assert not scored([2.0] * 8, 2.07, config)[0]


def test_skipped_values_do_not_widen_the_window():
    history = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9] + [200.0] * 20
    assert not scored(history, 200.0, StabilityConfig(window=8))[0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_update_is_measured_from_some_of_the_weights(kind, monkeypatch):
    """Against a copy of all weights; all of them watched is exact, a 61st of 10,000 roughly so."""
    for stride, tolerance in ((1, 1e-5), (61, 0.2)):
        monkeypatch.setattr(stability, "WATCHED_STRIDE", stride)
        training = start({3: "nan"}, kind)
        for step in range(5):
            before = [p.detach().clone() for p in training.model.parameters()]
            train_step(training, next(training.loader), loss_fn, 1.0, DIST, watch=True)
            steps = [
                p.detach() - b for p, b in zip(training.model.parameters(), before, strict=True)
            ]
            norm = torch.nn.utils.get_total_norm(steps).item()
            measured = training.averages.take()["update_norm"]
            assert (norm == measured == 0) if step == 3 else norm > 0
            assert measured == pytest.approx(norm, rel=tolerance)


def test_an_unusual_update_is_told_and_a_lower_rate_is_not_unusual(capsys):
    watched = Stability(StabilityConfig(window=8))
    ratios = [3.0, 3.2, 2.8, 3.1, 2.9, 3.0, 3.3, 3.0, 2.9, 3.1]
    for step, ratio in enumerate(ratios):
        rate = 0.5**step
        watched.watch(ratio * rate, rate)
    assert watched.watch(0.0, 0.1) == {"stability/update_norm": 0.0, "stability/update_norm_z": 0.0}
    assert "warning" not in capsys.readouterr().out
    last = np.array(ratios[-8:])
    z = watched.watch(0.6, 0.1)["stability/update_norm_z"]
    assert z == pytest.approx((6.0 - last.mean()) / last.std(), rel=1e-3)
    assert "warning: the last update was unusually large: 6 times" in capsys.readouterr().out


def test_the_lines_show_the_update(never_saw):
    lines = training_lines(never_saw.log.path).values()
    norms = np.array([m["stability/update_norm"] for m in lines])
    rates = np.array([m["train/lr"] for m in lines])
    weights = sum(p.numel() for p in never_saw.training.model.parameters())
    assert ((norms > 0) & (norms < 2 * rates * weights**0.5)).all()
    assert max(m["stability/update_norm_z"] for m in lines) < 6


class NoHostSync(TorchDispatchMode):
    """Raises where a tensor's value is read by Python."""

    def __torch_dispatch__(self, function: Callable, types: object, args=(), kwargs=None) -> object:
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.nonzero,
        ):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_reads_nothing_from_the_device(kind):
    training = start({1: "nan"}, kind)
    training.stability.config = QUICK
    with NoHostSync():
        with pytest.raises(AssertionError, match="waits for the device"):
            bool(torch.ones(()) > 0)
        for _ in range(3):
            train_step(training, next(training.loader), loss_fn, 1.0, DIST, watch=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_a_gpu_does_not_synchronise(kind):
    training = start({}, kind)
    training.stability.config = QUICK
    training.model.cuda()
    gpu = Distributed(0, 1, 0, torch.device("cuda"))
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        try:
            train_step(training, next(training.loader), loss_fn, 1.0, gpu, watch=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert training.averages.take()["steps"] == 6
