"""A program in a process of its own, on a pseudo-terminal."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Terminal:
    """Runs a script of the repository, types, and reads what appears."""

    def __init__(self, script: str, *argv: object) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
            os.environ.pop("NO_COLOR", None)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
            command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)]
            os.execv(sys.executable, command)
        self.decoder = codecs.getincrementaldecoder("utf-8")()  # a read may split a character
        self.raw = ""
        self.place = 0
        self.ended = False

    def expect(self, pattern: str, timeout_s: float = 300) -> str:
        """Waits for a pattern in what is new; returns what stands before it."""
        end = time.monotonic() + timeout_s
        while not (found := re.compile(pattern).search(self.text, self.place)):
            if not select.select([self.terminal], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no {pattern!r} in {self.text[self.place :]!r}")
            self._read()
        before = self.text[self.place : found.start()]
        self.place = found.end()
        return before

    def _read(self) -> None:
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # the other side is closed
            data = b""
        if not data:
            raise EOFError(f"the program has ended: {self.text[self.place :]!r}")
        self.raw += self.decoder.decode(data)

    @property
    def text(self) -> str:
        """All output, without what only moves the cursor or colours."""
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", "", self.raw)

    def say(self, line: str) -> str:
        """Types a line at the prompt; returns all that comes until the next one."""
        self.send(f"{line}\n")
        self.expect(re.escape(line) + "\n")
        return self.expect(r"(?:^|\n)> ")

    def send(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self, pattern: str) -> str:
        """Presses Ctrl-C at a prompt until a pattern comes.

        A signal that arrives just before Python waits for a key is noticed with the next one only.
        A program that is slow gets no second one: that would leave it.
        """
        for _ in range(9):
            self.send("\x03")
            for _ in range(60):
                with suppress(TimeoutError):
                    return self.expect(pattern, timeout_s=5)
                if self._sleeps():
                    break
        raise TimeoutError(f"no {pattern!r} in {self.text[self.place :]!r}")

    def _sleeps(self) -> bool:
        """Whether the program has waited for something for a second."""
        stat = Path(f"/proc/{self.pid}/stat")
        states = set()
        for _ in range(10):
            states.add(stat.read_text().rpartition(")")[2].split()[0])
            time.sleep(0.1)
        return states == {"S"}

    def signal(self, number: int = signal.SIGINT) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        """No program outlives its test."""
        if not self.ended:
            self.signal(signal.SIGKILL)
            self.wait()

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code."""
        try:
            while select.select([self.terminal], [], [], timeout_s)[0]:
                self._read()
            raise TimeoutError(f"still running after {self.text[self.place :]!r}")
        except EOFError:
            os.close(self.terminal)
            self.ended = True
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
