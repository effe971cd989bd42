"""Conversations from files to rows: nothing lost silently, nothing cut, every resume exact."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.chat import ChatTemplate, render
from data.chat_loader import ChatLoader, choose_questions, held_out_batches
from data.conversations import ChatDataConfig, ChatSource, Conversations, load_conversations
from data.packing import IGNORE, Batch
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from utils.config import ConfigError, validate

SHARED = Path(__file__).parents[3] / "shared/data"
SEQ_LEN = 64


def chat(i: int) -> list[dict]:
    """Conversation number i, of its own length."""
    words = " ".join(f"w{i}" for _ in range(1 + i * 7 % 11))
    return [
        {"role": "user", "content": f"{i}: {words}"},
        {"role": "assistant", "content": f"{words}."},
    ]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([m["content"] for i in range(50) for m in chat(i)], TokenizerConfig())


@pytest.fixture
def load(tokenizer, tmp_path):
    """Loads one source from a path, with changes to the data section."""

    def load(path: Path | str, weight: float = 1.0, **changes) -> Conversations:
        source = ChatSource(name="s", path=str(path), weight=weight)
        values = {"cache_dir": str(tmp_path / "cache"), "seq_len": SEQ_LEN} | changes
        config = ChatDataConfig(sources=[source], **values)
        return load_conversations(source, config, tokenizer, ChatTemplate.of(tokenizer))

    return load


@pytest.fixture
def many(load, tmp_path) -> Conversations:
    return load(write(tmp_path / "many.jsonl", [{"messages": chat(i)} for i in range(200)]))


def loader(*sources: Conversations, **changes) -> ChatLoader:
    config = ChatDataConfig(
        sources=[s.source for s in sources], seq_len=SEQ_LEN, max_documents_per_row=8
    )
    options = {"seed": 0, "rows_per_step": 6, "micro_batch": 2} | changes
    return ChatLoader(list(sources), config, **options)


def conversations_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The documents of batches as token tuples, padding aside, in their order."""
    found = []
    for batch in batches:
        ends = batch.cu_seqlens.tolist()
        tokens = batch.tokens.flatten()
        documents = [tokens[a:b] for a, b in pairwise(ends) if a < b]
        found += [tuple(d.tolist()) for d in documents if d.any()]
    return found


def same_batches(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets)
        for x, y in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------------------------------------
# From rows to tokens


def test_jsonl_json_and_parquet_give_the_same_conversations(load, tmp_path):
    records = [{"messages": chat(i)} for i in range(20)]
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    one, two, three = (
        load(path)
        for path in (
            write(tmp_path / "a.jsonl", records),
            tmp_path / "b.json",
            tmp_path / "c.parquet",
        )
    )
    for other in (two, three):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.learned.tolist() == other.learned.tolist()


def test_a_piece_is_the_rendered_conversation_shifted_by_one(many, tokenizer):
    rendered = render(chat(7), tokenizer, ChatTemplate.of(tokenizer))
    piece = many.piece(7)
    assert piece.tokens.tolist() == rendered.tokens[:-1]
    following = zip(rendered.tokens[1:], rendered.learned[1:], strict=True)
    assert piece.targets.tolist() == [t if yes else IGNORE for t, yes in following]
    assert piece.targets[-1] == tokenizer.eos_id
    assert many.lengths[7] == len(piece)


BAD = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]},
    {"note": "no shape at all"},
]


