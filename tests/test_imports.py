"""Imports run one way: scripts -> train -> {models, data, optim} -> utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "utils": set(),
    "data": {"utils"},
    "models": {"utils"},
    "optim": {"utils"},
    "train": {"utils", "data", "models", "optim"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).glob("*.py"))


def imported(path: Path) -> set[str]:
    """The first names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_run_one_way(path):
    room = path.parent.name
    ours = imported(path) & (set(MAY_IMPORT) | SCRIPTS)
    assert ours <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_module_says_what_it_is(path):
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))
