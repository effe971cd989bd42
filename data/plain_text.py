"""Plain text among the conversations of SFT, so that a model does not forget how to write.

The documents are those of a pretraining source, every token learned; the first ones of each source
are taken until there are as many tokens as wanted. Mixing pretraining data into what comes after it
is the oldest remedy against catastrophic forgetting, called rehearsal or replay; of InstructGPT's
losses it is the one named "ptx" (Ouyang et al. 2022, section 3.5).

What pretraining held out stays held out, if `held_out_fraction` is not smaller than it was there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.conversations import TENSORS, ChatDataConfig, Conversations
from data.records import Account, cached_tensors
from data.shards import clean, is_held_out
from data.sources import SourceConfig, SourceFile, list_files, read_rows
from data.tokenizer import Tokenizer, id_dtype
from utils.config import ConfigError
from utils.logging import get_logger

FORMAT = 1
CHUNK = 100  # documents encoded at a time


def load_plain_text(
    source: SourceConfig, config: ChatDataConfig, tokenizer: Tokenizer
) -> Conversations:
    """A source's share of `text_tokens`, tokenized now or before, each piece a "conversation".

    Documents longer than a row are cut into pieces; the last document may lose its end.

    Raises:
        ConfigError: unreadable, or too short for its share.
    """
    share = source.weight / sum(s.weight for s in config.text_sources)
    wanted = max(1, round(config.text_tokens * share))
    files = list_files(source)
    identity = {
        "format": FORMAT,
        "content": [(file.name, file.revision) for file in files],
        "text_field": source.text_field,
        "tokenizer": tokenizer.fingerprint,
        "tokens": wanted,
        "seq_len": config.seq_len,
        "held_out_fraction": config.held_out_fraction,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    path = Path(config.cache_dir) / f"{source.name}-{digest}.safetensors"
    make = partial(_tokenize, source, files, wanted, config, tokenizer)
    tensors, _ = cached_tensors(path, make)
    once = source.model_copy(update={"weight": 1.0})  # its weight has been heeded: `wanted`
    text = Conversations(once, *map(tensors.get, TENSORS))
    get_logger().info(
        f"source '{source.name}': {len(text.tokens):,} tokens of plain text in "
        f"{len(text.ends):,} pieces, {int(text.held_out.sum()):,} of them held out"
    )
    return text


def warn_of_leaks(config: ChatDataConfig, pretraining: dict[str, Any]) -> None:
    """Tell if what pretraining, by its resolved config, held out is now trained on."""
    theirs = pretraining.get("data", {}).get("held_out_fraction", 0)
    if theirs > config.held_out_fraction:
        get_logger().warning(
            f"data.held_out_fraction ({config.held_out_fraction}) is below pretraining's "
            f"({theirs}): if text_sources are its sources, some of what it held out is trained on"
        )


def _tokenize(
    source: SourceConfig,
    files: list[SourceFile],
    wanted: int,
    config: ChatDataConfig,
    tokenizer: Tokenizer,
) -> tuple[dict[str, np.ndarray], Account]:
    """The tensors of `Conversations`."""
    dtype = id_dtype(tokenizer.vocab_size)
    pieces, held_out, trained = [], [], 0
    with tqdm(desc=f"tokenizing {source.name}", unit=" tokens", total=wanted) as bar:
        for text, ids in _documents(source, files, tokenizer):
            kept_out = is_held_out(text, config.held_out_fraction)
            # The last token of a piece is only ever a target, so the next begins with it.
            for start in range(0, len(ids) - 1, config.seq_len):
                if trained >= wanted:  # a document may be a book
                    break
                piece = ids[start : start + config.seq_len + 1]
                pieces.append(np.array(piece, dtype))
                held_out.append(kept_out)
                if not kept_out:
                    trained += len(piece) - 1
                    bar.update(len(piece) - 1)
            if trained >= wanted:
                break
        else:
            raise ConfigError(
                f"source '{source.name}': its share of data.text_tokens is {wanted:,}, and it has "
                f"only {trained:,} to train on; lower data.text_tokens or its weight"
            )
    tensors = {
        "tokens": np.concatenate(pieces),
        "learned": np.ones(sum(map(len, pieces)), bool),
        "ends": np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
        "held_out": np.array(held_out, bool),
        "keys": np.zeros(len(pieces), np.uint32),  # only part weights ask for them
    }
    return tensors, Account()


def _documents(
    source: SourceConfig, files: list[SourceFile], tokenizer: Tokenizer
) -> Iterator[tuple[str, list[int]]]:
    """The documents with any text, and their ids."""
    texts = (clean(text) for file in files for text in read_rows(source, file) if text)
    while chunk := list(islice(texts, CHUNK)):
        yield from zip(chunk, tokenizer.encode_documents(chunk), strict=True)
