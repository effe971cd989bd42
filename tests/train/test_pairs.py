"""Losses of packed pairs against answers scored alone, and the reference kept on disk."""

import math

import numpy as np
import pytest
import torch

from data.pair_loader import PairBatch, batches_of, make_pair_batch
from data.preferences import PairDataConfig, Pairs, PairSource
from models.config import ModelConfig
from models.transformer import Transformer
from models.verifier import Verifier
from train.loss import token_logprobs
from train.pairs import (
    answer_logprobs,
    answer_scores,
    cached_reference,
    held_out_preference,
    preference_loss,
    reference_logprobs,
    score_statistics,
    verifier_loss,
)
from train.preference import PreferenceConfig
from utils.checkpoint import weights_fingerprint
from utils.distributed import Distributed

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
CONFIG = PairDataConfig(
    sources=[PairSource(name="s", path="unused")], seq_len=48, max_pairs_per_row=3
)
SHAPE = ModelConfig(
    vocab_size=50, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=64, max_seq_len=48
)
N_PAIRS = 12


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE)


@pytest.fixture
def verifier() -> Verifier:
    torch.manual_seed(0)
    return Verifier(SHAPE)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Random prompts of 2 to 5 tokens, answers of 1 to 6."""
    draw = np.random.default_rng(0)
    tokens, learned, ends = [], [], []
    for _ in range(N_PAIRS):
        prompt = draw.integers(1, 50, draw.integers(2, 6)).tolist()
        for size in draw.integers(1, 7, 2):
            tokens += prompt + draw.integers(1, 50, size).tolist()
            learned += [False] * len(prompt) + [True] * size
            ends.append(len(tokens))
    return Pairs(
        np.array(tokens), np.array(learned), np.array(ends),
        held_out=np.zeros(N_PAIRS, bool), known=np.zeros(N_PAIRS, bool),
    )  # fmt: skip


@pytest.fixture
def batch(pairs: Pairs) -> PairBatch:
    return make_pair_batch([[0, 1, 2], [], [3], [4, 5]], pairs, None, CONFIG)


PLACES = {0: 0, 1: 1, 2: 2, 6: 3, 9: 4, 10: 5}  # place in the batch -> pair


def alone(model: Transformer, tokens: np.ndarray) -> torch.Tensor:
    """Hidden states (T, C) of one sequence that nothing is packed with."""
    row = torch.from_numpy(tokens)[None]
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model(row, torch.arange(len(tokens))[None], ends)[0]


def answers_alone(model: Transformer, pairs: Pairs, sequence: int) -> torch.Tensor:
    """Log-probabilities of an answer's tokens, through the whole softmax."""
    span = pairs.slice(sequence)
    tokens, learned = pairs.tokens[span], pairs.learned[span]
    logp = model.logits(alone(model, tokens)).log_softmax(-1)  # (T, V)
    following = torch.from_numpy(tokens[1:])
    return logp[:-1].gather(1, following[:, None])[:, 0][torch.from_numpy(learned[1:])]


