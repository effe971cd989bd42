"""Preference losses: what DPO, its relatives and Bradley-Terry make of a pair of answers.

A pair is a prompt x with a chosen answer c and a rejected one r. The log-probability of an answer
is the sum over its tokens, the end-of-turn token included; its log-ratio compares the policy with
the reference, the model that training started from:

    ratio(y) = log π(y|x) − log π_ref(y|x)                 nats per answer

Every loss but Bradley-Terry's is a function of the two log-ratios, so each stands here in a line or
two; `pair_losses` chooses one. Those of PER_TOKEN see ratio(y) / |y|, with |y| the answer's tokens.

The rewards that the metrics speak of are β times the log-ratios that the loss sees (for
Bradley-Terry, the scores). A tie counts half, so an untrained policy has an accuracy of 0.5.

Left out: hinge losses (SLiC), losses without a reference (SimPO, ORPO), unpaired answers (KTO).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.preferences import PairBatch
from models.transformer import Transformer
from models.verifier import Verifier
from train.loss import token_logprobs
from utils.config import Config, Problem
from utils.distributed import Distributed

PER_TOKEN = ("dpo_norm", "ipo")
SMOOTHED = ("dpo", "dpo_norm")


class PreferenceConfig(Config):
    """Which loss, and how far the policy may move from its reference."""

    loss: Literal["dpo", "dpo_norm", "ipo", "apo_zero", "apo_down", "bradley_terry"] = "dpo"
    beta: float = 0.1
    """The larger, the closer the policy stays to the reference; not read by bradley_terry."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round (dpo, dpo_norm)."""
    nll_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-probability per token, added to the loss."""
    reference: Literal["cached", "live"] = "cached"
    """cached: the reference's log-probabilities are computed once, and only the policy is in
    memory; live: a second model computes them at each step."""
    warn_fall: float = 0.1
    """Warn when the held-out chosen answers have lost this much, in nats per token (0.1: their
    perplexity has risen by 10%) ..."""
    warn_window: int = 200
    """... within so many steps."""

    def problems(self) -> Iterator[Problem]:
        for key in ("beta", "warn_fall", "warn_window"):
            if not getattr(self, key) > 0:
                yield Problem((key,), f"{key} ({getattr(self, key)}) must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            yield Problem(
                ("label_smoothing",),
                f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 0.5",
            )
        if self.nll_weight < 0:
            yield Problem(("nll_weight",), f"nll_weight ({self.nll_weight}) is negative")
        if self.label_smoothing and self.loss not in SMOOTHED:
            yield Problem(
                ("label_smoothing", "loss"),
                f"label_smoothing is defined for {' and '.join(SMOOTHED)}, not for {self.loss}; "
                "set it to 0",
            )
        if self.nll_weight and self.is_verifier:
            yield Problem(
                ("nll_weight", "loss"), "nll_weight: bradley_terry scores answers and learns none"
            )

    @property
    def is_verifier(self) -> bool:
        return self.loss == "bradley_terry"


# ---------------------------------------------------------------------------------------------
# The losses: log-ratios (P, 2), chosen then rejected, to one loss for each pair (P,)


def dpo(ratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing ε, conservative DPO (Mitchell 2023).

        h = β (ratio(c) − ratio(r))
        loss = −(1 − ε) log σ(h) − ε log σ(−h)

    On ratios per token it is the length-normalised DPO of Tülu 3 (Lambert et al. 2024) and OLMo 2,
    whose β of 5 stands where DPO has 0.1.
    """
    h = beta * (ratios[:, 0] - ratios[:, 1])
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def ipo(ratios: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17, their τ is β): the margin is to be 1 / 2β, and no more.

        loss = (ratio(c) − ratio(r) − 1 / 2β)²

    The ratios are per token, as in TRL on the authors' advice: one margin for all pairs makes sense
    only for a quantity that does not grow with an answer's length.
    """
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)).square()


def apo_zero(ratios: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024): chosen up, rejected down, each for itself.

        loss = 1 − σ(β ratio(c)) + σ(β ratio(r))

    For chosen answers better than the model's own. The 1, as in TRL, makes 0 the best value.
    """
    return 1 - torch.sigmoid(beta * ratios[:, 0]) + torch.sigmoid(beta * ratios[:, 1])


