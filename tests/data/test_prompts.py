"""Prompts from rows: shapes, answers, splits, bad input, and an order that resumes exactly."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.chat import ChatTemplate, render, render_prompt
from data.prompts import (
    BUILTIN_EXAMPLES,
    PromptDataConfig,
    PromptOrder,
    Prompts,
    PromptSource,
    asked_text,
    load_prompts,
    to_prompt,
)
from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from utils.config import ConfigError, validate

SHARED = Path(__file__).parents[3] / "shared/data/rlvr"
GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


def gsm8k(i: int) -> dict:
    return {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [text for i in range(50) for text in gsm8k(i).values()]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=320))


def any_answer(verifier: str, answer: str) -> str | None:
    return None


def load(tokenizer: Tokenizer, *sources: dict, **settings) -> Prompts:
    sources = [PromptSource(name=f"s{i}", **s) for i, s in enumerate(sources)]
    config = PromptDataConfig(sources=sources, **{"held_out_fraction": 0.2} | settings)
    return load_prompts(config, tokenizer, ChatTemplate.of(tokenizer), any_answer)


# ---------------------------------------------------------------------------------------------
# Shapes

USER = [{"role": "user", "content": "What is 2 + 3?"}]
GYM = {"question": "What is 2 + 3?", "answer": "5", "metadata": {"source_dataset": "basic"}}
SHAPES = [
    (GSM8K, None, "5", "gsm8k"),
    (GSM8K, "number", "5", "number"),
    ({"prompt": "What is 2 + 3?", "answer": "5", "verifier": "math"}, None, "5", "math"),
    ({"prompt": USER, "answer": 5, "verifier": "math"}, "number", "5", "number"),
    ({"prompt": USER, "answer": "five"}, "exact_match", "five", "exact_match"),
    (GYM, None, json.dumps(GYM), "reasoning_gym"),
    (GYM, "exact_match", "5", "exact_match"),  # where the package is absent
    ({"prompt": USER, "answer": "a()\n#### b\nc()"}, "python", "a()\n#### b\nc()", "python"),
    ({"prompt": USER, "answer": "####\\s*5"}, "regex", "####\\s*5", "regex"),
]


@pytest.mark.parametrize(("record", "of_source", "answer", "verifier"), SHAPES)
def test_shapes(record: dict, of_source: str | None, answer: str, verifier: str) -> None:
    row = to_prompt(record, of_source)
    assert (row.messages, row.answer, row.verifier) == (USER, answer, verifier)


def test_a_system_message_beside_the_question_goes_before_it() -> None:
    system = {"role": "system", "content": "Think."}
    assert to_prompt(GSM8K | {"system": "Think."}, None).messages == [system, *USER]


def test_jsonl_gzip_and_parquet_give_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [gsm8k(i) for i in range(20)]
    plain = write(tmp_path / "a.jsonl", records)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    columns = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(records), columns)
    first, *others = (load(tokenizer, {"path": str(p)}) for p in (plain, packed, columns))
    assert len(first.train) + len(first.held_out) == 20
    assert all(other == first for other in others)


def test_prompt_is_the_beginning_of_its_conversation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(i) for i in range(5)])
    template = ChatTemplate.of(tokenizer)
    for prompt in load(tokenizer, {"path": str(path), "use": "train"}).train:
        answered = [*prompt.messages, {"role": "assistant", "content": prompt.answer}]
        whole = render(answered, tokenizer, template)
        assert whole.learned.index(True) == len(prompt.tokens)
        assert whole.tokens[: len(prompt.tokens)] == prompt.tokens


def test_builtin_prompts_keep_their_split(tokenizer: Tokenizer) -> None:
    prompts = load(tokenizer, {"path": "builtin:prompts"}, held_out_prompts=10_000)
    assert len(prompts.held_out) == BUILTIN_EXAMPLES["heldout"]
    assert prompts.verifiers == ["number"]
    trained = {asked_text(p.messages) for p in prompts.train}
    assert not trained & {asked_text(p.messages) for p in prompts.held_out}


@pytest.mark.skipif(not SHARED.exists(), reason="no GSM8K beside the repository")
def test_gsm8k_itself(tokenizer: Tokenizer) -> None:
    prompts = load(
        tokenizer,
        {"path": str(SHARED / "gsm8k_train.jsonl.gz"), "use": "train"},
        {"path": str(SHARED / "gsm8k_test.jsonl.gz"), "use": "held_out"},
        max_prompt_tokens=10_000,
        held_out_prompts=2_000,
    )
    assert (len(prompts.train), len(prompts.held_out)) == (7_473, 1_319)
    assert prompts.train[0].answer == "72"
    assert prompts.verifiers == ["gsm8k"]
    assert all(p.answer.replace(",", "").lstrip("-").isdecimal() for p in prompts.train)


# ---------------------------------------------------------------------------------------------
# Splits and weights


def test_held_out_prompts_are_trained_on_nowhere(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(i) for i in range(100)])
    test = write(tmp_path / "test.jsonl", [gsm8k(i) for i in range(90, 110)])
    split = load(tokenizer, {"path": str(path)}, {"path": str(path)}, held_out_prompts=1_000)
    asked = {asked_text(p.messages) for p in split.train}
    kept = {asked_text(p.messages) for p in split.held_out}
    assert len(asked) + len(kept) == 100
    assert not asked & kept
    leaky = load(
        tokenizer, {"path": str(path), "use": "train"}, {"path": str(test), "use": "held_out"}
    )
    assert len(leaky.train) == 90
    assert len(leaky.held_out) == 20


def test_weights_repeat_and_thin(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(i) for i in range(400)])
    source = {"path": str(path), "use": "train"}
    for weight, times in ((2.0, {2}), (0.25, {1}), (1.5, {1, 2})):
        prompts = load(tokenizer, source | {"weight": weight}).train
        counts = Counter(asked_text(p.messages) for p in prompts)
        assert set(counts.values()) == times
        assert len(prompts) == pytest.approx(400 * weight, rel=0.2)
        assert load(tokenizer, source | {"weight": weight}).train == prompts


def test_held_out_prompts_come_from_all_sources_and_all_over(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(i) for i in range(50)])
    few = load(
        tokenizer,
        {"path": str(path), "use": "held_out"},
        {"path": "builtin:prompts"},
        held_out_prompts=10,
    ).held_out
    assert Counter(p.source for p in few) == {"s0": 5, "s1": 5}
    assert [p.answer for p in few[:5]] == ["1", "11", "21", "31", "41"]


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = [
    ({"question": "What?", "answer": None}, "answer missing"),
    ({"question": "What?", "answer": " \n#### "}, "answer missing"),
    ({"question": "", "answer": "#### 5"}, "empty message"),
    ({"question": 7, "answer": "#### 5"}, "content is not text"),
    ({"question": "What?", "answer": ["5"]}, "answer is not text"),
    ({"question": "What?", "answer": "5"}, "no verifier named"),
    ({"prompt": [], "answer": "#### 5"}, "impossible order of roles"),
    ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "#### 5"}, "impossible order"),
    ({"text": "What?"}, "no known shape"),
    (7, "a int, not an object"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_bad_rows_end_the_run_or_are_counted(
    record: object, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(1), record, gsm8k(2)])
    source = {"path": str(path), "use": "train"}
    with pytest.raises(ConfigError, match="rows that cannot be used") as error:
        load(tokenizer, source)
    assert reason in str(error.value)
    assert "a.jsonl row 1" in str(error.value)
    assert len(load(tokenizer, source, bad_rows="skip").train) == 2


def test_answers_are_checked_by_their_verifier(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(1), gsm8k(2)])
    config = PromptDataConfig(sources=[PromptSource(name="s", path=str(path))])

    def check(verifier: str, answer: str) -> str | None:
        return f"{verifier} wants no 3" if answer == "3" else None

    with pytest.raises(ConfigError, match=r"gsm8k wants no 3 1 \(a.jsonl row 1\)"):
        load_prompts(config, tokenizer, ChatTemplate.of(tokenizer), check)


def test_long_prompts_end_the_run_or_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm8k(1), {**gsm8k(2), "question": "why " * 500}])
    source = {"path": str(path), "use": "train"}
    fits = len(render_prompt(to_prompt(gsm8k(1), None).messages, tokenizer,
                             ChatTemplate.of(tokenizer)))  # fmt: skip
    assert len(load(tokenizer, source, max_prompt_tokens=fits).train) == 1
    with pytest.raises(ConfigError, match=r"max_prompt_tokens \(100\).*a.jsonl row 1"):
        load(tokenizer, source, max_prompt_tokens=100, too_long="fatal")
    with pytest.raises(ConfigError, match="no prompt to train on"):
        load(tokenizer, source, max_prompt_tokens=fits - 1)


def test_unknown_shape_is_told_with_the_known_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "only text"}])
    with pytest.raises(ConfigError, match="Shapes accepted"):
        load(tokenizer, {"path": str(path)})


def test_config_mistakes_are_told_together() -> None:
    source = {"name": "a", "path": "builtin:chats", "weight": 0.0, "exact_match": True}
    raw = {"sources": [source], "max_prompt_tokens": 0, "held_out_fraction": 0.7}
    with pytest.raises(ConfigError) as error:
        validate(PromptDataConfig, raw, "rlvr.yaml")
    for key in ("path", "weight", "exact_match", "max_prompt_tokens", "held_out_fraction"):
        assert key in str(error.value)


# ---------------------------------------------------------------------------------------------
# Order


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    path = write(tmp_path_factory.mktemp("p") / "a.jsonl", [gsm8k(i) for i in range(30)])
    return load(tokenizer, {"path": str(path), "use": "train"})


def test_each_epoch_asks_all_in_an_order_of_its_own(prompts: Prompts) -> None:
    drawn = list(itertools.islice(PromptOrder(prompts, seed=1), 60))
    assert sorted(drawn[:30]) == sorted(drawn[30:]) == list(range(30))
    assert drawn[:30] != drawn[30:]
    assert drawn == list(itertools.islice(PromptOrder(prompts, seed=1), 60))
    assert drawn != list(itertools.islice(PromptOrder(prompts, seed=2), 60))


@pytest.mark.parametrize("before", [0, 7, 29, 30, 31, 75])
def test_order_resumes_exactly_and_twice(prompts: Prompts, before: int) -> None:
    whole = list(itertools.islice(PromptOrder(prompts, seed=1), before + 50))
    first = PromptOrder(prompts, seed=1)
    assert list(itertools.islice(first, before)) == whole[:before]
    second = PromptOrder(prompts, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(itertools.islice(second, 20)) == whole[before : before + 20]
    third = PromptOrder(prompts, seed=1)
    third.load_state_dict(second.state_dict())
    assert list(itertools.islice(third, 30)) == whole[before + 20 :]


def test_state_of_other_prompts_is_refused(prompts: Prompts) -> None:
    state = PromptOrder(prompts, seed=1).state_dict()
    fewer = Prompts(prompts.train[1:], [])
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        PromptOrder(fewer, seed=1).load_state_dict(state)