def test_bad_rows_are_counted_by_reason_and_told_with_their_numbers(load, tmp_path, capsys):
    good = [{"messages": chat(i)} for i in range(10)]
    path = write(tmp_path / "a.jsonl", [*good, *BAD, BAD[0]])
    with path.open("ab") as file:
        file.write(b'{"messages": "\xff"}\n{"messages": [\n[1]\n')
    for _ in range(2):  # tokenized, then from the cache
        assert len(load(path).ends) == 10
        told = capsys.readouterr().out
        for reason in (
            "empty answer 2 (a.jsonl row 10, a.jsonl row 16)", "missing role 1 (a.jsonl row 11)",
            "impossible order of roles 1 (a.jsonl row 12)",
            "broken UTF-8 2 (a.jsonl row 13, a.jsonl row 17)",
            "content is not text 1 (a.jsonl row 14)", "no known shape 1 (a.jsonl row 15)",
            "no valid JSON 1 (a.jsonl row 18)", "a list, not an object 1 (a.jsonl row 19)",
        ):  # fmt: skip
            assert reason in told
    with pytest.raises(ConfigError, match=r"empty answer 2 .*data\.bad_rows to skip"):
        load(path, bad_rows="fatal")


def test_only_the_first_few_bad_rows_are_named(load, tmp_path, capsys):
    load(write(tmp_path / "a.jsonl", [{"messages": chat(1)}, *[BAD[0]] * 99]))
    assert "empty answer 99 (a.jsonl row 1, " in (told := capsys.readouterr().out)
    assert "row 5, ...)" in told
    assert "row 6" not in told


def test_a_source_of_no_known_shape_shows_its_row(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "2 + 2", "reply": "4"}])
    with pytest.raises(ConfigError) as error:
        load(path)
    for part in ("a.jsonl row 0", "'question', 'reply'", "2 + 2", "instruction, input (optional)"):
        assert part in str(error.value)


def long_chats() -> list[dict]:
    """A short one, one whose answer is cut, and one of which no answer would be left."""
    return [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "1" * 100},
        {"prompt": "1" * 100, "completion": "a"},
    ]


def test_too_long_conversations_are_truncated_and_counted(load, tmp_path, capsys):
    found = load(write(tmp_path / "a.jsonl", long_chats()))
    assert found.lengths.tolist()[1:] == [SEQ_LEN]
    assert found.learned[found.slice(1)].sum() > SEQ_LEN - 5
    told = capsys.readouterr().out
    assert "truncated 1 (a.jsonl row 1)" in told
    assert "dropped, since no answer begins before the cut 1 (a.jsonl row 2)" in told


def test_too_long_conversations_are_dropped_and_counted(load, tmp_path, capsys):
    assert len(load(write(tmp_path / "a.jsonl", long_chats()), too_long="drop").ends) == 1
    assert "dropped 2 (a.jsonl row 1, a.jsonl row 2)" in capsys.readouterr().out


def test_the_cache_is_used_and_its_key_sees_what_matters(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": chat(i)} for i in range(20)])
    load(path)
    load(path, weight=3.0, bad_rows="fatal")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    load(path, held_out_fraction=0.3)
    load(path, seq_len=16)
    write(path, [{"messages": chat(i)} for i in range(21)])
    load(path)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_hub_dataset_is_read_like_a_file(load, tmp_path, monkeypatch):
    """The hub itself is out of reach of the tests; what it would hand over is a local dataset."""
    import datasets

    records = [{"messages": chat(i)} for i in range(20)]
    rows = datasets.Dataset.from_list([*records, BAD[0]])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    found = load("hub:someone/chats")
    assert asked[0] == (("someone/chats", None), {"split": "train"})
    same = load(write(tmp_path / "a.jsonl", records))
    assert found.tokens.tolist() == same.tokens.tolist()


def test_builtin_chats_hold_out_their_own_split(load, monkeypatch):
    monkeypatch.setattr("data.builtin_tasks.N_EXAMPLES", {"train": 20, "heldout": 5})
    assert load("builtin:chats", seq_len=256).held_out.tolist() == [False] * 20 + [True] * 5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:nobody/no-such-chats", "could not get 'nobody/no-such-chats'.*give their folder"),
        ("nowhere.jsonl", "no documents at"),
    ],
)
def test_a_source_that_cannot_be_reached(load, path, message):
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_sources_of_no_use(load, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ConfigError, match="cannot tell a question from an answer"):
        load(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="no conversation to train on"):
        load(write(tmp_path / "b.jsonl", [BAD[0]]))


