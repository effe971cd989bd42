"""Streamed text against text decoded at once; stop strings against a search letter by letter."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.text_stream import before_stop, readable, stop_when
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

LLAMA = Path(__file__).parents[3] / "shared/data/tokenizers/llama2"
SENTENCE = "Hello naïve world 漢字 😀🏽 12 end"
LETTERS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["abc abba cab " * 20], TokenizerConfig(vocab_size=280))


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    if not LLAMA.exists():
        pytest.skip("the Llama-2 tokenizer is not here")
    return load_tokenizer(TokenizerConfig(path=str(LLAMA)))


@given(text=st.text())
def test_the_pieces_are_the_text(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    assert "".join(readable(tokenizer, tokenizer.encode(text))) == text


@given(ids=st.lists(st.integers(0, 279), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer, ids):
    """Also bytes that are no character, and an unfinished character at the end."""
    assert "".join(readable(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_piece_has_half_a_character(tokenizer):
    ids = tokenizer.encode("漢字😀")
    assert len(ids) == 10
    assert list(readable(tokenizer, ids)) == ["漢", "字", "😀"]


def test_a_piece_comes_with_its_token(tokenizer):
    taken = []
    ids = tokenizer.encode("cab 12")
    pieces = readable(tokenizer, (taken.append(i) or i for i in ids))
    first = next(pieces)
    assert taken == ids[:1]
    assert "cab 12".startswith(first)


def test_special_tokens_are_not_shown(tokenizer):
    ids = [tokenizer.roles["user"], *tokenizer.encode("ab"), tokenizer.eos_id]
    assert "".join(readable(tokenizer, ids)) == "ab"


def test_a_sentencepiece_vocabulary(llama):
    """Its first word has a space before it that belongs to the text only where it goes on."""
    ids = llama.encode(SENTENCE)
    assert "".join(readable(llama, ids)) == SENTENCE
    for cut in range(1, len(ids)):
        before = [llama.bos_id, *ids[:cut]]
        if not llama.decode(before).endswith("\ufffd"):
            assert llama.decode(before) + "".join(readable(llama, ids[cut:], before)) == SENTENCE


def test_bytes_that_no_character_begins_with_do_not_end_the_text(llama):
    """`DecodeStream` raises here."""
    byte = {b: llama.inner.token_to_id(f"<0x{b:02X}>") for b in (0xE6, 0xBC, 0xA2, 0x41)}
    ids = [byte[0xE6], byte[0xBC], byte[0xA2], byte[0xA2], byte[0xE6], byte[0x41]]
    assert "".join(readable(llama, [*ids, *llama.encode("well")])).endswith("well")


def letter_by_letter(text: str, stops: list[str]) -> str:
    """What stands before the stop string that is complete first, the longest if several are."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(pieces=st.lists(LETTERS), stops=STOPS)
def test_stop_strings_across_pieces(pieces, stops):
    assert "".join(before_stop(pieces, stops)) == letter_by_letter("".join(pieces), stops)


@given(text=LETTERS, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    """What is shown after each letter is the longest that no continuation can take back."""
    whole = letter_by_letter(text, stops)
    if whole != text:
        return
    shown = []

    def letters():
        for n, letter in enumerate(text, 1):
            yield letter
            beginnings = [i for s in stops for i in range(len(s)) if text[:n].endswith(s[:i])]
            assert "".join(shown) == text[: n - max(beginnings, default=0)]

    for piece in before_stop(letters(), stops):
        shown.append(piece)


def test_nothing_is_asked_for_after_a_stop_string():
    pieces = iter(["a", "b", "c", "d"])
    assert "".join(before_stop(pieces, ["bc"])) == "a"
    assert list(pieces) == ["d"]


@given(text=LETTERS, stops=STOPS.filter(len))
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(tokenizer, text, stops):
    ids = tokenizer.encode("abba " * 30 + text)
    stopped = stop_when(tokenizer, stops)
    ended = [stopped(ids[:n]) for n in range(1, len(ids) + 1)]
    texts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    first = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
    assert (ended.index(True) if any(ended) else None) == first


def test_without_stop_strings_nothing_is_looked_for(tokenizer):
    assert stop_when(tokenizer, []) is None
