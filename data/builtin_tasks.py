"""Built-in tasks for the stages after pretraining: chats, preference pairs, verifiable prompts.

A task is a question with exactly one right answer: small sums, short strings, a format to keep, or
small talk with a fixed reply. Which split it belongs to is decided by a hash of what it asks, never
by its index, so the held-out score is about questions that no stage has seen (for sums, whole fact
families: see `builtin_math.py`). Everything is a pure function of split, index and seed.

Left out: anything a rule cannot check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.builtin_math import split_of, sum_pair
from data.builtin_words import WORDS, Draw

Message = dict[str, str]
SPLITS = ("train", "heldout")
ARITHMETIC = ("add", "subtract")


@dataclass(frozen=True)
class Task:
    """A question, its one right answer, and the kind of question it is."""

    kind: str
    prompt: str
    answer: str


def _letters(draw: Draw, low: int = 3, high: int = 4) -> list[str]:
    return draw.sample("abcdefghijklmnoprstuvw", draw.between(low, high))


def _add(draw: Draw, split: str) -> Task:
    a, b = sum_pair(draw, split)
    return Task("add", f"What is {a} + {b}?", str(a + b))


def _subtract(draw: Draw, split: str) -> Task:
    a, b = sum_pair(draw, split)
    return Task("subtract", f"What is {a + b} - {b}?", str(a))


def _reverse(draw: Draw, split: str) -> Task:
    letters = _letters(draw)
    return Task("reverse", f"Reverse the letters: {' '.join(letters)}", " ".join(letters[::-1]))


def _first(draw: Draw, split: str) -> Task:
    letters = _letters(draw, 3, 5)
    return Task("first", f"Which letter is first: {' '.join(letters)}?", letters[0])


def _last(draw: Draw, split: str) -> Task:
    letters = _letters(draw, 3, 5)
    return Task("last", f"Which letter is last: {' '.join(letters)}?", letters[-1])


def _repeat(draw: Draw, split: str) -> Task:
    word, times = draw.pick(WORDS["thing"]), draw.between(2, 4)
    return Task("repeat", f"Say {word} {times} times.", " ".join([word] * times))


def _count(draw: Draw, split: str) -> Task:
    letter, times = draw.pick("abcdefghijklmnoprstuvw"), draw.between(2, 7)
    return Task("count", f"How many letters are there: {' '.join(letter * times)}?", str(times))


def _brackets(draw: Draw, split: str) -> Task:
    number = draw.between(10, 999)
    return Task("brackets", f"Write {number} in brackets.", f"[{number}]")


def _larger(draw: Draw, split: str) -> Task:
    a, b = draw.sample(range(1, 100), 2)
    answer = "yes" if a > b else "no"
    return Task("larger", f"Is {a} larger than {b}? Answer yes or no.", answer)
