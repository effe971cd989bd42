"""Loss spikes and exploding gradients: skip the step, lower the rate, roll back, give up.

**Skip.** With the mean m and the standard deviation s of the last `window` steps that were kept, a
step's score is z = (x - m) / max(s, |m| / 100), for its loss and for the norm of its gradient
before clipping. A step is skipped when either is above `sigma`, or is not finite. The verdict is a
tensor that the optimizer reads on the device (`train.loop`), so a step never waits for it. Skipped
steps stay out of the window: one loss of a hundred times the usual would otherwise widen it until
the next passes. Scores count from half a window on.

**Escalation.** Steps are skipped *in a row* while fewer than `calm_steps` good ones lie between
them. The host counts them when it logs: from `cut_after` on the learning rate is multiplied by
`cut_factor` for `cut_steps` steps; at `rollback_after` the weights are taken to be damaged, and the
last checkpoint that was saved in calm is loaded. The data goes on where it is, past the bad span.
After `max_rollbacks` in a row the run stops.

**Watch.** A spike is judged before the step; what the step then did to the weights is looked at on
the steps that are logged: the norm of the update, from every 61st weight (which tells it within
some percent, and needs no second copy of the weights), relative to the learning rate, scored
against its last `window` values. An update cannot be skipped any more, and both optimizers bound it
by their rate, so an unusual one is a warning and a metric, and escalates nothing.

Sources: window and sigma are those of OLMo-core's SkipStepOptimizer (AI2, 2024), which keeps
outliers in its window and never escalates; skipping a span of data after going back to an earlier
checkpoint is PaLM's remedy (Chowdhery et al. 2022, section 5.1: 200 to 500 batches). The floor of
one percent keeps a memorised data set, whose losses hardly differ, from being all spikes.

Left out: spikes within the first half window, usually the warm-up, unless they are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from utils.checkpoint import Checkpointer
from utils.config import Config, ConfigError, Problem
from utils.distributed import Distributed
from utils.logging import MetricsLog, get_logger

if TYPE_CHECKING:
    from train.state import Training

RELATIVE_FLOOR = 0.01
WATCHED_STRIDE = 61  # a prime, so that every column of a matrix is met


class StabilityConfig(Config):
    """When a step is a spike, and what follows when spikes do not end."""

    sigma: float | None = 6.0
    """Standard deviations above the mean from which a step is skipped; null: never, if finite."""
    window: int = 128
    """Steps over which mean and deviation are taken."""
    calm_steps: int = 10
    """So many good steps end a row of skipped ones."""
    cut_after: int | None = 5
    """Steps skipped in a row that cut the learning rate; null: never."""
    cut_factor: float = 0.5
    cut_steps: int = 100
    rollback_after: int = 20
    """Steps skipped in a row after which the last good checkpoint is loaded."""
    max_rollbacks: int = 2
    """Rollbacks in a row; instead of another one the run stops."""

    def problems(self) -> Iterator[Problem]:
        least = {"window": 4, "calm_steps": 1, "cut_after": 1, "cut_steps": 1, "rollback_after": 1}
        for key, minimum in (least | {"max_rollbacks": 0}).items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                yield Problem((key,), f"{key} ({value}) must be {minimum} or more")
        if self.sigma is not None and self.sigma <= 0:
            yield Problem(("sigma",), f"sigma ({self.sigma}) must be above 0, or null")
        if not 0 < self.cut_factor <= 1:
            yield Problem(
                ("cut_factor",), f"cut_factor ({self.cut_factor}) must be above 0 and at most 1"
            )


class Stability:
    """What the run remembers of its spikes; without a config it only skips what is not finite.

    `device_state` holds, on the device: `history` (2, window), the losses and norms that were kept;
    `kept`, how many there have been; `in_row`, the steps skipped in a row; `calm`, the good steps
    since; `peak` (2,), the highest scores since the last log line.
    """

    def __init__(self, config: StabilityConfig | None = None) -> None:
        self.config = config
        self.device_state: dict[str, torch.Tensor] = {}
        self.skipped_steps = 0
        self.cut_until = 0
        self.rollbacks_in_row = 0
        self.skipped_spans: list[list[int]] = []  # [step gone back to, step reached before]
        self.rollback_due = False
        self.update_ratios: list[float] = []  # update norm over learning rate, at the last lines

    def accept(
        self, loss: torch.Tensor, norm: torch.Tensor, has_targets: torch.Tensor
    ) -> torch.Tensor:
        """Whether to keep a step with this mean loss and gradient norm: a bool on the device.

        A step that teaches nothing, without targets or with a gradient of zero, stays out of the
        window: RLVR may have many in a row, and beside zeros every other step would be a spike.
        """
        values = torch.stack([loss, norm]).float()  # (2,)
        good = values.isfinite().all()
        if self.config is None:
            return good
        state, window = self._prepare(values.device), self.config.window
        z = _scores(values, state["history"], state["kept"])
        good &= (z <= (self.config.sigma or math.inf)).all()

        counts = good & has_targets & (norm > 0)
        slots = torch.arange(window, device=values.device)
        written = counts & (slots == state["kept"] % window)
        state["history"] = torch.where(written, values[:, None], state["history"])
        state["kept"] = state["kept"] + counts
        state["peak"] = torch.maximum(state["peak"], z.nan_to_num(0.0, posinf=0.0))
        state["calm"] = torch.where(good, state["calm"] + counts, 0)
        over = state["calm"] >= self.config.calm_steps
        state["in_row"] = torch.where(over, 0, state["in_row"] + ~good)
        return good

    def _prepare(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The state on the device; anew where there is none, or of another window."""
        state, shape = self.device_state, (2, self.config.window)
        if not state or state["history"].shape != shape:
            count = torch.zeros((), dtype=torch.int64, device=device)
            state |= {"history": torch.zeros(shape, device=device), "kept": count}
            state |= {"in_row": count, "calm": count, "peak": torch.zeros(2, device=device)}
        return state

    def cut_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Lower the scheduled rate of this step while a cut lasts."""
        if step < self.cut_until:
            for group in optimizer.param_groups:
                group["lr"] *= self.config.cut_factor

    def review(self, step: int, skipped: int) -> dict[str, float]:
        """Escalate if need be, after `skipped` more steps were; return the metrics.

        Raises:
            ConfigError: too many steps were skipped in a row.
        """
        self.skipped_steps += skipped
        values: dict[str, float] = {"stability/skipped_steps": self.skipped_steps}
        if skipped:
            get_logger().warning(f"{skipped} step(s) skipped: a spike, or not finite")
        if self.config is None or not self.device_state:
            return values
        state = self.device_state
        in_row, calm, *peak = torch.stack([state["in_row"], state["calm"], *state["peak"]]).tolist()
        state["peak"] = torch.zeros_like(state["peak"])
        if calm >= self.config.calm_steps:
            self.rollbacks_in_row = 0
        self._escalate(step, int(in_row))
        return values | {
            "stability/loss_z": peak[0],
            "stability/grad_norm_z": peak[1],
            "stability/rate_cut": self.config.cut_factor if step < self.cut_until else 1.0,
            "stability/rollbacks": len(self.skipped_spans),
            "stability/steps_undone": sum(end - start for start, end in self.skipped_spans),
        }

    def watch(self, norm: float, rate: float) -> dict[str, float]:
        """Score the norm of an update made at this learning rate; a skipped one (0) only shows."""
        z = 0.0
        if self.config is not None and norm > 0 and rate > 0:
            ratio, window = norm / rate, self.config.window
            past = torch.zeros(1, window)
            self.update_ratios = self.update_ratios[-window:]  # a resumed run may shorten it
            past[0, : len(self.update_ratios)] = torch.tensor(self.update_ratios)
            z = _scores(torch.tensor([ratio]), past, torch.tensor(len(self.update_ratios))).item()
            self.update_ratios.append(ratio)
            if z > (self.config.sigma or math.inf):
                get_logger().warning(
                    f"the last update was unusually large: {ratio:.3g} times the learning rate, "
                    f"{z:.1f} deviations above the mean of the lines before"
                )
        return {"stability/update_norm": norm, "stability/update_norm_z": z}

    def _escalate(self, step: int, in_row: int) -> None:
        config = self.config
        if in_row >= config.rollback_after:
            if self.rollbacks_in_row >= config.max_rollbacks:
                raise ConfigError(
                    f"step {step:,}: {in_row} steps were skipped in a row, after "
                    f"{self.rollbacks_in_row} rollbacks in a row; their loss or gradient is not "
                    "finite or a spike. Look at the data of these steps; branch off an earlier "
                    "checkpoint with --resume-from and a lower optim.lr; or, if the data is meant "
                    "to be like this, go on with --resume train.stability.sigma=null"
                )
            self.rollback_due = True
        elif config.cut_after is not None and in_row >= config.cut_after:
            if step >= self.cut_until:
                get_logger().warning(
                    f"{in_row} steps skipped in a row: learning rate times {config.cut_factor} for "
                    f"{config.cut_steps} steps"
                )
            self.cut_until = step + config.cut_steps

    def rolled_back(self, earlier: dict[str, Any] | None, span: list[int]) -> None:
        """Take the window of the checkpoint gone back to; what was counted stays counted.

        A cut goes on from there. Without a checkpoint (None) only the row of skipped steps ends.
        """
        if earlier is not None:
            device = self.device_state["in_row"].device
            self.device_state = {k: v.to(device) for k, v in earlier["device_state"].items()}
            self.skipped_spans.append(span)
            self.cut_until = min(self.cut_until, span[0] + self.config.cut_steps)
        for key in ("in_row", "calm"):
            self.device_state[key] = torch.zeros_like(self.device_state[key])
        self.rollbacks_in_row += 1
        self.rollback_due = False

    def state_dict(self) -> dict[str, Any]:
        keys = ("device_state", "skipped_steps", "cut_until", "rollbacks_in_row", "skipped_spans")
        return {key: getattr(self, key) for key in (*keys, "update_ratios")}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self.device_state = {k: v.to(device) for k, v in state["device_state"].items()}


def _scores(values: torch.Tensor, history: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """How many deviations `values` (k,) lie above `history` (k, window); 0 while it is short."""
    window = history.shape[1]
    filled = torch.arange(window, device=values.device) < kept
    count = filled.sum().clamp(min=1)
    mean = (history * filled).sum(1) / count  # (k,)
    deviation = (((history - mean[:, None]) ** 2 * filled).sum(1) / count).sqrt()
    scale = torch.maximum(deviation, RELATIVE_FLOOR * mean.abs()).clamp(min=1e-12)
    return torch.where(kept >= window // 2, (values - mean) / scale, 0.0)


def watched_weights(model: torch.nn.Module) -> torch.Tensor:
    """A copy of every `WATCHED_STRIDE`-th weight that learns, by which an update is measured."""
    learning = (p.detach().flatten() for p in model.parameters() if p.requires_grad)
    return torch.cat([weights[::WATCHED_STRIDE] for weights in learning])


def update_norm(model: torch.nn.Module, before: torch.Tensor) -> torch.Tensor:
    """The norm of what a step added to all weights, told from the watched ones; on the device."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (watched_weights(model) - before).norm() * math.sqrt(learning / len(before))


def roll_back(
    training: Training, checkpointer: Checkpointer, metrics: MetricsLog, dist: Distributed
) -> None:
    """Load the last checkpoint saved in calm; the data goes on where it is."""
    checkpointer.wait()
    dist.barrier()
    found, reached = checkpointer.latest(_saved_in_calm), training.step
    dist.barrier()  # all have read it before the first process saves again
    if found is None:
        get_logger().warning("no checkpoint to roll back to; going on as it is")
        training.stability.rolled_back(None, [])
        return
    path, state = found
    training.go_back_to(state)
    training.stability.rolled_back(state["stability"], [training.step, reached])
    get_logger().warning(f"rolled back from step {reached:,} to {path}; the data goes on")
    if dist.is_main:
        for log in (metrics, *training.logs):
            log.cut_back(training.step, evaluated=training.evaluated_at == training.step)


def _saved_in_calm(state: dict) -> bool:
    return state["stability"]["device_state"]["in_row"].item() == 0
