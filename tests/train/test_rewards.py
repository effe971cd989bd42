"""Verifiers against completions such as a policy that looks for rewards would write."""

import importlib.util
import json
import threading

import pytest

from data.builtin_tasks import KINDS, prompt
from train import sandbox
from train.rewards import (
    VERIFIERS,
    RewardConfig,
    check_answer,
    combine,
    extract_code,
    standardise,
    verifier,
)
from train.scorer import Scorer
from utils.config import ConfigError, validate

needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
needs_sandbox = pytest.mark.skipif(
    sandbox.unavailable() is not None, reason=f"sandbox: {sandbox.unavailable()}"
)

GSM8K_ANSWER = "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72.\n#### 72"
GSM8K = [
    ("#### 72", 1),
    ("First 48, then 24.\n####72", 1),
    ("The answer is 72.", 1),
    ("the final answer is: **72**", 1),
    ("THE ANSWER IS $72.00", 1),
    ("#### 72 clips", 1),
    ("#### 72\n\nLet me know if you have questions, 24/7!", 1),
    ("#### 5\nNo, wait.\n#### 72", 1),
    ("#### 72\n#### 5", 0),  # the last one counts
    ("#### 1 #### 2 #### 71 #### 73", 0),
    ("72", 0),  # unmarked
    ("", 0),
    ("####", 0),
    ("#### \n\n", 0),
    ("The answer is not 72", 0),
    ("The answer is unknown, perhaps 72", 0),
    ("#### 720", 0),
    ("#### 172", 0),
    ("#### 72.5", 0),
    ("#### 7,2", 0),
    ("#### 72,000", 0),
    ("#### -72", 0),
    ("#### 72/3", 0),
    ("#### 72 + 1", 0),
    ("#### 72e9", 0),
    ("#### 72nd", 0),
    ("#### 70+2", 0),
    ("#### " + "72" * 500_000, 0),
    ("#### " * 200_000 + "72", 1),
    ("#### " + "7," * 500_000, 0),
]


@pytest.mark.parametrize(("completion", "reward"), GSM8K, ids=range(len(GSM8K)))
def test_gsm8k(completion: str, reward: float) -> None:
    assert verifier("gsm8k")(completion, GSM8K_ANSWER) == reward
    assert verifier("gsm8k")(completion, "72") == reward


NUMBERS = [
    ("1,000", "1000", 1),
    ("1000.00", "1,000", 1),
    ("$1,000", "1000", 1),
    ("1,0000", "10000", 0),
    ("It is 42.", "42", 1),
    ("3 + 4 = 7", "7", 1),
    ("7 - 3", "3", 0),  # a formula is no answer
    ("10-3", "-3", 0),
    ("-3", "-3", 1),
    ("\N{MINUS SIGN}3", "-3", 1),
    ("-$3", "-3", 1),
    ("$-3", "-3", 1),
    ("3", "-3", 0),
    ("it is 0.5", "0.50", 1),
    ("it is .5", "0.5", 1),
    ("1 2 3 4 5 6 7 8 9", "7", 0),  # listing guesses
    ("7 and 8", "7", 0),
    ("x7", "7", 0),
    ("7x", "7", 0),
    ("seven", "7", 0),
    ("\N{ARABIC-INDIC DIGIT SEVEN}", "7", 0),  # a digit, but of another script
    ("9" * 1_000_000, "9", 0),
    ("1.2.3", "3", 0),
]


@pytest.mark.parametrize(("completion", "answer", "reward"), NUMBERS)
def test_number(completion: str, answer: str, reward: float) -> None:
    assert verifier("number")(completion, answer) == reward


def test_exact_match() -> None:
    exact = verifier("exact_match")
    assert exact(" a b\n", "a b") == 1
    assert not any(exact(wrong, "a b") for wrong in ("a b c", "b a", "", "A B", "a  b"))


def test_builtin_prompts_accept_their_answers_and_no_near_miss() -> None:
    for index in range(200):
        row = prompt("train", index, kinds=KINDS)
        judge = verifier(row["verifier"])
        assert check_answer(row["verifier"], row["answer"]) is None
        assert judge(row["answer"], row["answer"]) == 1
        for wrong in ("", "0", row["answer"] + "1", row["prompt"][-1]["content"]):
            assert judge(wrong, row["answer"]) == 0


