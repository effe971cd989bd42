"""Preference pairs from rows of any common shape, tokenized once.

    files, hub, built-in --> to_pair --> check --> render --> tokens, learned --> cache

A pair is two conversations, the chosen and the rejected, that begin alike. What they have in common
is the prompt, what follows is the answer, and of the answer what the assistant says is learned, the
end of its turn included.

As with conversations (`conversations.py`), nothing is left out silently: rows that cannot be used
and pairs that are too long are counted by reason and told with the first row numbers. Held-out
pairs are chosen by a hash of what is asked, the same as for conversations, so a question that SFT
kept out of training at some fraction is kept out here at the same one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

from data import builtin_tasks
from data.chat import ChatTemplate, Message, Rendered, check_messages, render_many, to_messages
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
from data.sources import Record
from data.tokenizer import Tokenizer, id_dtype
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger

FORMAT = 2
BUILTIN_EXAMPLES = {"train": 4_000, "heldout": 400}
CHUNK = 500  # pairs encoded at a time
SHAPES = (
    "prompt, chosen, rejected: texts",
    "prompt, chosen, rejected: lists of messages [{role, content}, ...]",
    "chosen, rejected: lists of messages, the prompt's included",
    "chosen, rejected: whole dialogues '\\n\\nHuman: ...\\n\\nAssistant: ...'",
)


class PairSource(RecordSource):
    """One source of preference pairs."""

    BUILTIN: ClassVar = "builtin:pairs"


class PairDataConfig(Config):
    """Where preference pairs come from, which are used, and how they are packed."""

    sources: list[PairSource]
    cache_dir: str = "cache"
    """Tokenized pairs and the reference's log-probabilities; may be deleted."""
    seq_len: int = 2_048
    """Tokens per row (T); a pair, its prompt twice, stands in one row."""
    max_pairs_per_row: int = 16
    """At most so many pairs in a row; the batch has room for as many in each."""
    too_long: Literal["truncate", "drop"] = "drop"
    """What happens to pairs that do not fit into a row; either way they are counted. truncate: the
    longer answer loses its end, until both have half a row."""
    bad_rows: Literal["skip", "fatal"] = "skip"
    """Whether rows that cannot be used end the run, or are only counted and told."""
    held_out_fraction: float = 0.02
    """Share of the pairs, by a hash of what is asked, never trained on."""
    held_out_pairs: int = 500
    """At most so many held-out pairs are used at an evaluation."""
    expected_tokens: int | None = None
    """Tokens of an epoch, roughly: read by --dry-run alone, which has no data to count."""

    def problems(self) -> Iterator[Problem]:
        names = [s.name for s in self.sources]
        if not names:
            yield Problem(("sources",), "sources is empty: name at least one")
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem(("sources",), f"sources: the name '{name}' is used twice")
        for key in ("seq_len", "max_pairs_per_row", "held_out_pairs", "expected_tokens"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem((key,), f"{key} ({value}) must be above 0")
        if not 0 < self.held_out_fraction < 0.5:
            yield Problem(
                ("held_out_fraction",),
                f"held_out_fraction ({self.held_out_fraction}) must be between 0 and 0.5",
            )


# ---------------------------------------------------------------------------------------------
# Rows to two conversations


Pair = tuple[list[Message], list[Message]]  # the chosen and the rejected conversation
_OPEN_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)  # HH-RLHF's, cut in two


def to_pair(record: Record) -> Pair | None:
    """The conversations of a record in one of `SHAPES`, to be checked; None if in none of them."""
    if "chosen" not in record or "rejected" not in record:
        return None
    found = [_conversation(record.get("prompt"), record[side]) for side in ("chosen", "rejected")]
    if None in found:
        return None
    system = record.get("system")
    return tuple(to_messages({"messages": messages, "system": system}) for messages in found)


def _conversation(prompt: object, answer: object) -> object:
    """A prompt, if it is not part of the answer, and the answer, as messages."""
    if isinstance(answer, str):
        if prompt is None:
            return _dialogue(answer)
        if isinstance(prompt, str) and _OPEN_DIALOGUE.fullmatch(prompt):
            return _dialogue("\n\n" + prompt.lstrip() + answer)
    if isinstance(answer, list) and not _begins_with_assistant(answer):
        return answer
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return turns + answers


