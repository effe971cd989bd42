"""The one training loop of all four stages.

    eval -> save -> stop? -> step -> eval -> save -> stop? -> step ...

What a stage learns is in its `loss_fn(model, batch) -> (sum, sums)`; what it reads, in its loader;
what it measures, in `evaluate(step)`. The loop knows none of them.

- The loss is a sum. Weights (tokens, pairs, ...) are added over micro-batches and ranks first, and
  the division happens once: one micro-batch of 8 rows and four of 2 give the same gradient.
- Nothing in a step waits for the GPU. A step whose loss or gradient is not finite, or a spike
  (`train.stability`), is skipped on the device (fused AdamW takes the verdict as a tensor) and
  counted; the host reads it when it logs.
- The checkpoint is the state of a step boundary. On SIGTERM or Ctrl-C the accumulation in progress
  is abandoned and the last boundary saved, so a resumed run repeats what was abandoned.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch

from data.packing import Batch
from models.transformer import Transformer
from train.stability import StabilityConfig, roll_back, update_norm, watched_weights
from train.state import Training
from utils.checkpoint import Checkpointer
from utils.config import Config, ConfigError, Problem
from utils.distributed import Distributed
from utils.logging import MetricsLog, console_line, get_logger
from utils.profile import StepTrace

LossFn = Callable[[Transformer, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class LoopConfig(Config):
    """How often the loop measures, saves and logs."""

    clip_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 100
    """Steps between evaluations; the first and the last step are always evaluated."""
    save_every: int | None = 500
    """Steps between checkpoints; the last step is always saved."""
    save_every_hours: float | None = 0.5
    """Hours between checkpoints, whichever comes first."""
    keep_checkpoints: int = 2
    """The newest so many checkpoints are kept."""
    mirror_dir: str | None = None
    """A mounted folder (Google Drive, NFS) for verified copies, to which --resume looks as well."""
    wandb_project: str | None = None
    """Send the metrics to this Weights & Biases project too; WANDB_MODE=offline keeps them here."""
    profile_steps: int = 0
    """Trace so many steps early on: trace.json.gz in the run, GPU time by kernel in the log."""
    stability: StabilityConfig = StabilityConfig()

    def problems(self) -> Iterator[Problem]:
        for key in ("log_every", "eval_every", "save_every", "save_every_hours"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem((key,), f"{key} ({value}) must be above 0")
        if self.profile_steps < 0:
            yield Problem(
                ("profile_steps",), f"profile_steps ({self.profile_steps}) must be 0 or more"
            )
        if self.keep_checkpoints < 1:
            yield Problem(
                ("keep_checkpoints",),
                f"keep_checkpoints ({self.keep_checkpoints}) must be 1 or more",
            )


class StopRequest:
    """Remembers SIGTERM and Ctrl-C until the loop asks; a second Ctrl-C ends the program."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
        }

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        with suppress(RuntimeError):  # the signal came while a line was being written to stdout
            get_logger().info(f"{signal.Signals(number).name}: saving the last step, then leaving")

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def fit(
    training: Training,
    loss_fn: LossFn,
    config: LoopConfig,
    checkpointer: Checkpointer,
    metrics: MetricsLog,
    dist: Distributed,
    evaluate: Callable[[], dict[str, float]],
) -> bool:
    """Train to the schedule's last step; closes `metrics`.

    Returns:
        True at the end of training; False when a signal asked to stop, the state saved.

    Raises:
        ConfigError: out of GPU memory, the last checkpoint could not be written, or too many steps
            were skipped in a row.
    """
    training.stability.config = config.stability
    stop = StopRequest()
    saver = _Saver(training, config, checkpointer, dist)
    traced = config.profile_steps if dist.is_main else 0
    trace = StepTrace(traced, metrics.path.with_name("trace.json.gz"))
    try:
        if training.is_branch:
            saver.save()  # else a stop before the first save would lose where it comes from
        while True:
            last = training.step >= training.schedule.total_steps
            if not _any(stop.requested, dist) and _evaluation_due(training, config, last):
                _evaluate(training, evaluate, metrics)
            stopping = last or _any(stop.requested, dist)
            if stopping or saver.due():
                saver.save()
            if stopping:
                break
            trace.tick()
            _step_and_log(training, loss_fn, config, metrics, dist, stop)
            if training.stability.rollback_due:
                roll_back(training, checkpointer, metrics, dist)
                saver.save(again=True)  # so that a resumed run does not meet the bad data again
            _warn_of_failures(checkpointer)
        saver.finish()
    finally:
        stop.restore()
        trace.close()
        metrics.close()
    return last and training.evaluated_at == training.step


