"""Verifiable prompts: what RLVR asks, the answer to it, and which verifier compares the two.

    files, hub, built-in --> to_prompt --> check --> render_prompt --> Prompts --> PromptOrder

As with conversations, nothing is left out silently: rows that cannot be used and prompts that are
too long are counted by reason and told with the first row numbers, or end the run where the config
says so. Held-out prompts are chosen by a hash of what is asked; or a source is held out as a whole,
as GSM8K's test set is. What is held out in one source is not trained on in another.

Which verifiers there are this module does not know: the caller passes the check of an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from data import builtin_tasks
from data.chat import ChatTemplate, Message, check_messages, render_prompt, to_messages
from data.records import Account, RecordSource, read_source, tell_account, usable_rows
from data.shards import is_held_out
from data.tokenizer import Tokenizer
from utils.config import Config, ConfigError, Problem
from utils.logging import get_logger
from utils.seed import derive, shuffle_order

SHAPES = (
    "question, answer: GSM8K's, the answer's last line being '#### N'",
    "prompt (text or messages), answer, verifier (or set the source's)",
    "question, answer, metadata: an entry of reasoning-gym",
)
BUILTIN_EXAMPLES = {"train": 8_000, "heldout": 500}
MARKER = "####"
CheckAnswer = Callable[[str, str], str | None]  # (verifier, answer) -> why it is of no use


class PromptSource(RecordSource):
    """One source of prompts."""

    BUILTIN: ClassVar = "builtin:prompts"

    verifier: str | None = None
    """What compares a completion with the answer (a name of train/rewards.py); null: the row's own
    `verifier`, or what its shape implies (gsm8k, reasoning_gym)."""
    use: Literal["split", "train", "held_out"] = "split"
    """train: all of it is trained on; held_out: none; split: all but a share that a hash chooses
    (`held_out_fraction`)."""
    weight: float = 1.0
    """How often each prompt is asked in an epoch: 2 is twice, 0.25 a fixed quarter of them once."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.weight > 0:
            yield Problem(("weight",), f"weight ({self.weight}) must be above 0")
        if self.exact_match:
            yield Problem(("exact_match",), "exact_match: for prompts, set verifier: exact_match")


class PromptDataConfig(Config):
    """Where prompts come from and which are used."""

    sources: list[PromptSource]
    max_prompt_tokens: int = 512
    """A longer prompt is not asked."""
    too_long: Literal["drop", "fatal"] = "drop"
    """Whether such prompts are only counted and told, or end the run."""
    bad_rows: Literal["skip", "fatal"] = "fatal"
    """The same for rows that cannot be used: an answer is missing, or no number for `gsm8k` ..."""
    held_out_fraction: float = 0.02
    """Share of the prompts, by a hash of what is asked, never trained on."""
    held_out_prompts: int = 500
    """At most so many held-out prompts are asked at an evaluation."""

    def problems(self) -> Iterator[Problem]:
        names = [s.name for s in self.sources]
        if not names:
            yield Problem(("sources",), "sources is empty: name at least one")
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem(("sources",), f"sources: the name '{name}' is used twice")
        for key in ("max_prompt_tokens", "held_out_prompts"):
            if getattr(self, key) <= 0:
                yield Problem((key,), f"{key} ({getattr(self, key)}) must be above 0")
        if not 0 <= self.held_out_fraction < 0.5:
            yield Problem(
                ("held_out_fraction",),
                f"held_out_fraction ({self.held_out_fraction}) must be at least 0 and below 0.5",
            )


# ---------------------------------------------------------------------------------------------
# Rows to prompts


@dataclass(frozen=True)
class Prompt:
    """A question ready to be asked.

    Attributes:
        tokens: what a completion continues, the assistant's header included.
    """

    source: str
    messages: list[Message]
    answer: str
    verifier: str
    tokens: list[int]


@dataclass(frozen=True)
class _Row:
    """What `to_prompt` makes of a record, to be checked; any of it may be absent."""

    messages: Any
    answer: object
    verifier: object


def to_prompt(record: Mapping[str, Any], verifier: str | None) -> _Row | None:
    """A record in one of `SHAPES`, to be checked; None if it is in none of them.

    Args:
        verifier: the source's, which goes before the row's.
    """
    asked = record.get("prompt", record.get("question"))
    if asked is None or "answer" not in record:
        return None
    turns = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    messages = to_messages({"messages": turns, "system": record.get("system")})
    metadata, answer = record.get("metadata"), record["answer"]
    of_gym = isinstance(metadata, Mapping) and "source_dataset" in metadata
    marked = isinstance(answer, str) and MARKER in answer
    implied = "reasoning_gym" if of_gym else "gsm8k" if marked else None
    verifier = verifier or record.get("verifier") or implied
    if verifier == "reasoning_gym":
        answer = json.dumps(record)  # its scorers read the whole entry
    elif marked and verifier not in ("python", "regex"):  # whose answers are programs
        answer = answer.rpartition(MARKER)[2].strip()
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return _Row(messages, answer, verifier)


