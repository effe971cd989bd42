"""From batches of pairs to losses, held-out measures and the reference's log-probabilities.

The reference never changes, so what it says of every answer is computed once, with the policy's own
weights before the first step, and kept on disk: training then holds one model and not two. A file's
name carries a digest of all that decides its content (the reference's weights, the pairs' tokens,
precision and attention kernel), so another model or another row makes another file. Which pairs
share a row is left out of the digest: documents do not see each other, and a packed answer's
log-probability is that of the answer alone, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from data.pair_loader import PairBatch
from data.shards import write_atomic
from models.transformer import Transformer
from models.verifier import Verifier
from train.loss import token_logprobs
from train.preference import (
    PreferenceConfig,
    bradley_terry,
    likelihood_metrics,
    pair_losses,
    reward_metrics,
    sum_by_sequence,
)
from utils.distributed import Distributed
from utils.logging import get_logger

LossFn = Callable[[Transformer, PairBatch], tuple[Tensor, dict[str, Tensor]]]


def answer_logprobs(model: Transformer, batch: PairBatch) -> Tensor:
    """(P, 2) float32 log-probabilities of the chosen and rejected answers; 0 where no pair is."""
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)  # (B, T, C)
    logp, _ = token_logprobs(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
    sums = sum_by_sequence(logp, batch.seq_ids.flatten(), 2 * len(batch.pair_ids))
    return sums.view(-1, 2)  # (P, 2)


def preference_loss(
    model: Transformer,
    batch: PairBatch,
    config: PreferenceConfig,
    reference: Transformer | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a batch's pairs, and what to log of it, summed.

    Args:
        reference: the model to compare with; None: the batch has its log-probabilities.
    """
    policy = answer_logprobs(model, batch)  # (P, 2)
    with torch.no_grad():
        fixed = batch.ref_logp if reference is None else answer_logprobs(reference, batch)
    losses, rewards = pair_losses(policy, fixed, batch.lengths, config)
    policy, rewards = policy.detach(), rewards.detach()
    metrics = reward_metrics(rewards) | likelihood_metrics(policy, fixed)
    return _sums(losses, metrics, batch)


def verifier_loss(model: Verifier, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed Bradley-Terry loss of a batch's pairs, and what to log of it, summed."""
    scores = answer_scores(model, batch)  # (P, 2)
    return _sums(bradley_terry(scores), reward_metrics(scores.detach()), batch)


def answer_scores(model: Verifier, batch: PairBatch) -> Tensor:
    """(P, 2) float32 scores of the chosen and rejected answers."""
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)  # (B, T, C)
    return model.scores(hidden.flatten(0, 1)[batch.last_tokens])  # (P, 2)


def _sums(
    losses: Tensor, metrics: dict[str, Tensor], batch: PairBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    real = batch.pair_ids >= 0
    sums = {name: values.where(real, 0).sum() for name, values in metrics.items()}
    return losses.where(real, 0).sum(), sums


# ---------------------------------------------------------------------------------------------
# Over the held-out pairs


@torch.no_grad()
def held_out_preference(
    model: Transformer, batches: list[PairBatch], loss_fn: LossFn, dist: Distributed
) -> dict[str, float]:
    """Means over the held-out pairs: `val/loss`, and `pref/val_x` for each `pref/x` of training."""
    model.eval()
    totals: dict[str, Tensor] = {}
    for batch in batches[dist.rank :: dist.world_size]:
        loss, metrics = loss_fn(model, batch.to(dist.device))
        for name, value in {"val/loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0) + value.double()
    model.train()
    sums = dist.all_reduce_sum(torch.stack([*totals.values()])).tolist()
    pairs = sum(batch.weight for batch in batches)
    names = (name.replace("pref/", "pref/val_") for name in totals)
    return {name: value / pairs for name, value in zip(names, sums, strict=True)}


@torch.no_grad()
def score_statistics(
    model: Verifier, batches: list[PairBatch], dist: Distributed
) -> dict[str, float]:
    """Mean and standard deviation of the held-out answers' scores, by which to standardise."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=dist.device)  # number, sum, squares
    for batch in batches[dist.rank :: dist.world_size]:
        batch = batch.to(dist.device)
        scores = answer_scores(model, batch)[batch.pair_ids >= 0].double()
        totals += torch.stack([scores.new_tensor(scores.numel()), scores.sum(), (scores**2).sum()])
    model.train()
    number, total, squares = dist.all_reduce_sum(totals).tolist()
    mean = total / number
    return {"mean": mean, "deviation": max(squares / number - mean**2, 0.0) ** 0.5}


# ---------------------------------------------------------------------------------------------
# The reference


def cached_reference(
    model: Transformer,
    batches: Iterable[PairBatch],
    n_pairs: int,
    identity: dict[str, str],
    cache_dir: str,
    dist: Distributed,
) -> Tensor:
    """`reference_logprobs`, read from the cache if every rank finds it there, else computed.

    Args:
        model: the reference; not changed.
        batches: every pair once.
        identity: what the model and the pairs are.
    """
    kernel = model.attention_kernel()[0]
    identity = {**identity, "dtype": str(model.dtype), "kernel": kernel}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"reference-{digest}.safetensors"
    table = _read_table(path, n_pairs)
    found = torch.tensor(float(table is not None), device=dist.device)
    if dist.all_reduce_sum(found) == dist.world_size:
        get_logger().info(f"reference: {n_pairs:,} pairs' log-probabilities from {path}")
        return table
    table = reference_logprobs(model, batches, n_pairs, dist)
    if dist.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, safetensors.torch.save({"logp": table}, {"sha256": _sha256(table)}))
        get_logger().info(f"reference: {n_pairs:,} pairs' log-probabilities computed, in {path}")
    return table


@torch.no_grad()
def reference_logprobs(
    model: Transformer, batches: Iterable[PairBatch], n_pairs: int, dist: Distributed
) -> Tensor:
    """(n_pairs, 2) log-probabilities of every pair's answers, on the host."""
    table = torch.zeros(n_pairs + 1, 2, device=dist.device)  # the last line is for empty places
    for i, batch in enumerate(batches):
        if i % dist.world_size == dist.rank:
            batch = batch.to(dist.device)
            table[batch.pair_ids] = answer_logprobs(model, batch)
    table[-1] = 0
    return dist.all_reduce_sum(table)[:-1].cpu()


def _read_table(path: Path, n_pairs: int) -> Tensor | None:
    """The table at `path`; None if it is not there, or not what was written."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            table, sha256 = file.get_tensor("logp"), file.metadata()["sha256"]
    except (safetensors.SafetensorError, KeyError, TypeError):
        table, sha256 = torch.empty(0), None
    if table.shape == (n_pairs, 2) and _sha256(table) == sha256:
        return table
    get_logger().warning(f"{path} is damaged: computing it again")
    return None


def _sha256(table: Tensor) -> str:
    return hashlib.sha256(table.contiguous().numpy().data).hexdigest()
