"""Files of prompts: what is read from them, and what is said about a line that is none."""

import json

import pytest

from data.prompts_file import read_prompts
from utils.config import ConfigError

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def write(tmp_path):
    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to


def test_text_has_a_prompt_on_each_line(write):
    lines = read_prompts(write("a.txt", '\ufeffone\r\n{"prompt": "x"}\n  three\u2028lines '))
    texts = ["one", '{"prompt": "x"}', "  three\u2028lines "]
    assert [line.record for line in lines] == [{"prompt": text} for text in texts]
    assert [line.messages for line in lines] == [[{"role": "user", "content": t}] for t in texts]


def test_jsonl_has_texts_or_conversations_and_keeps_other_keys(write):
    chat = [{"role": "system", "content": "Be brief"}, USER, {"role": "assistant", "content": "Yo"}]
    records = [
        {"prompt": "Hi", "id": 7},
        {"messages": [*chat, USER]},
        {"messages": [{"from": "human", "value": "Hi"}]},
    ]
    lines = read_prompts(write("a.jsonl", "\n".join(map(json.dumps, records)) + "\n"))
    assert [line.record for line in lines] == records
    assert [line.messages for line in lines] == [[USER], [*chat, USER], [USER]]
    assert lines[1].place.endswith("a.jsonl, line 2")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "", "empty; put a prompt"),
        ("a.txt", "a\n\nb\n", "line 2: empty message"),
        ("a.txt", b"a\nb\nna\xefve\n", "line 3: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n', "line 2: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '"a"', "line 1: each line must be"),
        ("a.jsonl", '{"text": "a"}', "line 1: each line must be"),
        ("a.jsonl", '{"prompt": "a", "messages": []}', "line 1: each line must be"),
        ("a.jsonl", '{"prompt": 3}', "line 1: content is not text"),
        ("a.jsonl", '{"prompt": "  "}', "line 1: empty message"),
        ("a.jsonl", r'{"prompt": "\ud800"}', "line 1: broken UTF-8"),
        ("a.jsonl", '{"messages": "a"}', "line 1: not a list of messages"),
        ("a.jsonl", '{"messages": []}', "line 1: impossible order of roles"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}', "line 1: unknown role"),
        (
            "a.jsonl",
            json.dumps({"messages": [USER, {"role": "assistant", "content": "a"}]}),
            "line 1: impossible order of roles",
        ),
    ],
)
def test_mistakes_are_told_with_the_line(write, name, content, reason):
    with pytest.raises(ConfigError, match=reason):
        read_prompts(write(name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_prompts(str(tmp_path))