def apo_down(ratios: Tensor, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024): both down, the rejected answer further.

        loss = 1 + σ(β ratio(c)) − σ(β (ratio(c) − ratio(r)))

    For a model whose own answers are better than the chosen ones. The 1 is as in `apo_zero`.
    """
    margin = ratios[:, 0] - ratios[:, 1]
    return 1 + torch.sigmoid(beta * ratios[:, 0]) - torch.sigmoid(beta * margin)


def bradley_terry(scores: Tensor) -> Tensor:
    """The likelihood of the choices if P(c over r) = σ(score(c) − score(r)).

        loss = −log σ(score(c) − score(r))

    Bradley & Terry 1952; as the loss of a reward model, Ouyang et al. 2022, eq. 1.
    """
    return -F.logsigmoid(scores[:, 0] - scores[:, 1])


def pair_losses(
    policy: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """The configured loss of each pair, and the rewards of its answers.

    With `nll_weight` α the loss has α (−log π(c|x)) / |c| added (RPO: Pang et al. 2024), which
    holds the chosen answer's probability up.

    Args:
        policy, reference: (P, 2) log-probabilities of chosen and rejected answers.
        lengths: (P, 2) tokens of the answers; at least 1.

    Returns:
        (P,) losses and (P, 2) rewards.
    """
    ratios = policy - reference
    if config.loss in PER_TOKEN:
        ratios = ratios / lengths
    if config.loss in SMOOTHED:
        losses = dpo(ratios, config.beta, config.label_smoothing)
    else:
        function = {"ipo": ipo, "apo_zero": apo_zero, "apo_down": apo_down}[config.loss]
        losses = function(ratios, config.beta)
    if config.nll_weight:
        losses = losses - config.nll_weight * policy[:, 0] / lengths[:, 0]
    return losses, config.beta * ratios


# ---------------------------------------------------------------------------------------------
# What is measured


def reward_metrics(rewards: Tensor) -> dict[str, Tensor]:
    """Of rewards or scores (P, 2), for each pair:

    pref/reward_accuracy   1 if reward(c) > reward(r), 0.5 if equal, 0 otherwise
    pref/reward_margin     reward(c) − reward(r)
    """
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "pref/reward_accuracy": (margin.sign() + 1) / 2,
        "pref/reward_margin": margin,
    }


def likelihood_metrics(policy: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Of log-probabilities (P, 2), for each pair, in nats per answer:

    pref/chosen_logp       log π(c|x)
    pref/rejected_logp     log π(r|x)
    pref/kl                mean over c and r of log π_ref(y|x) − log π(y|x)

    The last is the plain Monte Carlo estimate (k1 in Schulman 2020) of KL(π_ref ‖ π). It has no
    bias where the answers were sampled from the reference, as DPO supposes; for answers that others
    wrote it says how far the policy has turned away from them, and may be negative.
    """
    return {
        "pref/chosen_logp": policy[:, 0],
        "pref/rejected_logp": policy[:, 1],
        "pref/kl": (reference - policy).mean(1),
    }


def chosen_fall(history: list[tuple[int, float]], window: int) -> float:
    """Nats by which the last value of `history` lies below the highest within `window` steps.

    Args:
        history: (step, held-out chosen log-probability), in the order of steps.
    """
    last_step, last = history[-1]
    return max(value for step, value in history if step >= last_step - window) - last


# ---------------------------------------------------------------------------------------------
# From tokens to answers


def sum_by_sequence(values: Tensor, seq_ids: Tensor, n_sequences: int) -> Tensor:
    """Sums of the `values` (N,) that belong to each sequence; an id of -1 belongs to none.

    Returns:
        (n_sequences,) in the dtype of `values`.
    """
    sums = values.new_zeros(n_sequences + 1)
    return sums.index_add(0, seq_ids + 1, values)[1:]


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
# Over all pairs

LossFn = Callable[[Transformer, PairBatch], tuple[Tensor, dict[str, Tensor]]]


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
    return dist.all_reduce_sum(table)[:-1].cpu()
