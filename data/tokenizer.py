"""Tokenizers: load one, or train one, and carry it inside the checkpoint.

A `Tokenizer` wraps `tokenizers.Tokenizer` with what training needs to know and a checkpoint must
keep: which ids play the special roles, whether documents begin with BOS and end with EOS, and a
fingerprint of what it does, so that two files that tokenize alike are the same tokenizer.

Text never becomes a special token: a user who types `</s>` gets the pieces of those four
characters. Roles are added as ids, by this module and by the chat template.

A loaded tokenizer is read from its `tokenizer.json` (from a hub id or a local folder): it is the
exact thing its model was trained with, while class-specific conversions are not always. A trained
one is byte-level BPE with single digits, so that any text round-trips and numbers split one way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.config import Config, ConfigError, Problem

if TYPE_CHECKING:
    import tokenizers

CHAT_ROLES = ("system", "user", "assistant")
TRAINED_SPECIALS = {
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    **{role: f"<|{role}|>" for role in CHAT_ROLES},
}
# Strings on which tokenizers differ: spaces, digits, scripts, bytes, markup, control characters.
FINGERPRINT_PROBES = (
    " leading", "trailing ", "two  spaces", "tab\tline\nblank\n\n", "0 12 345 6789", "3.14e-10",
    "naïve café", "Ωμέγα", "漢字かな", "😀🏽", "def f(x):\n    return x**2", "</s><s><|user|>",
    "\u00a0\u200b\u0000", "I'm can't we'll", "HTTP://Example.COM",
)  # fmt: skip


class TokenizerConfig(Config):
    """Which tokenizer a run uses."""

    path: str = "trained"
    """A hub id, a local folder with a tokenizer.json, or `trained`: train one on the sources."""
    vocab_size: int = 2_048
    """Size of a trained vocabulary, special tokens included."""
    train_megabytes: float = 4.0
    """Text of the sources a tokenizer is trained on."""
    add_bos: bool | None = None
    """Begin each document with BOS; null: as the tokenizer itself does."""
    add_eos: bool | None = None
    """End each document with EOS; null: as the tokenizer itself does."""

    def problems(self) -> Iterator[Problem]:
        least = 256 + len(TRAINED_SPECIALS)
        if self.path == "trained" and self.vocab_size < least:
            yield Problem(
                ("path", "vocab_size"),
                f"vocab_size ({self.vocab_size:,}) must hold 256 bytes and "
                f"{len(TRAINED_SPECIALS)} special tokens: at least {least}",
            )


class Tokenizer:
    """Text to ids and back, with the roles of the special tokens.

    Args:
        inner: the `tokenizers` object; text is encoded without special tokens.
        roles: role name ("bos", "eos", "pad", "system", ...) to token id; absent roles have none.
        add_bos, add_eos: whether documents get them.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, roles: dict[str, int], add_bos: bool, add_eos: bool
    ) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.roles = dict(sorted(roles.items()))
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.fingerprint = _fingerprint(self)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        return self.roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.roles.get("eos")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special tokens."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, in parallel across cores, no special tokens."""
        return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole documents, with BOS and EOS as configured."""
        before = [self.bos_id] if self.add_bos else []
        after = [self.eos_id] if self.add_eos else []
        return [before + ids + after for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)

    def state_dict(self) -> dict:
        """Plain values from which `from_state` makes the same tokenizer, no file needed."""
        return {
            "json": self.inner.to_str(),
            "roles": self.roles,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_state(cls, state: dict) -> Tokenizer:
        import tokenizers

        inner = tokenizers.Tokenizer.from_str(state["json"])
        return cls(inner, state["roles"], state["add_bos"], state["add_eos"])


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that keeps a vocabulary's ids on the disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of vocabulary, merges and behaviour; two spellings of one tokenizer.json agree."""
    model = json.loads(tokenizer.inner.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    identity = {
        "vocab": sorted(tokenizer.inner.get_vocab(with_added_tokens=True).items()),
        "merges": merges,
        "roles": tokenizer.roles,
        "bos_eos": [tokenizer.add_bos, tokenizer.add_eos],
        "probes": tokenizer.encode_batch(list(FINGERPRINT_PROBES)),
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer at `config.path`, a hub id or a local folder.

    Raises:
        ConfigError: nothing there, no access, or BOS/EOS asked for and not in the vocabulary.
    """
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(_resolve(config.path, "tokenizer.json")))
    specials = json.loads(_resolve(config.path, "tokenizer_config.json").read_text())
    roles = {}
    for role in ("bos", "eos", "pad", "unk"):
        token = specials.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and inner.token_to_id(token) is not None:
            roles[role] = inner.token_to_id(token)
    # What the tokenizer itself does with a text says more than the flags beside it.
    probe = inner.encode("a", add_special_tokens=True).ids
    add_bos = probe[0] == roles.get("bos") if config.add_bos is None else config.add_bos
    add_eos = probe[-1] == roles.get("eos") if config.add_eos is None else config.add_eos
    for role, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and role not in roles:
            raise ConfigError(
                f"tokenizer.add_{role} (true): the tokenizer at '{config.path}' names no "
                f"{role}_token; set it to false or choose another tokenizer"
            )
    return Tokenizer(inner, roles, add_bos, add_eos)


def _resolve(path: str, filename: str) -> Path:
    """A file of a local folder, or of a hub repository (downloaded once, then cached)."""
    if Path(path).exists() or path.startswith((".", "/", "~")):
        local = Path(path).expanduser() / filename
        if not local.is_file():
            raise ConfigError(
                f"tokenizer.path ('{path}'): no {filename} there; "
                "give a folder saved by transformers' save_pretrained, or a hub id"
            )
        return local
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, filename))
    except Exception as error:  # the hub library raises many kinds; all mean the same to a user
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"tokenizer.path ('{path}'): could not get {filename} from the hub ({reason}). "
            "Check the id and the network; for a gated one run `hf auth login`; "
            "or give a local folder"
        ) from error


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Byte-level BPE trained on `texts`; the same texts give the same tokenizer.

    Each special role of the chat template is a single token. Digits are split, as in Llama, so
    that a number's tokens do not depend on its neighbours.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(TRAINED_SPECIALS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_first_bytes(texts, config.train_megabytes), trainer)
    roles = {role: inner.token_to_id(token) for role, token in TRAINED_SPECIALS.items()}
    add_bos = config.add_bos is not False
    add_eos = config.add_eos is not False
    return Tokenizer(inner, roles, add_bos, add_eos)


def _first_bytes(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode())
        yield text
