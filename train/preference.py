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

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config import Config, Problem

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
