"""Time, memory and loss of one training step: ours in several forms, and transformers'.

    python -m bench.step --shape tiny --device cpu --variants plain,fused,hf
    python -m bench.step --shape 160m --micro-batch 96 --variants fused,compiled,hf+liger
    python -m bench.step --shape 600m --micro-batch 48 --variants fused+balanced --profile

A variant is what runs the blocks, and settings of it, joined by +:

    plain, compiled, regional   the modules: as they are, all compiled, each block compiled
    fused                       models/fused.py, with fast, balanced or low; with fp8; with cublas
                                (by itself quack's products, where they can run)
    fa4, fa2, varlen, flex      attention of any of these by this kernel; by itself the fastest
    hf                          transformers' SmolLM3, torch.compile; with liger, eager
    bf16logits                  the head's logits in bf16
    apart                       the gradient of the loss in a pass of its own
    padded                      cu_seqlens with room for 33 documents a row, most of them empty
    deterministic               bit-identical repeats; give it alone, what cuBLAS is told stays told
    twopass                     the loss from token_logprobs, which multiplies by the head twice

All see the same packed rows (documents of 676 tokens in the mean, exponentially distributed; tokens
with the frequencies of words), the same weights to begin with, AdamW, and one micro-batch a step.
"loss" is that of the first step, "off" its distance from the plain modules in float32, "norm" that
of the first gradient. Peak memory is what the allocator reserved, under a limit of 76 GiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE, Batch, RowPacker, cut_document, make_batch
from models import elementwise
from models.attention import KERNELS
from models.config import GIB, ModelConfig
from models.elementwise import WIDEST_ROW
from models.transformer import Transformer
from train.loss import cross_entropy_loss, token_logprobs
from train.runtime import use_expandable_segments
from utils.config import load_config
from utils.profile import gpu_time, gpu_time_table, trace_steps
from utils.seed import set_deterministic

MEAN_DOCUMENT = 676
MAX_DOCUMENTS = 32
MEMORY_LIMIT_GIB = 76
REFERENCE_ROWS = 4  # at a time


@dataclass
class Result:
    """What a variant showed; times in milliseconds."""

    variant: str
    loss: float
    reference_loss: float
    grad_norm: float
    startup_s: float
    times: list[float] = field(default_factory=list)
    reserved_gib: float = 0.0
    allocated_gib: float = 0.0
    gpu_ms: dict[str, float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def main() -> None:
    args = parse_arguments()
    began = time.monotonic()
    device = torch.device(args.device)
    limit_memory(device, args.limit_gib)
    torch.set_float32_matmul_precision("high")
    config = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    batches = make_batches(config, args.micro_batch, args.batches)
    torch.manual_seed(0)
    weights = Transformer(config).state_dict()
    reference = reference_loss(config, weights, batches[0], device)
    print(f"loss of the plain modules in float32: {reference:.5f}", flush=True)

    results: dict[str, Result] = {}
    for variant in args.variants.split(",") * args.rounds:
        if (passed := time.monotonic() - began) > args.budget_seconds:
            print(f"-- {variant}: not run, {passed:.0f} s are over the budget", flush=True)
            continue
        try:
            result = measure(variant, config, weights, batches, device, args)
        except Exception:
            print(f"-- {variant} failed\n{traceback.format_exc()}", flush=True)
            continue
        finally:
            clean_up(device)
        if variant in results:
            result = replace(result, times=results[variant].times + result.times)
        result.reference_loss = reference
        results[variant] = result
        print(line(result, config, args.micro_batch), flush=True)
    print_table(results, config, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="tiny", choices=("tiny", "160m", "600m"))
    parser.add_argument("--variants", default="plain,fused")
    parser.add_argument("--micro-batch", type=int, default=2, metavar="ROWS")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="different batches in turn")
    parser.add_argument("--rounds", type=int, default=1, help="the whole list so many times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--limit-gib", type=float, default=MEMORY_LIMIT_GIB)
    parser.add_argument("--profile", action="store_true", help="GPU time by kind of work")
    parser.add_argument("--out", default="runs/bench", help="folder of the profiler's traces")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# Data and reference


def make_batches(config: ModelConfig, rows: int, count: int) -> list[Batch]:
    """Packed rows of random documents, on the host."""
    generator = np.random.default_rng(0)
    ranks = np.arange(config.vocab_size) + 2.7  # Mandelbrot's form of Zipf's law
    frequencies = (1 / ranks) / (1 / ranks).sum()

    def documents():
        while True:
            length = 2 + int(generator.exponential(MEAN_DOCUMENT - 2))
            tokens = generator.choice(config.vocab_size, length, p=frequencies)
            for start in range(0, length, config.max_seq_len):
                yield cut_document(tokens, start, config.max_seq_len)

    packer, pieces = RowPacker(config.max_seq_len, MAX_DOCUMENTS), documents()
    return [
        make_batch(
            [packer.next_row(pieces) for _ in range(rows)], config.max_seq_len, MAX_DOCUMENTS
        )
        for _ in range(count)
    ]


@torch.no_grad()
def reference_loss(config: ModelConfig, weights: dict, batch: Batch, device: torch.device) -> float:
    """Mean loss of a batch: plain modules and dense masks in float32, whole logits, few rows."""
    torch.set_float32_matmul_precision("highest")
    model = Transformer(config, torch.float32, "dense").to(device)
    model.load_state_dict(weights)
    total = 0.0
    for part in parts(batch, REFERENCE_ROWS):
        part = part.to(device)
        hidden = model(part.tokens, part.positions, part.cu_seqlens)
        logits, targets = model.logits(hidden).flatten(0, 1), part.targets.flatten()
        total += torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=IGNORE, reduction="sum"
        ).item()
    torch.set_float32_matmul_precision("high")
    return total / batch.weight


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch, so many rows at a time; their counts stay those of the whole."""
    length = batch.tokens.shape[1]
    for start in range(0, len(batch.tokens), rows):
        some = slice(start, min(start + rows, len(batch.tokens)))
        first, last = some.start * length, some.stop * length
        bounds = batch.cu_seqlens
        yield replace(
            batch,
            tokens=batch.tokens[some],
            targets=batch.targets[some],
            positions=batch.positions[some],
            cu_seqlens=bounds[(bounds >= first) & (bounds <= last)] - first,
        )