def test_the_mistakes_of_a_config():
    source = {"name": "s", "path": "builtin:poems", "weight": 0.0}
    with pytest.raises(ConfigError) as error:
        validate(ChatDataConfig, {"sources": [source, source], "held_out_fraction": 0.9}, "x")
    for part in ("sources.0.weight", "'builtin:chats'", "used twice", "held_out_fraction (0.9)"):
        assert part in str(error.value)


# ---------------------------------------------------------------------------------------------
# Held out


def test_held_out_is_decided_by_the_question_alone(load, tmp_path):
    records = [{"prompt": f"q{i % 50}", "completion": f"answer {i}"} for i in range(100)]
    found = load(write(tmp_path / "a.jsonl", records), held_out_fraction=0.3)
    assert found.held_out[:50].tolist() == found.held_out[50:].tolist()
    assert 5 < found.held_out[:50].sum() < 25
    training = conversations_of([b for _ in range(5) for b in next(loader(found))])
    kept_out = {tuple(found.piece(i).tokens.tolist()) for i in np.flatnonzero(found.held_out)}
    assert not kept_out & set(training)


def test_held_out_batches_and_questions(load, tmp_path, tokenizer):
    records = [{"messages": chat(i)} for i in range(100)]
    found = load(write(tmp_path / "a.jsonl", records), held_out_fraction=0.3)
    config = ChatDataConfig(sources=[found.source], seq_len=SEQ_LEN, max_documents_per_row=8)
    batches = held_out_batches([found], config, micro_batch=4)
    assert all(batch.tokens.shape == (4, SEQ_LEN) for batch in batches)
    assert len(conversations_of(batches)) == found.held_out.sum()
    questions = choose_questions([found], 7, tokenizer.eos_id)
    assert len(questions) == 7
    for question in questions:
        number, words = tokenizer.decode(question.prompt).split(": ")
        assert found.held_out[int(number)]
        assert tokenizer.decode(question.answer) == words + "."
    few = ChatDataConfig(sources=[found.source], seq_len=SEQ_LEN, held_out_tokens=1)
    assert len(conversations_of(held_out_batches([found], few, micro_batch=4))) == 1


@pytest.mark.parametrize("seq_len", [8, 9, 10, 11, 12, 13, 14])
def test_no_question_is_made_of_a_cut_answer(load, tmp_path, tokenizer, seq_len):
    """Wherever two turns are cut, what is asked for is one of the two whole answers."""
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "1234", strict=True)
    ]
    found = load(write(tmp_path / "a.jsonl", [{"messages": turns}]), seq_len=seq_len)
    for question in choose_questions([found], 1, tokenizer.eos_id, held_out=False):
        assert tokenizer.decode(question.answer) in ("2", "4")


def test_nothing_held_out_is_said(many):
    many.held_out[:] = False
    with pytest.raises(ConfigError, match="no held-out conversation"):
        held_out_batches([many], ChatDataConfig(sources=[many.source]), micro_batch=2)


# ---------------------------------------------------------------------------------------------
# The loader


def test_an_epoch_holds_every_conversation_once_and_whole(many):
    subject = loader(many, rows_per_step=1, micro_batch=1)
    rows = len(subject.plan.of_epoch(0))
    seen = conversations_of([batch for _ in range(rows) for batch in next(subject)])
    trained = np.flatnonzero(~many.held_out)
    assert Counter(seen) == Counter(tuple(many.piece(i).tokens.tolist()) for i in trained)
    assert (subject.plan.epoch, subject.plan.row) == (1, 0)


def test_the_order_depends_on_seed_and_epoch_alone(many):
    plans = [loader(many, seed=s).plan.of_epoch(e) for s in (0, 1) for e in (0, 1)]
    assert plans[0] == loader(many, rows_per_step=2, micro_batch=1).plan.of_epoch(0)
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


