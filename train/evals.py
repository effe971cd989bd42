"""Held-out measures that a training run reports while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt

from data.packing import Batch
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from models.generate import Engine
from train.groups import Group, sample_groups
from train.judge import Judge
from utils.config import Config
from utils.distributed import Distributed

LossFn = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class PassConfig(Config):
    """What is sampled at an evaluation of an RLVR run."""

    samples_per_prompt: PositiveInt = 4
    """Completions of each held-out prompt; pass@k is told for 1 and for this k."""
    samples: NonNegativeInt = 10
    """So many completions are kept in samples.jsonl."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, eq. 1).

    Args:
        n: samples that were drawn, `correct` of them right; at least k.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def held_out_pass(
    engine: Engine,
    prompts: Sequence[Prompt],
    config: PassConfig,
    max_new_tokens: int,
    seed: int,
    judge: Judge,
    tokenizer: Tokenizer,
    dist: Distributed,
) -> tuple[dict[str, float], list[dict]]:
    """Samples every held-out prompt as rollouts do, each time with the same seeds.

    Returns:
        rlvr/val_pass_at_1, rlvr/val_pass_at_<k>, the first for each source too if there are
        several, rlvr/val_reward_mean and rlvr/val_stopped_frac; and the samples to keep.
    """
    if not prompts:
        return {}, []
    engine.refresh()
    n, numbers = config.samples_per_prompt, range(len(prompts))
    key = (seed, "evaluation")
    groups = sample_groups(engine, prompts, numbers, n, max_new_tokens, key, judge, dist)
    right = [sum(rule == 1 for rule in group.rule) for group in groups]
    sampled = [completion for group in groups for completion in group.completions]
    metrics = {
        "rlvr/val_reward_mean": _mean([r for group in groups for r in group.reward]),
        "rlvr/val_stopped_frac": _mean([completion.stopped for completion in sampled]),
        "rlvr/val_response_tokens": _mean([len(completion.tokens) for completion in sampled]),
    }
    for k in {1, n}:
        metrics[f"rlvr/val_pass_at_{k}"] = _mean([pass_at_k(n, c, k) for c in right])
    sources = sorted({prompt.source for prompt in prompts})
    for source in sources if len(sources) > 1 else ():
        of_source = [c / n for c, p in zip(right, prompts, strict=True) if p.source == source]
        metrics[f"rlvr/val_pass_at_1_{source}"] = _mean(of_source)
    kept = min(config.samples, len(groups))
    chosen = [groups[i * len(groups) // kept] for i in range(kept)]
    return metrics, [_sample(group, prompts[group.prompt], tokenizer) for group in chosen]


def _sample(group: Group, prompt: Prompt, tokenizer: Tokenizer) -> dict:
    completion = group.completions[0]
    return {
        "prompt": prompt.messages[-1]["content"],
        "completion": tokenizer.decode(completion.answer),
        "answer": prompt.answer,
        "rule": group.rule[0],
        "reward": group.reward[0],
        "stopped": completion.stopped,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
        if shares[domain]:  # else a loss that is not finite would spoil the mixture
            mixture += loss * shares[domain] / sum(shares[d] for d in batches)
        metrics |= {f"{domain}_val_loss": loss, f"{domain}_val_ppl": _exp(loss)}
    model.train()
    return {"val/loss": mixture, "val/ppl": _exp(mixture), **metrics}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