# ---------------------------------------------------------------------------------------------
# Variants


def padded(batch: Batch) -> Batch:
    """With room in cu_seqlens for as many documents as the rows may hold."""
    unused = len(batch.tokens) * (MAX_DOCUMENTS + 1) + 1 - len(batch.cu_seqlens)
    bounds = torch.nn.functional.pad(batch.cu_seqlens, (0, unused), value=batch.tokens.numel())
    return replace(batch, cu_seqlens=bounds)


def build(
    variant: str, config: ModelConfig, weights: dict, device: torch.device
) -> tuple[torch.nn.Module, Callable[[Batch], Tensor]]:
    """The model of a variant and its summed loss of a batch."""
    how, *settings = variant.split("+")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if how == "hf":
        from bench import hf

        return hf.build(config, weights, device, dtype, liger="liger" in settings)
    kernel = next((k for k in KERNELS if k in settings), "auto")
    model = Transformer(config, dtype, kernel).to(device)
    model.load_state_dict(weights)
    if how == "compiled":
        model.compile_blocks()
    elif how == "regional":
        for block in model.blocks:
            block.compile(dynamic=False)
        model.final_norm.compile(dynamic=False)
    elif how == "fused":
        memory = next((m for m in ("fast", "balanced", "low") if m in settings), "fast")
        requested = "cublas" if "cublas" in settings else "auto"
        gemm, why = model.choose_gemm(requested)
        if "fp8" not in settings:
            print(f"{variant}: products by {gemm} ({why})", flush=True)
        model.fuse_blocks(memory, "fp8" if "fp8" in settings else "bf16", gemm)
    elif how != "plain":
        raise ValueError(f"no variant '{how}'")
    elementwise.WIDEST_ROW = 0 if "apart" in settings else WIDEST_ROW
    set_deterministic("deterministic" in settings)
    logits = None if "bf16logits" in settings else torch.float32

    def loss(batch: Batch) -> Tensor:
        if "twopass" in settings:
            hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)
            return -token_logprobs(hidden, model.head_weight, batch.targets.flatten())[0].sum()
        return cross_entropy_loss(model, batch, logits_dtype=logits)[0]

    return model, loss


