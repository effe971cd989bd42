"""Attention forward and backward over packed documents: milliseconds per layer, kernel by kernel.

    python -m bench.attention --shape 160m --rows 32
    python -m bench.attention --shape 600m --rows 32 --kernels fa4,varlen

Rows of 2,048 tokens, documents of 676 in the mean. "bounds" is the length of cu_seqlens: with
33 entries a row, most of them empty documents, or as long as the documents need, as the loader
makes it.
"packed" gives q, k and v as views of one tensor, as the fused step does. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json

import torch
from triton.testing import do_bench

from bench.step import make_batches, padded
from models.attention import KERNELS, attention, choose_kernel, document_mask
from models.config import ModelConfig
from utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="160m", choices=("160m", "600m"))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--kernels", default=",".join(k for k in KERNELS if k != "dense"))
    args = parser.parse_args()
    config = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    batch = make_batches(config, args.rows, 1)[0]
    results = {}
    print(
        f"{args.shape}, {args.rows} rows, {batch.attended_pairs:,} pairs, "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    print(
        f"{'kernel':<8} {'bounds':>7} {'q, k, v':<9} {'forward':>9} {'backward':>9}  ms per layer"
    )
    for kernel in args.kernels.split(","):
        for which, bounds in (
            ("all", padded(batch).cu_seqlens),
            ("needed", batch.cu_seqlens),
        ):
            for layout in ("separate", "packed"):
                try:
                    choose_kernel(kernel, torch.device("cuda"), torch.bfloat16, config.head_dim)
                    times = measure(config, args.rows, kernel, bounds.cuda(), layout)
                except Exception as error:
                    print(f"{kernel:<8} {str(error).splitlines()[0][:120]}", flush=True)
                    continue
                results[f"{kernel} {which} {layout}"] = times
                print(
                    f"{kernel:<8} {len(bounds):>7} {layout:<9} {times[0]:9.3f} {times[1]:9.3f}",
                    flush=True,
                )
    print(json.dumps({"shape": args.shape, "rows": args.rows, "forward_backward_ms": results}))


def measure(
    config: ModelConfig, rows: int, kernel: str, bounds: torch.Tensor, layout: str
) -> tuple[float, float]:
    """Medians of forward, and of backward alone."""
    heads, kv_heads = config.n_heads, config.n_kv_heads
    shape = (rows, config.max_seq_len, heads + 2 * kv_heads, config.head_dim)
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    parts = qkv.split((heads, kv_heads, kv_heads), 2)
    if layout == "separate":
        parts = [part.contiguous() for part in parts]
    q, k, v = (part.detach().requires_grad_() for part in parts)
    mask = document_mask(bounds, shape[:2], kernel)
    out = attention(q, k, v, mask)
    grad = torch.randn_like(out)
    options = {"warmup": 20, "rep": 60, "return_mode": "median"}
    forward = do_bench(lambda: attention(q, k, v, mask), **options)
    backward = do_bench(
        lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), **options
    )
    return forward, backward


if __name__ == "__main__":
    main()
