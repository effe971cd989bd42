"""What a model sees of a conversation that goes on, and what is saved of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import check_messages
from data.dialogue import Dialogue, with_system
from utils.config import ConfigError


def spoken(turns: int, system: str | None = None) -> Dialogue:
    """So many questions and answers, and one question more."""
    dialogue = Dialogue(system)
    for i in range(turns):
        dialogue.ask(f"q{i}")
        dialogue.answer(f"a{i}")
    dialogue.ask(f"q{turns}")
    return dialogue


@given(turns=st.integers(0, 8), room=st.integers(0, 20), system=st.sampled_from([None, "Be brief"]))
def test_the_newest_that_fits_is_seen(turns, room, system):
    dialogue = spoken(turns, system)
    all_of_it = dialogue.seen()
    dropped = dialogue.make_room(lambda seen: len(seen) <= room)
    seen = dialogue.seen()
    start = len(all_of_it) - len(dialogue.turns)
    assert seen == all_of_it[:start] + all_of_it[start + dialogue.dropped :]
    assert check_messages([*seen, {"role": "assistant", "content": "a"}]) is None
    assert len(seen) <= max(room, start + 1)
    assert len(seen) + 2 > room or not dropped
    assert dropped == (len(all_of_it) > room and turns > 0)


def test_a_question_without_an_answer_is_left_out():
    dialogue = spoken(1)
    dialogue.answer(" \n")
    assert [m["content"] for m in dialogue.seen()] == ["q0", "a0"]


def test_forgetting_keeps_the_system_message():
    dialogue = spoken(3, "Be brief")
    dialogue.make_room(lambda seen: len(seen) < 4)
    dialogue.forget()
    dialogue.ask("again")
    assert [m["content"] for m in dialogue.seen()] == ["Be brief", "again"]


def test_a_conversation_keeps_its_own_system_message():
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    assert with_system(own, "other") == own
    assert with_system(own[1:], "other")[0] == {"role": "system", "content": "other"}
    assert with_system(own[1:], "") == own[1:]


def test_all_of_it_is_saved_also_what_was_dropped(tmp_path):
    dialogue = spoken(3, "Sei kürzer")
    whole = dialogue.seen()
    dialogue.make_room(lambda seen: False)
    path = tmp_path / "chat.json"
    dialogue.save(str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == whole
    dialogue.answer("a3")
    dialogue.save(str(path))
    assert len(json.loads(path.read_text(encoding="utf-8"))) == len(whole) + 1


def test_a_file_of_others_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for name, reason in (
        (str(path), "choose another name"),
        (str(tmp_path / "no" / "chat.json"), "cannot be written: No such file"),
        ("", "needs the name"),
    ):
        with pytest.raises(ConfigError, match=reason):
            spoken(1).save(name)
    assert path.read_text() == "mine"
