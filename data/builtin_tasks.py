"""Built-in tasks for the stages after pretraining: chats, preference pairs, verifiable prompts.

A task is a question with exactly one right answer: a sum, a short string, a format to keep, or
small talk with a fixed reply. Its split is decided by a hash of what it asks and never by its
index, so the held-out score is about questions that no stage has seen (for sums: whole fact
families, see `builtin_math.py`). Every function is pure: split, index and seed decide everything.

The difficulty is chosen for a model of a million parameters that trains for minutes on a CPU. Sums
and differences neither carry nor borrow: such a model works those out for pairs it has never seen,
while with carries the same training leaves it at one right answer in ten. Answers are as short as
they can be, since reinforcement learning pays for every token. Left out: anything that a rule
cannot check.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data.builtin_math import split_of, sum_pair
from data.builtin_words import Draw

T = TypeVar("T", bound=Sequence)
Message = dict[str, str]

N_EXAMPLES = {"train": 40_000, "heldout": 500}  # an epoch; any index >= 0 exists
ARITHMETIC = ("add", "subtract")
LETTERS = "abcdefghijklmnoprstuvw"
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a patient teacher.",
    "Give only the answer.",
)
SMALL_TALK = (
    ("[Hello|Hi|Good <daytime>], I am <name>.", "Hello, nice to meet you!"),
    ("My name is <name>. [How are you?|How do you do?]", "I am fine, thank you. And you?"),
    ("I live in <town>.", "That must be a beautiful place!"),
    ("I like <fruit_s>. [And you?|Do you?]", "I cannot eat, but they sound lovely."),
    ("My <pet> is <mood>.", "Tell me more about your pet!"),
    ("I am <mood> today.", "Thank you for telling me. Can I help you?"),
    ("Do you like <month>?", "Yes, it is a fine time of the year."),
    ("[Thank you|Thanks]. I am going to the <place> now.", "Goodbye, and have a good time!"),
    ("Can you help me with <subject>?", "Of course. What would you like to know?"),
    ("My <relation> is <a_job>.", "That must be an interesting life."),
    ("I have <a_colour> <thing>.", "What a lovely colour!"),
    ("It is <weather> in <town>.", "Then I hope that you like the weather."),
)


@dataclass(frozen=True)
class Task:
    """A question, its one right answer, and the kind of question it is."""

    kind: str
    prompt: str
    answer: str


def _add(draw: Draw, split: str) -> Task:
    a, b = sum_pair(draw, split)
    return Task("add", f"What is {a} + {b}?", str(a + b))


def _subtract(draw: Draw, split: str) -> Task:
    a, b = sum_pair(draw, split)
    if a < 10:  # 67 - 60 = 7 loses a digit, which is far harder to learn than 67 - 7 = 60
        a, b = b, a
    return Task("subtract", f"What is {a + b} - {b}?", str(a))


def _operands(kind: str, split: str, make: Callable[[], T]) -> T:
    """The first operands that `make` gives and that belong to the split."""
    while split_of(kind, *(operands := make())) != split:
        pass
    return operands


def _letters(draw: Draw, split: str, low: int, high: int) -> list[str]:
    return _operands("letters", split, lambda: draw.sample(LETTERS, draw.between(low, high)))


def _reverse(draw: Draw, split: str) -> Task:
    letters = _letters(draw, split, 2, 3)
    return Task("reverse", f"Reverse the letters: {' '.join(letters)}", " ".join(letters[::-1]))


def _first(draw: Draw, split: str) -> Task:
    letters = _letters(draw, split, 3, 5)
    return Task("first", f"Which letter is first: {' '.join(letters)}?", letters[0])


def _last(draw: Draw, split: str) -> Task:
    letters = _letters(draw, split, 3, 5)
    return Task("last", f"Which letter is last: {' '.join(letters)}?", letters[-1])


def _repeat(draw: Draw, split: str) -> Task:
    letter, times = _operands("repeat", split, lambda: (draw.pick(LETTERS), draw.between(2, 6)))
    return Task("repeat", f"Say {letter} {times} times.", " ".join(letter * times))


def _count(draw: Draw, split: str) -> Task:
    letter, times = _operands("count", split, lambda: (draw.pick(LETTERS), draw.between(2, 6)))
    return Task("count", f"How many letters: {' '.join(letter * times)}?", str(times))


def _brackets(draw: Draw, split: str) -> Task:
    (number,) = _operands("brackets", split, lambda: (draw.between(10, 99),))
    return Task("brackets", f"Write {number} in brackets.", f"[{number}]")


def _larger(draw: Draw, split: str) -> Task:
    pair = _operands("larger", split, lambda: sorted(draw.sample(range(1, 100), 2)))
    a, b = draw.sample(pair, 2)  # in either order: both questions belong to one split
    return Task("larger", f"Is {a} larger than {b}? Answer yes or no.", "yes" if a > b else "no")


def _talk(draw: Draw, split: str) -> Task:
    question, answer = _operands(
        "talk", split, lambda: draw.fill("\n".join(draw.pick(SMALL_TALK))).split("\n")
    )
    return Task("talk", question, answer)


_MAKERS: dict[str, tuple[float, Callable[[Draw, str], Task]]] = {
    "add": (0.19, _add),
    "subtract": (0.17, _subtract),
    "reverse": (0.09, _reverse),
    "first": (0.07, _first),
    "last": (0.07, _last),
    "repeat": (0.07, _repeat),
    "count": (0.06, _count),
    "brackets": (0.07, _brackets),
    "larger": (0.06, _larger),
    "talk": (0.15, _talk),
}
KINDS = tuple(_MAKERS)


def task(split: str, index: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> Task:
    """Task number `index` of a split, of one of the kinds, in the proportions of a chat."""
    return _task(_draw("task", split, index, seed, kinds), split, kinds)


def _draw(what: str, split: str, index: int, seed: int, kinds: Sequence[str]) -> Draw:
    if split not in N_EXAMPLES:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(N_EXAMPLES)}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds are {tuple(kinds)}, must be some of {', '.join(KINDS)}")
    return Draw(f"{seed}/{split}/{what}/{index}")


def _task(draw: Draw, split: str, kinds: Sequence[str]) -> Task:
    left = draw.random() * sum(_MAKERS[kind][0] for kind in kinds)
    for kind in kinds:
        left -= _MAKERS[kind][0]
        if left < 0:
            break
    return _MAKERS[kind][1](draw, split)


def _context(draw: Draw, split: str, kinds: Sequence[str]) -> list[Message]:
    """What may come before the question: a system message, an earlier turn, mostly nothing."""
    messages = []
    if draw.chance(0.2):
        messages.append({"role": "system", "content": draw.pick(SYSTEM_MESSAGES)})
    if draw.chance(0.15):
        earlier = _task(draw, split, kinds)
        messages.append({"role": "user", "content": earlier.prompt})
        messages.append({"role": "assistant", "content": earlier.answer})
    return messages


def chat(split: str, index: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> dict:
    """A conversation to learn from: {"messages", "answer": the last message's text, "kind"}."""
    draw = _draw("chat", split, index, seed, kinds)
    asked = _task(draw, split, kinds)
    messages = [
        *_context(draw, split, kinds),
        {"role": "user", "content": asked.prompt},
        {"role": "assistant", "content": asked.answer},
    ]
    return {"messages": messages, "answer": asked.answer, "kind": asked.kind}


def prompt(split: str, index: int, seed: int = 0, kinds: Sequence[str] = ARITHMETIC) -> dict:
    """A question to answer and verify: {"prompt": messages, "answer", "verifier", "kind"}."""
    asked = _task(_draw("prompt", split, index, seed, kinds), split, kinds)
    return {
        "prompt": [{"role": "user", "content": asked.prompt}],
        "answer": asked.answer,
        "verifier": "number" if asked.answer.isdecimal() else "exact_match",
        "kind": asked.kind,
    }


def preference(split: str, index: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> dict:
    """A right and a wrong answer to one question: {"prompt": messages, "chosen", "rejected"}."""
    draw = _draw("preference", split, index, seed, kinds)
    asked = _task(draw, split, kinds)
    messages = [*_context(draw, split, kinds), {"role": "user", "content": asked.prompt}]
    wrong = _ramble(draw, asked) if draw.chance(0.15) else _near_miss(draw, asked)
    return {"prompt": messages, "chosen": asked.answer, "rejected": wrong}


def _ramble(draw: Draw, asked: Task) -> str:
    """An answer that does not come to its end, or says more than was asked."""
    wrong = _near_miss(draw, asked)
    forms = (
        "{right} and {right} and {right} and",
        "It is {right} or {wrong} or",
        "Well, {right} is",
    )
    return draw.pick(forms).format(right=asked.answer, wrong=wrong)


def _near_miss(draw: Draw, asked: Task) -> str:
    """A wrong answer of the right form, such as a beginner would give."""
    wrong = _WRONG_ANSWERS[asked.kind](draw, asked)
    return draw.pick([answer for answer in wrong if answer != asked.answer])


def _wrong_result(draw: Draw, asked: Task) -> list[str]:
    """One or ten off, digits swapped, the other operation."""
    a, b = map(int, re.findall(r"\d+", asked.prompt))
    right = int(asked.answer)
    other = a - b if asked.kind == "add" else a + b
    swapped = int(asked.answer[::-1])
    candidates = (right - 1, right + 1, right - 10, right + 10, swapped, other)
    return [str(n) for n in candidates if n > 0]


def _wrong_count(draw: Draw, asked: Task) -> list[str]:
    return [str(int(asked.answer) - 1), str(int(asked.answer) + 1)]


def _wrong_order(draw: Draw, asked: Task) -> list[str]:
    letters = asked.answer.split()
    return [" ".join(letters[::-1]), " ".join(letters[1:] + letters[:1])]


def _wrong_letter(draw: Draw, asked: Task) -> list[str]:
    return asked.prompt.rstrip("?").split(": ")[1].split()


def _wrong_times(draw: Draw, asked: Task) -> list[str]:
    words = asked.answer.split()
    return [" ".join(words[1:]), " ".join([*words, words[0]])]


def _wrong_brackets(draw: Draw, asked: Task) -> list[str]:
    number = asked.answer[1:-1]
    return [number, f"({number})", f"[{number}", f"[{number[::-1]}]"]


def _wrong_choice(draw: Draw, asked: Task) -> list[str]:
    return ["yes", "no"]


def _wrong_reply(draw: Draw, asked: Task) -> list[str]:
    return [_talk(draw, "train").answer for _ in range(3)] + [asked.prompt]


_WRONG_ANSWERS: dict[str, Callable[[Draw, Task], list[str]]] = {
    "add": _wrong_result,
    "subtract": _wrong_result,
    "reverse": _wrong_order,
    "first": _wrong_letter,
    "last": _wrong_letter,
    "repeat": _wrong_times,
    "count": _wrong_count,
    "brackets": _wrong_brackets,
    "larger": _wrong_choice,
    "talk": _wrong_reply,
}
