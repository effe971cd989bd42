"""Rollouts: packed losses against completions one by one, dropped groups, keys, state."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import IGNORE
from data.policy_batch import Completions, policy_batches
from data.prompts import Prompt, Prompts
from models.config import ModelConfig
from models.transformer import Transformer
from train.evals import pass_at_k
from train.judge import Judge
from train.policy import PolicyConfig, clipped_loss
from train.rewards import RewardConfig
from train.rollout import RolloutConfig, RolloutLoader, make_engine, policy_objective
from utils import checkpoint
from utils.config import ConfigError, validate
from utils.distributed import Distributed

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
EOS = 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=12, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=48, max_seq_len=32
    )
    return Transformer(shape)


@pytest.fixture
def prompts():
    asked = [
        Prompt("s", [], str(i % 3), "exact_match", [2 + i % 5, 3, 2 + i % 7]) for i in range(9)
    ]
    return Prompts(asked, [])


class Spelling:
    """A tokenizer whose text is the tokens themselves."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class Scripted(Judge):
    """Rewards by a function of (prompt number, answer)."""

    def __init__(self, reward, prompts):
        super().__init__(RewardConfig(), Spelling(), ["exact_match"])
        self.reward, self.numbers = reward, {id(p): i for i, p in enumerate(prompts.train)}

    def begin(self, index, prompt, answer):
        super().begin(index, prompt, answer)
        asked, text, _ = self._begun[index]
        self._begun[index] = (asked, text, self.reward(self.numbers[id(prompt)], answer))


def make_loader(model, prompts, reward, policy=None, seed=0, **settings):
    values = {"prompts": 3, "group_size": 4, "max_new_tokens": 6, "seq_len": 24}
    config = validate(RolloutConfig, values | {"max_completions_per_row": 3} | settings, "test")
    return RolloutLoader(
        model, make_engine(model, config, 8, EOS), prompts, Scripted(reward, prompts), config,
        policy or PolicyConfig(), seed, 2, ALONE,
    )  # fmt: skip


def parity(number, answer):
    return float(sum(answer) % 2)


def whole_rollout(loader):
    """The completions of the next rollout, and all its batches."""
    loader.completions = loader._roll_out()
    completions = loader.completions
    return completions, loader._batches(0)


# ---------------------------------------------------------------------------------------------
# Batches


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), max_size=12),
    micro_batch=st.integers(1, 3),
    world_size=st.integers(1, 2),
    data=st.data(),
)
def test_every_token_of_every_completion_is_learned_once(lengths, micro_batch, world_size, data):
    prompts = [[5], [6, 7], [8, 9, 10]]
    ids = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    n = sum(lengths)
    completions = Completions(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
        torch.randint(20, 40, (n,)),
        torch.randn(n),
        torch.randn(len(lengths)),
    )
    batches = policy_batches(
        completions, np.arange(len(lengths)), prompts, 10, 3, micro_batch, world_size
    )
    assert len(batches) % world_size == 0 and batches
    assert {batch.tokens.shape for batch in batches} == {(micro_batch, 10)}
    assert sum(batch.n_completions for batch in batches) == len(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), completions.lengths)
    seen = []
    for batch in batches:
        learned = batch.learned
        index = batch.index[learned]
        seen += index.tolist()
        assert torch.equal(batch.targets[learned], completions.tokens[index])
        assert torch.equal(batch.engine_logp[learned], completions.engine_logp[index])
        assert torch.equal(batch.advantage[learned], completions.advantage[owner[index]])
        assert torch.equal(batch.lengths[learned], completions.lengths[owner[index]])
        for field in (batch.engine_logp, batch.advantage, batch.lengths):
            assert not field[~learned].any()
    assert sorted(seen) == list(range(n))


