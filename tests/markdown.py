"""The code blocks of a Markdown file, and the shell commands in them.

A fence of a language that is no shell's (```text for output) holds no commands; nor does a line of
a listing, which is a name, two spaces or more, and what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

SHELL = ("", "bash", "sh", "shell", "console")
DESCRIBED = re.compile(r"\S+( \S+)*  +[^#\s].*")  # a line of a listing: name, spaces, what it is
PROGRAM = re.compile(r"(\w+=\S+ )*(\S*/)?(python3?|torchrun|make|pip|git|cd|source|export)\b")


class Block(NamedTuple):
    language: str
    text: str


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks, and what is indented by four spaces after an empty line."""
    kept: list[str] = []
    fence: str | None = None
    before = ""
    for line in [*markdown.splitlines(), ""]:
        opening = re.match(r"\s*```\s*(\w*)", line)
        if fence is not None:
            if opening:
                yield Block(fence, "\n".join(kept))
                fence, kept = None, []
            else:
                kept.append(line)
        elif opening:
            fence = opening[1]
        elif line.startswith("    ") and (kept or not before.strip()):
            kept.append(line[4:])
        elif kept:
            yield Block("", "\n".join(kept))
            kept = []
        before = line


def commands(markdown: str) -> list[str]:
    """What a reader would paste, one command each: lines joined, comments and `$ ` dropped."""
    found = []
    for block in blocks(markdown):
        if block.language not in SHELL:
            continue
        for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
            line = re.sub(r"(^|\s)#\s.*", "", line.strip().removeprefix("$ ")).strip()
            if DESCRIBED.fullmatch(line) and not PROGRAM.match(line):
                continue
            found += [part.strip() for part in line.split(" && ") if part.strip()]
    return list(dict.fromkeys(found))
