"""Verifiers: what a completion is worth, by rule, by a model, or by both.

A verifier is a function (completion, answer) -> reward between 0 and 1; VERIFIERS names them, and a
row of data says which one judges it. All give a wrong, empty or absurd completion 0 and raise
nothing: a policy tries everything.

    gsm8k           the number after the last "####" or "the answer is"
    number          the last number
    exact_match     the whole text, white space around it aside
    regex           the whole text matches the answer, a pattern
    math            the last result, by math-verify: LaTeX, fractions, sets, equivalent forms
    python          the code passes the answer: tests, or inputs with the outputs they should give
    reasoning_gym   the task's own scorer; the answer is the task's entry as JSON

Numbers are compared as numbers: 1,000 is 1000.00 and $72 is 72, but neither 720 nor 72/3 is 72.
Where several answers stand in a completion only the last counts, so that listing many gains nothing
over guessing once.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from difflib import get_close_matches

from train import sandbox
from train.scorer import Scorer
from utils.config import Config, ConfigError, Problem

Verifier = Callable[[str, str], float]

MINUS = "\N{MINUS SIGN}"

# Quantifiers are possessive (++): a completion of a million digits must not take quadratic time.
_NUMBER = re.compile(
    r"(?<![\w.,])(?<![0-9][-+*/^])(?<![0-9] [-+*/^] )"  # not inside a word, number or formula
    r"(?P<sign>(?<![\w).])-)?+\$?+"
    r"(?P<digits>[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?!\w|[.,][0-9]|\s?(?:[-+/^=]|\*{1,2})\s?[0-9(])"
)
_MARKER = re.compile(r"(?:####|\bthe (?:final )?answer is)[\s:*`]*+", re.IGNORECASE)
_CODE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON_TAGS = ("", "python", "py", "python3", "py3")
_JSON_LIST = re.compile(r"\s*\[\s*[]{\"]")


# ---------------------------------------------------------------------------------------------
# Texts and numbers


def marked_number(text: str) -> Decimal | None:
    """The number that follows the last "####" or "the answer is"; None if none does."""
    text = text.replace(MINUS, "-")
    markers = list(_MARKER.finditer(text))
    return _value(_NUMBER.match(text, markers[-1].end())) if markers else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text that is not part of a formula; None if there is none."""
    found = None
    for found in _NUMBER.finditer(text.replace(MINUS, "-")):  # noqa: B007
        pass
    return _value(found)


def _value(found: re.Match | None) -> Decimal | None:
    if found is None:
        return None
    return Decimal((found["sign"] or "") + found["digits"].replace(",", ""))


def _answer_number(answer: str) -> Decimal | None:
    """The number of a dataset's answer: marked, as in GSM8K's own files, or alone."""
    return marked_number(answer) if "####" in answer else last_number(answer)


def gsm8k(completion: str, answer: str) -> float:
    """1 if the marked number is the answer's."""
    said = marked_number(completion)
    return float(said is not None and said == _answer_number(answer))


def number(completion: str, answer: str) -> float:
    """1 if the last number is the answer's."""
    said = last_number(completion)
    return float(said is not None and said == _answer_number(answer))


def exact_match(completion: str, answer: str) -> float:
    """1 if the text is the answer, white space around it aside."""
    return float(completion.strip() == answer.strip())


# ---------------------------------------------------------------------------------------------
# Code


def extract_code(completion: str) -> str:
    """The last fenced block, closed or not, that is Python or does not say what it is; the whole
    completion if there is none."""
    found = _CODE.findall(completion)
    blocks = [block for tag, block in found if tag.strip().lower() in _PYTHON_TAGS]
    return blocks[-1] if blocks else completion


def python(completion: str, answer: str) -> float:
    """1 if the code passes, in the sandbox.

    The answer is either tests, which run after the code in its namespace and raise if it is wrong,
    or a JSON list of {"stdin", "stdout"}, compared outside the sandbox line by line, white space at
    the ends aside. The second kind cannot be forged by what the program does to its interpreter.
    """
    program = extract_code(completion)
    cases = _cases(answer)
    if cases is None:
        return float(sandbox.run(program, tests=answer).finished)
    return float(all(_prints(program, case) for case in cases))


