"""What a benchmark of training reads: shards of drawn documents, or those of a config's sources.

Documents have 676 tokens in the mean, exponentially distributed, with the frequencies of words. The
shards are real ones, made as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from data.shards import ShardStore
from data.sources import SourceConfig
from data.streaming import DataConfig, make_tokenizer, open_stores
from data.tokenizer import TokenizerConfig
from models.config import ModelConfig
from utils.config import Config, ConfigError, load_config

MEAN_DOCUMENT = 676
SHARD_TOKENS = 2_000_000  # as in 8 MB of English
HELD_OUT = 0.001  # a loader reads none of it


class RunData(Config):
    """What is read of a pretraining config."""

    model_config = ConfigDict(extra="ignore")

    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig


class DrawnTokens:
    """Stands for a tokenizer: a document's text is its number, by which its tokens are drawn."""

    fingerprint = "drawn"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        ranks = np.arange(vocab_size) + 2.7  # Mandelbrot's form of Zipf's law
        self._cumulative = (1 / ranks).cumsum() / (1 / ranks).sum()

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        documents = []
        for text in texts:
            generator = np.random.default_rng(int(text))
            length = 2 + int(generator.exponential(MEAN_DOCUMENT - 2))
            drawn = np.searchsorted(self._cumulative, generator.random(length))
            documents.append(drawn.clip(max=self.vocab_size - 1))
        return documents


def drawn_stores(
    shape: ModelConfig, tokens: int, folder: Path
) -> tuple[DataConfig, list[ShardStore]]:
    """One source of so many drawn tokens, roughly, in rows of the model's context."""
    path = folder / "documents.jsonl"
    numbers = range(100_000, 100_100 + tokens // MEAN_DOCUMENT)  # of six digits each
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in numbers))
    source = SourceConfig(name="drawn", path=str(path), weight=1.0)
    data = DataConfig(
        sources=[source],
        cache_dir=str(folder / "cache"),
        seq_len=shape.max_seq_len,
        shard_megabytes=6e-6 * SHARD_TOKENS / MEAN_DOCUMENT,
    )
    tokenizer = DrawnTokens(shape.vocab_size)
    store = ShardStore(source, tokenizer, data.cache_dir, data.shard_megabytes, HELD_OUT)
    return data, [store]


def configured_stores(
    path: str, overrides: Iterable[str], shape: ModelConfig
) -> tuple[DataConfig, list[ShardStore]]:
    """The sources of a pretraining config.

    Raises:
        ConfigError: the config is wrong, or its tokens do not fit the model.
    """
    run = load_config(RunData, path, overrides)
    if run.data.seq_len > shape.max_seq_len:
        raise ConfigError(
            f"{path}: data.seq_len ({run.data.seq_len:,}) must not exceed the model's "
            f"({shape.max_seq_len:,}): give another --shape or data.seq_len"
        )
    tokenizer = make_tokenizer(run.tokenizer, run.data.sources)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, more than the model "
            f"({shape.vocab_size:,}): give another --shape or tokenizer.path"
        )
    return run.data, open_stores(run.data, tokenizer)
