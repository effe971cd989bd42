"""Scored requests per second: ours against lm-eval's transformers backend, on the same requests.

    python bench/eval.py                                     # one GPU, 160M, bf16
    python bench/eval.py --shape tiny --requests 120         # a CPU, to see that it runs

The requests are synthetic, with the lengths of three families of benchmarks: endings of several
tokens (as HellaSwag), short questions with short answers (ARC), questions with a letter as the
answer (MMLU without solved examples). Both sides get the same token ids and the same random
weights, and their scores are compared. The backend scores at the best of several batch sizes; where
lm-eval is not installed, `padded_scores` does what that backend does, step by step. Each side's
time is the median of several runs.

Left out: tokenizing, and the building of prompts, which are lm-eval's own on both sides.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from export_hf import hf_config, hf_weights
from models.config import ModelConfig
from models.transformer import Transformer
from train import setup
from train.likelihood import Request, Score, score
from train.setup import RuntimeConfig
from utils import distributed
from utils.config import load_yaml
from utils.versions import versions

SHAPES = Path(__file__).parents[1] / "configs/model"
# Of each family: context and answer lengths in tokens (median, spread of the logarithm), and
# answers to a question; None: as many one-token answers.
FAMILIES = {
    "endings": ((75, 0.4), (22, 0.4), 4),
    "short answers": ((30, 0.4), (5, 0.6), 4),
    "letters": ((110, 0.6), None, 4),
}
BATCH_SIZES = (16, 64, 128, 256, 512)
TRIED = 8  # batch sizes are tried on one request in so many
REPEATS = 3


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, theirs = build(args.shape, device, dtype)
    name, peer = make_peer(theirs)
    found = versions()
    kernel = ours.attention_kernel()[0]
    print(f"{found['device']}, torch {found['torch']}, {args.shape}, {dtype}, attention {kernel}")
    print(f"against {name}, its best batch size of {', '.join(map(str, BATCH_SIZES))}\n")
    print(
        f"{'requests':<24}{'tokens':>10}{'ours/s':>10}{'theirs/s':>10}{'at batch':>10}{'ratio':>8}"
    )
    per_family = max(TRIED, args.requests // len(FAMILIES))
    began, rows = time.perf_counter(), {}
    for family in FAMILIES:
        requests = make_requests(family, per_family, ours.config)
        rows[family] = compare(ours, peer, requests, device)
        print_row(f"{len(requests):,} {family}", rows[family])
    total = {key: sum(row[key] for row in rows.values()) for key in
             ("requests", "tokens", "ours_s", "theirs_s")}  # fmt: skip
    print_row("all", total)
    result = {
        "bench": "eval", "model": args.shape, "dtype": str(dtype), "kernel": kernel, "peer": name,
        "versions": found, "ratio": total["theirs_s"] / total["ours_s"], "families": rows,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(json.dumps(result))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "160m", "600m"), default="160m")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--requests", type=int, default=18_000)
    return parser.parse_args(argv)


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, object]:
    """Our model and transformers' with the same random weights."""
    from transformers import SmolLM3ForCausalLM

    torch.manual_seed(0)
    config = ModelConfig(**load_yaml(SHAPES / f"smol_{name}.yaml"))
    dist = replace(distributed.setup(), device=device)
    ours = setup.build_model(config, RuntimeConfig(), dist).eval()
    weights = hf_weights(ours.state_dict(), config.d_model, dtype)
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    theirs = SmolLM3ForCausalLM(hf_config(config, specials, dtype)).to(dtype)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return ours, theirs.to(device).eval()


