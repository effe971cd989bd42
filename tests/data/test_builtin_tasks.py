"""The built-in tasks: right answers, disjoint splits, wrong answers that are wrong."""

import hashlib
import json
import re

import pytest

from data import builtin_tasks as tasks
from data.builtin_math import split_of, sum_split

N = 3_000
GOLDEN = {"chat": "205881dfc9ab", "preference": "3e523b78a995", "prompt": "b6d231501172"}


def right_answer(prompt: str) -> str | None:
    """What a reader of the question would answer, by rules of their own; None for small talk."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    letters = re.findall(r"\b[a-z]\b", prompt)
    match prompt.split():
        case ["What", "is", _, "+", _]:
            return str(numbers[0] + numbers[1])
        case ["What", "is", _, "-", _]:
            return str(numbers[0] - numbers[1])
        case ["Reverse", *_]:
            return " ".join(reversed(letters))
        case ["Which", "letter", "is", place, *_]:
            return letters[0] if place == "first:" else letters[-1]
        case ["Say", letter, *_]:
            return " ".join(letter for _ in range(numbers[0]))
        case ["How", "many", "letters:", *_]:
            return str(len(letters))
        case ["Write", number, *_]:
            return "[" + number + "]"
        case ["Is", *_, "no."]:
            return ["no", "yes"][numbers[0] > numbers[1]]
    return None


def replies() -> set[str]:
    return {reply for _, reply in tasks.SMALL_TALK}


@pytest.fixture(scope="module", params=["train", "heldout"])
def drawn(request):
    return request.param, [tasks.task(request.param, index) for index in range(N)]


@pytest.mark.parametrize("name", GOLDEN)
def test_examples_never_change(name):
    make = getattr(tasks, name)
    examples = [make(split, index) for split in tasks.N_EXAMPLES for index in range(20)]
    assert hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:12] == GOLDEN[name]


def test_an_example_depends_on_its_arguments_alone():
    assert tasks.task("train", 5) == tasks.task("train", 5)
    assert tasks.task("train", 5) != tasks.task("train", 5, seed=1)
    assert tasks.task("train", 5) != tasks.task("train", 6)


def test_answers_are_right(drawn):
    _, made = drawn
    for task in made:
        if task.kind == "talk":
            assert right_answer(task.prompt) is None
            assert task.answer in replies()
        else:
            assert task.answer == right_answer(task.prompt), task


def test_every_kind_is_drawn_in_its_proportion(drawn):
    _, made = drawn
    for kind, (share, _) in tasks._MAKERS.items():
        assert abs(sum(task.kind == kind for task in made) / N - share) < 0.03
    assert abs(sum(share for share, _ in tasks._MAKERS.values()) - 1) < 1e-9


def test_a_question_has_one_answer():
    answers: dict[str, str] = {}
    for split in tasks.N_EXAMPLES:
        for index in range(N):
            task = tasks.task(split, index)
            assert answers.setdefault(task.prompt, task.answer) == task.answer


def test_splits_share_no_question():
    train, heldout = (
        {tasks.task(split, index).prompt for index in range(4 * N)} for split in tasks.N_EXAMPLES
    )
    assert not train & heldout
    assert len(heldout) > 400


def test_sums_are_split_by_family(drawn):
    split, made = drawn
    for task in made:
        a, b = [*map(int, re.findall(r"\d+", task.prompt)), 0, 0][:2]
        if task.kind == "add":
            assert sum_split(a, b) == split
        elif task.kind == "subtract":
            assert sum_split(a - b, b) == split


def test_letters_are_split_across_all_tasks_on_them(drawn):
    split, made = drawn
    for task in made:
        if task.kind in ("reverse", "first", "last"):
            assert split_of("letters", *re.findall(r"\b[a-z]\b", task.prompt)) == split


def test_comparisons_are_split_in_both_orders(drawn):
    split, made = drawn
    for task in made:
        if task.kind == "larger":
            pair = sorted(int(number) for number in re.findall(r"\d+", task.prompt))
            assert split_of("larger", *pair) == split


def test_arithmetic_neither_carries_nor_borrows(drawn):
    _, made = drawn
    for task in made:
        if task.kind in tasks.ARITHMETIC:
            a, b = map(int, re.findall(r"\d+", task.prompt))
            ones = a % 10 + b % 10 if task.kind == "add" else a % 10 - b % 10
            assert 0 <= ones <= 9 and 0 < int(task.answer) <= 99


def test_chats_end_with_the_answer():
    shapes = set()
    for index in range(500):
        chat = tasks.chat("train", index)
        messages = chat["messages"]
        roles = [message["role"] for message in messages]
        assert messages[-1] == {"role": "assistant", "content": chat["answer"]}
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        assert right_answer(messages[-2]["content"]) in (chat["answer"], None)
        assert chat["kind"] in tasks.KINDS
        shapes.add((roles[0], len(roles)))
    assert shapes == {("user", 2), ("user", 4), ("system", 3), ("system", 5)}


def test_earlier_turns_are_of_the_same_split():
    train = {tasks.task("train", index).prompt for index in range(4 * N)}
    for index in range(500):
        for message in tasks.chat("heldout", index)["messages"]:
            assert message["role"] != "user" or message["content"] not in train


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rejected_answers_are_wrong_and_chosen_ones_right(split):
    for index in range(N):
        pair = tasks.preference(split, index)
        asked = pair["prompt"][-1]
        assert asked["role"] == "user"
        right = right_answer(asked["content"])
        assert pair["chosen"] == right if right is not None else pair["chosen"] in replies()
        assert pair["rejected"].strip() and pair["rejected"] != pair["chosen"]


def test_wrong_results_are_near():
    near = total = 0
    for index in range(N):
        pair = tasks.preference("train", index, kinds=tasks.ARITHMETIC)
        if pair["rejected"].isdecimal():
            right, wrong = int(pair["chosen"]), int(pair["rejected"])
            swapped = sorted(pair["chosen"]) == sorted(pair["rejected"].zfill(2))
            near += abs(right - wrong) in (1, 10) or swapped
            total += 1
    assert 0.75 * N < total < 0.95 * N  # the rest ramble
    assert near > 0.7 * total  # the rest are the other operation


def test_prompts_say_how_to_verify():
    assert {tasks.prompt("train", i)["kind"] for i in range(50)} == set(tasks.ARITHMETIC)
    for index in range(500):
        prompt = tasks.prompt("heldout", index, kinds=tasks.KINDS)
        assert [message["role"] for message in prompt["prompt"]] == ["user"]
        assert right_answer(prompt["prompt"][0]["content"]) in (prompt["answer"], None)
        is_number = re.fullmatch(r"\d+", prompt["answer"]) is not None
        assert prompt["verifier"] == ("number" if is_number else "exact_match")


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_each_kind_can_be_asked_for_alone(kind):
    assert {tasks.task("heldout", i, kinds=(kind,)).kind for i in range(20)} == {kind}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("test", 0), "heldout"),
        (("train", 0, 0, ("poems",)), "poems"),
        (("train", 0, 0, ()), "some"),
    ],
)
@pytest.mark.parametrize("make", [tasks.task, tasks.chat, tasks.prompt, tasks.preference])
def test_unknown_splits_and_kinds_are_named(make, arguments, named):
    with pytest.raises(ValueError, match=named):
        make(*arguments)
