"""The whole training loop against the bare step: what logging, saving and the loader cost.

    python -m bench.loop --shape tiny --device cpu
    python -m bench.loop --shape 160m --micro-batch 96 --accumulate 16 --steps 5 --rounds 3
    python -m bench.loop --shape 600m --micro-batch 48 --model fused+balanced --profile

A variant is one of two, the second with parts left out, joined by -:

    bare        the inner loop of bench/step.py, on the device's own copies of the loader's batches:
                forward and backward passes, the norm of the gradient, AdamW
    fit         train/loop.py: `fit` with the pretraining loader and its Prefetcher, the stability
                monitor, the cost tracker, metrics and a console line every --log-every steps, and a
                checkpoint in the background every --save-every steps
      -logging -stability -saves     without it
      -prefetch                      the loop packs its batches itself, in no thread
      -packing                       recorded batches, in host memory
      -copies                        recorded batches, on the device

The variants take turns in one process, on the same batches and from the same weights. Steps are
timed from one request for batches to the next; evaluations do not count, nor does the save at the
end. "of bare" compares the turns of a round; "costs" is what `fit` takes longer than without the
part. --profile traces two steps of either: work by kind, and the time in which the GPU had none.

The data are shards of drawn documents (676 tokens in the mean, exponentially distributed), or with
--data the tokenized sources of a pretraining config; `key=value` changes the config.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch

from bench.shards import configured_stores, drawn_stores
from bench.step import MEMORY_LIMIT_GIB, build, device_name, limit_memory, synchronize
from data.packing import Batch
from data.streaming import Prefetcher, PretrainLoader
from models.config import GIB, ModelConfig
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train.loop import LoopConfig, fit
from train.loss import cross_entropy_loss
from train.state import Training
from utils.checkpoint import Checkpointer
from utils.command_line import run_script
from utils.config import load_config
from utils.cost_tracker import CostConfig, CostTracker
from utils.distributed import Distributed
from utils.logging import MetricsLog, read_metrics
from utils.profile import gpu_time, gpu_time_table, trace_steps

PARTS = ("logging", "stability", "saves", "prefetch", "packing", "copies")
ALL = ("bare", "fit", *(f"fit-{part}" for part in PARTS))
READ_AHEAD = 2  # steps that the loader packs beyond the last one, as in a run that goes on
TRACED, BEFORE_TRACE = 2, 5  # steps; the second is that of utils.profile.StepTrace


@dataclass
class Round:
    """One turn of a variant.

    Attributes:
        step_ms: of each timed step.
        first_loss: of the step before all others; None where nothing is logged.
        saves: checkpoints within the timed steps.
        allocations: calls of cudaMalloc there.
        reserved_gib: the most that the allocator held, in the process so far.
    """

    step_ms: list[float]
    first_loss: float | None
    saves: int = 0
    allocations: int = 0
    reserved_gib: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.mean(self.step_ms)


class Marks:
    """When each step began, and the last one ended."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.at: list = []
        self.allocations = 0  # before the first timed step

    def set(self) -> None:
        if self.device.type == "cuda":
            self.at.append(torch.cuda.Event(enable_timing=True))
            self.at[-1].record()
        else:
            self.at.append(time.perf_counter())
        if len(self.at) == self.warmup + 1:
            self.allocations = _allocations(self.device)

    def round(self, first_loss: float | None, saves: int = 0) -> Round:
        allocations = _allocations(self.device) - self.allocations
        synchronize(self.device)
        timed = pairwise(self.at[self.warmup :])
        on_gpu = self.device.type == "cuda"
        times = [a.elapsed_time(b) if on_gpu else (b - a) * 1e3 for a, b in timed]
        reserved = torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0
        return Round(times, first_loss, saves, allocations, reserved)


def _allocations(device: torch.device) -> int:
    return torch.cuda.memory_stats()["num_device_alloc"] if device.type == "cuda" else 0