def _begins_with_assistant(messages: list) -> bool:
    first = to_messages({"messages": messages[:1]})
    return [m["role"] for m in first if isinstance(m, dict)] == ["assistant"]


def _dialogue(text: str) -> list[Message] | None:
    """The turns of a dialogue in the form of HH-RLHF; None if it is not one."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def check_pair(pair: Pair) -> str | None:
    """Why a pair cannot be trained on, in a few words; None if it can."""
    for side, messages in zip(("chosen", "rejected"), pair, strict=True):
        if reason := check_messages(messages):
            return f"{side}: {reason}"
    chosen, rejected = pair
    common = len(prompt_of(pair))
    if common == len(chosen) == len(rejected):
        return "chosen equal to rejected"
    if common in (len(chosen), len(rejected)):
        return "one answer continues the other"
    if chosen[common]["role"] != "assistant":
        return "prompts differ"
    return None


def prompt_of(pair: Pair) -> list[Message]:
    """The messages that both conversations begin with, white space around them aside."""
    prompt = []
    for a, b in zip(*pair, strict=False):
        if a["role"] != b["role"] or a["content"].strip() != b["content"].strip():
            break
        prompt.append(a)
    return prompt


# ---------------------------------------------------------------------------------------------
# Conversations to tokens


@dataclass
class Pairs:
    """Pairs laid end to end: sequence 2i is the chosen one of pair i, sequence 2i + 1 the rejected.

    Attributes:
        tokens: sequence s is tokens[ends[s-1] : ends[s]].
        learned: for each token, whether it belongs to an answer.
        held_out: for each pair, whether it is kept out of training.
        known: for each pair, whether its chosen answer is the only right one.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    held_out: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.held_out)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each pair takes in a row."""
        return np.diff(self.ends, prepend=0).reshape(-1, 2).sum(1)

    def slice(self, sequence: int) -> slice:
        """Where a sequence lies in `tokens` and `learned`."""
        return slice(int(self.ends[sequence - 1]) if sequence > 0 else 0, int(self.ends[sequence]))

    def pieces(self, index: int) -> list[Piece]:
        """The chosen and the rejected sequence of a pair, their targets the answers' tokens."""
        result = []
        for sequence in (2 * index, 2 * index + 1):
            span = self.slice(sequence)
            piece = cut_document(self.tokens[span], 0, span.stop - span.start)
            piece.targets[:-1][~self.learned[span][1:]] = IGNORE
            result.append(piece)
        return result

    def fingerprint(self) -> str:
        """Digest of everything that training sees of the pairs."""
        arrays = (self.tokens, self.learned, self.ends, self.held_out)
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def load_pairs(config: PairDataConfig, tokenizer: Tokenizer, template: ChatTemplate) -> Pairs:
    """The pairs of all sources, tokenized now or before, and an account of what was left out.

    Raises:
        ConfigError: unreadable, of no known shape, bad rows where `bad_rows` is fatal, or empty.
    """
    tensors = [_load_source(source, config, tokenizer, template) for source in config.sources]
    starts = np.cumsum([0, *(len(t["tokens"]) for t in tensors)])
    known = [
        np.full(len(t["held_out"]), source.exact_match)
        for t, source in zip(tensors, config.sources, strict=True)
    ]
    pairs = Pairs(
        tokens=np.concatenate([t["tokens"] for t in tensors]),
        learned=np.concatenate([t["learned"] for t in tensors]),
        ends=np.concatenate([t["ends"] + at for t, at in zip(tensors, starts, strict=False)]),
        held_out=np.concatenate([t["held_out"] for t in tensors]),
        known=np.concatenate(known),
    )
    for split, empty in (("train on", pairs.held_out.all()), ("hold out", not any(pairs.held_out))):
        if empty:
            raise ConfigError(
                f"data.sources: {len(pairs):,} usable pairs, none of them to {split}; "
                f"add pairs or change data.held_out_fraction ({config.held_out_fraction})"
            )
    return pairs


