"""Tokenize the data of a pretraining config ahead of time, over many processes.

    python prepare_data.py --config configs/pretrain_160m.yaml --dry-run        # what it would do
    python prepare_data.py --config configs/pretrain_160m.yaml                  # on every core
    python prepare_data.py --config configs/pretrain_160m.yaml data.workers=4

It makes the token shards that training with this config reads, in the order in which it reads them,
and stops with the tokens that the run needs, the source's end, or `data.max_cache_gb`. Started
again after a stop of any kind it goes on where it was. Training does all this itself while it
reads; ahead of time it can be done on a cheap machine, and the cache folder carried to the GPU.

Any key of the config can be given as key=value.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict
from tqdm import tqdm

from data.shards import ShardStore
from data.streaming import DataConfig, make_tokenizer, open_stores
from data.tokenizer import TokenizerConfig
from data.windows import first_epoch
from data.workers import WorkerPool
from models.config import ModelConfig
from train.setup import TrainConfig
from utils.command_line import parse_command_line, run_script
from utils.config import Config, load_config
from utils.logging import get_logger, human_count


class PrepareConfig(Config):
    """What of a pretraining config decides the shards; its other sections are not looked at."""

    model_config: ClassVar = ConfigDict(extra="ignore")

    seed: int = 0
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    train: TrainConfig


@dataclass
class Prepared:
    """What was done for a source."""

    source: str
    documents: int = 0
    tokens: int = 0
    shards: int = 0
    gb: float = 0.0
    seconds: float = 0.0
    ended: str = ""


def main(argv: list[str]) -> None:
    args = parse_command_line(__doc__, argv=argv)
    config = load_config(PrepareConfig, args.config, args.overrides)
    needed = tokens_needed(config)
    if args.dry_run:
        for name, tokens in needed.items():
            print(f"{name}: up to {human_count(tokens)} tokens, about {tokens * 2 / 1e9:,.1f} GB")
        return
    tokenizer = make_tokenizer(config.tokenizer, config.data.sources)
    stores = open_stores(config.data, tokenizer)
    with WorkerPool(config.data.workers or os.cpu_count() or 1, tokenizer) as pool:
        done = [prepare(store, config, pool, needed[store.source.name]) for store in stores]
    print(table(done))


def tokens_needed(config: PrepareConfig) -> dict[str, float]:
    """The tokens that training takes from each source."""
    total = config.train.total_steps * config.train.batch_tokens
    weights = {s.name: s.weight for s in config.data.sources}
    return {name: total * w / sum(weights.values()) for name, w in weights.items()}


def prepare(store: ShardStore, config: PrepareConfig, pool: WorkerPool, needed: float) -> Prepared:
    """Make the shards of one source, under a progress bar."""
    done = Prepared(store.source.name, ended="source read to its end")
    most_bytes = config.data.cache_bytes(store.source)
    started = time.perf_counter()
    bar = tqdm(desc=f"tokenizing {done.source}", total=round(needed), unit="tok", unit_scale=True)
    with bar:
        for info in first_epoch(store, config.seed, pool, needed):
            done.documents += info.documents
            done.tokens += info.tokens
            done.shards += 1
            done.gb += store.path(info).stat().st_size / 1e9
            bar.update(info.tokens)
            if most_bytes is not None and done.gb * 1e9 >= most_bytes:
                done.ended = "data.max_cache_gb reached"
                break
        else:
            if done.tokens >= needed:
                done.ended = "all that the run needs"
    done.seconds = time.perf_counter() - started
    if done.ended.startswith("data"):
        get_logger().warning(f"{done.source}: {done.ended}; training makes the rest as it goes")
    return done


def table(done: list[Prepared]) -> str:
    """One line per source."""
    head = ("source", "documents", "tokens", "shards", "GB", "seconds", "ended with")
    rows = [
        (p.source, f"{p.documents:,}", f"{p.tokens:,}", f"{p.shards:,}", f"{p.gb:.2f}",
         f"{p.seconds:.1f}", p.ended)
        for p in done
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i in (0, len(head) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )


if __name__ == "__main__":
    run_script(main)