@dataclass
class Steps:
    """The batches of some steps, and the state to save with them; notes when they are asked for."""

    batches: Iterator[list[Batch]]
    state_dict: Callable[[], dict] = dict
    marks: Marks | None = None

    def __next__(self) -> list[Batch]:
        if self.marks:
            self.marks.set()
        return next(self.batches)


@dataclass
class Bench:
    """All that the turns have in common; `recorded` are the batches of each step, on the host."""

    args: argparse.Namespace
    device: torch.device
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]
    make_loader: Callable[[], PretrainLoader]
    recorded: list[list[Batch]]
    folder: Path

    def on_device(self) -> list[list[Batch]]:
        return [[batch.to(self.device) for batch in batches] for batches in self.recorded]

    def optimizer(self) -> torch.optim.Optimizer:
        """A new one, and the weights as they were at first."""
        self.model.load_state_dict(self.weights)
        return make_optimizer(self.model.named_parameters(), OptimConfig(lr=1e-5))


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    began = time.monotonic()
    device = torch.device(args.device)
    limit_memory(device, args.limit_gib)
    torch.set_float32_matmul_precision("high")
    shape = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    torch.manual_seed(0)
    weights = Transformer(shape).state_dict()
    model, _ = build(args.model, shape, weights, device)
    rounds: dict[str, list[Round]] = {variant: [] for variant in args.variants}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_loader = open_data(args, shape, Path(folder))
        recorded = list(islice(make_loader(), args.warmup + args.steps))
        args.seq_len = recorded[0][0].max_seqlen
        bench = Bench(args, device, model, weights, make_loader, recorded, Path(folder))
        run_fit(bench, set(), 1)  # kernels are compiled, memory for a checkpoint is set aside
        for variant in args.variants * args.rounds:
            if (passed := time.monotonic() - began) > args.budget_seconds:
                print(f"-- {variant}: not run, {passed:.0f} s are over the budget", flush=True)
                continue
            gc.collect()  # the turn before is a ring of references, with an optimizer in it
            try:
                rounds[variant].append(run(variant, bench))
                print(f"{variant:<20}{rounds[variant][-1].mean:>10.1f} ms a step", flush=True)
            except Exception:
                print(f"-- {variant} failed\n{traceback.format_exc()}", flush=True)
        traces = profile(bench) if args.profile else {}
    report({v: turns for v, turns in rounds.items() if turns}, traces, args)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--shape", default="tiny", choices=("tiny", "160m", "600m"))
    add("--variants", default="bare,fit", help="or all: with each part left out in turn")
    add("--model", help="as a variant of bench/step.py; fused on a GPU, plain elsewhere")
    add("--micro-batch", type=int, default=2, metavar="ROWS")
    add("--accumulate", type=int, default=4, metavar="N", help="micro-batches of a step")
    add("--steps", type=int, default=8, help="timed steps of each turn")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--rounds", type=int, default=3, help="turns of each variant")
    add("--log-every", type=int, default=1, metavar="STEPS")
    add("--save-every", type=int, default=4, metavar="STEPS")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", metavar="CONFIG", help="a pretraining config, whose sources are read")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of that config")
    add("--folder", help="for checkpoints and drawn shards; default: the system's for such files")
    add("--budget-seconds", type=float, default=540)
    add("--limit-gib", type=float, default=MEMORY_LIMIT_GIB, help="of the GPU's memory")
    add("--profile", action="store_true", help="GPU time by kind of work, and idle time")
    add("--out", default="runs/bench", help="folder of the profiler's traces")
    args = parser.parse_args(argv)
    args.model = args.model or ("fused" if args.device.startswith("cuda") else "plain")
    args.variants = list(ALL) if args.variants == "all" else args.variants.split(",")
    for variant in args.variants:
        how, *without = variant.split("-")
        if how not in ("bare", "fit") or (without and how == "bare") or set(without) - set(PARTS):
            parser.error(f"no variant '{variant}': bare, or fit without some of {', '.join(PARTS)}")
    return args