def alone(model, prompt, tokens):
    """(n,) log-probabilities of a completion's tokens, computed without packing or loss."""
    whole = torch.tensor([[*prompt, *tokens]])
    n = whole.shape[1]
    hidden = model(whole, torch.arange(n)[None], torch.tensor([0, n], dtype=torch.int32))
    logp = model.logits(hidden)[0].log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_loss_is_that_of_the_completions_one_by_one(model, prompts, kind, minibatches):
    policy = PolicyConfig(normalisation=kind, engine_ratio_cap=None)
    loader = make_loader(model, prompts, parity, policy, minibatches=minibatches)
    completions = loader._roll_out()
    loader.completions = completions
    with torch.no_grad():  # the policy has moved since the rollout
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    total, weight, expected, denominator = 0.0, 0.0, 0.0, 0.0
    for part in range(minibatches):
        for batch in loader._batches(part):
            loss, _ = policy_objective(model, batch, policy, loader.config)
            total, weight = total + loss, weight + batch.weight
    start = 0
    for prompt, length, advantage in zip(
        completions.prompt_ids, completions.lengths.tolist(), completions.advantage, strict=True
    ):
        span = slice(start, start + length)
        start += length
        logp = alone(model, loader.prompt_tokens[prompt], completions.tokens[span].tolist())
        old = logp.detach() if minibatches == 1 else completions.old_logp[span]
        losses = clipped_loss((logp - old).exp(), advantage, 0.2, 0.28)
        expected += losses.mean() if kind == "sequence" else losses.sum()
        denominator += {"token": length, "sequence": 1, "constant": 6}[kind]
    assert weight == denominator
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    by_hand = torch.autograd.grad(expected, list(model.parameters()))
    for ours, theirs in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_engines_logprobs_are_the_trainers(model, prompts, temperature):
    loader = make_loader(model, prompts, parity, temperature=temperature, minibatches=2)
    completions = loader._roll_out()
    theirs = loader._logprobs(model, completions)
    torch.testing.assert_close(theirs, completions.engine_logp, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# What is sampled


def test_groups_without_signal_are_replaced(model, prompts):
    """Of prompts with an even number all completions are worth the same."""
    loader = make_loader(model, prompts, lambda n, answer: parity(n, answer) if n % 2 else 1.0)
    completions, batches = whole_rollout(loader)
    assert {int(i) % 2 for i in completions.prompt_ids} == {1}
    assert len(completions) <= 12
    assert (completions.advantage.view(-1, 4).abs().sum(1) > 0).all()
    assert loader.window["zero_std"] > 0
    assert loader.window["groups"] > len(completions) / 4
    assert sum(batch.n_completions for batch in batches) == len(completions)


def test_groups_without_signal_stay_where_the_config_says_so(model, prompts):
    loader = make_loader(model, prompts, lambda n, answer: 1.0, dynamic_sampling=False)
    completions, _ = whole_rollout(loader)
    assert len(completions) == 12
    assert not completions.advantage.any()


def test_a_rollout_that_teaches_nothing_is_an_empty_batch(model, prompts):
    loader = make_loader(model, prompts, lambda n, answer: 0.0, max_refills=1, minibatches=2)
    (batch,) = next(loader)
    assert loader.window["groups"] == 6
    assert batch.weight == 0 and (batch.targets == IGNORE).all()
    loss, sums = policy_objective(model, batch, PolicyConfig(), loader.config)
    assert loss == 0 and all(value == 0 for value in sums.values())
    state = checkpoint.snapshot(loader.state_dict())  # between the two minibatches
    other = make_loader(model, prompts, parity, max_refills=1, minibatches=2)
    other.load_state_dict(state)
    (batch,) = next(other)
    assert batch.weight == 0 and other.rollout == 1


def test_a_prompt_asked_twice_in_a_rollout_is_answered_twice(model, prompts):
    few = Prompts(prompts.train[:2], [])
    loader = make_loader(model, few, parity, dynamic_sampling=False)
    completions = loader._roll_out()
    starts = completions.lengths.cumsum(0) - completions.lengths
    texts = [
        completions.tokens[s : s + n].tolist()
        for s, n in zip(starts.tolist(), completions.lengths.tolist(), strict=True)
    ]
    groups = {}
    for place in range(3):
        groups.setdefault(int(completions.prompt_ids[4 * place]), []).append(
            texts[4 * place : 4 * place + 4]
        )
    (twice,) = (found for found in groups.values() if len(found) == 2)
    assert twice[0] != twice[1]


def test_long_completions_are_punished_before_advantages(model, prompts):
    policy = PolicyConfig(overlong_tokens=6)
    loader = make_loader(model, prompts, lambda n, answer: 1.0, policy)
    completions, _ = whole_rollout(loader)
    by_length = sorted(
        zip(completions.lengths.tolist(), completions.advantage.tolist(), strict=True)
    )
    assert by_length[0][1] > 0 > by_length[-1][1]


def test_seeds_are_keyed_by_rollout_prompt_and_sample(model, prompts):
    """The same weights, order and seed give the same completions; another seed or rollout not."""
    one, again = (make_loader(model, prompts, parity)._roll_out() for _ in range(2))
    assert torch.equal(one.tokens, again.tokens)
    other = make_loader(model, prompts, parity, seed=1)._roll_out()
    assert not torch.equal(one.tokens[:10], other.tokens[:10])
    fewer = make_loader(model, prompts, parity, slots=2)._roll_out()
    assert torch.equal(one.tokens, fewer.tokens)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_the_state_goes_on_with_the_same_batches(model, prompts, after):
    loader = make_loader(model, prompts, parity, minibatches=3)
    for _ in range(after):
        next(loader)
    state = loader.state_dict()
    expected = [next(loader) for _ in range(4)]
    other = make_loader(model, prompts, parity, minibatches=3)
    other.load_state_dict(state)
    for ours, theirs in zip((next(other) for _ in range(4)), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.old_logp, b.old_logp)
            assert a.weight == b.weight
    measured, also = loader.measures(), other.measures()
    timed = ("rlvr/rollout_tokens_per_sec", "rlvr/rollout_frac")
    assert {k: v for k, v in measured.items() if k not in timed} == {
        k: v for k, v in also.items() if k not in timed
    }


def test_a_state_of_other_prompts_is_refused(model, prompts):
    state = make_loader(model, prompts, parity).state_dict()
    other = Prompts(prompts.train[:-1], [])
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        make_loader(model, other, parity).load_state_dict(state)


# ---------------------------------------------------------------------------------------------
# Judge and pass@k


def test_slow_verifiers_are_judged_in_order():
    prompts = [SimpleNamespace(verifier="regex", answer=str(i), messages=[]) for i in range(8)]
    judge = Judge(RewardConfig(), Spelling(), ["regex"])
    for i in (3, 0, 7, 1, 2, 6, 5, 4):
        judge.begin(i, prompts[i], [i if i % 2 else 9])
    rules, rewards = judge.finish()
    assert rules == rewards == [float(i % 2) for i in range(8)]
    assert judge.finish() == ([], [])


def test_rule_and_model_are_weighed():
    config = RewardConfig(rule_weight=2.0, model_weight=0.5)
    asked = SimpleNamespace(
        verifier="exact_match", answer="3", messages=[{"role": "user", "content": "?"}]
    )
    told = []

    def score(conversations):
        told.extend(conversations)
        return [0.25 * i for i in range(len(conversations))]

    judge = Judge(config, Spelling(), ["exact_match"], score)
    judge.begin(0, asked, [3])
    judge.begin(1, asked, [4])
    assert judge.finish() == ([1.0, 0.0], [2.0, 0.125])
    assert [c[-1]["content"] for c in told] == ["3", "4"]
    for index, answer in enumerate((4, 3, 4)):
        judge.begin(index, asked, [answer])
    assert judge.finish()[1] == [0.0, 2.125, 0.0]  # equal answers have equal scores


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, data):
    from itertools import combinations

    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, min(n, 4)))
    subsets = list(combinations([i < correct for i in range(n)], k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert math.isclose(pass_at_k(n, correct, k), expected, abs_tol=1e-12)
