"""Policy losses against values worked out by hand, and against the papers' formulas written out."""

import math

import pytest
import torch

from train.policy import (
    PolicyConfig,
    advantages,
    batch_weight,
    clipped_loss,
    engine_weight,
    has_signal,
    k3,
    metric_shares,
    overlong_penalty,
    policy_loss,
    token_shares,
)
from utils.config import ConfigError, validate

MAX_TOKENS = 8


# ---------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    # means 1/2 and 1/4; deviations sqrt(4 x 0.25 / 3) and sqrt((3 x 0.0625 + 0.5625) / 3)
    first, second = math.sqrt(1 / 3), 0.5
    centred = [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]]
    normalised = [[x / first for x in centred[0]], [x / second for x in centred[1]]]
    assert advantages(rewards, "centred").tolist() == centred
    for got, expected in zip(advantages(rewards, "normalised").tolist(), normalised, strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_groups_without_a_difference_teach_exactly_nothing(kind: str) -> None:
    rewards = torch.tensor([[0.1] * 7, [1.0] * 7, [0.0] * 6 + [1e-3]])
    assert has_signal(rewards).tolist() == [False, False, True]
    got = advantages(rewards, kind)
    assert not got[:2].any()
    assert got[2].abs().min() > 0


def test_normalised_advantages_forget_the_scale_of_rewards() -> None:
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    got = advantages(rewards, "normalised")
    assert torch.allclose(advantages(100 * rewards + 3, "normalised"), got, atol=1e-3)
    assert torch.allclose(got.std(1), torch.ones(5), atol=1e-4)
    assert torch.allclose(got.sum(1), torch.zeros(5), atol=1e-5)


def test_overlong_penalty_by_hand() -> None:
    # limit 10, buffer 4: free up to 6, then a quarter for each token
    lengths = torch.tensor([0, 6, 7, 8, 9, 10, 50])
    penalty = overlong_penalty(lengths, max_tokens=10, buffer=4)
    assert penalty.tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert not overlong_penalty(lengths, max_tokens=10, buffer=0).any()


# ---------------------------------------------------------------------------------------------
# The loss of a token

CLIP = [  # ratio, advantage, loss, its derivative by log π; clip 0.2 / 0.28
    (1.0, 2.0, -2.0, -2.0),
    (1.25, 2.0, -2.5, -2.5),  # inside the wider upper side
    (1.5, 2.0, -2.56, 0.0),  # 1.28 x 2: nothing to gain beyond
    (0.5, 2.0, -1.0, -1.0),  # moved the wrong way: never clipped
    (0.9, -1.0, 0.9, 0.9),
    (0.5, -1.0, 0.8, 0.0),
    (1.5, -1.0, 1.5, 1.5),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), CLIP)
def test_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    old = torch.tensor([-3.0], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    sign = torch.tensor([advantage], dtype=torch.float64)
    got, metrics = policy_loss(logp, old, sign, PolicyConfig())
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert logp.grad.item() == pytest.approx(gradient)
    clipped = gradient == 0 and advantage != 0
    assert metrics["rlvr/clip_frac"].item() == float(clipped)


def test_on_policy_gradient_is_reinforce() -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([1.5, -0.5, 0.0])
    losses, _ = policy_loss(logp, logp.detach(), advantage, PolicyConfig())
    losses.sum().backward()
    assert torch.allclose(logp.grad, -advantage)


def test_k3_by_hand() -> None:
    logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ref_logp = torch.tensor([-1.0, -2.0, 0.0])
    # d = 0, -1, 1: e^d - d - 1 = 0, 1/e, e - 2; by log π: 1 - e^d
    kl = k3(logp, ref_logp)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([0, 1 / math.e, math.e - 2], abs=1e-6)
    assert logp.grad.tolist() == pytest.approx([0, 1 - 1 / math.e, 1 - math.e], abs=1e-6)


def test_k3_and_entropy_are_estimates_of_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=generator).log_softmax(-1)
    drawn = policy.exp().multinomial(200_000, replacement=True, generator=generator)
    logp = policy[drawn]
    _, metrics = policy_loss(
        logp, logp, torch.zeros_like(logp), PolicyConfig(), ref_logp=reference[drawn]
    )
    kl = (policy.exp() * (policy - reference)).sum().item()
    entropy = -(policy.exp() * policy).sum().item()
    assert metrics["rlvr/kl"].mean().item() == pytest.approx(kl, rel=0.02)
    assert metrics["rlvr/entropy"].mean().item() == pytest.approx(entropy, rel=0.02)