def open_data(
    args: argparse.Namespace, shape: ModelConfig, folder: Path
) -> Callable[[], PretrainLoader]:
    """Makes loaders that all begin at the same place."""
    rows = args.accumulate * args.micro_batch
    if args.data:
        data, stores = configured_stores(args.data, args.overrides, shape)
    else:
        steps = args.warmup + args.steps + READ_AHEAD + 1
        data, stores = drawn_stores(shape, steps * rows * shape.max_seq_len, folder)
    return lambda: PretrainLoader(stores, data, 0, rows, args.micro_batch)


# ---------------------------------------------------------------------------------------------
# The turns


def run(variant: str, bench: Bench) -> Round:
    how, *without = variant.split("-")
    if how == "fit":
        return run_fit(bench, set(without), len(bench.recorded))
    marks = Marks(bench.device, bench.args.warmup)
    losses = bare_steps(bench.model, bench.optimizer(), bench.on_device(), marks)
    return marks.round(losses[0].item())


def bare_steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: list[list[Batch]],
    marks: Marks,
) -> list[torch.Tensor]:
    """The mean loss of each step, on the device."""
    losses = []
    for batches in steps:
        marks.set()
        weight, mean = sum(batch.weight for batch in batches), 0.0
        for batch in batches:
            loss = cross_entropy_loss(model, batch)[0] / weight
            loss.backward()
            mean = mean + loss.detach()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean)
    marks.set()
    return losses


def run_fit(bench: Bench, without: set[str], steps: int, profile_steps: int = 0) -> Round:
    """A run of so many steps, in a folder of its own."""
    args, marks = bench.args, Marks(bench.device, bench.args.warmup)
    loader, prefetcher = open_loader(bench, without, steps, marks)
    training = Training(
        model=bench.model,
        optimizer=bench.optimizer(),
        schedule=Schedule(ScheduleConfig(), steps),
        loader=loader,
        cost=CostTracker.for_device(CostConfig(), device_name(bench.device)),
        identity={"stage": "bench"},
        evaluated_at=0,
    )
    config = LoopConfig(
        log_every=steps + 1 if "logging" in without else args.log_every,
        eval_every=steps,
        save_every=None if "saves" in without else args.save_every,
        save_every_hours=None,
        keep_checkpoints=1,
        profile_steps=profile_steps,
    )
    if "stability" in without:
        config = config.model_copy(update={"stability": None})
    result: list[Round] = []

    def evaluate() -> dict[str, float]:
        """Comes after the last step and before the last save."""
        marks.set()
        saves = range(args.warmup + 1, steps) if config.save_every else ()
        result.append(marks.round(None, sum(step % args.save_every == 0 for step in saves)))
        return {}

    folder, alone = Path(tempfile.mkdtemp(dir=bench.folder)), Distributed(0, 1, 0, bench.device)
    checkpointer = Checkpointer(bench.folder / "checkpoints", 1)
    metrics = MetricsLog(folder / "metrics.jsonl")
    with (folder / "console.txt").open("w") as console, redirect_stdout(console):
        fit(training, cross_entropy_loss, config, checkpointer, metrics, alone, evaluate)
    checkpointer.close()
    for _ in prefetcher:  # its thread ends
        pass
    if profile_steps:
        shutil.move(folder / "trace.json.gz", trace_file(args, "fit"))
    losses = [line["train/loss"] for line in read_metrics(metrics.path) if "train/loss" in line]
    result[0].first_loss = losses[0] if losses and args.log_every == 1 else None
    return result[0]


