"""A dialogue in a terminal: lines that can be edited, Ctrl-C that ends no program, quiet colours.

What is asked for goes to stdout; notices go to stderr, so that a pipe carries only the former.
Colours are for terminals alone, and not where the user has said NO_COLOR (no-color.org).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

BOLD_GREEN, DIM = "1;32", "2"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text, coloured where `stream` is a terminal that shows colours."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or not stream.isatty() else f"\033[{colour}m{text}\033[0m"


def notice(text: str) -> None:
    """Tells the user something that is no part of the result."""
    print(paint(text, DIM, sys.stderr), file=sys.stderr, flush=True)


def show(pieces: Iterable[str]) -> str:
    """Prints each piece at once, and a line's end after the last; returns the whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def discard_stdout() -> None:
    """What is printed from here on goes nowhere, and Python's own flush at the end cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside raises nothing; the function that is given tells whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class LineInput:
    """Reads what the user types, with readline's editing and history where there is one.

    Attributes:
        interrupted: the last thing that the user did was Ctrl-C; also set by who answers a line.
    """

    def __init__(self, sign: str) -> None:
        with suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  (its import is what makes `input` use it)
        sys.stdin.reconfigure(errors="replace")
        sign = paint(sign, BOLD_GREEN, sys.stdout)
        sign = re.sub("(\033.*?m)", "\001\\1\002", sign)  # tells readline what has no width
        self.sign = sign if sys.stdin.isatty() and sys.stdout.isatty() else ""
        self.interrupted = False

    def read(self) -> str | None:
        """The next line; None when the user leaves: Ctrl-D, or Ctrl-C twice and nothing typed."""
        while True:
            try:
                line = input(self.sign)
            except EOFError:
                notice("")  # what the shell writes next begins a line
                return None
            except KeyboardInterrupt:
                notice("")
                if not self._typed():
                    if self.interrupted:
                        return None
                    notice("Ctrl-C again, or Ctrl-D, leaves")
                self.interrupted = not self._typed()
            else:
                self.interrupted = False
                return line

    def _typed(self) -> bool:
        """Whether the interrupted line had text; Ctrl-C then only throws it away."""
        readline = sys.modules.get("readline")
        return bool(readline and readline.get_line_buffer())