class _Saver:
    """Decides when a checkpoint is due, and saves each step once."""

    def __init__(
        self,
        training: Training,
        config: LoopConfig,
        checkpointer: Checkpointer,
        dist: Distributed,
    ) -> None:
        self.training = training
        self.config = config
        self.checkpointer = checkpointer
        self.dist = dist
        # A fresh run has nothing to lose, a resumed one is saved.
        self.saved_at = None if training.is_branch else training.step
        self.saved_time = time.monotonic()

    def due(self) -> bool:
        every, hours = self.config.save_every, self.config.save_every_hours
        by_step = every is not None and self.training.step % every == 0
        by_time = hours is not None and time.monotonic() - self.saved_time > hours * 3600
        return by_step or _any(by_time, self.dist)

    def save(self, again: bool = False) -> None:
        if self.saved_at == self.training.step and not again:
            return
        if self.dist.is_main:
            self.checkpointer.save(self.training.step, self.training.state_dict())
        self.saved_at, self.saved_time = self.training.step, time.monotonic()

    def finish(self) -> None:
        """Wait for the last checkpoint; it must be there before anyone says so."""
        self.checkpointer.wait()
        failures = self.checkpointer.failures()
        if failures:
            raise ConfigError(
                f"{failures[-1]}. The last checkpoint is not on disk; make room and run again "
                "with --resume to repeat the steps since the one before"
            )


def train_step(
    training: Training,
    batches: list[Batch],
    loss_fn: LossFn,
    clip_norm: float,
    dist: Distributed,
    stop: StopRequest | None = None,
    watch: bool = False,
) -> bool:
    """One optimizer step over this rank's micro-batches; nothing here waits for the device.

    Args:
        watch: measure the update too, for the line that follows.

    Returns:
        False when a stop was requested meanwhile: nothing has changed then.
    """
    device = dist.device
    weight = torch.full((), sum(b.weight for b in batches), dtype=torch.float32, device=device)
    has_targets = dist.all_reduce_sum(weight) > 0  # else momentum alone would move the weights
    weight = weight.clamp(min=1.0)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss, metrics = loss_fn(training.model, batch.to(device))
        (loss / weight).backward()
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0) + value.detach()
        # Ranks must agree to abandon; with several, the step is finished first.
        if stop and stop.requested and dist.world_size == 1:
            training.optimizer.zero_grad(set_to_none=True)
            return False
    reduced = dist.all_reduce_sum(torch.stack([*sums.values()]))
    sums = dict(zip(sums, reduced.unbind(), strict=True))
    dist.all_reduce_gradients(training.model.parameters())
    before = watched_weights(training.model) if watch else None
    good, norm = _update(training, sums["loss"] / weight, clip_norm, has_targets)

    kept = (good & has_targets).double()
    averages = {name: torch.where(good, value.double(), 0.0) for name, value in sums.items()}
    if before is not None:
        averages["update_norm"] = update_norm(training.model, before)
    averages["weight"] = weight * kept
    averages["grad_norm"] = torch.where(good, norm, 0.0)
    averages["steps"], averages["skipped"] = kept, 1 - good.double()
    training.averages.add(averages)
    _count(training, batches, dist)
    return True


