"""Preference losses against values worked out by hand, then their properties.

The pair of all tables below: log-probabilities of -10 (chosen) and -14 (rejected) under the policy,
-12 and -13 under the reference, answers of 4 and 2 tokens. So

    ratio(c) = -10 + 12 = 2        per token  2 / 4 =  0.5
    ratio(r) = -14 + 13 = -1       per token -1 / 2 = -0.5
"""

import math

import pytest
import torch

from train.preference import (
    PreferenceConfig,
    bradley_terry,
    chosen_fall,
    likelihood_metrics,
    pair_losses,
    reward_metrics,
    sum_by_sequence,
)
from utils.config import ConfigError, validate

POLICY = torch.tensor([[-10.0, -14.0]])
REFERENCE = torch.tensor([[-12.0, -13.0]])
LENGTHS = torch.tensor([[4.0, 2.0]])

BY_HAND = [
    # h = 0.5 (2 + 1) = 1.5; -log sigmoid(1.5) = log(1 + e^-1.5) = log 1.2231302
    ({"loss": "dpo", "beta": 0.5}, 0.2014133, (1.0, -0.5)),
    # 0.9 x 0.2014133 + 0.1 x (0.2014133 + 1.5), since -log sigmoid(-h) = h - log sigmoid(h)
    ({"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1}, 0.3514133, (1.0, -0.5)),
    # h = 0.5 (0.5 + 0.5) = 0.5; log(1 + e^-0.5) = log 1.6065307
    ({"loss": "dpo_norm", "beta": 0.5}, 0.4740770, (0.25, -0.25)),
    # 0.9 x 0.4740770 + 0.1 x 0.9740770
    ({"loss": "dpo_norm", "beta": 0.5, "label_smoothing": 0.1}, 0.5240770, (0.25, -0.25)),
    # ((0.5 + 0.5) - 1 / (2 x 0.25))^2 = (1 - 2)^2
    ({"loss": "ipo", "beta": 0.25}, 1.0, (0.125, -0.125)),
    # 1 - sigmoid(1) + sigmoid(-0.5) = 1 - 0.7310586 + 0.3775407
    ({"loss": "apo_zero", "beta": 0.5}, 0.6464821, (1.0, -0.5)),
    # 1 + sigmoid(1) - sigmoid(1.5) = 1 + 0.7310586 - 0.8175745
    ({"loss": "apo_down", "beta": 0.5}, 0.9134841, (1.0, -0.5)),
    # DPO's 0.2014133 + 0.2 x 10 / 4
    ({"loss": "dpo", "beta": 0.5, "nll_weight": 0.2}, 0.7014133, (1.0, -0.5)),
]


@pytest.mark.parametrize(("settings", "loss", "rewards"), BY_HAND)
def test_losses_by_hand(settings: dict, loss: float, rewards: tuple[float, float]) -> None:
    losses, got = pair_losses(POLICY, REFERENCE, LENGTHS, PreferenceConfig(**settings))
    assert losses.tolist() == pytest.approx([loss], abs=1e-6)
    assert got[0].tolist() == pytest.approx(rewards)


def test_bradley_terry_by_hand() -> None:
    # differences 1 and -2: log(1 + e^-1) = log 1.3678794, log(1 + e^2) = log 8.3890561
    losses = bradley_terry(torch.tensor([[1.5, 0.5], [-1.0, 1.0]]))
    assert losses.tolist() == pytest.approx([0.3132617, 2.1269280], abs=1e-6)


GRADIENTS = [
    # DPO: -beta sigmoid(-h) and its opposite; sigmoid(-1.5) = 0.1824255
    ({"loss": "dpo", "beta": 0.5}, (-0.0912128, 0.0912128)),
    # -beta sigmoid(-h) / |y|; sigmoid(-0.5) = 0.3775407
    ({"loss": "dpo_norm", "beta": 0.5}, (-0.0471926, 0.0943852)),
    # 2 (1 - 2) / |y|
    ({"loss": "ipo", "beta": 0.25}, (-0.5, 1.0)),
    # -beta s'(1) and beta s'(-0.5), where s' = s (1 - s): 0.1966119, 0.2350037
    ({"loss": "apo_zero", "beta": 0.5}, (-0.0983060, 0.1175019)),
    # beta (s'(1) - s'(1.5)) and beta s'(1.5); s'(1.5) = 0.1491465: both probabilities fall
    ({"loss": "apo_down", "beta": 0.5}, (0.0237327, 0.0745732)),
    # the NLL term adds -0.2 / 4 to the chosen answer
    ({"loss": "dpo", "beta": 0.5, "nll_weight": 0.2}, (-0.1412128, 0.0912128)),
]


@pytest.mark.parametrize(("settings", "gradient"), GRADIENTS)
def test_gradients_by_hand(settings: dict, gradient: tuple[float, float]) -> None:
    policy = POLICY.clone().requires_grad_()
    losses, _ = pair_losses(policy, REFERENCE, LENGTHS, PreferenceConfig(**settings))
    losses.sum().backward()
    assert policy.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


AT_THE_START = {
    "dpo": math.log(2), "dpo_norm": math.log(2), "ipo": 25.0, "apo_zero": 1.0, "apo_down": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("loss", "expected"), AT_THE_START.items())
def test_policy_that_is_its_reference(loss: str, expected: float) -> None:
    losses, rewards = pair_losses(POLICY, POLICY, LENGTHS, PreferenceConfig(loss=loss, beta=0.1))
    metrics = reward_metrics(rewards) | likelihood_metrics(POLICY, POLICY)
    assert losses.item() == pytest.approx(expected)
    assert metrics["pref/reward_accuracy"].item() == 0.5
    assert metrics["pref/reward_margin"].item() == metrics["pref/kl"].item() == 0


def test_metrics_by_hand() -> None:
    rewards = torch.tensor([[1.0, -0.5], [0.2, 0.2], [-1.0, 2.0]])
    metrics = reward_metrics(rewards) | likelihood_metrics(POLICY, REFERENCE)
    assert metrics["pref/reward_accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert metrics["pref/reward_margin"].tolist() == pytest.approx([1.5, 0.0, -3.0])
    assert metrics["pref/chosen_logp"].item() == -10
    assert metrics["pref/rejected_logp"].item() == -14
    assert metrics["pref/kl"].item() == pytest.approx((-2 + 1) / 2)


def test_extreme_ratios_stay_finite() -> None:
    policy = torch.tensor([[-9e3, -1.0], [-1.0, -9e3]], requires_grad=True)
    reference = torch.full((2, 2), -4e3)
    for loss in AT_THE_START:
        losses, _ = pair_losses(
            policy, reference, LENGTHS.expand(2, 2), PreferenceConfig(loss=loss, beta=5.0)
        )
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all(), loss
        assert gradient.isfinite().all(), loss


def test_sum_by_sequence() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sum_by_sequence(values, torch.tensor([2, -1, 0, 2, -1]), 4)
    assert sums.tolist() == [4, 0, 9, 0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad.tolist() == [100, 0, 1, 100, 0]


def test_chosen_fall() -> None:
    history = [(0, -10.0), (100, -8.0), (200, -9.0), (300, -12.0)]
    assert chosen_fall(history, window=200) == 4.0  # from step 100
    assert chosen_fall(history, window=100) == 3.0  # from step 200
    assert chosen_fall(history[:2], window=200) == 0.0  # it has risen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is defined for dpo"),
        ({"label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ({"loss": "bradley_terry", "nll_weight": 1.0}, "scores answers"),
        ({"beta": 0.0}, "beta (0.0) must be above 0"),
        ({"loss": "dpoo"}, "did you mean 'dpo'?"),
    ],
)
def test_config_mistakes(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(PreferenceConfig, settings, "test")
    assert message in str(error.value)
