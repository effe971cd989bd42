r"""The learning rate over a run: warm-up, then WSD (warm-up, stable, decay) or one cosine.

    wsd   1 |   __________            cosine   1 |   _
            |  /          \                      |  / `-.
            | /            \                     | /     `-.
          0 |/______________\                  0 |/_________`-_
             warmup stable decay                  warmup

WSD (MiniCPM, Hu et al. 2024) leaves the length of a run open: from any checkpoint of the stable
phase a short decay gives a finished model (`decay_now`), and the stable phase can go on later. The
1-sqrt shape is from Hägele et al. 2024.

Steps count from 0. Warm-up ends at full rate on its last step. `final_lr_ratio` is what step
`total_steps` would have, the first that is not run: no step is spent at a rate of zero.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt
from torch.optim import Optimizer

from utils.config import Config, ConfigError, Problem


class ScheduleConfig(Config):
    """How the learning rate rises and falls."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd: warm-up, stable, decay; cosine: one fall from the end of the warm-up on."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the rate rises linearly to its peak."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Warm-up as a part of all steps, for runs whose length follows from their data."""
    decay_fraction: float = Field(default=0.1, ge=0, le=1)
    """The part of all steps that WSD spends decaying, at the end."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Of WSD's decay; 1-sqrt falls fastest at first."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, relative to the peak."""
    decay_now: bool = False
    """Begin the decay at the checkpoint resumed from, and end the run after `decay_steps`."""
    decay_steps: PositiveInt | None = None
    """The length of the decay that `decay_now` begins."""

    def problems(self) -> Iterator[Problem]:
        if self.warmup_steps and self.warmup_fraction:
            yield Problem(
                ("warmup_steps", "warmup_fraction"),
                f"warmup_steps ({self.warmup_steps}) and warmup_fraction ({self.warmup_fraction}) "
                "both give the warm-up: keep one of them",
            )
        if self.decay_now and self.decay_steps is None:
            yield Problem(("decay_now", "decay_steps"), "decay_now needs decay_steps")
        if self.decay_steps is not None and not self.decay_now:
            yield Problem(
                ("decay_steps", "decay_now"),
                f"decay_steps ({self.decay_steps}) is read only with decay_now=true; "
                "the length of the ordinary decay is decay_fraction",
            )
        if self.decay_now and self.kind != "wsd":
            yield Problem(("decay_now", "kind"), f"decay_now needs kind 'wsd', not '{self.kind}'")


class Decay(NamedTuple):
    """The last phase: where it starts, how long it is, and from which factor it falls."""

    start: int
    steps: int
    factor: float


class Schedule:
    """The learning rate's factor at each step of a run.

    Raises:
        ConfigError: warm-up and decay do not fit into `total_steps`.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int) -> None:
        self.config = config
        self.warmup_steps = config.warmup_steps or round(config.warmup_fraction * total_steps)
        steps = total_steps - self.warmup_steps
        if config.kind == "wsd":
            steps = round(config.decay_fraction * total_steps)
        self.decay = Decay(total_steps - steps, steps, 1.0)
        self.branched = False
        if self.warmup_steps > self.decay.start or steps < 0:
            raise ConfigError(
                f"warmup_steps ({self.warmup_steps:,}) and a decay of {max(steps, 0):,} steps do "
                f"not fit into {total_steps:,} steps: shorten one of them or train longer"
            )

    @property
    def total_steps(self) -> int:
        """The length of the run; a branch changes it."""
        return self.decay.start + self.decay.steps

    def factor(self, step: int) -> float:
        """What the peak rate is multiplied by at this step, counted from 0."""
        if step < self.decay.start:
            return min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = min(1.0, (step - self.decay.start) / max(1, self.decay.steps))
        shape = "cosine" if self.config.kind == "cosine" else self.config.decay_shape
        end = self.config.final_lr_ratio
        return end + (self.decay.factor - end) * _remaining(shape, progress)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Sets every group's rate for this step; the peak is kept as the group's `initial_lr`."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def branch(self, step: int) -> None:
        """Begins the decay here, from the rate in force, also from that of another branch."""
        assert self.config.decay_steps is not None  # held by ScheduleConfig.problems
        self.decay = Decay(step, self.config.decay_steps, self.factor(step))
        self.branched = True

    def state_dict(self) -> dict[str, Any]:
        return {"branch": self.decay._asdict() if self.branched else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["branch"]:
            self.decay, self.branched = Decay(**state["branch"]), True


def _remaining(shape: str, progress: float) -> float:
    """From 1 to 0 as `progress` goes from 0 to 1."""
    if shape == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - (math.sqrt(progress) if shape == "1-sqrt" else progress)