def _cases(answer: str) -> list[dict[str, str]] | None:
    """None if the answer is tests. A list that is no valid JSON is refused: as tests it would test
    nothing."""
    return json.loads(answer) if _JSON_LIST.match(answer) else None


def _prints(program: str, case: dict[str, str]) -> bool:
    result = sandbox.run(program, stdin=case["stdin"])
    done = result.exit_code == 0 and not result.stopped
    return done and _lines(result.stdout) == _lines(case["stdout"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _python() -> Verifier:
    if reason := sandbox.unavailable():
        raise ConfigError(
            f"verifier 'python' runs what a model wrote, and the sandbox for it is unavailable: "
            f"{reason}"
        )
    return python


# ---------------------------------------------------------------------------------------------
# By name

VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "gsm8k": lambda: gsm8k,
    "number": lambda: number,
    "exact_match": lambda: exact_match,
    "regex": lambda: Scorer("regex"),
    "math": lambda: Scorer("math"),
    "python": _python,
    "reasoning_gym": lambda: Scorer("reasoning_gym"),
}


@functools.cache
def verifier(name: str) -> Verifier:
    """The verifier of a name.

    Raises:
        ConfigError: there is none, or what it needs is not here; with the reason.
    """
    if name not in VERIFIERS:
        raise ConfigError(f"{_unknown(name)} There are {', '.join(VERIFIERS)}")
    return VERIFIERS[name]()


def _unknown(name: str) -> str:
    near = get_close_matches(name, VERIFIERS, n=1, cutoff=0)[0]
    return f"no verifier '{name}', did you mean '{near}'?"


def check_answer(name: str, answer: str) -> str | None:
    """Why no completion could ever be right, in a few words; None if one could."""
    if name not in VERIFIERS:
        return _unknown(name)
    if not answer.strip():
        return "answer missing"
    if name in ("gsm8k", "number") and _answer_number(answer) is None:
        return "answer without a number"
    try:
        if name == "regex":
            re.compile(answer)
        elif name == "reasoning_gym":
            json.loads(answer)["metadata"]["source_dataset"]
        elif name == "python":
            _check_tests(answer)
    except (ValueError, KeyError, TypeError, re.error, SyntaxError) as error:
        return f"answer not valid for {name} ({type(error).__name__})"
    return None


def _check_tests(answer: str) -> None:
    cases = _cases(answer)
    if cases is None:
        compile(answer, "tests", "exec")
    elif not cases or not all(
        isinstance(case[key], str) for case in cases for key in ("stdin", "stdout")
    ):
        raise TypeError


# ---------------------------------------------------------------------------------------------
# Rule and model together


class RewardConfig(Config):
    """How the reward of a completion is put together."""

    rule_weight: float = 1.0
    """Weight of the verifier by rule."""
    model_weight: float = 0.0
    """Weight of the model given as --verifier-model, its scores standardised."""
    score_mean: float = 0.0
    """Mean score of a verifier in transformers' format; a checkpoint of ours has its own."""
    score_deviation: float = 1.0
    """And their standard deviation."""

    def problems(self) -> Iterator[Problem]:
        for key in ("rule_weight", "model_weight"):
            if getattr(self, key) < 0:
                yield Problem((key,), f"{key} ({getattr(self, key)}) is negative")
        if self.score_deviation <= 0:
            yield Problem(
                ("score_deviation",), f"score_deviation ({self.score_deviation}) must be above 0"
            )
        if self.rule_weight == self.model_weight == 0:
            yield Problem(
                ("rule_weight", "model_weight"), "rule_weight and model_weight are both 0"
            )


def standardise(score: float, mean: float, deviation: float) -> float:
    """A verifier model's score in deviations from its mean over held-out answers: its own scale
    means nothing (Bradley-Terry fixes differences alone), and a weight needs one."""
    return (score - mean) / deviation


def combine(rule: float | None, model: float | None, config: RewardConfig) -> float:
    """rule_weight × rule + model_weight × model; a part that is None is absent and has weight 0.

    Args:
        rule: a verifier's reward, 0 to 1.
        model: a standardised score.
    """
    parts = ((rule, config.rule_weight), (model, config.model_weight))
    return sum(weight * part for part, weight in parts if part is not None)
