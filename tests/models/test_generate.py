"""Generation against an uncached loop; independence of the batch; the distribution of samples."""

import pytest
import torch

from models.generate import generate, sample, stream
from models.transformer import Transformer

PROMPTS = [[5, 9, 2, 11, 7], [3], [8, 8, 1]]


@pytest.fixture
def model(tiny) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny).requires_grad_(False)


def greedy_without_cache(model, prompt, new_tokens):
    tokens = list(prompt)
    for _ in range(new_tokens):
        n = len(tokens)
        bounds = torch.tensor([0, n], dtype=torch.int32)
        hidden = model(torch.tensor([tokens]), torch.arange(n)[None], bounds)
        tokens.append(int(model.logits(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_uncached_loop_for_mixed_lengths(model):
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert generate(model, PROMPTS, 12, temperature=0) == expected


def test_a_sequence_does_not_depend_on_the_others_in_its_batch(model):
    together = generate(model, PROMPTS, 12, seed=[41, 42, 43], top_k=50, top_p=0.95)
    alone = [
        generate(model, [prompt], 12, seed=seed, top_k=50, top_p=0.95)[0]
        for prompt, seed in zip(PROMPTS, (41, 42, 43), strict=True)
    ]
    assert together == alone
    assert together == generate(model, PROMPTS, 12, seed=41, top_k=50, top_p=0.95)
    assert together != generate(model, PROMPTS, 12, seed=44, top_k=50, top_p=0.95)


def test_a_continuation_draws_what_the_uninterrupted_run_would_have(model):
    (whole,) = generate(model, [PROMPTS[0]], 10, seed=7)
    (rest,) = generate(model, [PROMPTS[0] + whole[:4]], 6, seed=7)
    assert whole[4:] == rest


def test_stream_gives_the_same_tokens(model):
    (expected,) = generate(model, [PROMPTS[0]], 8, seed=3)
    assert list(stream(model, PROMPTS[0], 8, seed=3)) == expected


def test_stop_ids_end_their_own_sequence_and_are_left_out(model):
    free = generate(model, PROMPTS, 12, temperature=0)
    stop = free[0][4]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert {len(tokens) for tokens in expected} != {12}
    assert generate(model, PROMPTS, 12, temperature=0, stop_ids={stop}) == expected


def test_generation_stops_at_the_contexts_end(model):
    prompts = [[1] * 30, [1] * 3, [1] * 31]
    completions = generate(model, prompts, 40, temperature=0)
    assert [len(tokens) for tokens in completions] == [2, 29, 1]
    assert completions[1] == generate(model, prompts[1:2], 40, temperature=0)[0]


def test_nothing_to_do_gives_nothing(model):
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2, 3]], 0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], [2] * 32], {}, "prompt 1 has 32 tokens; .* context of 32: shorten it"),
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[1]], {"temperature": -0.1}, r"temperature \(-0.1\)"),
        ([[1]], {"top_k": -1}, r"top_k \(-1\)"),
        ([[1]], {"top_p": 0}, r"top_p \(0\)"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_mistakes_are_refused(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 5, **settings)


def test_bf16_generates_too(tiny):
    torch.manual_seed(0)
    model = Transformer(tiny, dtype=torch.bfloat16)
    completions = generate(model, PROMPTS, 6, seed=1)
    assert [len(tokens) for tokens in completions] == [6, 6, 6]
    assert all(0 <= token < tiny.vocab_size for tokens in completions for token in tokens)


# ---------------------------------------------------------------------------------------------
# Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.0, -30.0, 0.0])


def frequencies(draws=40_000, by="seed", **settings):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    numbers, constant = torch.arange(draws), torch.full((draws,), 3)
    seeds, positions = (numbers, constant) if by == "seed" else (constant, numbers)
    tokens = sample(LOGITS.expand(draws, -1), seeds, positions, **settings)
    return torch.bincount(tokens, minlength=len(LOGITS)) / draws


@pytest.mark.parametrize("by", ["seed", "position"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_softmax(by, temperature):
    expected = (LOGITS / temperature).softmax(-1)
    four_sigma = 4 * (expected * (1 - expected) / 40_000).sqrt()
    assert ((frequencies(by=by, temperature=temperature) - expected).abs() <= four_sigma).all()


def test_draws_of_neighbouring_seeds_and_positions_are_independent():
    """Correlation of one sequence's draws with the next's, and with its own next position."""
    grid = torch.arange(200)
    seeds, positions = grid[:, None].expand(200, 200), grid.expand(200, 200)
    logits = torch.zeros(40_000, 2)
    bits = sample(logits, seeds.flatten(), positions.flatten(), 1.0, 0, 1.0).view(200, 200)
    signs = 2.0 * bits - 1
    for shifted, other in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1])):
        assert (shifted * other).mean().abs() < 4 / 200
    assert (signs[1:, :-1] * signs[:-1, 1:]).mean().abs() < 4 / 200  # equal seed + position


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 4]),
        ({"top_k": 3}, [0, 2, 3, 4]),  # 2 and 3 are equal
        ({"top_k": 100}, [0, 1, 2, 3, 4, 6]),  # 5 has a probability of 6e-15
        ({"top_p": 0.45}, [0]),  # its probability is 0.50
        ({"top_p": 0.55}, [0, 4]),  # 0.50 + 0.18 = 0.68
        ({"top_p": 0.7}, [0, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.72}, [0]),  # of two with 2.718 : 1, the first has 0.73
        ({"top_k": 2, "top_p": 0.74}, [0, 4]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(settings, kept):
    share = torch.zeros(len(LOGITS))
    share[kept] = LOGITS[kept].softmax(-1)
    drawn = frequencies(**settings)
    assert set(drawn.nonzero().flatten().tolist()) == set(kept)
    torch.testing.assert_close(drawn, share, rtol=0, atol=0.01)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_cold_sampling_takes_the_likeliest(temperature):
    assert frequencies(100, temperature=temperature)[0] == 1
