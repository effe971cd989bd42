"""A file of prompts to be answered: text with one a line, or jsonl with text or messages on each.

Everything is read and checked before anything is answered: a mistake in the last line should not
cost the work on the others. Left out: compressed files, parquet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat import Message, check_messages, to_messages
from utils.config import ConfigError

SHAPES = '{"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class Line:
    """A line of the file.

    Attributes:
        place: the file and the number of the line.
        record: what stands there, other keys included.
        messages: a conversation up to an answer; of a text, one user's message.
    """

    place: str
    record: dict[str, Any]
    messages: list[Message]


def read_prompts(path: str) -> list[Line]:
    """All lines of a file.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line is no prompt.
    """
    try:
        lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if lines == [b""]:
        raise ConfigError(f"{path}: empty; put a prompt on each line")
    parse = _parse_json if path.endswith(".jsonl") else _parse_text
    result = []
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            record = parse(line.decode("utf-8-sig").removesuffix("\r"))
            messages = to_messages(_conversation(record))
            if reason := obstacle(messages):
                raise ValueError(reason)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{place}: not UTF-8 text; save the file as UTF-8") from error
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
        result.append(Line(place, record, messages))
    return result


def obstacle(messages: object) -> str | None:
    """Why nothing can be answered to a conversation, in a few words; None if it can.

    It needs at most one system message, at the beginning, and a user's message at the end.
    """
    if not isinstance(messages, list):
        return "not a list of messages"
    return check_messages([*messages, {"role": "assistant", "content": "an answer"}])


def _parse_text(line: str) -> dict[str, Any]:
    return {"prompt": line}


def _parse_json(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); each line must be {SHAPES}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ValueError(f"each line must be {SHAPES}")
    return record


def _conversation(record: dict[str, Any]) -> dict[str, Any]:
    if "messages" in record:
        return {"messages": record["messages"]}
    return {"messages": [{"role": "user", "content": record["prompt"]}]}
