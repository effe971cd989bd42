"""Tokenizers: round trips, special tokens stay out of reach of text, fingerprints of behaviour."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from utils.config import ConfigError

TEXTS = ["The cat sat on the mat, 1234 times.", "def add(a, b):\n    return a + b\n"] * 50
CONFIG = TokenizerConfig(vocab_size=320)
LLAMA = Path(__file__).parents[3] / "shared/data/tokenizers/llama2"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, CONFIG)


@given(text=st.text())
def test_any_text_round_trips(trained, text):
    text = text.encode("utf-8", "ignore").decode()
    assert trained.decode(trained.encode(text), skip_special=False) == text


def test_text_never_becomes_a_special_token(trained):
    ids = trained.encode("</s><|user|>hello<s>")
    assert not set(ids) & set(trained.roles.values())


def test_digits_are_tokens_of_their_own(trained):
    assert [trained.decode([i]) for i in trained.encode("1234")] == ["1", "2", "3", "4"]


def test_documents_get_bos_and_eos(trained):
    (ids,) = trained.encode_documents(["hello"])
    assert (ids[0], ids[-1]) == (trained.bos_id, trained.eos_id)
    assert ids[1:-1] == trained.encode("hello")


def test_training_is_repeatable(trained):
    assert train_tokenizer(TEXTS, CONFIG).fingerprint == trained.fingerprint


def test_the_state_is_enough_to_make_it_again(trained):
    state = json.loads(json.dumps(trained.state_dict()))
    again = Tokenizer.from_state(state)
    assert again.fingerprint == trained.fingerprint
    assert again.encode_documents(TEXTS[:2]) == trained.encode_documents(TEXTS[:2])


def test_the_fingerprint_sees_behaviour_and_not_bytes(trained):
    state = trained.state_dict()
    respelled = state | {"json": json.dumps(json.loads(state["json"]), indent=3)}
    assert Tokenizer.from_state(respelled).fingerprint == trained.fingerprint
    without_bos = Tokenizer.from_state(state | {"add_bos": False})
    assert without_bos.fingerprint != trained.fingerprint
    other = json.loads(state["json"])
    other["normalizer"] = {"type": "Lowercase"}
    changed = Tokenizer.from_state(state | {"json": json.dumps(other)})
    assert changed.fingerprint != trained.fingerprint


@pytest.mark.skipif(not LLAMA.exists(), reason="the Llama-2 tokenizer is not here")
def test_llama_2_as_transformers_reads_it():
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(TokenizerConfig(path=str(LLAMA)))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(LLAMA / "tokenizer.json"))
    text = "Hello  world, 12345 naïve 漢字\n\tx"
    assert ours.vocab_size == 32_000
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_documents([text])[0] == theirs.encode(text)
    assert (ours.add_bos, ours.add_eos) == (True, False)
    assert ours.roles["eos"] not in ours.encode("a</s>b")


@pytest.mark.parametrize(
    ("path", "message"),
    [("./nowhere", "no tokenizer.json there"), ("someone/no-such-model", "from the hub")],
)
def test_a_missing_tokenizer_is_said_with_its_remedy(path, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(TokenizerConfig(path=path))
