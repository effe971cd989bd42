"""Tokens to text while they are being made: whole characters, and nothing of a stop string.

    ids --> readable --> pieces of text --> before_stop --> pieces that are sure to be shown

A character can take several tokens, and a stop string can begin in one token and end in another.
So text waits until it is certain: an unfinished character until its last byte is there, what could
be the beginning of a stop string until it is one or is none. Nothing shown is ever taken back, and
what is shown does not depend on where the borders between tokens lie.

`tokenizers.DecodeStream` does the first half, but it raises on bytes that no character begins with
(in a vocabulary with byte fallback), which a sampled text can contain, and keeps to itself what is
unfinished at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character decode to


def readable(tokenizer: Tokenizer, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """The text of `ids` in pieces, each as soon as it is certain.

    Args:
        after: tokens that the text continues, such as a prompt; a SentencePiece vocabulary drops
            the space before the first word of a text, and this one may begin with a space.
    """
    # The tokens of the last piece are decoded again with the new ones: text depends on its left.
    known, new = list(after), []
    for token in ids:
        new.append(token)
        text = _continuation(tokenizer, known, new)
        if text and not text.endswith(UNFINISHED):
            yield text
            known, new = new, []
    if text := _continuation(tokenizer, known, new):
        yield text


def _continuation(tokenizer: Tokenizer, known: list[int], new: list[int]) -> str:
    return tokenizer.decode(known + new)[len(tokenizer.decode(known)) :]


def before_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the first stop string that is completed; no more pieces are asked for then.

    Where two are completed by the same character, the longer one counts.
    """
    held = ""  # not yet shown: it may be the beginning of a stop string
    for piece in pieces:
        held += piece
        found = [(held.index(stop) + len(stop), -len(stop)) for stop in stops if stop in held]
        if found:
            end, minus_length = min(found)
            if end + minus_length:
                yield held[: end + minus_length]
            return
        certain = len(held) - _longest_beginning(held, stops)
        if certain:
            yield held[:certain]
            held = held[certain:]
    if held:
        yield held


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def stop_when(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Tells from a completion's tokens, after each one, that a stop string is there."""
    if not stops:
        return None
    # A token is at least a byte and a character at most four: so many tokens hold a stop string.
    # The others are for tokens without text, and for what decodes differently without its left.
    reach = 4 * max(map(len, stops)) + 8

    def stopped(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-reach:])
        return any(stop in text for stop in stops)

    return stopped
