"""A run's whole state: what a checkpoint holds and a resumed run starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from data.packing import Batch
from models.transformer import Transformer
from optim.scheduler import Schedule
from train.stability import Stability
from utils.checkpoint import FORMAT_VERSION
from utils.cost_tracker import CostTracker
from utils.logging import MetricsLog
from utils.seed import rng_state, set_rng_state


@dataclass
class Averages:
    """Sums since the last log line, on the device; part of the state, so that no line changes."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take(self) -> dict[str, float]:
        """Everything as floats, with one host sync; starts anew."""
        values = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        result = dict(zip(self.sums, values, strict=True))
        self.sums = {}
        return result


@dataclass
class Training:
    """A run's whole state: what a checkpoint holds and a resumed run starts from.

    `identity` is what a checkpoint says of itself: stage, model_config, tokenizer, chat_template,
    config.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Iterator[list[Batch]]
    cost: CostTracker
    identity: dict
    measures: Callable[[], dict[str, float]] = dict  # what a stage logs besides
    step: int = 0
    tokens: int = 0
    evaluated_at: int = -1
    averages: Averages = field(default_factory=Averages)
    stability: Stability = field(default_factory=Stability)
    logs: list[MetricsLog] = field(default_factory=list)  # beside the metrics; cut back with them
    is_branch: bool = False  # begins at another run's step; nothing of its own is saved yet
    boundary: dict | None = None  # loader and generators before a step that is not finished

    def weights(self) -> dict:
        """The self-contained checkpoint that the next stage and inference need."""
        return {
            "format_version": FORMAT_VERSION,
            **self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "model": self.model.state_dict(),
        }

    def state_dict(self) -> dict:
        """`weights()` and everything needed to go on training."""
        boundary = self.boundary or self.position()
        return self.weights() | {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            **boundary,
            "cost": self.cost.state_dict(),
            "metrics_window": dict(self.averages.sums),
            "evaluated_at": self.evaluated_at,
            "stability": self.stability.state_dict(),
        }

    def position(self) -> dict:
        """Where the data and the random generators are."""
        return {"loader": self.loader.state_dict(), "rng": rng_state()}

    def load_state_dict(self, state: dict) -> None:
        self.go_back_to(state)
        self.schedule.load_state_dict(state["schedule"])
        self.loader.load_state_dict(state["loader"])
        self.cost.load_state_dict(state["cost"])
        self.stability.load_state_dict(state["stability"], self.device)
        set_rng_state(state["rng"])

    def go_back_to(self, state: dict) -> None:
        """Take what was learned and counted until a checkpoint; data and generators go on."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages = Averages({k: v.to(self.device) for k, v in state["metrics_window"].items()})
        self.step, self.tokens = state["step"], state["tokens"]
        self.cost.tokens = state["cost"]["tokens"]
        self.evaluated_at = state["evaluated_at"]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
