"""How fast the data path is: packing batches from token shards, and making the shards.

    python bench/loader.py
    python bench/loader.py --text "corpus/*.parquet" --tokenizer FOLDER_OR_HUB_ID --workers 8

Packing is timed over whole steps as training takes them, state included, from shards that are on
the disk; their first reading, with its checksum, is part of it. Making shards (read the text, cut
it, hand it to the workers, tokenize, write, record) is set against `tokenizers`' own
`encode_batch_fast` (it leaves out offsets) on the same text, in memory, with as many threads as
there are workers. The two take turns, so that what else the machine does falls on both; the ratio
of each turn is what counts. Prints a table and then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.shards import ShardStore, cut
from data.sources import SourceConfig, sample_texts
from data.streaming import DataConfig, PretrainLoader, make_tokenizer
from data.tokenizer import Tokenizer, TokenizerConfig
from data.windows import first_epoch
from data.workers import WorkerPool

ROWS_PER_STEP, MICRO_BATCH = 192, 48


def main() -> None:
    args = arguments()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # before the first encode_batch
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    source = SourceConfig(name="text", path=args.text, weight=1.0)
    tokenizer = make_tokenizer(TokenizerConfig(path=args.tokenizer, vocab_size=8_192), [source])
    with tempfile.TemporaryDirectory() as folder:
        source = sample(source, Path(folder) / "text.jsonl", args.megabytes)
        config = DataConfig(sources=[source], cache_dir=folder)
        with WorkerPool(args.workers, tokenizer) as pool:
            warm_up(pool, config, tokenizer, args.workers)
            turns = list(tokenizing(config, tokenizer, pool, args.repeats))
        packed = [packing(config, tokenizer, args.steps) for _ in range(args.repeats)]
    ratios = [ours / alone for ours, alone in turns]
    rows = {
        "packing, tokens/s": packed,
        "encode_batch alone, tokens/s": [alone for _, alone in turns],
        "making shards, tokens/s": [ours for ours, _ in turns],
        "making shards / encode_batch": ratios,
    }
    print(f"{'':<30}{'median':>14}{'least':>14}{'most':>14}")
    for name, values in rows.items():
        shown = (statistics.median(values), min(values), max(values))
        digits = ".3f" if "/ enc" in name else ",.0f"
        print(f"{name:<30}" + "".join(f"{value:>14{digits}}" for value in shown))
    about = vars(args) | {"machine": platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"bench": "loader", **about, **rows}))


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--text", default="builtin:web", help="as the path of a source")
    add("--tokenizer", default="trained", help="as tokenizer.path; trained: on the text")
    add("--megabytes", type=float, default=64.0, help="text that is tokenized in a turn")
    add("--workers", type=int, default=os.cpu_count())
    add("--steps", type=int, default=20, help=f"of {ROWS_PER_STEP * 2048:,} tokens")
    add("--repeats", type=int, default=3)
    return parser.parse_args()


def sample(source: SourceConfig, path: Path, megabytes: float) -> SourceConfig:
    """The first part of the text as a file of its own; short text repeats, slightly changed."""
    turns = (
        f"{text} {turn or ''}" for turn in range(1_000) for text in sample_texts(source) if text
    )
    texts = cut(turns, int(megabytes * 1e6))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return source.model_copy(update={"path": str(path)})


def tokenizing(
    config: DataConfig, tokenizer: Tokenizer, pool: WorkerPool, repeats: int
) -> Iterator[tuple[float, float]]:
    """Tokens per second of making shards and of `encode_batch` alone, turn by turn."""
    texts = list(sample_texts(config.sources[0]))
    for turn in range(repeats):
        store = open_store(config, tokenizer, f"{config.cache_dir}/turn{turn}")
        started = time.perf_counter()
        tokens = sum(info.tokens for info in first_epoch(store, 0, pool))
        ours = tokens / (time.perf_counter() - started)
        started, rest, tokens = time.perf_counter(), iter(texts), 0
        while batch := cut(rest, store.shard_bytes):
            encoded = tokenizer.inner.encode_batch_fast(batch, add_special_tokens=False)
            tokens += sum(map(len, encoded))
        yield ours, tokens / (time.perf_counter() - started)


def warm_up(pool: WorkerPool, config: DataConfig, tokenizer: Tokenizer, workers: int) -> None:
    """All workers have started and tokenized something."""
    store = open_store(config, tokenizer, f"{config.cache_dir}/warm_up")
    texts = next(iter(sample_texts(config.sources[0])))
    for future in [pool.submit(store.job(0, i, [texts] * 50, False)) for i in range(4 * workers)]:
        future.result()


def packing(config: DataConfig, tokenizer: Tokenizer, steps: int) -> float:
    """Tokens per second of whole steps from shards that are made."""
    store = open_store(config, tokenizer, f"{config.cache_dir}/turn0")
    loader = PretrainLoader([store], config, 0, ROWS_PER_STEP, MICRO_BATCH)
    started = time.perf_counter()
    for batches in (next(loader) for _ in range(steps)):
        loader.state_dict()
        assert len(batches) == ROWS_PER_STEP // MICRO_BATCH
    return steps * ROWS_PER_STEP * config.seq_len / (time.perf_counter() - started)


def open_store(config: DataConfig, tokenizer: Tokenizer, folder: str) -> ShardStore:
    source = config.sources[0]
    return ShardStore(source, tokenizer, folder, config.shard_megabytes, config.held_out_fraction)


if __name__ == "__main__":
    main()