def _load_source(
    source: PairSource, config: PairDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> dict[str, np.ndarray]:
    digest = _digest(source, config, tokenizer, template)
    path = Path(config.cache_dir) / f"{source.name}-{digest}.safetensors"
    tensors, account = cached_tensors(path, partial(_tokenize, source, config, tokenizer, template))
    held_out = tensors["held_out"]
    get_logger().info(
        f"source '{source.name}': {len(held_out):,} pairs, {int(held_out.sum()):,} of them held "
        f"out; {len(tensors['tokens']):,} tokens, {int(tensors['learned'].sum()):,} in answers"
    )
    tell_account(source, account, config.seq_len, config.bad_rows)
    return tensors


def _digest(
    source: PairSource, config: PairDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> str:
    identity = {
        "format": ["pairs", FORMAT],
        "content": source_revision(source, BUILTIN_EXAMPLES),
        "tokenizer": tokenizer.fingerprint,
        "template": template.state_dict(),
        "seq_len": config.seq_len,
        "too_long": config.too_long,
        "held_out_fraction": config.held_out_fraction,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def _tokenize(
    source: PairSource, config: PairDataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[dict[str, np.ndarray], Account]:
    """The tensors of one source, and what was left out."""
    account = Account()
    dtype = id_dtype(tokenizer.vocab_size)
    tokens, learned, held_out = [np.empty(0, dtype)], [np.empty(0, bool)], []
    records = read_source(source, builtin_tasks.preference, BUILTIN_EXAMPLES)
    rows = usable_rows(source, records, to_pair, check_pair, SHAPES, account.bad)
    with tqdm(desc=f"tokenizing {source.name}", unit=" pairs") as bar:
        while chunk := list(islice(rows, CHUNK)):
            conversations = [messages for row in chunk for messages in row.value]
            rendered = render_many(conversations, tokenizer, template)
            for row, *answers in zip(chunk, rendered[::2], rendered[1::2], strict=True):
                prompt = prompt_of(row.value)
                for answer in answers:
                    _learn_answer_only(answer, prompt)
                if not _fit(*answers, config, account.too_long, row.place):
                    continue
                tokens += [np.array(answer.tokens, dtype) for answer in answers]
                learned += [np.array(answer.learned, bool) for answer in answers]
                held_out.append(_is_held_out(row, prompt, config.held_out_fraction))
            bar.update(len(chunk))
    tensors = {
        "tokens": np.concatenate(tokens),
        "learned": np.concatenate(learned),
        "ends": np.cumsum([len(t) for t in tokens[1:]], dtype=np.int64),
        "held_out": np.array(held_out, bool),
    }
    return tensors, account


def _learn_answer_only(rendered: Rendered, prompt: list[Message]) -> None:
    """Unmark what the assistant has already said in the prompt."""
    learned = np.array(rendered.learned)
    begins = np.flatnonzero(learned[1:] & ~learned[:-1]) + 1  # of the assistant's turns
    answer = begins[sum(message["role"] == "assistant" for message in prompt)]
    rendered.learned[:answer] = [False] * int(answer)


def _fit(
    chosen: Rendered, rejected: Rendered, config: PairDataConfig, too_long: Tally, place: str
) -> bool:
    """Whether a pair is kept, cut to a row's length if need be."""
    sizes = [len(chosen.tokens), len(rejected.tokens)]
    if sum(sizes) <= config.seq_len:
        return True
    if config.too_long == "drop":
        too_long.add("dropped", place)
        return False
    half = config.seq_len // 2
    for rendered, other in ((chosen, sizes[1]), (rejected, sizes[0])):
        most = max(half, config.seq_len - other)
        del rendered.tokens[most:], rendered.learned[most:]
    if not (any(chosen.learned) and any(rejected.learned)) or chosen.tokens == rejected.tokens:
        too_long.add("dropped, since the answers do not differ before the cut", place)
        return False
    too_long.add("truncated", place)
    return True


def _is_held_out(row: Row[Pair], prompt: list[Message], fraction: float) -> bool:
    if row.held_out is not None:
        return row.held_out
    asked = [m["content"] for m in prompt if m["role"] != "assistant"]
    return is_held_out("\n".join(asked), fraction)