def check_prompt(row: _Row, check_answer: CheckAnswer) -> str | None:
    """Why a row cannot be used, in a few words; None if it can."""
    stand_in = {"role": "assistant", "content": "an answer"}
    messages = row.messages if isinstance(row.messages, list) else []
    if reason := check_messages([*messages, stand_in]):
        return reason
    if row.answer is None or str(row.answer).strip() == "":
        return "answer missing"
    if not isinstance(row.answer, str):
        return "answer is not text"
    if not isinstance(row.verifier, str):
        return "no verifier named: set the source's"
    return check_answer(row.verifier, row.answer)


def asked_text(messages: list[Message]) -> str:
    """What is asked, for the split: the same as for conversations and pairs."""
    return "\n".join(m["content"] for m in messages if m["role"] != "assistant")


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompts:
    """All prompts of a run: those trained on, by weight, and those of the evaluations."""

    train: list[Prompt]
    held_out: list[Prompt]

    @property
    def verifiers(self) -> list[str]:
        """The names of all verifiers that are needed."""
        return sorted({prompt.verifier for prompt in self.train + self.held_out})

    def fingerprint(self) -> str:
        """Digest of everything that training sees of them."""
        digest = hashlib.sha256()
        for p in self.train:
            digest.update(json.dumps([p.tokens, p.answer, p.verifier]).encode())
        return digest.hexdigest()[:16]


def load_prompts(
    config: PromptDataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    check_answer: CheckAnswer,
) -> Prompts:
    """The prompts of all sources, with an account of what was left out.

    Raises:
        ConfigError: unreadable, of no known shape, nothing to train on; bad rows or long prompts
            where they are fatal.
    """
    train: list[tuple[Prompt, float]] = []
    held_out: dict[str, list[Prompt]] = {}
    for source in config.sources:
        trained, kept = _load_source(source, config, tokenizer, template, check_answer)
        train += [(prompt, source.weight) for prompt in trained]
        held_out[source.name] = kept
        get_logger().info(
            f"source '{source.name}': {len(trained):,} prompts, and {len(kept):,} held out"
        )
    never = {asked_text(p.messages) for kept in held_out.values() for p in kept}
    asked = [p for p, weight in train for _ in range(_times(p, weight, never))]
    if not asked:
        raise ConfigError("data.sources: they leave no prompt to train on")
    share = config.held_out_prompts // max(1, sum(map(bool, held_out.values())))
    return Prompts(asked, [p for kept in held_out.values() for p in _spread(kept, share)])


def _load_source(
    source: PromptSource,
    config: PromptDataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    check_answer: CheckAnswer,
) -> tuple[list[Prompt], list[Prompt]]:
    """A source's prompts to train on, and those held out."""
    account, train, held_out = Account(), [], []
    records = read_source(source, builtin_tasks.prompt, BUILTIN_EXAMPLES)
    rows = usable_rows(
        source,
        records,
        lambda record: to_prompt(record, source.verifier),
        lambda row: check_prompt(row, check_answer),
        SHAPES,
        account.bad,
    )
    for row in rows:
        asked = row.value
        tokens = render_prompt(asked.messages, tokenizer, template)
        if len(tokens) > config.max_prompt_tokens:
            account.too_long.add("dropped", row.place)
            continue
        prompt = Prompt(source.name, asked.messages, asked.answer, asked.verifier, tokens)
        kept = _is_held_out(source, row.held_out, prompt, config.held_out_fraction)
        (held_out if kept else train).append(prompt)
    if account.too_long.counts and config.too_long == "fatal":
        raise ConfigError(
            f"source '{source.name}', longer than max_prompt_tokens "
            f"({config.max_prompt_tokens:,}): {account.too_long}. Raise it, shorten or remove "
            "them, or set data.too_long to drop"
        )
    tell_account(source, account, config.max_prompt_tokens, config.bad_rows)
    return train, held_out


def _is_held_out(
    source: PromptSource, by_source: bool | None, prompt: Prompt, fraction: float
) -> bool:
    if source.use != "split":
        return source.use == "held_out"
    if by_source is not None:
        return by_source
    return is_held_out(asked_text(prompt.messages), fraction)


def _times(prompt: Prompt, weight: float, never: set[str]) -> int:
    """How often a prompt is asked in an epoch."""
    text = asked_text(prompt.messages)
    if text in never:
        return 0
    whole, part = divmod(weight, 1)
    return int(whole) + is_held_out(f"weight {text}", part)


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """At most `count` of them, from all over."""
    few = min(len(prompts), count)
    return [prompts[i * len(prompts) // few] for i in range(few)]


class PromptOrder:
    """The numbers of the prompts in the order in which they are asked, for ever.

    Each epoch is a permutation of its own, keyed by (seed, epoch).
    """

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self.seed = seed
        self.epoch = 0
        self.index = 0
        self.fingerprint = prompts.fingerprint()
        self._count = len(prompts.train)
        self._order = self._of_epoch()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.index == self._count:
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._of_epoch()
        self.index += 1
        return int(self._order[self.index - 1])

    def _of_epoch(self) -> np.ndarray:
        return shuffle_order(self._count, derive(self.seed, "prompts", self.epoch))

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "index": self.index, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is of other prompts, so that their order would be another.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the prompts are not those of the checkpoint (a file, a hub dataset or its "
                "revision has changed); restore them, or start another run"
            )
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._of_epoch()