def _update(
    training: Training, loss: torch.Tensor, clip_norm: float, has_targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and step, or skip a bad or empty step; returns (whether it was good, gradient norm).

    Fused AdamW and Muon divide the gradients by `grad_scale` and leave everything untouched, their
    step counts included, where `found_inf` is 1: the interface that torch's GradScaler uses.
    """
    optimizer = training.optimizer
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    good = training.stability.accept(loss, norm, has_targets)
    scale = (norm / clip_norm).clamp(min=1.0) if clip_norm > 0 else torch.ones_like(norm)
    optimizer.grad_scale, optimizer.found_inf = scale, (~(good & has_targets)).float()
    training.schedule.apply(optimizer, training.step)
    training.stability.cut_rate(optimizer, training.step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return good, norm


def _count(training: Training, batches: list[Batch], dist: Distributed) -> None:
    tokens = sum(b.tokens.numel() for b in batches) * dist.world_size
    pairs = sum(b.attended_pairs for b in batches) * dist.world_size
    training.step += 1
    training.tokens += tokens
    training.cost.update(tokens, training.model.config.training_flops(tokens, pairs))


def _step_and_log(
    training: Training,
    loss_fn: LossFn,
    config: LoopConfig,
    metrics: MetricsLog,
    dist: Distributed,
    stop: StopRequest,
) -> None:
    training.boundary = training.position()
    logged = (training.step + 1) % config.log_every == 0
    try:
        stepped = train_step(
            training, next(training.loader), loss_fn, config.clip_norm, dist, stop, watch=logged
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            "the GPU is out of memory; halve train.micro_batch: batch_tokens, and with it the "
            f"result, stays the same, and --resume goes on from the last checkpoint ({error})"
        ) from error
    if not stepped:
        return  # the boundary before it is what will be saved
    training.boundary = None
    if logged:
        _log(training, metrics)


def _log(training: Training, metrics: MetricsLog) -> None:
    """Averages since the last line; the one host sync of `log_every` steps."""
    taken = training.averages.take()
    steps, weight = max(taken.pop("steps"), 1.0), max(taken.pop("weight"), 1.0)
    norm, skipped = taken.pop("grad_norm") / steps, int(taken.pop("skipped"))
    update, rate = taken.pop("update_norm"), training.optimizer.param_groups[0]["lr"]
    means = {
        name if "/" in name else f"train/{name}": value / weight for name, value in taken.items()
    }
    values = {
        **means,
        "train/grad_norm": norm,
        "train/lr": rate,
        **training.stability.review(training.step, skipped),
        **training.stability.watch(update, rate),
        "train/tokens": training.tokens,
        **training.measures(),
        **training.cost.metrics(training.step, training.schedule.total_steps),
        **_memory(),
    }
    metrics.write(training.step, values)
    get_logger().info(console_line(training.step, training.schedule.total_steps, values))


def _memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu/memory_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "gpu/memory_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def _evaluation_due(training: Training, config: LoopConfig, last: bool) -> bool:
    due = last or training.step % config.eval_every == 0
    return due and training.evaluated_at != training.step


def _evaluate(
    training: Training, evaluate: Callable[[], dict[str, float]], metrics: MetricsLog
) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize()  # what the device has still to do is training
    with training.cost.paused():
        values = evaluate()
    training.evaluated_at = training.step
    metrics.write(training.step, values)
    get_logger().info(console_line(training.step, training.schedule.total_steps, values))


def _any(flag: bool, dist: Distributed) -> bool:
    """Whether it is so on any rank, so that all of them take the same turn."""
    if dist.world_size == 1:
        return flag
    return bool(dist.all_reduce_sum(torch.tensor(float(flag), device=dist.device)).item())


def _warn_of_failures(checkpointer: Checkpointer) -> None:
    for failure in checkpointer.failures():
        get_logger().warning(f"{failure}. Training goes on; earlier checkpoints are kept")
