"""Generation against an uncached loop; independence of the batch; the distribution of samples."""

import random

import pytest
import torch

from models.generate import Engine, Request, generate, stream
from models.sampling import Sampling, sample
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


# ---------------------------------------------------------------------------------------------
# The engine


def uncached_logits(model, tokens):
    n = len(tokens)
    bounds = torch.tensor([0, n], dtype=torch.int32)
    return model.logits(model(torch.tensor([tokens]), torch.arange(n)[None], bounds))[0]  # (T, V)


def random_requests(count, vocab_size, context, seed=0):
    """Prompts and completions of all lengths, some of which fill the context."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, context - 1) for _ in range(count)]
    return [
        Request([draw.randrange(vocab_size) for _ in range(n)], draw.randint(1, context), seed=i)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_continuous_batch_has_the_uncached_logits(model, tiny, slots):
    """Every token is drawn from the logits that the whole sequence, computed alone, has there."""
    requests = random_requests(20, tiny.vocab_size, tiny.max_seq_len)
    sampling = Sampling(temperature=0.8)
    done = list(Engine(model, slots, sampling=sampling).run(requests))
    assert sorted(completion.index for completion in done) == list(range(20))
    for completion in done:
        prompt, tokens = list(completion.request.prompt), completion.tokens
        assert len(tokens) == min(completion.request.max_new_tokens, 32 - len(prompt))
        logits = uncached_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        seeds = torch.full((len(tokens),), completion.request.seed)
        positions = len(prompt) + torch.arange(len(tokens))
        expected, _ = sample(logits, seeds, positions, sampling)
        assert tokens == expected.tolist()
        logprobs = (logits / 0.8).log_softmax(-1)[torch.arange(len(tokens)), expected]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, rtol=0, atol=1e-5)


def test_a_free_slot_is_refilled_at_once(model):
    """Two slots: while the long one runs, the other serves all the short ones."""
    requests = [Request([1], 20)] + [Request([2], 4) for _ in range(5)]
    done, steps = [], 0
    for updated in Engine(model, 2).steps(requests):
        steps += 1
        done += [completion.index for completion in updated if completion.done]
    assert done == [1, 2, 3, 4, 0, 5] or done == [1, 2, 3, 4, 5, 0]
    assert steps <= 20 + 2 * 5  # a prefill is a step of its own


def test_equal_prompts_are_computed_once_and_sampled_apart(model, monkeypatch):
    computed = []
    extend = Transformer.extend

    def counting(self, tokens, positions, cache):
        computed.append(tokens.shape)
        return extend(self, tokens, positions, cache)

    alone = [generate(model, [PROMPTS[0]], 6, seed=s)[0] for s in range(4)]
    monkeypatch.setattr(Transformer, "extend", counting)
    assert generate(model, [PROMPTS[0]] * 4, 6, seed=0) == alone
    assert computed[0] == (1, 5)
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_stop_when_ends_a_sequence_and_keeps_its_tokens(model):
    (free,) = generate(model, [PROMPTS[0]], 12, seed=5)
    ended = generate(model, [PROMPTS[0]], 12, seed=5, stop_when=lambda t: t[-2:] == free[3:5])
    assert ended == [free[:5]]


def test_what_a_completion_says_of_its_end(model):
    (free,) = Engine(model, 1).run([Request(PROMPTS[0], 12)])
    assert (free.stopped, free.answer) == (False, free.tokens)
    (stopped,) = Engine(model, 1, stop_ids=[free.tokens[4]]).run([Request(PROMPTS[0], 12)])
    at = free.tokens.index(free.tokens[4])
    assert stopped.stopped
    assert (stopped.tokens, stopped.answer) == (free.tokens[: at + 1], free.tokens[:at])
    assert stopped.logprobs == free.logprobs[: at + 1]


def test_an_engine_can_be_used_again_after_it_was_left(model):
    engine = Engine(model, 2)
    requests = [Request(prompt, 9, seed=i) for i, prompt in enumerate(PROMPTS)]
    next(iter(engine.steps(requests)))  # left in the middle
    again = {completion.index: completion.tokens for completion in engine.run(requests)}
    assert [again[i] for i in range(3)] == generate(model, PROMPTS, 9, seed=0)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], [2] * 32], {}, "prompt 1 has 32 tokens; .* context of 32: shorten it"),
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[1]], {"temperature": -0.1}, r"temperature \(-0.1\)"),
        ([[1]], {"top_k": -1}, r"top_k \(-1\)"),
        ([[1]], {"top_p": 0}, r"top_p \(0\)"),
        ([[1]], {"min_p": 1.5}, r"min_p \(1.5\)"),
        ([[1]], {"repetition_penalty": 0}, r"repetition_penalty \(0\)"),
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
    numbers, constant = torch.arange(draws), torch.full((draws,), 3)
    seeds, positions = (numbers, constant) if by == "seed" else (constant, numbers)
    tokens, _ = sample(LOGITS.expand(draws, -1), seeds, positions, Sampling(**settings))
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
    bits, _ = sample(logits, seeds.flatten(), positions.flatten(), Sampling())
    bits = bits.view(200, 200)
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
        ({"min_p": 1.0}, [0]),
        ({"min_p": 0.3}, [0, 4]),  # relative to the first: e^-1 = 0.37, e^-1.5 = 0.22
        ({"min_p": 0.2}, [0, 2, 3, 4]),
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


def test_the_repetition_penalty_is_transformers(model, tiny):
    """The processor of `transformers` on the same logits, prompt included."""
    from transformers import RepetitionPenaltyLogitsProcessor

    (ours,) = generate(model, [PROMPTS[0]], 10, temperature=0, repetition_penalty=50.0)
    tokens, processor = list(PROMPTS[0]), RepetitionPenaltyLogitsProcessor(50.0)
    for _ in range(10):
        logits = uncached_logits(model, tokens)[-1:]
        tokens.append(int(processor(torch.tensor([tokens]), logits).argmax()))
    assert ours == tokens[5:]
    assert ours != generate(model, [PROMPTS[0]], 10, temperature=0)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logprobs_are_of_the_tempered_softmax_before_the_filters(temperature):
    settings = Sampling(temperature=temperature, top_k=2, min_p=0.1)
    numbers = torch.arange(100)
    tokens, logprobs = sample(LOGITS.expand(100, -1), numbers, numbers, settings)
    expected = (LOGITS / (temperature or 1)).log_softmax(-1)[tokens]
    torch.testing.assert_close(logprobs, expected)