# ---------------------------------------------------------------------------------------------
# In a process of their own


def test_regex_matches_the_whole_text() -> None:
    pattern = r"<think>[^<]*</think>\s*<answer>[0-9]+</answer>"
    judge = verifier("regex")
    assert judge("<think>well</think>\n<answer>42</answer>\n", pattern) == 1
    assert judge("<think>well</think><answer>42</answer> and more", pattern) == 0
    assert judge("", pattern) == 0


def test_exponential_regex_scores_zero_and_the_next_is_answered() -> None:
    judge = Scorer("regex", answer_s=1.0)
    assert judge("a" * 40 + "!", "(a+)+$") == 0
    judge.answer_s = 300.0
    assert judge("aaa", "(a+)+$") == 1
    judge.close()


MATH = [
    ("So we get $\\frac{1}{2}$.", "1/2", 1),
    ("\\boxed{0.5}", "\\frac{1}{2}", 1),
    ("The final answer is $1 + x^2$", "x^2+1", 1),
    ("$\\{2, 1\\}$", "\\{1, 2\\}", 1),
    ("\\boxed{7}", "72", 0),
    ("\\boxed{720}", "72", 0),
    ("\\boxed{1} \\boxed{2} \\boxed{3}", "3", 0),
    ("\\boxed{\\$18.90}", "\\$18.90", 1),
    ("The final answer is $72$", "\\$72", 1),
    ("\\boxed{73}", "\\$72", 0),
    ("", "72", 0),
    ("\\boxed{", "72", 0),
    ("\\boxed{72}" + "}" * 10_000, "73", 0),
    ("$__import__('os').abort()$", "72", 0),
    ("\ud800 \0 $\\sqrt[", "72", 0),
]


@needs_math
@pytest.mark.parametrize(("completion", "answer", "reward"), MATH, ids=range(len(MATH)))
def test_math(completion: str, answer: str, reward: float) -> None:
    assert verifier("math")(completion, answer) == reward


@needs_math
def test_math_bombs_score_zero_and_the_next_is_answered() -> None:
    judge = Scorer("math", answer_s=2.0)
    for bomb in ("$9^{9^{9^{9}}} - 1$", "$(10^{10^{10}})!$"):
        assert judge(f"\\boxed{{{bomb}}}", "72") == 0
    judge.answer_s = 300.0
    assert judge("\\boxed{72}", "72") == 1
    judge.close()


@needs_math
def test_math_in_many_threads() -> None:
    rewards = [0.0] * 8

    def one(i: int) -> None:
        rewards[i] = verifier("math")(f"$\\frac{{{i}}}{{2}}$", "3/2")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [0, 0, 0, 1, 0, 0, 0, 0]


def test_scorer_outlives_the_thread_that_started_it() -> None:
    """Its process may not (it dies with its parent thread); the question is then asked again."""
    judge = Scorer("regex")
    thread = threading.Thread(target=judge, args=("a", "a"))
    thread.start()
    thread.join()
    assert [judge("a", "a") for _ in range(20)] == [1.0] * 20
    judge._process.kill()
    judge._process.poll = lambda: None  # killed between the look and the question
    assert judge("a" * 10_000, "a*") == 1
    judge.close()


def test_scorer_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """What evaluates text is refused; the rest runs in a plain process, timeouts as ever."""
    monkeypatch.setattr(sandbox, "unavailable", lambda: "no namespaces")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"evaluates .* no namespaces"):
        Scorer("reasoning_gym")
    judge = Scorer("regex", answer_s=1.0)
    assert judge("a" * 40 + "!", "(a+)+$") == 0
    judge.answer_s = 300.0
    assert judge("aaa", "(a+)+$") == 1
    judge.close()


def test_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        Scorer("reasoning_gym")


@needs_sandbox
def test_reasoning_gym_scores_its_own_tasks() -> None:
    gym = pytest.importorskip("reasoning_gym")
    judge = verifier("reasoning_gym")
    entry = gym.create_dataset("countdown", size=1, seed=1)[0]
    answer = json.dumps(entry)
    assert judge(entry["answer"], answer) == 1
    assert judge(f"hm <answer>1</answer> <answer>{entry['answer']}</answer>", answer) == 1
    assert judge("", answer) < 0.1
    assert judge("__import__('os').system('kill -9 -1')", answer) < 0.1


