"""Tasks of reasoning-gym as a file, with the package or with a stand-in for it."""

import json
import sys
from types import SimpleNamespace

import pytest

from data.prompts import check_prompt, to_prompt
from scripts import write_gym_tasks
from train.rewards import check_answer
from utils.config import ConfigError

ENTRIES = [
    {"question": "Legs of 2 cats?", "answer": "8", "metadata": {"source_dataset": "legs"}},
    {"question": "Name a colour.", "answer": "red", "metadata": {"source_dataset": "legs"}},
]


@pytest.fixture
def gym(monkeypatch):
    """A package with one kind of task."""

    def create_dataset(name: str, size: int, seed: int) -> list[dict]:
        if name != "legs":
            raise ValueError(f"Dataset {name} not registered")
        return ENTRIES[:size]

    monkeypatch.setitem(
        sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset)
    )


def written(tmp_path, *argv) -> list[dict]:
    out = tmp_path / "gym.jsonl"
    write_gym_tasks.main(["--tasks", "legs", "--out", str(out), *argv])
    return [json.loads(line) for line in out.open()]


@pytest.mark.parametrize("verifier", ["reasoning_gym", "exact_match"])
def test_the_file_is_read_as_prompts(gym, tmp_path, verifier):
    rows = written(tmp_path, "--verifier", verifier)
    assert len(rows) == 2
    for row, entry in zip(rows, ENTRIES, strict=True):
        asked = to_prompt(row, None)
        assert check_prompt(asked, check_answer) is None
        assert asked.verifier == verifier
        assert asked.messages[0]["content"] == entry["question"]
        assert asked.answer == (json.dumps(entry) if verifier == "reasoning_gym" else row["answer"])


def test_mistakes(gym, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="does not fit task 'legs': answer without a number"):
        written(tmp_path, "--verifier", "number")
    assert len(written(tmp_path, "--verifier", "number", "--count", "1")) == 1
    with pytest.raises(ConfigError, match="not registered"):
        write_gym_tasks.main(["--tasks", "arms", "--out", str(tmp_path / "x")])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-gym.txt"):
        written(tmp_path)