@pytest.mark.parametrize(("weight", "least", "most"), [(2.0, 2, 2), (0.25, 0, 1), (1.5, 1, 2)])
def test_weights_say_how_often_each_conversation_is_seen(load, tmp_path, weight, least, most):
    path = write(tmp_path / "a.jsonl", [{"messages": chat(i)} for i in range(200)])
    found = load(path, weight)
    counts = Counter(m for row in loader(found).plan.of_epoch(0) for m in row)
    times = Counter(int(i) for _, i in loader(found).members)
    trained = int((~found.held_out).sum())
    assert {times[i] for i in np.flatnonzero(~found.held_out)} == {least, most}
    assert sum(counts.values()) == pytest.approx(weight * trained, rel=0.2)
    assert len(counts) == sum(counts.values()), "a member is a conversation and a repetition"


def test_several_sources_are_mixed_in_every_part_of_an_epoch(load, tmp_path):
    one = load(write(tmp_path / "a.jsonl", [{"messages": chat(i)} for i in range(100)]))
    two = load(write(tmp_path / "b.jsonl", [{"messages": chat(i)} for i in range(100, 200)]))
    subject = loader(one, two)
    first_half = subject.plan.of_epoch(0)[: len(subject.plan.of_epoch(0)) // 2]
    sources = [int(subject.members[m][0]) for row in first_half for m in row]
    assert 0.3 < np.mean(sources) < 0.7


def test_resuming_anywhere_and_twice_gives_the_same_batches(many):
    whole = loader(many)
    steps = [next(whole) for _ in range(60)]
    assert whole.plan.epoch > 1
    subject = loader(many)
    for step in range(60):
        if step % 3 == 2:
            state = json.loads(json.dumps(subject.state_dict()))
            subject = loader(many)
            subject.load_state_dict(state)
        assert same_batches(next(subject), steps[step])


def test_ranks_and_micro_batches_share_the_rows_of_one_process(many):
    one = [row for batch in next(loader(many, micro_batch=6)) for row in batch.tokens.tolist()]
    two = [loader(many, micro_batch=1, rank=r, world_size=2) for r in (0, 1)]
    parts = [[row for batch in next(rank) for row in batch.tokens.tolist()] for rank in two]
    assert [parts[i % 2][i // 2] for i in range(6)] == one
    assert two[0].state_dict() == two[1].state_dict()


def test_steps_cover_the_epochs_without_a_short_one(many):
    subject = loader(many)
    rows = sum(len(subject.plan.of_epoch(epoch)) for epoch in range(3))
    assert 0 <= subject.steps(3) * 6 - rows < 6
    assert all(len(next(subject)) == 3 for _ in range(subject.steps(3)))


def test_other_conversations_are_refused_on_resume(many, load, tmp_path):
    state = loader(many).state_dict()
    other = load(write(tmp_path / "b.jsonl", [{"messages": chat(i)} for i in range(1, 201)]))
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        loader(other).load_state_dict(state)


@pytest.mark.skipif(not (SHARED / "sft").exists(), reason="the chat sample is not here")
def test_padding_of_the_chat_sample_is_under_two_percent(tmp_path):
    tokenizer = load_tokenizer(TokenizerConfig(path=str(SHARED / "tokenizers/llama2")))
    source = ChatSource(name="chat", path=str(SHARED / "sft/chat_messages.jsonl.gz"))
    config = ChatDataConfig(sources=[source], cache_dir=str(tmp_path))
    found = load_conversations(source, config, tokenizer, ChatTemplate.of(tokenizer))
    subject = ChatLoader([found], config, seed=0, rows_per_step=64, micro_batch=16)
    for epoch in range(2):
        plan = subject.plan.of_epoch(epoch)
        tokens = sum(found.lengths[subject.members[m][1]] for row in plan for m in row)
        assert tokens > 0.98 * len(plan) * config.seq_len
        assert max(map(len, plan)) <= config.max_documents_per_row
