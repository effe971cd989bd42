"""Plain text among conversations: as much as asked for, in its order, held-out documents apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import plain_text
from data.chat_loader import ChatLoader, held_out_batches
from data.conversations import ChatDataConfig, ChatSource
from data.plain_text import load_plain_text, warn_of_leaks
from data.shards import is_held_out
from data.sources import SourceConfig
from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from utils.config import ConfigError, validate
from utils.logging import get_logger

SEQ_LEN = 32
FRACTION = 0.2
CHATS = ChatSource(name="chats", path="builtin:chats")


def document(i: int) -> str:
    return " ".join(f"word{i}" for _ in range(1 + 31 * i % 37))


TEXTS = ["", "half a face: ?", *map(document, range(100))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=320))


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    path = tmp_path / "text.jsonl"
    broken = (text.replace("?", "\ud83d") for text in TEXTS)  # half an emoji, as found in the wild
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in broken))
    return SourceConfig(name="text", path=str(path), weight=3, text_field="body")


def config_of(tmp_path: Path, *sources: SourceConfig, tokens: int = 1_000) -> ChatDataConfig:
    return ChatDataConfig(
        sources=[CHATS],
        text_sources=list(sources),
        text_tokens=tokens,
        cache_dir=str(tmp_path / "cache"),
        seq_len=SEQ_LEN,
        held_out_fraction=FRACTION,
    )


def test_documents_in_their_order_until_there_are_enough(source, tokenizer, tmp_path):
    text = load_plain_text(source, config_of(tmp_path, source), tokenizer)
    expected, held_out, trained = [], [], 0
    for document in filter(None, TEXTS):
        ids = tokenizer.encode_documents([document])[0]
        kept_out = is_held_out(document, FRACTION)
        while len(ids) > 1 and trained < 1_000:
            expected.append(ids[: SEQ_LEN + 1])
            held_out.append(kept_out)
            trained += 0 if kept_out else len(expected[-1]) - 1
            ids = ids[SEQ_LEN:]
    pieces = [text.tokens[text.slice(i)].tolist() for i in range(len(text.ends))]
    assert pieces == expected
    assert text.held_out.tolist() == held_out
    assert any(held_out) and text.learned.all()
    assert len(pieces) < 300, "a part of the source must do, or the test shows nothing"


def test_every_target_of_a_document_is_learned_once(source, tokenizer, tmp_path):
    text = load_plain_text(source, config_of(tmp_path, source), tokenizer)
    targets = [text.piece(i).targets for i in range(len(text.ends))]
    learned = np.concatenate([t[t >= 0] for t in targets])
    documents = tokenizer.encode_documents([t for t in TEXTS if t])
    every = [token for ids in documents for token in ids[1:]]
    assert learned.tolist() == every[: len(learned)]


def test_a_book_does_not_swamp_the_conversations(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was a long road. " * 5_000)
    source = SourceConfig(name="book", path=str(path), weight=1)
    config = config_of(tmp_path, source).model_copy(update={"held_out_fraction": 1e-9})
    text = load_plain_text(source, config, tokenizer)
    assert 1_000 <= sum(text.lengths) < 1_000 + SEQ_LEN


def test_what_pretraining_held_out_is_not_trained_on_in_silence(tmp_path, source, caplog):
    config = config_of(tmp_path, source)
    get_logger().addHandler(caplog.handler)
    try:
        warn_of_leaks(config, {"data": {"held_out_fraction": FRACTION}})
        warn_of_leaks(config, {})
        assert not caplog.records
        warn_of_leaks(config, {"data": {"held_out_fraction": 2 * FRACTION}})
    finally:
        get_logger().removeHandler(caplog.handler)
    assert "is below pretraining's (0.4)" in caplog.text


def test_weights_share_the_tokens_out(source, tokenizer, tmp_path):
    other = source.model_copy(update={"name": "other", "weight": 1})
    config = config_of(tmp_path, source, other, tokens=1_200)
    large, small = (load_plain_text(s, config, tokenizer) for s in config.text_sources)
    for text, share in ((large, 900), (small, 300)):
        assert share <= sum(text.lengths[~text.held_out]) < share + SEQ_LEN


def test_a_second_time_it_comes_from_the_cache(source, tokenizer, tmp_path, monkeypatch):
    config = config_of(tmp_path, source)
    first = load_plain_text(source, config, tokenizer)
    monkeypatch.delattr(plain_text, "read_rows")
    again = load_plain_text(source, config, tokenizer)
    assert np.array_equal(first.tokens, again.tokens)
    with Path(source.path).open("a") as file:
        file.write('{"body": "more"}\n')
    with pytest.raises(NameError):  # a changed file is read again
        load_plain_text(source, config, tokenizer)


def test_it_goes_into_rows_and_evaluations_like_conversations(source, tokenizer, tmp_path):
    config = config_of(tmp_path, source)
    text = load_plain_text(source, config, tokenizer)
    loader = ChatLoader([text], config, seed=0, rows_per_step=4, micro_batch=4)
    rows = loader.plan.rows_in(1)
    seen = np.concatenate([next(loader)[0].targets.flatten() for _ in range(-(-rows // 4))])
    learned = sum(text.lengths[~text.held_out])
    assert learned <= (seen >= 0).sum() < learned + 4 * SEQ_LEN
    batches = held_out_batches([text], config, micro_batch=4)
    assert sum((b.targets >= 0).sum() for b in batches) == sum(text.lengths[text.held_out])


def test_mistakes_are_told(source, tokenizer, tmp_path):
    config = config_of(tmp_path, source, tokens=1_000_000)
    with pytest.raises(ConfigError, match=r"its share of data.text_tokens is 1,000,000, and"):
        load_plain_text(source, config, tokenizer)
    chats, text = CHATS.model_dump(), source.model_dump()
    with pytest.raises(ConfigError, match=r"text_tokens \(0\) must be above 0"):
        validate(ChatDataConfig, {"sources": [chats], "text_sources": [text]}, "config")
    with pytest.raises(ConfigError, match=r"text_tokens \(9\) must be above 0 if there are"):
        validate(ChatDataConfig, {"sources": [chats], "text_tokens": 9}, "config")
    named = {"text_sources": [text | {"name": "chats"}], "text_tokens": 9}
    with pytest.raises(ConfigError, match="the name 'chats' is used twice"):
        validate(ChatDataConfig, {"sources": [chats]} | named, "config")
