"""Held-out measures that a training run reports while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from data.packing import Batch
from utils.distributed import Distributed

LossFn = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    batches: Mapping[str, list[Batch]],
    shares: Mapping[str, float],
    loss_fn: LossFn,
    dist: Distributed,
) -> dict[str, float]:
    """Mean held-out loss in nats per token of each domain, and of the mixture.

    `val/loss` weighs the domains by their share of the training tokens: it estimates the training
    loss on unseen documents. Perplexities are the exponentials of the losses.

    Returns:
        val/loss, val/ppl, and `<domain>_val_loss`, `<domain>_val_ppl` for each domain.
    """
    model.eval()
    metrics, mixture = {}, 0.0
    for domain, members in batches.items():
        total = torch.zeros(2, dtype=torch.float64, device=dist.device)  # loss sum, weight
        for batch in members[dist.rank :: dist.world_size]:
            loss, _ = loss_fn(model, batch.to(dist.device))
            total += torch.stack([loss.double(), torch.full_like(loss, batch.weight).double()])
        loss_sum, weight = dist.all_reduce_sum(total).tolist()
        loss = loss_sum / weight
        mixture += loss * shares[domain] / sum(shares[d] for d in batches)
        metrics |= {f"{domain}_val_loss": loss, f"{domain}_val_ppl": _exp(loss)}
    model.train()
    return {"val/loss": mixture, "val/ppl": _exp(mixture), **metrics}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
