"""Verifiers of completions have all the time that they need: a slow machine fails no test."""

import pytest

from train import sandbox, scorer


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LIMITS", sandbox.Limits(wall_s=300.0))
    monkeypatch.setattr(scorer, "ANSWER_S", 300.0)
    monkeypatch.setattr(scorer, "START_S", 300.0)