def test_kl_is_added_with_its_weight() -> None:
    logp, ref_logp = torch.tensor([-1.0]), torch.tensor([-2.0])
    config = PolicyConfig(kl_weight=0.1)
    losses, _ = policy_loss(logp, logp, torch.tensor([2.0]), config, ref_logp=ref_logp)
    assert losses.item() == pytest.approx(-2 + 0.1 / math.e)


def test_engine_weight_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    engine = old - torch.tensor([1.5, 0.5, 1.0, 4.0]).log()
    weight = engine_weight(old, engine, cap=2.0)
    assert weight.tolist() == pytest.approx([1.5, 0.5, 1.0, 2.0])
    advantage = torch.ones(4)
    losses, metrics = policy_loss(old, old, advantage, PolicyConfig(), engine_logp=engine)
    assert losses.tolist() == pytest.approx([-1.5, -0.5, -1.0, -2.0])
    assert metrics["rlvr/engine_gap"][3].item() == pytest.approx(math.log(4))
    config = PolicyConfig(engine_ratio_cap=None)
    uncorrected, _ = policy_loss(old, old, advantage, config, engine_logp=engine)
    assert uncorrected.tolist() == [-1.0] * 4


def test_engine_weight_takes_away_the_bias() -> None:
    """Tokens drawn from the engine's distribution give the trainer's expected gradient."""
    generator = torch.Generator().manual_seed(0)
    trainer = torch.randn(4, generator=generator).log_softmax(-1)
    engine = (trainer + 0.3 * torch.randn(4, generator=generator)).log_softmax(-1)
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0])
    losses, _ = policy_loss(trainer, trainer, advantage, PolicyConfig(), engine_logp=engine)
    expected = -(trainer.exp() * advantage).sum()
    assert (engine.exp() * losses).sum().item() == pytest.approx(expected.item(), abs=1e-6)


