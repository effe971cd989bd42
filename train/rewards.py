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

# Possessive (++, *+): a completion of a million digits must not take quadratic time.
_NUMBER = re.compile(
    r"(?<![\w.,])"  # not inside a word or number
    r"(?P<sign>(?<![\w)] )(?<![\w)])-)?+\$?+"
    r"(?P<digits>[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+)"
    r"(?![\w]|[.,][0-9]|\s?[*/^=]|\s?[-+]\s?[0-9])"  # not the beginning of a word or a formula
)
_MARKER = re.compile(r"####|\bthe (?:final )?answer is\b:?", re.IGNORECASE)
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_MARKUP = str.maketrans({"−": "-", "*": None, "`": None})  # a minus sign; bold and code


# ---------------------------------------------------------------------------------------------
# Numbers


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None if there is none."""
