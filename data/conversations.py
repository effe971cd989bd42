"""Conversations from rows of any common shape, tokenized once.

    files, hub, built-in --> to_messages --> check --> render --> tokens, learned --> cache

Nothing is left out silently. Rows that cannot be used and conversations that are too long are
counted by reason and told with the first row numbers (from 0), also when they come from the cache.

Held-out conversations are chosen by a hash of what is asked in them, so two answers to one question
are on the same side. The cache is one file for each source; its name carries a digest of everything
that decides its content. Everything is in memory: 3 bytes a token, 1 GB for smol-smoltalk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from data import builtin_tasks
from data.chat import (
    SHAPES,
    ChatTemplate,
    Message,
    Rendered,
    check_messages,
    render_many,
    to_messages,
)
from data.packing import IGNORE, Piece, cut_document
from data.records import (
    Account,
    RecordSource,
    Row,
    Tally,
    cached_tensors,
    read_source,
    source_revision,
    tell_account,
    usable_rows,
)
from data.shards import is_held_out
from data.sources import SourceConfig
from data.tokenizer import Tokenizer, id_dtype
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger

FORMAT = 2
CHUNK = 1_000  # conversations encoded at a time
TENSORS = ("tokens", "learned", "ends", "held_out", "keys")


class ChatSource(RecordSource):
    """One source of conversations."""

    BUILTIN: ClassVar = "builtin:chats"

    weight: float = 1.0
    """How often each conversation is seen in an epoch: 2 is twice, 0.25 a fixed quarter of them
    once, 1.5 all once and a fixed half again. Which ones is decided by a hash of their content."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.weight > 0:
            yield Problem(("weight",), f"weight ({self.weight}) must be above 0")