# ---------------------------------------------------------------------------------------------
# Code

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
PROGRAMS = [
    ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
    ("```\ndef add(a, b): return a + b", 1),  # no closing fence, no language
    ("def add(a, b): return a + b", 1),
    ("```python\ndef add(a, b): return a - b\n```", 0),
    ("```python\ndef add(a, b): return 0\n```\n```python\ndef add(a, b): return a + b\n```", 1),
    ("```python\ndef add(a, b): return a + b\n```\n```python\nadd = None\n```", 0),
    ("", 0),
    ("import sys; sys.exit(0)", 0),
    ("import os; os._exit(0)", 0),
    ("def add(a, b): raise SystemExit(0)", 0),
    ("print('passed')", 0),
    ("add" * 200_000, 0),
]


@needs_sandbox
@pytest.mark.parametrize(("completion", "reward"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_python_against_tests(completion: str, reward: float) -> None:
    assert verifier("python")(completion, TESTS) == reward


@needs_sandbox
@pytest.mark.parametrize("indent", [None, 1])
def test_python_against_outputs(indent: int | None) -> None:
    cases = [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "1 1", "stdout": "2"}]
    answer = json.dumps(cases, indent=indent)
    judge = verifier("python")
    assert check_answer("python", answer) is None
    assert judge("print(sum(map(int, input().split())), ' ')", answer) == 1
    assert judge("print(sum(map(int, input().split())))\nexit()", answer) == 1
    assert judge("print(5)", answer) == 0
    assert judge("print(sum(map(int, input().split())))\nexit(1)", answer) == 0


def test_last_code_block_counts() -> None:
    assert extract_code("a\n```py\nfirst\n```\n```python\nsecond\n```\nb") == "second\n"
    assert extract_code("```" * 100_000) == "```" * 100_000


@pytest.mark.parametrize(
    "completion",
    [
        "Install it:\n```bash\npip install x\n```\nThen:\n```python\ncode\n```\nDone.",
        "```Python3\ncode\n```\nThis adds one.",
        "```text\n1 2\n```\n```\ncode\n```\n```json\n{}\n```",
        "```py \ncode\n",
    ],
)
def test_blocks_of_other_languages_are_left_out(completion: str) -> None:
    assert extract_code(completion) == "code\n"


def test_code_rewards_are_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "no namespaces here")
    with pytest.raises(ConfigError, match="no namespaces here"):
        VERIFIERS["python"]()


# ---------------------------------------------------------------------------------------------
# Names, answers, combinations


def test_unknown_verifier_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        verifier("gsm8")


UNUSABLE = [
    ("nubmer", "5", "no verifier 'nubmer', did you mean 'number'?"),
    ("gsm8k", " ", "answer missing"),
    ("gsm8k", "no number", "answer without a number"),
    ("gsm8k", "5 apples\n#### ?", "answer without a number"),
    ("regex", "(", "answer not valid for regex (error)"),
    ("python", "assert (", "answer not valid for python (SyntaxError)"),
    ("python", '[{"stdin": "1"}]', "answer not valid for python (KeyError)"),
    ("python", '[{"stdin": "1", ', "answer not valid for python (JSONDecodeError)"),
    (
        "python",
        "[\n {'stdin': '1', 'stdout': '2'}]",
        "answer not valid for python (JSONDecodeError)",
    ),
    ("python", '["assert f(1) == 2"]', "answer not valid for python (TypeError)"),
    ("python", "[ ]", "answer not valid for python (TypeError)"),
    ("reasoning_gym", "{}", "answer not valid for reasoning_gym (KeyError)"),
]


@pytest.mark.parametrize(("name", "answer", "reason"), UNUSABLE)
def test_answers_that_nothing_could_match(name: str, answer: str, reason: str) -> None:
    assert check_answer(name, answer) == reason


def test_combination_by_hand() -> None:
    both = RewardConfig(rule_weight=2.0, model_weight=0.5)
    assert standardise(7.0, mean=4.0, deviation=2.0) == 1.5
    assert combine(1.0, 1.5, both) == 2.75
    assert combine(1.0, None, both) == 2
    assert combine(None, 1.5, both) == 0.75
    assert combine(1.0, 9.0, RewardConfig()) == 1


def test_weights_that_reward_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="both 0"):
        validate(RewardConfig, {"rule_weight": 0.0}, "rlvr.yaml")
