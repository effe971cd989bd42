"""Policy-gradient losses: what GRPO and its descendants make of groups of rewarded completions.

For each prompt a group of G completions y_1 ... y_G is sampled and rewarded. A completion's
advantage says how much better it is than its group, and every one of its tokens t gets it:

    ratio_t = π(y_t) / π_old(y_t)          π_old: the policy at the time of the rollout
    loss_t  = −min(ratio_t A, clip(ratio_t, 1 − low, 1 + high) A) + kl_weight KL_t

How the tokens are averaged is the choice that changes results most. The training loop divides a sum
of losses by a sum of batch weights, so each average is a pair of a token's share and a weight:

                                                share of a token    weight of a batch
    token      DAPO (Yu et al. 2025)            1                   its completions' tokens
    sequence   GRPO (Shao et al. 2024)          1 / |y|             its completions
    constant   Dr. GRPO (Liu et al. 2025)       1                   its completions × max_tokens

Tokens come as flat (N,) tensors; those that no completion sampled have a share of 0.

Left out: a critic (PPO), leave-one-out baselines (RLOO: centred advantages times G / (G − 1)),
sequence-level ratios (GSPO), an entropy bonus.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from utils.config import Config, Problem

MAX_LOG_RATIO = 20.0  # e^20 is beyond any clip; e^89 would be infinite in float32
DEVIATION_FLOOR = 1e-6


class PolicyConfig(Config):
    """How rewards become a gradient."""

    advantage: Literal["centred", "normalised"] = "centred"
    """centred: reward minus the group's mean (Dr. GRPO); normalised: that divided by the group's
    deviation (GRPO)."""
    normalisation: Literal["token", "sequence", "constant"] = "token"
    """How tokens are averaged: see the table in train/policy.py."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The policy gains nothing by moving a token's ratio below 1 - clip_low or above
    1 + clip_high. The wider upper side lets rare tokens grow (DAPO's clip-higher)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the reference; 0: no reference is needed."""
    engine_ratio_cap: float | None = 2.0
    """Cap of the weight that corrects for the generation engine's log-probabilities; null: no
    correction."""
    overlong_tokens: int = 0
    """Completions that come within so many tokens of the limit lose reward, up to 1 (DAPO's soft
    punishment); 0: none does."""

    def problems(self) -> Iterator[Problem]:
        if not 0 < self.clip_low <= 1:
            yield Problem(("clip_low",), f"clip_low ({self.clip_low}) must be above 0, at most 1")
        if not self.clip_high > 0:
            yield Problem(("clip_high",), f"clip_high ({self.clip_high}) must be above 0")
        for key in ("kl_weight", "overlong_tokens"):
            if getattr(self, key) < 0:
                yield Problem((key,), f"{key} ({getattr(self, key)}) is negative")
        if self.engine_ratio_cap is not None and self.engine_ratio_cap < 1:
            yield Problem(
                ("engine_ratio_cap",),
                f"engine_ratio_cap ({self.engine_ratio_cap}) must be at least 1, or null: below 1 "
                "it would shrink every token's gradient",
            )


# ---------------------------------------------------------------------------------------------
# Rewards to advantages


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """How much better than its group each completion is.

        centred      A_i = r_i − mean(r)                  Dr. GRPO (Liu et al. 2025)
        normalised   A_i = (r_i − mean(r)) / std(r)       GRPO (Shao et al. 2024)

    The deviation is the sample's (over G − 1), as in TRL and verl, and is kept off 0.

    Args:
        rewards: (groups, G), G at least 2.

    Returns:
        (groups, G); 0 throughout a group whose rewards are equal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(~has_signal(rewards)[:, None], 0.0)  # not a rounding error of 0
    if kind == "centred":
        return centred
    return centred / (rewards.std(1, keepdim=True) + DEVIATION_FLOOR)


def has_signal(rewards: Tensor) -> Tensor:
    """(groups,) bool: not all rewards of the group (groups, G) are equal.

    The others teach nothing. DAPO's dynamic sampling drops them and samples others in their place.
    """
    return rewards.amax(1) > rewards.amin(1)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What is added to the rewards of long completions (DAPO, Yu et al. 2025, eq. 13).

         0                                     |y| ≤ max_tokens − buffer
        ((max_tokens − buffer) − |y|) / buffer in between
        −1                                     |y| ≥ max_tokens

    Without it a correct answer just before the limit is worth 1 and one just after it 0, which
    punishes what may have been good reasoning.

    Args:
        lengths: completions' lengths in tokens, of any shape.
        buffer: tokens before the limit; 0: no penalty.
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1.0, 0.0)


# ---------------------------------------------------------------------------------------------
# Tokens to a loss


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    config: PolicyConfig,
    *,
    engine_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token, and what is measured of it.

    Args:
        logp: (N,) log-probabilities under the policy; the only input that gets a gradient.
        old_logp: (N,) under the policy of the rollout, computed as `logp` is; `logp.detach()` where
            a rollout is used for a single step.
        advantage: (N,) of the completion that the token belongs to.
        engine_logp: (N,) as the generation engine gave them, for `engine_weight`.
        ref_logp: (N,) under the reference; needed if `kl_weight` is set.

    Returns:
        (N,) losses, and the (N,) metrics of `token_metrics`.
    """
    ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    losses = clipped_loss(ratio, advantage, config.clip_low, config.clip_high)
    if engine_logp is not None and config.engine_ratio_cap is not None:
        losses = losses * engine_weight(old_logp, engine_logp, config.engine_ratio_cap)
    if config.kl_weight:
        losses = losses + config.kl_weight * k3(logp, ref_logp)
    return losses, token_metrics(logp, old_logp, ratio, advantage, config, engine_logp, ref_logp)


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with DAPO's two sides (eq. 10).

    loss = −min(ratio A, clip(ratio, 1 − low, 1 + high) A)
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from sampled tokens (k3 of Schulman 2020; GRPO, eq. 4).

        d = log π_ref − log π
        KL ≈ e^d − d − 1

    It is unbiased for tokens sampled from π, never negative, and less noisy than −d.
    """
    d = (ref_logp - logp).clamp(max=MAX_LOG_RATIO)
    return d.exp() - d - 1


def engine_weight(old_logp: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling between trainer and engine (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"; the truncation is Ionides' of 2008).

        weight = min(π_old(y) / π_engine(y), cap)

    The tokens were drawn from the engine's distribution. Its kernels round otherwise than the
    trainer's, so even with equal weights the two differ, and uncorrected the gradient is biased.
    """
    return (old_logp - engine_logp).detach().exp().clamp(max=cap)


def token_metrics(
    logp: Tensor,
    old_logp: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    config: PolicyConfig,
    engine_logp: Tensor | None,
    ref_logp: Tensor | None,
) -> dict[str, Tensor]:
    """Detached values (N,), in nats where they are of log-probabilities:

    rlvr/clip_frac    1 where the clip has taken the gradient away
    rlvr/entropy      −log π(y_t): its mean over tokens sampled from π is the entropy's estimate
    rlvr/kl           k3 to the reference, if there is one
    rlvr/engine_gap   |log π_old − log π_engine|, if the engine's are known
    """
    too_high = (advantage > 0) & (ratio > 1 + config.clip_high)
    too_low = (advantage < 0) & (ratio < 1 - config.clip_low)
    metrics = {"rlvr/clip_frac": (too_high | too_low).float(), "rlvr/entropy": -logp}
    if ref_logp is not None:
        metrics["rlvr/kl"] = k3(logp, ref_logp)
    if engine_logp is not None:
        metrics["rlvr/engine_gap"] = (old_logp - engine_logp).abs()
    return {name: value.detach() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------
# Sums and what divides them


def token_shares(lengths: Tensor, kind: str) -> Tensor:
    """The factor of each token's loss in the sum, given the length of its completion.

    Args:
        lengths: (N,) tokens of the completion that each token belongs to; 0 where none does.
    """
    share = 1 / lengths.clamp(min=1) if kind == "sequence" else torch.ones_like(lengths).float()
    return share * (lengths > 0)


def metric_shares(lengths: Tensor, kind: str, max_tokens: int) -> Tensor:
    """The same for metrics, which are means also where the loss is divided by a constant: over
    tokens for `token`, over completions otherwise."""
    if kind == "constant":
        return max_tokens * token_shares(lengths, "sequence")
    return token_shares(lengths, kind)


def batch_weight(n_sequences: int, n_tokens: int, kind: str, max_tokens: int) -> float:
    """What a batch adds to the denominator of the loss.

    Args:
        n_tokens: of all its completions together.
        max_tokens: the limit of a completion's length, Dr. GRPO's constant.
    """
    weights = {"token": n_tokens, "sequence": n_sequences, "constant": n_sequences * max_tokens}
    return float(weights[kind])
