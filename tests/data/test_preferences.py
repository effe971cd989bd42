"""Preference pairs from rows to paired batches: shapes, bad rows, packing, exact resume."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.chat import ChatTemplate, render, render_prompt
from data.packing import IGNORE
from data.pair_loader import (
    PairLoader,
    batches_of,
    choose_questions,
    held_out_batches,
    make_pair_batch,
)
from data.preferences import PairDataConfig, Pairs, PairSource, check_pair, load_pairs, to_pair
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from utils.config import ConfigError, validate

SHARED = Path(__file__).parents[3] / "shared/data"
SEQ_LEN = 64


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def record(i: int) -> dict:
    """Pair number i, of its own lengths."""
    return {
        "prompt": f"{i}: " + "why" * (i % 3),
        "chosen": "since " + "so" * (1 + i % 5),
        "rejected": "no" * (1 + i % 7),
    }


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [text for i in range(50) for text in record(i).values()]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=320))


def settings(*paths: Path | str, **changes) -> PairDataConfig:
    sources = [PairSource(name=f"s{i}", path=str(path)) for i, path in enumerate(paths)]
    return PairDataConfig(
        sources=sources, **{"seq_len": SEQ_LEN, "max_pairs_per_row": 3, "held_out_fraction": 0.2}
        | changes,
    )  # fmt: skip


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(*paths: Path | str, **changes) -> Pairs:
        config = settings(*paths, cache_dir=str(tmp_path / "cache"), **changes)
        return load_pairs(config, tokenizer, ChatTemplate.of(tokenizer))

    return load


@pytest.fixture
def many(load, tmp_path) -> Pairs:
    return load(write(tmp_path / "many.jsonl", [record(i) for i in range(120)]))


# ---------------------------------------------------------------------------------------------
# Shapes

X, C, R = [user("why?")], [assistant("so")], [assistant("no")]
SAME = {
    "texts": {"prompt": "why?", "chosen": "so", "rejected": "no"},
    "messages": {"prompt": X, "chosen": C, "rejected": R},
    "prompt text, whole conversations": {"prompt": "why?", "chosen": X + C, "rejected": X + R},
    "prompt messages, answer texts": {"prompt": X, "chosen": "so", "rejected": "no"},
    "whole conversations": {"chosen": X + C, "rejected": X + R},
    "dialogues": {
        "chosen": "\n\nHuman: why?\n\nAssistant: so",
        "rejected": "\n\nHuman: why?\n\nAssistant: no",
    },
    "a dialogue, cut before the answers": {
        "prompt": "\n\nHuman: why?\n\nAssistant:",
        "chosen": " so",
        "rejected": " no",
    },
    "other names": {
        "chosen": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}],
        "rejected": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "no"}],
    },
}


@pytest.mark.parametrize("shape", SAME)
def test_every_shape_gives_the_same_pair(shape, load, tmp_path):
    pair = to_pair(SAME[shape])
    assert check_pair(pair) is None
    assert [[m["content"].strip() for m in side] for side in pair] == [
        ["why?", "so"],
        ["why?", "no"],
    ]
    texts = load(write(tmp_path / "texts.jsonl", [SAME["texts"], *map(record, range(20))]))
    other = load(write(tmp_path / "other.jsonl", [SAME[shape], *map(record, range(20))]))
    assert other.fingerprint() == texts.fingerprint()


def test_a_dialogue_of_several_turns():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    chosen, rejected = to_pair({"chosen": f"{shared} d", "rejected": f"{shared} e\n\nf"})
    assert [m["role"] for m in chosen] == ["user", "assistant"] * 2
    assert chosen[:3] == rejected[:3]
    assert (chosen[3]["content"], rejected[3]["content"]) == ("d", "e\n\nf")
    cut = to_pair({"prompt": shared, "chosen": " d", "rejected": " e\n\nf"})
    assert cut == (chosen, rejected)


def test_a_system_message_in_a_field_of_its_own():
    system = {"role": "system", "content": "s"}
    for record in SAME.values():
        assert [side[0] for side in to_pair(record | {"system": "s"})] == [system, system]
    whole = {"chosen": [user("a"), *C], "rejected": [system | {"content": "t"}, user("a"), *R]}
    assert [m["content"] for m, *_ in to_pair(whole | {"system": "s"})] == ["s", "t"]


BAD = {
    "chosen equal to rejected": {"prompt": "a", "chosen": "b", "rejected": " b\n"},
    "chosen: empty answer": {"prompt": "a", "chosen": " ", "rejected": "b"},
    "rejected: empty answer": {"prompt": "a", "chosen": "b", "rejected": ""},
    "chosen: empty message": {"prompt": "", "chosen": "b", "rejected": "c"},
    "chosen: content is not text": {"prompt": "a", "chosen": 3, "rejected": "b"},
    "chosen: not a list of messages": {"prompt": "a", "chosen": ["b"], "rejected": ["c"]},
    "rejected: broken UTF-8": {"prompt": "a", "chosen": "b", "rejected": "\ud800"},
    "no known shape": {"prompt": "a", "chosen": "b"},
    "rejected: impossible order of roles": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
    },
    "prompts differ": {"chosen": [user("a"), *C], "rejected": [user("b"), *R]},
    "one answer continues the other": {"chosen": X + C, "rejected": X + C + X + R},
}


def test_bad_rows_are_counted_and_the_others_used(load, tmp_path, capsys):
    good = [record(i) for i in range(20)]
    path = write(tmp_path / "p.jsonl", [*good, *BAD.values()])
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    for _ in range(2):  # the second time from the cache
        pairs = load(path)
        told = capsys.readouterr().out
        assert len(pairs) == len(good)
        for number, reason in enumerate([*BAD, "broken UTF-8"], start=len(good)):
            assert f"{reason} 1 (p.jsonl row {number})" in told
    with pytest.raises(ConfigError, match=r"chosen equal to rejected 1 \(p.jsonl row 20\)"):
        load(path, bad_rows="fatal")


def test_rows_of_no_known_shape_are_shown(load, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
    with pytest.raises(ConfigError) as error:
        load(path)
    assert "p.jsonl row 0" in str(error.value)
    assert "'question', 'good', 'bad'" in str(error.value)
    assert "prompt, chosen, rejected" in str(error.value)


def test_a_source_without_pairs_to_train_on_is_refused(load, tmp_path):
    with pytest.raises(ConfigError, match="0 usable pairs"):
        load(write(tmp_path / "p.jsonl", []))


def test_config_mistakes():
    raw = {"sources": [{"name": "a", "path": "builtin:chats"}], "max_pairs_per_row": 0}
    with pytest.raises(ConfigError) as error:
        validate(PairDataConfig, raw, "test")
    assert "'builtin:pairs'" in str(error.value)
    assert "max_pairs_per_row (0) must be above 0" in str(error.value)


# ---------------------------------------------------------------------------------------------
# Tokens


def test_tokens_and_what_is_learned(load, tokenizer, tmp_path):
    """Against the chat template, turn by turn: of the prompt nothing is learned."""
    prompt = [user("a"), assistant("b"), user("c")]
    row = {"prompt": prompt, "chosen": "yes", "rejected": "maybe not"}
    pairs = load(write(tmp_path / "p.jsonl", [row, *map(record, range(20))]))
    template = ChatTemplate.of(tokenizer)
    header = render_prompt(prompt, tokenizer, template)
    for piece, answer in zip(pairs.pieces(0), ("yes", "maybe not"), strict=True):
        whole = render([*prompt, assistant(answer)], tokenizer, template).tokens
        assert piece.tokens.tolist() == whole
        nothing = [IGNORE] * (len(header) - 1)
        assert piece.targets.tolist() == [*nothing, *whole[len(header) :], IGNORE]


def test_answers_of_several_turns(load, tokenizer, tmp_path):
    row = {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
           "rejected": [user("a"), assistant("e")]}  # fmt: skip
    pairs = load(write(tmp_path / "p.jsonl", [row, *map(record, range(20))]))
    learned = [p.targets[p.targets != IGNORE].tolist() for p in pairs.pieces(0)]
    eos = [tokenizer.eos_id]
    assert learned == [
        [*tokenizer.encode("b"), *eos, *tokenizer.encode("d"), *eos],
        [*tokenizer.encode("e"), *eos],
    ]


@pytest.mark.parametrize("sizes", [(70, 8), (8, 70), (50, 50), (61, 61)])
def test_truncation_keeps_what_fits(load, tmp_path, capsys, sizes):
    texts = ["".join(chr(97 + i * 7 % 26) for i in range(size)) for size in sizes]
    row = {"prompt": "?", "chosen": texts[0], "rejected": f"z{texts[1]}"}
    path = write(tmp_path / "p.jsonl", [*map(record, range(20)), row])
    assert len(load(path)) == 20
    assert "dropped 1 (p.jsonl row 20)" in capsys.readouterr().out
    whole = load(path, seq_len=256)
    cut = load(path, too_long="truncate")
    assert "truncated 1 (p.jsonl row 20)" in capsys.readouterr().out
    assert cut.lengths[20] == SEQ_LEN
    for one, other in zip(cut.pieces(20), whole.pieces(20), strict=True):
        assert one.tokens.tolist() == other.tokens[: len(one)].tolist()
        assert len(one) == len(other) or len(one) >= SEQ_LEN // 2
        assert (one.targets != IGNORE).any()


def test_pairs_that_differ_only_beyond_the_cut_are_dropped(load, tmp_path, capsys):
    row = {"prompt": "?", "chosen": "a" * 99 + "b", "rejected": "a" * 99 + "c"}
    path = write(tmp_path / "p.jsonl", [*map(record, range(20)), row])
    assert len(load(path, too_long="truncate", seq_len=20)) <= 20
    assert "do not differ before the cut 1" in capsys.readouterr().out


def test_held_out_pairs_are_chosen_by_their_prompt(load, tmp_path):
    rows = [record(i % 40) | {"chosen": f"answer {i}"} for i in range(80)]
    held_out = load(write(tmp_path / "p.jsonl", rows)).held_out
    assert 0 < held_out.sum() < 40
    assert (held_out[:40] == held_out[40:]).all()


def test_the_built_in_pairs(load, tokenizer):
    pairs = load("builtin:pairs", seq_len=512)
    assert (len(pairs), pairs.held_out.sum()) == (4_400, 400)
    prompts = [
        {pairs.tokens[pairs.slice(2 * i)][: q].tobytes() for i, q in prompt_ends(pairs, split)}
        for split in (False, True)
    ]  # fmt: skip
    assert len(prompts[1]) > 100
    assert not prompts[0] & prompts[1]


def prompt_ends(pairs: Pairs, held_out: bool):
    for i in np.flatnonzero(pairs.held_out == held_out):
        yield i, int(pairs.learned[pairs.slice(2 * i)].argmax())


# ---------------------------------------------------------------------------------------------
# Batches


def test_a_batch_says_which_target_belongs_to_whom(many):
    config = settings("unused")
    reference = torch.arange(2.0 * len(many)).view(-1, 2)
    rows = [[3, 50], [], [7]]
    batch = make_pair_batch(rows, many, reference, config)
    places = [(0, 3), (1, 50), (6, 7)]  # three places a row
    assert batch.pair_ids.tolist() == [3, 50, -1, -1, -1, -1, 7, -1, -1]
    assert batch.weight == 3
    flat = batch.tokens.flatten()
    documents = [flat[a:b].tolist() for a, b in pairwise(batch.cu_seqlens.tolist()) if a < b]
    for place, pair in places:
        assert batch.ref_logp[place].tolist() == [2 * pair, 2 * pair + 1]
        for side, piece in enumerate(many.pieces(pair)):
            belongs = batch.seq_ids == 2 * place + side
            learned = piece.targets[piece.targets != IGNORE].tolist()
            assert batch.targets[belongs].tolist() == learned
            assert batch.lengths[place, side] == len(learned)
            last = int(batch.last_tokens[place, side])
            assert flat[last - len(piece) + 1 : last + 1].tolist() == piece.tokens.tolist()
            assert piece.tokens.tolist() in documents
    assert ((batch.seq_ids >= 0) == (batch.targets != IGNORE)).all()
    empty = batch.pair_ids < 0
    assert (batch.lengths[empty] == 1).all()
    assert (batch.ref_logp[empty] == 0).all()


def loader(pairs: Pairs, **changes) -> PairLoader:
    options = {"seed": 0, "rows_per_step": 6, "micro_batch": 2} | changes
    return PairLoader(pairs, None, settings("unused"), **options)


def ids(batches: list) -> list[int]:
    return [i for b in batches for i in b.pair_ids.tolist() if i >= 0]


def test_an_epoch_has_every_training_pair_once_and_shapes_are_fixed(many):
    source = loader(many, rows_per_step=1, micro_batch=1)
    batches = [next(source)[0] for _ in range(source.plan.rows_in(1))]
    assert sorted(ids(batches)) == np.flatnonzero(~many.held_out).tolist()
    assert (
        len({tuple(v.shape for v in vars(b).values() if torch.is_tensor(v)) for b in batches}) == 1
    )
    again = [next(source)[0] for _ in range(source.plan.rows_in(2) - len(batches))]
    assert sorted(ids(again)) == sorted(ids(batches))
    assert ids(again) != ids(batches)


def test_every_resume_goes_on_exactly(many):
    """From within an epoch, across its end, and twice."""
    source = loader(many)
    states, expected = [], []
    for _ in range(3 * source.steps(1)):
        states.append(source.state_dict())
        expected.append(ids(next(source)))
    assert states[-1]["epoch"] == 2
    for start in (0, 1, len(states) // 2, len(states) - 1):
        resumed = loader(many)
        resumed.load_state_dict(states[start])
        assert [ids(next(resumed)) for _ in expected[start:]] == expected[start:]


def test_ranks_share_the_batches_of_one(many):
    alone = [next(loader(many))]
    ranks = [next(loader(many, micro_batch=1, rank=r, world_size=2)) for r in range(2)]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert ids(together) == ids(alone[0])


def test_the_state_carries_the_reference_and_knows_its_pairs(many, load, tmp_path):
    reference = torch.randn(len(many), 2)
    state = PairLoader(many, reference, settings("unused"), 0, 6, 2).state_dict()
    resumed = loader(many)
    resumed.load_state_dict(state)
    batch = next(resumed)[0]
    real = batch.pair_ids >= 0
    assert torch.equal(batch.ref_logp[real], reference[batch.pair_ids[real]])
    others = load(write(tmp_path / "o.jsonl", [record(i) for i in range(90)]))
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        loader(others).load_state_dict(state)


def test_held_out_batches_and_everything_once(many):
    config = settings("unused", held_out_pairs=10)
    held_out = held_out_batches(many, None, config, micro_batch=2, world_size=3)
    assert len(held_out) % 3 == 0
    assert len(ids(held_out)) == 10
    assert many.held_out[ids(held_out)].all()
    everything = list(batches_of(np.arange(len(many)), many, None, config, 4))
    assert sorted(ids(everything)) == list(range(len(many)))


def test_questions_are_the_held_out_prompts(many, tokenizer):
    questions = choose_questions(many, 5, tokenizer.eos_id)
    assert len(questions) == 5
    template = ChatTemplate.of(tokenizer)
    expected = {
        tuple(render_prompt([user(record(i)["prompt"])], tokenizer, template)): record(i)["chosen"]
        for i in np.flatnonzero(many.held_out)
    }
    for question in questions:
        assert tokenizer.decode(question.answer) == expected[tuple(question.prompt)]
        assert not question.known


# ---------------------------------------------------------------------------------------------
# Real data

REAL = {"alpaca_eval_balanced": (2_900, 2_920), "hh_rlhf_harmless_test": (2_290, 2_300)}


@pytest.mark.parametrize("name", REAL)
def test_real_pairs(name, tmp_path):
    path = SHARED / f"preferences/{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    folder = str(SHARED / "tokenizers/llama2")
    tokenizer = load_tokenizer(TokenizerConfig(path=folder, add_eos=True))
    config = settings(path, seq_len=2048, max_pairs_per_row=16, cache_dir=str(tmp_path))
    pairs = load_pairs(config, tokenizer, ChatTemplate.of(tokenizer))
    least, most = REAL[name]
    assert least <= len(pairs) <= most
    rows = len(list(batches_of(np.arange(len(pairs)), pairs, None, config, 1)))
    assert pairs.lengths.sum() / (rows * 2048) > 0.97
    assert (pairs.tokens[pairs.ends - 1] == tokenizer.eos_id).all()
    for i in range(0, len(pairs), 100):
        chosen, rejected = pairs.pieces(i)
        begin = int((chosen.targets != IGNORE).argmax())
        assert chosen.tokens[: begin + 1].tolist() == rejected.tokens[: begin + 1].tolist()
