"""The optimizer of a stage, over groups in which every parameter stands once: fused AdamW, or Muon
for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from optim.muon import Muon
from optim.param_groups import param_groups
from utils.config import Config, Problem


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter 2019), and whether Muon takes its place inside the blocks."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices inside the blocks, AdamW for embedding and norms."""
    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Of matrices; embeddings, norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_lr: float | None = None
    """Muon's own peak rate; null: `lr`, since its updates are as large as AdamW's."""
    muon_momentum: float = 0.95

    def problems(self) -> Iterator[Problem]:
        for key in ("lr", "muon_lr"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                yield Problem((key,), f"{key} ({value}) must be above 0")
        if self.weight_decay < 0:
            yield Problem(("weight_decay",), f"weight_decay ({self.weight_decay}) is negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Problem(("betas",), f"betas {list(self.betas)} must be at least 0 and below 1")
        if not 0 <= self.muon_momentum < 1:
            yield Problem(
                ("muon_momentum",),
                f"muon_momentum ({self.muon_momentum}) must be at least 0 and below 1",
            )
        if self.kind != "muon" and self.muon_lr is not None:
            yield Problem(
                ("muon_lr", "kind"), f"muon_lr ({self.muon_lr}) is read only with kind 'muon'"
            )


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> torch.optim.AdamW:
    """AdamW or Muon; few kernels a step, and steps can be skipped on the device."""
    is_muon = config.kind == "muon"
    groups = param_groups(named_parameters, config.weight_decay, is_muon)
    for group in groups:
        group["initial_lr"] = config.lr
        if group["name"] == "muon":
            group["initial_lr"] = config.muon_lr or config.lr
            group["momentum"] = config.muon_momentum
        group["lr"] = group["initial_lr"]
    kind = Muon if is_muon else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)