@torch.no_grad()
def test_packed_log_probabilities_are_those_of_answers_alone(model, pairs, batch):
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)
    logp, _ = token_logprobs(hidden, model.head_weight, batch.targets.flatten())
    sums = answer_logprobs(model, batch)
    for place in range(len(batch.pair_ids)):
        for side in (0, 1):
            expected = torch.zeros(0)
            if place in PLACES:
                expected = answers_alone(model, pairs, 2 * PLACES[place] + side)
            tokens = logp[(batch.seq_ids == 2 * place + side).flatten()]
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(sums[place, side], expected.sum(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_scores_are_those_of_answers_alone(verifier, pairs, batch):
    scores = answer_scores(verifier, batch)
    for place, pair in PLACES.items():
        for side in (0, 1):
            hidden = alone(verifier, pairs.tokens[pairs.slice(2 * pair + side)])
            expected = (hidden[-1] @ verifier.score.weight[0]).item()
            assert scores[place, side].item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_sum_over_pairs_and_ignores_empty_places(model, pairs, batch):
    config = PreferenceConfig(beta=0.5, nll_weight=0.3)
    torch.manual_seed(1)
    reference = Transformer(SHAPE)
    loss, metrics = preference_loss(model, batch, config, reference)
    loss.backward()
    expected, margins, kl = 0.0, [], 0.0
    for pair in PLACES.values():
        with torch.no_grad():
            chosen, rejected = (answers_alone(model, pairs, 2 * pair + s) for s in (0, 1))
            fixed = [answers_alone(reference, pairs, 2 * pair + s).sum() for s in (0, 1)]
        ratios = [chosen.sum() - fixed[0], rejected.sum() - fixed[1]]
        margins.append(0.5 * (ratios[0] - ratios[1]).item())
        expected += math.log1p(math.exp(-margins[-1])) - 0.3 * chosen.mean().item()
        kl -= (ratios[0] + ratios[1]).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["pref/reward_margin"].item() == pytest.approx(sum(margins), abs=1e-4)
    assert metrics["pref/reward_accuracy"].item() == sum(m > 0 for m in margins)
    assert metrics["pref/kl"].item() == pytest.approx(kl, rel=1e-4)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_cached_and_live_reference_are_the_same_bits(model, pairs):
    """On identical packs; on others they differ by rounding."""
    torch.manual_seed(1)
    reference = Transformer(SHAPE)
    everything = np.arange(N_PAIRS)
    table = reference_logprobs(
        reference, batches_of(everything, pairs, None, CONFIG, 2), N_PAIRS, ALONE
    )
    config = PreferenceConfig(beta=0.5)
    for batch in batches_of(everything, pairs, table, CONFIG, 2):
        cached, _ = preference_loss(model, batch, config)
        live, _ = preference_loss(model, batch, config, reference)
        assert cached.item() == live.item()
    packed_otherwise = reference_logprobs(
        reference, batches_of(everything[::-1], pairs, None, CONFIG, 1), N_PAIRS, ALONE
    )
    torch.testing.assert_close(packed_otherwise, table, atol=1e-5, rtol=0)


def test_in_bf16_a_pack_changes_the_reference_by_less_than_half_a_percent(pairs):
    """Of an answer's log-probability; identical packs give identical bits here too."""
    torch.manual_seed(1)
    reference = Transformer(SHAPE, dtype=torch.bfloat16)

    def table(order: np.ndarray, rows: int) -> torch.Tensor:
        batches = batches_of(order, pairs, None, CONFIG, rows)
        return reference_logprobs(reference, batches, N_PAIRS, ALONE)

    everything = np.arange(N_PAIRS)
    assert torch.equal(table(everything, 2), table(everything, 2))
    torch.testing.assert_close(table(everything[::-1], 1), table(everything, 2), rtol=5e-3, atol=0)


@pytest.fixture
def cached(model, pairs, tmp_path):
    """Asks for the reference's table; returns it, and whether it was computed."""

    def cached(
        identity: dict | None = None, reference: Transformer = model
    ) -> tuple[torch.Tensor, bool]:
        computed = []

        def batches():
            computed.append(True)
            yield from batches_of(np.arange(N_PAIRS), pairs, None, CONFIG, 2)

        identity = identity or {"weights": "a", "pairs": "b"}
        table = cached_reference(
            reference, batches(), N_PAIRS, identity, str(tmp_path / "cache"), ALONE
        )
        return table, bool(computed)

    return cached


def test_the_reference_is_computed_once_for_each_model_and_data(cached):
    first, computed = cached()
    assert computed
    again, computed = cached()
    assert not computed
    assert torch.equal(again, first)
    assert cached({"weights": "other", "pairs": "b"})[1]
    assert cached({"weights": "a", "pairs": "other"})[1]
    assert cached(reference=Transformer(SHAPE, torch.bfloat16))[1]


@pytest.mark.parametrize("place", [10, -10])
def test_a_damaged_cache_is_made_again(cached, tmp_path, capsys, place):
    first, _ = cached()
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    again, computed = cached()
    assert computed
    assert torch.equal(again, first)
    assert "is damaged" in capsys.readouterr().out
    assert not cached()[1]


def test_weights_fingerprint(model):
    before = weights_fingerprint(model.state_dict())
    assert weights_fingerprint(model.state_dict()) == before
    with torch.no_grad():
        model.final_norm.weight[3] += 1e-6
    assert weights_fingerprint(model.state_dict()) != before


def test_held_out_means_do_not_depend_on_the_batches(model, pairs):
    torch.manual_seed(1)
    reference = Transformer(SHAPE)

    def loss_fn(model, batch):
        return preference_loss(model, batch, PreferenceConfig(), reference)

    results = [
        held_out_preference(
            model, list(batches_of(np.arange(N_PAIRS), pairs, None, CONFIG, rows)), loss_fn, ALONE
        )
        for rows in (1, 3)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert set(results[0]) == {
        "val/loss", "pref/val_reward_accuracy", "pref/val_reward_margin", "pref/val_chosen_logp",
        "pref/val_rejected_logp", "pref/val_kl",
    }  # fmt: skip
    assert model.training


def test_score_statistics(verifier, pairs):
    batches = list(batches_of(np.arange(N_PAIRS), pairs, None, CONFIG, 2))
    with torch.no_grad():
        scores = torch.cat([answer_scores(verifier, b)[b.pair_ids >= 0].flatten() for b in batches])
    statistics = score_statistics(verifier, batches, ALONE)
    assert len(scores) == 2 * N_PAIRS
    assert statistics["mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert statistics["deviation"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)


def test_a_verifier_learns_through_its_whole_transformer(verifier, batch):
    loss, metrics = verifier_loss(verifier, batch)
    loss.backward()
    scores = answer_scores(verifier, batch).detach()
    margins = (scores[:, 0] - scores[:, 1])[batch.pair_ids >= 0]
    assert loss.item() == pytest.approx((1 + (-margins).exp()).log().sum().item(), rel=1e-5)
    assert metrics["pref/reward_margin"].item() == pytest.approx(margins.sum().item(), abs=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in verifier.parameters())


def test_a_verifier_keeps_the_transformers_parameters(model, verifier):
    assert verifier.state_dict().keys() - model.state_dict().keys() == {"score.weight"}
    verifier.load_state_dict(verifier.state_dict() | model.state_dict())
    assert torch.equal(verifier.embedding.weight, model.embedding.weight)