class ChatDataConfig(Config):
    """Where conversations come from, which are used, and how they are packed."""

    sources: list[ChatSource]
    cache_dir: str = "cache"
    """Tokenized conversations; may be deleted, are then made again."""
    seq_len: int = 2_048
    """Tokens per row (T)."""
    max_documents_per_row: int = 32
    """At most so many conversations in a row, which bounds `cu_seqlens`."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to conversations that do not fit into a row; either way they are counted."""
    bad_rows: Literal["skip", "fatal"] = "skip"
    """Whether rows that cannot be used end the run, or are only counted and told."""
    held_out_fraction: float = 0.01
    """Share of the conversations, by a hash of what is asked, never trained on."""
    held_out_tokens: int = 200_000
    """At most so many held-out tokens are used at an evaluation."""
    expected_tokens: int | None = None
    """Tokens of an epoch, plain text included, roughly: read by --dry-run alone, which has no data
    to count."""
    text_sources: list[SourceConfig] = Field(default_factory=list)
    """Plain documents, as pretraining reads them, mixed into every epoch: without them a model
    forgets over the conversations how to write."""
    text_tokens: int = 0
    """Tokens of plain text in an epoch, shared out by the weights of `text_sources`."""

    def problems(self) -> Iterator[Problem]:
        names = [s.name for s in [*self.sources, *self.text_sources]]
        if not self.sources:
            yield Problem(("sources",), "sources is empty: name at least one")
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem(("sources",), f"sources: the name '{name}' is used twice")
        for key in ("seq_len", "max_documents_per_row", "held_out_tokens", "expected_tokens"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem((key,), f"{key} ({value}) must be above 0")
        if not 0 < self.held_out_fraction < 0.5:
            yield Problem(
                ("held_out_fraction",),
                f"held_out_fraction ({self.held_out_fraction}) must be between 0 and 0.5",
            )
        if (self.text_tokens > 0) != bool(self.text_sources):
            yield Problem(
                ("text_tokens", "text_sources"),
                f"text_tokens ({self.text_tokens}) must be above 0 if there are text_sources, "
                "and 0 if there are none",
            )


# ---------------------------------------------------------------------------------------------
# Messages to tokens


@dataclass
class Conversations:
    """A source's conversations laid end to end: number i is tokens[ends[i-1] : ends[i]].

    Attributes:
        learned: for each token, whether it is to be learned.
        held_out: for each conversation, whether it is kept out of training.
        keys: for each conversation, 32 bits of a hash of its content.
    """

    source: ChatSource | SourceConfig
    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    held_out: np.ndarray
    keys: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each takes in a row: its last token is only ever a target."""
        return np.diff(self.ends, prepend=0) - 1

    def slice(self, index: int) -> slice:
        """Where conversation `index` lies in `tokens` and `learned`."""
        return slice(int(self.ends[index - 1]) if index > 0 else 0, int(self.ends[index]))

    def piece(self, index: int) -> Piece:
        """Conversation `index` for a row, its targets those tokens that are to be learned."""
        span = self.slice(index)
        piece = cut_document(self.tokens[span], 0, span.stop - span.start - 1)
        piece.targets[~self.learned[span][1:]] = IGNORE
        return piece


def load_conversations(
    source: ChatSource, config: ChatDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> Conversations:
    """A source's conversations, tokenized now or before, and an account of what was left out.

    Raises:
        ConfigError: unreadable, of no known shape, bad rows where `bad_rows` is fatal, or empty.
    """
    digest = _digest(source, config, tokenizer, template)
    path = Path(config.cache_dir) / f"{source.name}-{digest}.safetensors"
    tensors, account = cached_tensors(path, partial(_tokenize, source, config, tokenizer, template))
    conversations = Conversations(source, *map(tensors.get, TENSORS))
    _give_account(conversations, account, config)
    return conversations


def _digest(
    source: ChatSource, config: ChatDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> str:
    identity = {
        "format": FORMAT,
        "content": source_revision(source, builtin_tasks.N_EXAMPLES),
        "tokenizer": tokenizer.fingerprint,
        "template": template.state_dict(),
        "seq_len": config.seq_len,
        "too_long": config.too_long,
        "held_out_fraction": config.held_out_fraction,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def _tokenize(
    source: ChatSource, config: ChatDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[dict[str, np.ndarray], Account]:
    """The tensors of `Conversations`, and what was left out."""
    account = Account()
    dtype = id_dtype(tokenizer.vocab_size)
    tokens, learned, held_out, keys = [np.empty(0, dtype)], [np.empty(0, bool)], [], []
    records = read_source(source, builtin_tasks.chat, builtin_tasks.N_EXAMPLES)
    rows = usable_rows(source, records, to_messages, check_messages, SHAPES, account.bad)
    with tqdm(desc=f"tokenizing {source.name}", unit=" conversations") as bar:
        while chunk := list(islice(rows, CHUNK)):
            all_rendered = render_many([row.value for row in chunk], tokenizer, template)
            for row, rendered in zip(chunk, all_rendered, strict=True):
                if not _fit(rendered, config, account.too_long, row.place):
                    continue
                tokens.append(np.array(rendered.tokens, dtype))
                learned.append(np.array(rendered.learned, bool))
                held_out.append(_is_held_out(row, config.held_out_fraction))
                keys.append(_key(row.value))
            bar.update(len(chunk))
    tensors = {
        "tokens": np.concatenate(tokens),
        "learned": np.concatenate(learned),
        "ends": np.cumsum([len(t) for t in tokens[1:]], dtype=np.int64),
        "held_out": np.array(held_out, bool),
        "keys": np.array(keys, np.uint32),
    }
    return tensors, account


def _fit(rendered: Rendered, config: ChatDataConfig, too_long: Tally, place: str) -> bool:
    """Whether a conversation is kept, cut to a row's length if need be."""
    most = config.seq_len + 1  # the last token is only ever a target
    if len(rendered.tokens) <= most:
        return True
    if config.too_long == "drop":
        too_long.add("dropped", place)
        return False
    del rendered.tokens[most:], rendered.learned[most:]
    if not any(rendered.learned):
        too_long.add("dropped, since no answer begins before the cut", place)
        return False
    too_long.add("truncated", place)
    return True


def _is_held_out(row: Row[list[Message]], fraction: float) -> bool:
    if row.held_out is not None:
        return row.held_out
    asked = [m["content"] for m in row.value if m["role"] != "assistant"]
    return is_held_out("\n".join(asked), fraction)


def _key(messages: list[Message]) -> int:
    digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _give_account(conversations: Conversations, account: Account, config: ChatDataConfig) -> None:
    """Log what a source holds and what was left out; refuse bad rows, or no rows at all."""
    name = conversations.source.name
    held_out = int(conversations.held_out.sum())
    get_logger().info(
        f"source '{name}': {len(conversations.ends):,} conversations, {held_out:,} of them held "
        f"out; {len(conversations.tokens):,} tokens, {int(conversations.learned.sum()):,} learned"
    )
    tell_account(conversations.source, account, config.seq_len, config.bad_rows)
    if held_out == len(conversations.ends):
        raise ConfigError(f"source '{name}': no conversation to train on at its path")
