"""A conversation that goes on: what has been said, and what of it a model still sees.

A context is finite and a conversation is not: the oldest turns are dropped from what the model
sees, a question and its answer at a time, and the system message stays. What is saved is the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.chat import Message
from utils.config import ConfigError


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages after a system message, if one is given and they bring none."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


@dataclass
class Dialogue:
    """A user and an assistant in turn.

    Attributes:
        system: the system message, if there is one.
        turns: all other messages.
        dropped: so many of them, from the beginning, are no longer seen.
        saved: files that it was written to.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    dropped: int = 0
    saved: set[Path] = field(default_factory=set)

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds the answer to the last question; without a text both are left out."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def forget(self) -> None:
        """Begins again, with the same system message."""
        self.turns, self.dropped = [], 0

    def seen(self) -> list[Message]:
        """The messages that the model sees."""
        return with_system(self.turns[self.dropped :], self.system)

    def make_room(self, fits: Callable[[list[Message]], bool]) -> bool:
        """Drops the oldest turns until the rest fits or is the last question; whether it did."""
        before = self.dropped
        while self.dropped < len(self.turns) - 1 and not fits(self.seen()):
            self.dropped += 2
        return self.dropped > before

    def save(self, name: str) -> None:
        """Writes all messages as a json list: a new file, or again one that this has written.

        Raises:
            ConfigError: there is another file, or it cannot be written; begins with the name.
        """
        path = Path(name).expanduser()
        if not name:
            raise ConfigError("needs the name of a file")
        if path.exists() and path not in self.saved:
            raise ConfigError(f"{name}: is there already; choose another name")
        text = json.dumps(with_system(self.turns, self.system), ensure_ascii=False, indent=2)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{name}: cannot be written: {error.strerror}") from error
        self.saved.add(path)
