"""A conversation with inference.py in a terminal: history, commands, Ctrl-C, the context's end."""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import suppress

import pytest

import inference
from data.chat import Message
from tests.terminal import ROOT, Terminal
from tests.tiny import CONTEXT, LONG_CONTEXT, NEW, Checkpoints, assistant, user


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def chat(made) -> str:
    return made.save("chat", chat=True)


@pytest.fixture(scope="module")
def base(made) -> str:
    return made.save("base", chat=False)


@pytest.fixture
def write(capsys):
    """Runs the script here, on the CPU; returns what it wrote on stdout and stderr."""

    def call(path: str, *argv: object, new: int = NEW) -> tuple[str, str]:
        flags = ["--checkpoint", path, "--max-new-tokens", str(new), "--device", "cpu"]
        inference.main([*flags, *map(str, argv)])
        return tuple(capsys.readouterr())

    return call


def converse(path: str, *argv: object) -> Terminal:
    flags = ("--interactive", "--temperature", 0, "--device", "cpu")
    return Terminal("inference", "--checkpoint", path, *flags, *argv)


def stripped(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def test_a_conversation(made, chat, tmp_path):
    with converse(chat, "--max-new-tokens", NEW, "--stats") as terminal:
        terminal.expect("/help tells more\n> ")
        assert "\x1b[1;32m" in terminal.raw
        assert "Ctrl-C stops an answer" in terminal.say("/help")
        assert "no /hello" in terminal.say("/hello you")
        said = [{"role": "system", "content": "Be brief."}]
        assert "is set" in terminal.say("/system Be brief.")
        for question in ("Hello", " /help is no command here", "naïve 漢字?"):
            said.append(user(question.strip()))
            answer = made.answer(said, temperature=0)
            told = terminal.say(question)
            assert told.startswith(f"{answer}\nstats: ")
            said.append(assistant(answer))
        path = tmp_path / "my chat.json"
        assert f"saved in {path}" in terminal.say(f"/save {path}")
        kept = json.loads(path.read_text(encoding="utf-8"))
        assert [stripped(m) for m in kept] == [stripped(m) for m in said]
        assert "choose another name" in terminal.say(f"/save {ROOT / 'README.md'}")

        assert "forgotten" in terminal.say("/reset")
        expected = made.answer([said[0], user("Hello")], temperature=0)
        assert terminal.say("Hello").startswith(f"{expected}\n")
        terminal.say("/reset")
        assert "no system message" in terminal.say("/system")
        expected = made.answer([user("Hello")], temperature=0)
        terminal.send("\x1b[A\x1b[A\x1b[A\n")  # three lines up in the history
        assert terminal.expect("stats: ").endswith(f"Hello\n{expected}\n")
        terminal.expect(r"\n> ")  # before it the line is not edited, and Ctrl-D would be lost
        terminal.send("\x04")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.text


def test_ctrl_c_stops_the_answer_and_not_the_program(made, tmp_path):
    path = made.save("long", chat=True, context=LONG_CONTEXT)
    with converse(path, "--max-new-tokens", LONG_CONTEXT) as terminal:
        terminal.expect("> ")
        answers = []
        for number, interrupt in enumerate((lambda: terminal.send("\x03"), terminal.signal)):
            terminal.send(f"Question {number}\n")
            terminal.expect(rf"Question {number}\n")
            start = terminal.expect(r"(?=[^\n]{40})")
            assert start == ""
            interrupt()
            answers.append(terminal.expect(r"\nstopped; Ctrl-C again.*\n> ").removeprefix("^C"))
        file = tmp_path / "chat.json"
        terminal.say(f"/save {file}")
        messages = json.loads(file.read_text())
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2
        for i in (1, 3):
            text = messages[i]["content"]
            new = len(made.tokenizer.encode(text)) + 50
            assert made.answer(messages[:i], 100, temperature=0).startswith(text[:40])
            assert len(text) >= 40
            assert new < LONG_CONTEXT // 2

        terminal.send("half a line")
        terminal.expect("half a line")
        terminal.interrupt(r"\n> ")
        terminal.interrupt(r"Ctrl-C again, or Ctrl-D, leaves\n> ")
        with suppress(EOFError, OSError):  # it has left already
            terminal.interrupt("never written")
        # One Ctrl-C more than needed may come when it is on its way out.
        assert terminal.wait() in (0, -signal.SIGINT, 128 + signal.SIGINT)
        assert "Traceback" not in terminal.text


def test_a_base_checkpoint_continues_each_line(made, base):
    with converse(base, "--max-new-tokens", NEW) as terminal:
        terminal.expect("each line is continued.*\n> ")
        for text in ("The old mill", "What is 3 + 4?", "a"):
            assert terminal.say(text) == text + made.continuation(text, temperature=0)
        for command in ("/reset", "/system a", "/save b"):
            assert "there is no conversation" in terminal.say(command)
        terminal.send("/exit\n")
        assert terminal.wait() == 0


def talk(monkeypatch, write, path: str, lines: list[str], *argv: object) -> tuple[str, str]:
    """A conversation whose lines come from a pipe."""
    data = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return write(path, "--interactive", "--temperature", 0, *argv)


def test_the_oldest_turns_are_dropped_when_the_context_is_full(
    made, chat, write, tmp_path, monkeypatch
):
    lines = [f"Tell me of number {i}" for i in range(8)]
    file = tmp_path / "chat.json"
    argv = ("--system", "Be brief")
    out, err = talk(monkeypatch, write, chat, [*lines, f"/save {file}"], *argv)
    assert "context (160 tokens) is full: the oldest turns are dropped" in err
    said = json.loads(file.read_text())
    assert [m["content"] for m in said[1::2]] == lines
    assert out.splitlines() == [m["content"] for m in said[2::2]]
    system, turns = said[0], said[1:]
    for i in range(8):
        asked = turns[: 2 * i + 1]
        prompts = [[system, *asked[start:]] for start in range(0, len(asked), 2)]
        room = CONTEXT - NEW
        seen = next(p for p in prompts if len(made.render(p)) <= room)
        assert turns[2 * i + 1]["content"] == made.answer(seen, temperature=0)
    assert len(seen) < len(said) - 1


def test_a_message_that_is_too_long_is_told_and_the_conversation_goes_on(
    made, chat, write, monkeypatch
):
    lines = ["Hello", "word " * CONTEXT, "Bye"]
    out, err = talk(monkeypatch, write, chat, lines)
    first = made.answer([user("Hello")], temperature=0)
    said = [user("Hello"), assistant(first), user("Bye")]
    assert out == f"{first}\n{made.answer(said, temperature=0)}\n"
    assert "your message: " in err
    assert "shorten it" in err


def test_bytes_that_are_no_text_do_not_end_a_conversation(made, chat, write, monkeypatch):
    out, _ = talk(monkeypatch, write, chat, ["na\udcefve"])
    assert out == made.answer([user("na\ufffdve")], temperature=0) + "\n"


def test_colours_are_for_terminals(chat, write, monkeypatch):
    out, err = talk(monkeypatch, write, chat, ["Hello", "/help"])
    assert "\x1b" not in out + err
    assert "> " not in out