def make_requests(family: str, count: int, config: ModelConfig) -> list[Request]:
    """The same every time."""
    generator = np.random.default_rng(0)

    def length(median: float, spread: float) -> int:
        drawn = round(median * np.exp(spread * generator.standard_normal()))
        return int(np.clip(drawn, 1, config.max_seq_len * 3 // 4))

    def tokens(n: int) -> list[int]:
        return generator.integers(config.vocab_size, size=n).tolist()

    context_length, answer_length, answers = FAMILIES[family]
    requests: list[Request] = []
    while len(requests) < count:
        context = tokens(length(*context_length))
        for _ in range(answers):
            n = 1 if answer_length is None else length(*answer_length)
            requests.append(Request(context, tokens(min(n, config.max_seq_len // 4))))
    return requests[:count]


def compare(
    model: Transformer, peer: Callable, requests: list[Request], device: torch.device
) -> dict[str, Any]:
    """Seconds of both sides, and how far their scores are apart."""
    sample = requests[::TRIED]
    flat(score(model, sample))  # builds the kernels
    mine, ours_s = repeated(lambda: flat(score(model, requests)), device)
    seconds = {}
    for size in BATCH_SIZES:
        if size // 2 > len(sample) and seconds:
            break
        try:
            peer(sample[:size], size)  # warm
            seconds[size] = timed(lambda size=size: peer(sample, size), device)[1]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    best = min(seconds, key=seconds.__getitem__)
    yours, theirs_s = repeated(lambda: peer(requests, best), device)
    lengths = [len(request.continuation) for request in requests]
    apart = [
        abs(a[0] - b[0]) / n
        for a, b, n in zip(mine, yours, lengths, strict=True)
    ]  # fmt: skip
    return {
        "requests": len(requests),
        "tokens": sum(len(r.context) + len(r.continuation) for r in requests),
        "ours_s": statistics.median(ours_s),
        "theirs_s": statistics.median(theirs_s),
        "ours_range_s": [min(ours_s), max(ours_s)],
        "theirs_range_s": [min(theirs_s), max(theirs_s)],
        "batch_size": best,
        "nats_apart_per_token": sum(apart) / len(apart),
        "greedy_alike": sum(a[1] == b[1] for a, b in zip(mine, yours, strict=True)) / len(mine),
    }


def flat(batches: Iterable[list[tuple[int, Score]]]) -> list[Score]:
    found = dict(pair for batch in batches for pair in batch)
    return [found[i] for i in range(len(found))]


def repeated(run: Callable, device: torch.device) -> tuple[list, list[float]]:
    """The result, and the seconds of each run."""
    runs = [timed(run, device) for _ in range(REPEATS)]
    return runs[-1][0], [seconds for _, seconds in runs]


def timed(run: Callable, device: torch.device) -> tuple[list, float]:
    # Else Python's collector looks through all that the libraries hold, 0.4 s with transformers and
    # lm-eval on a CPU of a server, in the middle of one run or another.
    gc.collect()
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def print_row(name: str, row: dict[str, Any]) -> None:
    ours, theirs = (row["requests"] / row[key] for key in ("ours_s", "theirs_s"))
    print(
        f"{name:<24}{row['tokens']:>10,}{ours:>10,.0f}{theirs:>10,.0f}"
        f"{row.get('batch_size', ''):>10}{row['theirs_s'] / row['ours_s']:>7.1f}x",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------
# lm-eval's transformers backend


def make_peer(model: object) -> tuple[str, Callable[[list[Request], int], list[tuple]]]:
    """Its name, and its scores of requests at a batch size."""
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        return "padded_scores", lambda requests, size: padded_scores(model, requests, size)
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    names = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0", "unk_token": "w3"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), **names
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    def scores(requests: list[Request], size: int) -> list[tuple]:
        harness.batch_size_per_gpu = size
        pairs = [((str(i), ""), *map(list, r)) for i, r in enumerate(requests)]
        return harness._loglikelihood_tokens(pairs, disable_tqdm=True)

    return "lm-eval's HFLM", scores


@torch.no_grad()
def padded_scores(model: object, requests: list[Request], batch_size: int) -> list[tuple]:
    """Sorted by length, padded on the right, the whole batch's logits, then request by request.

    As the backend does, requests that differ in their last token alone share a row.
    """
    groups: dict[tuple, list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        groups.setdefault((*context, *continuation[:-1]), []).append(i)
    order = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
    results: list = [None] * len(requests)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        rows = [torch.tensor(tokens, device=model.device) for tokens in some]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
        logprobs = torch.log_softmax(model(padded).logits, dim=-1)  # (B, T, V)
        for tokens, row in zip(some, logprobs, strict=True):
            for i in groups[tokens]:
                results[i] = _row_score(row[: len(tokens)], requests[i].continuation)
    return results


def _row_score(logprobs: Tensor, continuation: Iterable[int]) -> tuple[float, bool]:
    wanted = torch.tensor(continuation, device=logprobs.device)
    logprobs = logprobs[-len(wanted) :]
    greedy = bool((logprobs.argmax(-1) == wanted).all())
    return float(logprobs.gather(-1, wanted[:, None]).sum()), greedy


if __name__ == "__main__":
    main(sys.argv[1:])