def test_extreme_ratios_keep_loss_and_gradient_finite() -> None:
    logp = torch.tensor([-1.0, -2000.0, -1.0, -2000.0], requires_grad=True)
    old = torch.tensor([-2000.0, -1.0, -2000.0, -1.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    losses, metrics = policy_loss(logp, old, advantage, PolicyConfig(), engine_logp=old - 500)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logp.grad.isfinite().all()
    assert metrics["rlvr/clip_frac"].tolist() == [1.0, 0.0, 0.0, 1.0]


# ---------------------------------------------------------------------------------------------
# The average over tokens, as the papers write it


class Group:
    """Completions of unlike lengths: per-completion lists, and the same as flat tokens."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.logp = [-torch.rand(n, generator=draw) * 3 for n in lengths]
        self.old = [x + 0.5 * torch.randn(len(x), generator=draw) for x in self.logp]
        self.ref = [x + 0.5 * torch.randn(len(x), generator=draw) for x in self.logp]
        self.advantage = torch.randn(len(lengths), generator=draw).tolist()

    def flat(self, config: PolicyConfig) -> tuple[float, float, dict[str, float]]:
        """The summed loss, the batch weight and the summed metrics, prompt tokens between."""
        pad = torch.zeros(3)

        def lay(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.cat([pad, part]) for part in parts])

        pairs = zip(self.lengths, self.advantage, strict=True)
        advantage = lay([torch.full((n,), a) for n, a in pairs])
        lengths = lay([torch.full((n,), float(n)) for n in self.lengths])
        losses, metrics = policy_loss(
            lay(self.logp), lay(self.old), advantage, config, ref_logp=lay(self.ref)
        )
        kind = config.normalisation
        share, metric_share = token_shares(lengths, kind), metric_shares(lengths, kind, MAX_TOKENS)
        sums = {name: (value * metric_share).sum().item() for name, value in metrics.items()}
        weight = batch_weight(len(self.lengths), sum(self.lengths), kind, MAX_TOKENS)
        return (losses * share).sum().item(), weight, sums

    def by_the_paper(self, config: PolicyConfig) -> float:
        """The objective with its sums over completions i and tokens t written out."""
        per_completion = []
        for i, n in enumerate(self.lengths):
            total, a = 0.0, self.advantage[i]
            for t in range(n):
                pi, old, ref = (math.exp(x[i][t].item()) for x in (self.logp, self.old, self.ref))
                ratio = pi / old
                clip = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                total += min(ratio * a, clip * a)
                total -= config.kl_weight * (ref / pi - math.log(ref / pi) - 1)
            per_completion.append(total)
        count = len(self.lengths)
        if config.normalisation == "token":  # DAPO eq. 8: 1 / Σ|y_i| Σ_i Σ_t
            return -sum(per_completion) / sum(self.lengths)
        if config.normalisation == "sequence":  # GRPO eq. 3: 1/G Σ_i 1/|y_i| Σ_t
            means = [x / n for x, n in zip(per_completion, self.lengths, strict=True)]
            return -sum(means) / count
        return -sum(per_completion) / count / MAX_TOKENS  # Dr. GRPO: 1/G Σ_i Σ_t / constant


KINDS = ("token", "sequence", "constant")


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize("kind", KINDS)
def test_normalisations_against_the_papers(kind: str, kl_weight: float) -> None:
    config = PolicyConfig(normalisation=kind, kl_weight=kl_weight)
    group = Group([1, 8, 3, 5])
    loss, weight, _ = group.flat(config)
    assert loss / weight == pytest.approx(group.by_the_paper(config), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind: str) -> None:
    config = PolicyConfig(normalisation=kind)
    whole = Group([2, 7, 1, 4])
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        part = Group([])
        for name in ("lengths", "logp", "old", "ref", "advantage"):
            setattr(part, name, getattr(whole, name)[half])
        parts.append(part.flat(config))
    loss, weight, sums = whole.flat(config)
    assert parts[0][0] + parts[1][0] == pytest.approx(loss, rel=1e-5)
    assert parts[0][1] + parts[1][1] == weight
    assert parts[0][2]["rlvr/kl"] + parts[1][2]["rlvr/kl"] == pytest.approx(sums["rlvr/kl"])


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_means_whatever_divides_the_loss(kind: str) -> None:
    """Of something that is 1 everywhere the mean is 1."""
    lengths = torch.tensor([0, 2, 2, 0, 3, 3, 3.0])
    total = metric_shares(lengths, kind, MAX_TOKENS).sum().item()
    assert total / batch_weight(2, 5, kind, MAX_TOKENS) == pytest.approx(1)


def test_length_bias_of_each_average() -> None:
    """A token of the long completion counts for less only under the sequence average."""
    lengths = torch.tensor([1.0, 4.0])
    assert token_shares(lengths, "token").tolist() == [1, 1]
    assert token_shares(lengths, "sequence").tolist() == [1, 0.25]
    assert token_shares(lengths, "constant").tolist() == [1, 1]


def test_clipped_loss_is_symmetric_ppo_with_equal_sides() -> None:
    ratio = torch.linspace(0.2, 3, 50)
    for advantage in (-1.0, 1.0):
        slow = [-min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratio.tolist()]
        got = clipped_loss(ratio, torch.full_like(ratio, advantage), 0.2, 0.2)
        assert got.tolist() == pytest.approx(slow, abs=1e-6)


def test_config_mistakes_are_told_together() -> None:
    raw = {"clip_low": 0.0, "clip_high": -1.0, "kl_weight": -0.1, "engine_ratio_cap": 0.5}
    with pytest.raises(ConfigError) as error:
        validate(PolicyConfig, raw, "rlvr.yaml")
    assert all(key in str(error.value) for key in raw)