def measure(
    variant: str,
    config: ModelConfig,
    weights: dict,
    batches: list[Batch],
    device: torch.device,
    args: argparse.Namespace,
) -> Result:
    began = time.monotonic()
    on_gpu = device.type == "cuda"
    model, loss_of = build(variant, config, weights, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if "padded" in variant:
        batches = [padded(batch) for batch in batches]
    batches = [batch.to(device) for batch in batches]
    count = 0

    def step() -> tuple[Tensor, Tensor]:
        nonlocal count
        batch = batches[count % len(batches)]
        count += 1
        loss = loss_of(batch)
        (loss / batch.weight).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach() / batch.weight, norm

    first, norm = (x.item() for x in step())
    for _ in range(args.warmup):
        step()
    synchronize(device)
    startup = time.monotonic() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, device) for _ in range(args.steps)]
    result = Result(variant, first, 0.0, norm, startup, times)
    if on_gpu:
        result.reserved_gib = torch.cuda.max_memory_reserved() / GIB
        result.allocated_gib = torch.cuda.max_memory_allocated() / GIB
    if args.profile:
        file = Path(args.out) / f"{args.shape}_{variant}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        trace_steps(step, 2, file)
        print(gpu_time_table(file, 2, kernels=28), flush=True)
        result.gpu_ms = gpu_time(file, 2)[0]
    return result


def limit_memory(device: torch.device, gib: float) -> None:
    """As on a card of so much memory, set up as a run sets it up; before the first allocation."""
    use_expandable_segments()
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a step, by the GPU's clock where there is one."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean_up(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------------------------
# Report


def line(result: Result, config: ModelConfig, rows: int) -> str:
    tokens = rows * config.max_seq_len
    spread = (max(result.times) - min(result.times)) / result.median
    return (
        f"{result.variant:<28} {result.median:8.1f} ms  ±{spread / 2:5.1%}  "
        f"{tokens / result.median:8.1f}K tokens/s  reserved {result.reserved_gib:5.1f} GiB  "
        f"allocated {result.allocated_gib:5.1f}  start {result.startup_s:4.0f} s  "
        f"loss {result.loss:.5f}  off {result.loss - result.reference_loss:+.5f}  "
        f"norm {result.grad_norm:.4f}"
    )


def print_table(results: dict[str, Result], config: ModelConfig, args: argparse.Namespace) -> None:
    device = device_name(torch.device(args.device))
    print(
        f"\n{args.shape}, {args.micro_batch} rows of {config.max_seq_len:,}, {device}, "
        f"torch {torch.__version__}; medians of {args.steps * args.rounds} steps, ± half the range"
    )
    for result in sorted(results.values(), key=lambda r: r.median):
        print(line(result, config, args.micro_batch))
    values = {
        name: {**asdict(result), "tokens_per_s": tokens_per_second(result, config, args)}
        for name, result in results.items()
    }
    print(json.dumps({"shape": args.shape, "rows": args.micro_batch, "variants": values}))


def tokens_per_second(result: Result, config: ModelConfig, args: argparse.Namespace) -> int:
    return round(args.micro_batch * config.max_seq_len / result.median * 1e3)


if __name__ == "__main__":
    main()
