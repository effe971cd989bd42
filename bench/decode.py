"""New tokens per second of the engine, with transformers' `generate` beside it.

    python bench/decode.py                                   # 160M, batches of 64 and 512
    python bench/decode.py --model configs/model/smol_tiny.yaml --batch 8 --new-tokens 16  # a trial

Same shape, random weights, random prompts of equal length, every sequence sampled at temperature 1
to the full number of new tokens; prompts are all different, so all are computed. The time runs from
the prompts as Python lists to the tokens as Python lists, the prefill included.

The ceiling reads the weights and the growing cache once a step at the memory's peak bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.config import ModelConfig
from models.generate import Engine, Request
from models.sampling import Sampling
from models.transformer import Transformer
from utils.config import load_config

PEAK_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes/s, SXM


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(ModelConfig, args.model, [])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(config, dtype).to(device).requires_grad_(False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows = []
    for batch in args.batch:
        prompts = torch.randint(config.vocab_size, (batch, args.prompt_tokens)).tolist()
        row = {"batch": batch, "ceiling": ceiling(config, batch, args, name)}
        row["engine"] = measure(engine_run(model, prompts, args), batch, args)
        if not args.no_peer:
            row["transformers"] = measure(peer_run(config, prompts, args, device), batch, args)
        rows.append(row)
        print(line(row), flush=True)
    print(json.dumps({"bench": "decode", "device": name, **vars(args), "rows": rows}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="configs/model/smol_160m.yaml")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="the engine alone")
    return parser.parse_args()


def engine_run(
    model: Transformer, prompts: list[list[int]], args: argparse.Namespace
) -> Callable[[], int]:
    """One engine for all repeats, as a training run keeps it; returns the number of tokens."""
    capacity = args.prompt_tokens + args.new_tokens
    engine = Engine(model, len(prompts), capacity, sampling=Sampling(temperature=1.0))

    def run() -> int:
        requests = (Request(prompt, args.new_tokens, seed=i) for i, prompt in enumerate(prompts))
        return sum(len(completion.tokens) for completion in engine.run(requests))

    return run


def peer_run(
    config: ModelConfig, prompts: list[list[int]], args: argparse.Namespace, device: torch.device
) -> Callable[[], int]:
    """`generate` of transformers on a model of the same shape."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    shape = SmolLM3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ffn,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peer = SmolLM3ForCausalLM(shape).to(device, dtype).eval()
    tokens = torch.tensor(prompts, device=device)
    settings = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}

    def run() -> int:
        mask = torch.ones_like(tokens)
        out = peer.generate(tokens, attention_mask=mask, do_sample=True, top_k=0, **settings)
        return sum(len(row) - args.prompt_tokens for row in out.tolist())

    return run


def measure(run: Callable[[], int], batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Median, least and greatest tokens per second, after one run to warm up."""
    rates = []
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        tokens = run()
        if tokens != batch * args.new_tokens:
            raise RuntimeError(f"{tokens} new tokens, not {batch * args.new_tokens}")
        if repeat > 0:
            rates.append(tokens / (time.perf_counter() - start))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def ceiling(config: ModelConfig, batch: int, args: argparse.Namespace, name: str) -> float | None:
    """Tokens/s if a step did nothing but read bf16 weights and cache once; None: unknown device."""
    peak = next((rate for key, rate in PEAK_BANDWIDTH.items() if key in name), None)
    if peak is None:
        return None
    cache_bytes_per_token = config.n_layers * 2 * config.n_kv_heads * config.head_dim * 2
    mean_length = args.prompt_tokens + args.new_tokens / 2
    step_bytes = 2 * config.n_params + batch * mean_length * cache_bytes_per_token
    return batch * peak / step_bytes


def line(row: dict) -> str:
    parts = [f"batch {row['batch']:>4}"]
    for who in ("engine", "transformers"):
        if who in row:
            m = row[who]
            parts.append(f"{who} {m['median']:>9,.0f} tok/s ({m['min']:,.0f}-{m['max']:,.0f})")
    if row["ceiling"]:
        parts.append(
            f"ceiling {row['ceiling']:,.0f}, {row['engine']['median'] / row['ceiling']:.0%}"
        )
    return "   ".join(parts)


if __name__ == "__main__":
    main()
