"""Messages to tokens: the chat template, and which tokens the assistant learns.

    zephyr   <s><|user|>\\n Hello </s>\\n<|assistant|>\\n Hi! </s>     headers are plain text
    roles    <s><|user|>    Hello </s>  <|assistant|>    Hi! </s>     headers are single tokens
                                                         ^^^ ^^^^     learned

Zephyr's form (Tunstall et al. 2023) suits any vocabulary with an end-of-text token, such as that
of Llama 2, and adds nothing to it; a tokenizer trained by this project has a token for each role.
EOS ends every turn. Of an assistant's turn the content and that EOS are learned: without the EOS a
model never stops. BOS stands in front where documents begin with it.

Text is encoded apart from the special tokens, which are added as ids: `</s>` or `<|assistant|>`
typed by a user stays text. A header and its content are encoded together and parted afterwards,
because a SentencePiece vocabulary would put a space before content encoded alone; so a prompt is
always the beginning of its conversation, token by token. Contents are stripped of the white space
around them.

`ChatTemplate.jinja` is the same form for transformers' `apply_chat_template`, token for token, as
long as no text spells a special token: that one reads a typed `</s>` as the token.

Left out: tools, images, several assistants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.tokenizer import CHAT_ROLES, Tokenizer
from utils.config import ConfigError

ROLES = CHAT_ROLES
Message = dict[str, str]
SHAPES = (
    "messages: [{role, content}, ...]",
    "conversations: [{from, value}, ...]",
    "instruction, input (optional), output",
    "prompt, completion",
)
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's

# Newlines are inside expressions: transformers trims those that follow a block.
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ ('' if loop.first else '\\n') + '<|' + message['role'] + '|>\\n' }}"
    "{{ (message['content'] | trim) + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)
_ROLES = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_JINJA = {"zephyr": _ZEPHYR, "roles": _ROLES}


@dataclass(frozen=True)
class ChatTemplate:
    """The form of a conversation: `name` for this module, `jinja` for transformers."""

    name: str
    jinja: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The form that suits a vocabulary.

        Raises:
            ConfigError: it has no EOS, so that no turn could end.
        """
        if tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer names no eos_token, and a chat model would never learn to stop: "
                "pretrain with a tokenizer that has one"
            )
        name = "roles" if all(role in tokenizer.roles for role in ROLES) else "zephyr"
        return cls(name, ("{{ bos_token }}" if tokenizer.add_bos else "") + _JINJA[name])

    def state_dict(self) -> dict[str, str]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, str]) -> ChatTemplate:
        return cls(**state)


@dataclass
class Rendered:
    """A conversation's tokens, and for each whether it is to be learned (as a target)."""

    tokens: list[int]
    learned: list[bool]


def render(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate) -> Rendered:
    """One whole conversation."""
    return render_many([messages], tokenizer, template)[0]


def render_many(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, template: ChatTemplate
) -> list[Rendered]:
    """Many whole conversations, encoded in parallel across cores."""
    turns = [(m, i == 0) for messages in conversations for i, m in enumerate(messages)]
    turns = iter(_encode_turns(turns, tokenizer, template))
    result = []
    for messages in conversations:
        rendered = Rendered([tokenizer.bos_id], [False]) if tokenizer.add_bos else Rendered([], [])
        for message in messages:
            header, content = next(turns)
            rendered.tokens += [*header, *content, tokenizer.eos_id]
            rendered.learned += [False] * len(header)
            rendered.learned += [message["role"] == "assistant"] * (len(content) + 1)
        result.append(rendered)
    return result


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate
) -> list[int]:
    """A conversation so far and the header of the answer to come: what a completion continues."""
    header = _header("assistant", not messages, tokenizer, template)
    return render(messages, tokenizer, template).tokens + header


def to_messages(record: Mapping[str, Any]) -> object:
    """The messages of a record in one of `SHAPES`, to be checked; None if it is in none of them.

    The usual names of roles become ours, an empty system message is left out, and one that stands
    beside the others, in a field of its own, goes before them.
    """
    found = _shaped(record)
    if found is None:
        return None
    messages = _normal(found)
    system = _normal([{"role": "system", "content": record.get("system")}])
    if system and _are_messages(messages) and messages[0]["role"] != "system":
        return system + messages
    return messages


def _shaped(record: Mapping[str, Any]) -> object:
    if "messages" in record:
        return record["messages"] or []
    if "conversations" in record:
        return record["conversations"] or []
    if "instruction" in record and "output" in record:
        parts = [record["instruction"], *filter(None, [record.get("input")])]
        question = "\n\n".join(parts) if all(isinstance(p, str) for p in parts) else None
        return _turns("user", question) + _turns("assistant", record["output"])
    if "prompt" in record and "completion" in record:
        return _turns("user", record["prompt"]) + _turns("assistant", record["completion"])
    return None


def _turns(role: str, content: object) -> list:
    """One message of this role, or the messages that stand in its place."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _are_messages(messages: object) -> bool:
    return (
        bool(messages) and isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    )


def _normal(messages: object) -> object:
    if not _are_messages(messages):
        return messages or []
    renamed = []
    for message in messages:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not (role == "system" and content in (None, "")):
            renamed.append({"role": _OTHER_NAMES.get(str(role), role), "content": content})
    return renamed


def check_messages(messages: object) -> str | None:
    """Why a conversation cannot be trained on, in a few words; None if it can.

    It needs at most one system message, at the beginning, then a user and an assistant in turn,
    the assistant last, each with text.
    """
    if not _are_messages(messages):
        return "not a list of messages"
    roles = [m.get("role") for m in messages]
    if None in roles:
        return "missing role"
    if not all(role in ROLES for role in roles):
        return "unknown role"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return "impossible order of roles"
    return next(filter(None, map(_check_content, messages)), None)


def _check_content(message: Message) -> str | None:
    content = message.get("content")
    if not isinstance(content, str):
        return "content is not text"
    if not content.strip():
        return "empty answer" if message["role"] == "assistant" else "empty message"
    try:
        content.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return "broken UTF-8"
    return None


def _header_text(role: str, first: bool) -> str:
    return f"<|{role}|>\n" if first else f"\n<|{role}|>\n"


def _header(role: str, first: bool, tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids before a message's content; `first`: it opens the conversation."""
    if template.name == "roles":
        return [tokenizer.roles[role]]
    return tokenizer.encode(_header_text(role, first))


def _encode_turns(
    turns: list[tuple[Message, bool]], tokenizer: Tokenizer, template: ChatTemplate
) -> list[tuple[list[int], list[int]]]:
    """The ids of each message's header and content; the flag says that it opens a conversation."""
    kinds = [(message["role"], first) for message, first in turns]
    contents = [message["content"].strip() for message, _ in turns]
    headers = {kind: _header(*kind, tokenizer, template) for kind in set(kinds)}
    if template.name == "roles":
        return [
            (headers[k], ids)
            for k, ids in zip(kinds, tokenizer.encode_batch(contents), strict=True)
        ]
    texts = [_header_text(*k) + content for k, content in zip(kinds, contents, strict=True)]
    encoded = []
    for kind, content, ids in zip(kinds, contents, tokenizer.encode_batch(texts), strict=True):
        header = headers[kind]
        # A vocabulary that merges across the newline gets its content encoded alone.
        parted = ids[: len(header)] == header
        encoded.append((header, ids[len(header) :] if parted else tokenizer.encode(content)))
    return encoded
