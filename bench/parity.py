"""Does the fast path learn what the plain one learns? Losses of the same steps, run by run.

    python -m bench.parity --runs fast,again,compiled,fp8              # on a GPU: 160M, 300 steps
    python -m bench.parity --runs plain --out parity                   # one more, compared with all
    python -m bench.parity --runs fast,again --data configs/pretrain_160m.yaml   # its sources
    python -m bench.parity --shape tiny --device cpu --steps 12 --rows 2 --last 4

All runs see the same batches and begin from the same weights. Each leaves its losses in --out, and
whatever lies there is compared: the mean distance, step by step, and the difference of the means,
both over the last --last steps.

    fast, again     the fused blocks, twice: how far two runs drift apart by the order of sums alone
    low             fused, memory low
    fp8             fused, products in fp8
    cublas          fused, products by cuBLAS where quack's could run
    compiled        the modules under torch.compile, the loss by `token_logprobs`
    plain           the modules as they are, dense masks, whole logits in float32: the reference

Without --data two tokens of three follow from the one before by a fixed table and the others are
drawn with the frequencies of words. That is learnt all of a sudden, which drives any two runs apart
(0.016 nats over the last 50 of 300 steps): for a verdict take text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shards import configured_stores
from bench.step import MAX_DOCUMENTS, MEAN_DOCUMENT, REFERENCE_ROWS, parts
from data.packing import IGNORE, Batch, Piece, RowPacker, cut_document, make_batch
from data.streaming import PretrainLoader
from models.config import ModelConfig
from models.transformer import Transformer
from train.loss import cross_entropy_loss, token_logprobs
from utils.config import load_config

RUNS = ("fast", "again", "low", "fp8", "cublas", "compiled", "plain")
LONGEST_CHAIN = 8  # tokens that follow from each other


def main() -> None:
    args = parse_arguments()
    config = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    for run in filter(None, args.runs.split(",")):
        began = time.monotonic()
        losses = train(run, config, args)
        (args.out / f"{run}.json").write_text(json.dumps(losses))
        print(
            f"{run:<10} loss {losses[0]:.4f} -> {statistics.mean(losses[-args.last :]):.4f} "
            f"in {time.monotonic() - began:.0f} s",
            flush=True,
        )
    compare(args.out, args.last)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="fast,again,plain", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--shape", default="160m", choices=("tiny", "160m", "600m"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=32, help="a step, of the model's context")
    parser.add_argument("--last", type=int, default=50, help="steps that are compared")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("parity"))
    parser.add_argument("--data", metavar="CONFIG", help="a pretraining config with the sources")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of that config")
    args = parser.parse_args()
    if unknown := set(filter(None, args.runs.split(","))) - set(RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    return args


def train(run: str, config: ModelConfig, args: argparse.Namespace) -> list[float]:
    """The mean loss of every step."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model, loss_of = build(run, config, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warmup = max(1, args.steps // 6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / warmup))
    losses = []
    batches = make_batches(config, args)
    for _ in range(args.steps):
        batch, mean = next(batches), 0.0
        for part in parts(batch, REFERENCE_ROWS if run == "plain" else args.rows):
            loss = loss_of(part.to(device)) / batch.weight
            loss.backward()
            mean = mean + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean)
    return torch.stack(losses).tolist()


def build(
    run: str, config: ModelConfig, device: torch.device
) -> tuple[Transformer, Callable[[Batch], Tensor]]:
    """The model of a run and its summed loss of a batch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(config, dtype, "dense" if run == "plain" else "auto").to(device)
    if run == "compiled":
        model.compile_blocks()
    elif run != "plain":
        requested = "cublas" if run == "cublas" else "auto"
        gemm, why = model.choose_gemm(requested)
        print(f"{run}: products by {gemm} ({why})", flush=True)
        memory, matmul = "low" if run == "low" else "fast", "fp8" if run == "fp8" else "bf16"
        model.fuse_blocks(memory, matmul, gemm)

    def loss(batch: Batch) -> Tensor:
        if run not in ("plain", "compiled"):
            return cross_entropy_loss(model, batch)[0]
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)
        targets = batch.targets.flatten()
        if run == "compiled":
            return -token_logprobs(hidden, model.head_weight, targets)[0].sum()
        logits = model.logits(hidden)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    return model, loss


# ---------------------------------------------------------------------------------------------
# Data


def make_batches(config: ModelConfig, args: argparse.Namespace) -> Iterator[Batch]:
    """The same batches for every run."""
    length = config.max_seq_len
    if args.data:
        data, stores = configured_stores(args.data, args.overrides, config)
        for batches in PretrainLoader(stores, data, 0, args.rows, args.rows):
            yield from batches
        return
    pieces = cut(chains(config.vocab_size), length)
    packer = RowPacker(length, MAX_DOCUMENTS)
    while True:
        rows = [packer.next_row(pieces) for _ in range(args.rows)]
        yield make_batch(rows, length, MAX_DOCUMENTS)


def cut(documents: Iterator[np.ndarray], length: int) -> Iterator[Piece]:
    for document in documents:
        for start in range(0, len(document), length):
            yield cut_document(document, start, length)


def chains(vocab: int) -> Iterator[np.ndarray]:
    """Documents of drawn tokens, each followed by up to 7 that a fixed table gives."""
    generator = np.random.default_rng(0)
    ranks = np.arange(vocab) + 2.7  # Mandelbrot's form of Zipf's law
    cumulative = (1 / ranks).cumsum() / (1 / ranks).sum()
    table = generator.permutation(vocab)
    after = [np.arange(vocab)]  # after[k][token]: what stands k places behind it
    for _ in range(LONGEST_CHAIN - 1):
        after.append(table[after[-1]])
    after = np.stack(after)
    while True:
        length = 2 + int(generator.exponential(MEAN_DOCUMENT - 2))
        place = np.arange(length)
        drawn = (generator.random(length) < 1 / 3) | (place % LONGEST_CHAIN == 0)
        source = np.maximum.accumulate(np.where(drawn, place, 0))
        tokens = np.searchsorted(cumulative, generator.random(length)).clip(max=vocab - 1)
        yield after[place - source, tokens[source]]


# ---------------------------------------------------------------------------------------------
# Comparison


def compare(folder: Path, last: int) -> None:
    """Prints every pair of runs in `folder`, and one JSON line."""
    runs = {run: folder / f"{run}.json" for run in RUNS}
    losses = {run: json.loads(file.read_text()) for run, file in runs.items() if file.exists()}
    pairs = {}
    print(f"\n{'over the last ' + str(last) + ' steps':<24} mean |difference|   of the means, nats")
    for a, b in combinations(losses, 2):
        differences = [y - x for x, y in zip(losses[a][-last:], losses[b][-last:], strict=True)]
        distance, shift = statistics.mean(map(abs, differences)), statistics.mean(differences)
        pairs[f"{a} {b}"] = distance, shift
        print(f"{a + ' against ' + b:<24} {distance:17.5f}   {shift:+18.5f}")
    print(json.dumps({"last": last, "distance_and_shift": pairs}))


if __name__ == "__main__":
    main()
