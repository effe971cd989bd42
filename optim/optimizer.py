"""The optimizer of a stage: AdamW, fused, over groups in which every parameter stands once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from optim.param_groups import param_groups
from utils.config import Config, Problem


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Of matrices; embeddings, norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def problems(self) -> Iterator[Problem]:
        if not self.lr > 0:
            yield Problem(("lr",), f"lr ({self.lr}) must be above 0")
        if self.weight_decay < 0:
            yield Problem(("weight_decay",), f"weight_decay ({self.weight_decay}) is negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Problem(("betas",), f"betas {list(self.betas)} must be at least 0 and below 1")


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> torch.optim.AdamW:
    """Fused AdamW: one kernel per group, and steps can be skipped on the device."""
    groups = param_groups(named_parameters, config.weight_decay)
    for group in groups:
        group["initial_lr"] = config.lr
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True
    )