def open_loader(
    bench: Bench, without: set[str], steps: int, marks: Marks
) -> tuple[Steps, Iterator[list[Batch]]]:
    """What a turn reads, and what is left to read after it."""
    if without & {"packing", "copies"}:
        recorded = bench.on_device() if "copies" in without else bench.recorded
        return Steps(iter(recorded), marks=marks), iter(())
    loader = bench.make_loader()
    if "prefetch" in without:
        return Steps(loader, loader.state_dict, marks), iter(())
    prefetcher = Prefetcher(Steps(islice(loader, steps + READ_AHEAD), loader.state_dict))
    return Steps(prefetcher, prefetcher.state_dict, marks), prefetcher


def profile(bench: Bench) -> dict[str, dict[str, float]]:
    """Traces some steps of `fit` and of the bare loop; milliseconds a step by kind of work."""
    run_fit(bench, {"saves"}, BEFORE_TRACE + TRACED + 1, TRACED)
    optimizer, steps = bench.optimizer(), bench.on_device()[:TRACED]

    def bare() -> None:
        bare_steps(bench.model, optimizer, steps, Marks(bench.device, 0))

    bare()
    trace_steps(bare, 1, trace_file(bench.args, "bare"))
    traces = {}
    for name in ("bare", "fit"):
        file = trace_file(bench.args, name)
        print(f"\n{name}, {TRACED} steps\n{gpu_time_table(file, TRACED)}")
        traces[name] = gpu_time(file, TRACED)[0]
    return traces


def trace_file(args: argparse.Namespace, name: str) -> Path:
    file = Path(args.out) / f"loop_{args.shape}_{name}.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def report(rounds: dict[str, list[Round]], traces: dict, args: argparse.Namespace) -> None:
    tokens = args.accumulate * args.micro_batch * args.seq_len
    print(
        f"\n{args.shape}, {args.model}, {args.accumulate} x {args.micro_batch} rows of "
        f"{args.seq_len:,} a step, {device_name(torch.device(args.device))}, torch "
        f"{torch.__version__}; means of {args.steps} steps, medians of {args.rounds} turns, "
        "± half the range\n"
        f"{'':<20}{'ms/step':>10}{'±':>7}{'tokens/s':>11}{'of bare':>9}  {'(range)':<17}"
        f"{'costs, ms':>11}{'saves':>7}{'cudaMalloc':>12}{'reserved, GiB':>15}"
    )
    values = {}
    for variant, turns in rounds.items():
        means = [turn.mean for turn in turns]
        median = statistics.median(means)
        of_bare = [b.mean / t.mean for b, t in zip(rounds.get("bare", []), turns, strict=False)]
        costs = [f.mean - t.mean for f, t in zip(rounds.get("fit", []), turns, strict=False)]
        shown = ["", "", ""]
        if of_bare:
            shown = [
                f"{statistics.median(of_bare):.2%}",
                f"({min(of_bare):.2%}-{max(of_bare):.2%})",
            ]
            shown.append(f"{statistics.median(costs):.1f}" if costs and "-" in variant else "")
        print(
            f"{variant:<20}{median:>10.1f}{(max(means) - min(means)) / 2 / median:>7.1%}"
            f"{tokens / median * 1e3:>11,.0f}{shown[0]:>9}  {shown[1]:<17}{shown[2]:>11}"
            f"{turns[0].saves:>7}{max(turn.allocations for turn in turns):>12}"
            f"{max(turn.reserved_gib for turn in turns):>15.1f}"
        )
        values[variant] = {
            "ms": [[round(ms, 2) for ms in turn.step_ms] for turn in turns],
            "tokens_per_s": round(tokens / median * 1e3),
            "of_bare": of_bare,
            "costs_ms": costs,
            "saves": turns[0].saves,
            "allocations": [turn.allocations for turn in turns],
            "reserved_gib": max(turn.reserved_gib for turn in turns),
            "first_loss": turns[0].first_loss,
        }
    print(json.dumps({"bench": "loop", **vars(args), "results": values, "gpu_ms": traces}))


if __name__ == "__main__":
    run_script(main)
