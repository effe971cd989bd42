"""The parts of a training step one by one: elementwise kernels in GB/s, matrix products in TFLOP/s.

    python -m bench.parts --shape 160m --rows 96
    python -m bench.parts --shape 600m --rows 48

"GB/s" counts each input read once and each output written once. Medians by CUDA events
(triton.testing.do_bench). A matrix product is given forward, for its input's gradient and for its
weight's. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from triton.testing import do_bench

from models import elementwise, fp8
from models.config import ModelConfig
from models.elementwise import Rows
from models.layers import rotary_angles
from models.products import weight_gradient
from utils.config import load_config

RESULTS: dict[str, float] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="160m", choices=("160m", "600m"))
    parser.add_argument("--rows", type=int, default=96)
    args = parser.parse_args()
    config = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    tokens = args.rows * config.max_seq_len
    print(f"{args.shape}, {tokens:,} tokens, {torch.cuda.get_device_name()}, {torch.__version__}")
    for part in (elementwise_parts, head_parts, products):
        part(config, tokens)
        torch.cuda.empty_cache()
    print(json.dumps({"shape": args.shape, "tokens": tokens, "ms": RESULTS}))


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def time_of(name: str, run: Callable[[], object], moved: Iterable[Tensor] = (), flops: int = 0):
    """Prints one line: time and what it amounts to; a failure is a line as well."""
    try:
        ms = do_bench(run, warmup=10, rep=40, return_mode="median")
    except Exception as error:
        print(f"{name:<44} failed: {str(error).splitlines()[0][:100]}", flush=True)
        return
    size = sum(x.numel() * x.element_size() for x in moved)
    rate = f"{size / ms / 1e6:7.0f} GB/s" if size else f"{flops / ms / 1e9:7.0f} TFLOP/s"
    RESULTS[name] = ms
    print(f"{name:<44} {ms:8.3f} ms {rate}", flush=True)


def elementwise_parts(config: ModelConfig, tokens: int) -> None:
    size, eps = config.d_model, config.norm_eps
    x, delta, grad, weight = *(draw(tokens, size) for _ in range(3)), draw(size).float()
    time_of("copy", lambda: delta.copy_(x), (x, delta))
    time_of("add_norm", lambda: elementwise.add_norm(x, delta, weight, eps), (x, delta, x, x))
    time_of("norm", lambda: elementwise.add_norm(x, None, weight, eps), (x, x))
    time_of(
        "add_norm backward",
        lambda: elementwise.add_norm_backward(x, weight, delta, grad, eps),
        (x, delta, grad, x),
    )
    heads = config.n_heads + 2 * config.n_kv_heads
    qkv = draw(tokens, heads, config.head_dim)
    turned = qkv[:, : config.n_heads + config.n_kv_heads]
    positions = torch.arange(config.max_seq_len, device="cuda").repeat(tokens // config.max_seq_len)
    cos, signed_sin = rotary_angles(positions[None], config.head_dim, config.rope_theta)
    angles = cos[0, :, 0, 0], signed_sin[0, :, 0, 1]
    time_of(
        "rotate q and k in place",
        lambda: elementwise.rotate_heads(turned, angles),
        (turned, turned),
    )
    gate_up, product = draw(tokens, 2 * config.d_ffn), draw(tokens, config.d_ffn)
    time_of("swiglu", lambda: elementwise.swiglu(gate_up), (gate_up, product))
    time_of(
        "swiglu backward",
        lambda: elementwise.swiglu_backward(gate_up, product),
        (gate_up, product, product, gate_up),
    )
    rounding_parts(x, delta, weight, eps, gate_up, product)


def rounding_parts(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, gate_up: Tensor, product: Tensor
) -> None:
    """The same with rows rounded to fp8 on the way, and what rounding alone takes."""

    def room(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=fp8.FORMAT, device="cuda")

    for name, t in (("x", x), ("product", product), ("gate_up", gate_up)):
        time_of(f"round {name}", lambda t=t: elementwise.quantise_rows(t, fp8.FORMAT), (t, room(t)))
    time_of(
        "add_norm, fp8",
        lambda: elementwise.add_norm(x, delta, weight, eps, fp8.FORMAT, wide=False),
        (x, delta, x, room(x)),
    )
    time_of(
        "add_norm, bf16 and fp8",
        lambda: elementwise.add_norm(x, delta, weight, eps, fp8.FORMAT),
        (x, delta, x, x, room(x)),
    )
    time_of(
        "swiglu, fp8", lambda: elementwise.swiglu(gate_up, fp8.FORMAT), (gate_up, room(product))
    )
    time_of(
        "swiglu backward, bf16 and fp8",
        lambda: elementwise.swiglu_backward(gate_up, product, fp8.FORMAT),
        (gate_up, product, product, gate_up, room(gate_up)),
    )


def head_parts(config: ModelConfig, tokens: int) -> None:
    n, vocab = 8192, config.vocab_size
    hidden, weight = draw(n, config.d_model), draw(vocab, config.d_model)
    targets = torch.randint(vocab, (n,), device="cuda")
    ones = torch.ones(n, device="cuda")
    flops = 2 * n * vocab * config.d_model
    total = torch.zeros(vocab, config.d_model, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        time_of(
            f"head, {n} tokens, logits {kind}",
            lambda dtype=dtype: (
                torch.mm(hidden, weight.T, out_dtype=dtype)
                if dtype == torch.float32
                else hidden @ weight.T
            ),
            flops=flops,
        )
        logits = draw(n, vocab, dtype=dtype)
        time_of(
            f"softmax statistics, {kind}",
            lambda x=logits: elementwise.softmax_statistics(x, targets, -100),
            (logits,),
        )
        _, logz = elementwise.softmax_statistics(logits, targets, -100)
        grad = torch.empty_like(logits, dtype=torch.bfloat16)
        time_of(
            f"logits gradient, {kind} -> bf16",
            lambda x=logits, z=logz: elementwise.logits_gradient(
                x.clone() if x.dtype == torch.bfloat16 else x,
                z, targets, -ones, ones, torch.bfloat16, -100,
            ),
            (logits, grad) if dtype == torch.float32 else (logits, logits, logits, grad),
        )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        logits = draw(n, vocab, dtype=dtype)
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        time_of(
            f"loss and logits gradient in one, {kind} -> bf16",
            lambda x=logits: elementwise.cross_entropy_gradient(
                x, targets, 0.0, torch.bfloat16, -100
            ),
            (logits, grad),
        )
    time_of("head, input gradient", lambda: grad @ weight, flops=flops)
    time_of("head, weight gradient", lambda: weight_gradient(grad, hidden), flops=flops)
    time_of(
        "head, weight gradient added in place",
        lambda: torch.ops.aten.addmm.dtype_out(total, grad.T, hidden, torch.float32, out=total),
        flops=flops,
    )


def products(config: ModelConfig, tokens: int) -> None:
    size, d_kv = config.d_model, config.n_kv_heads * config.head_dim
    shapes = {
        "qkv": (size + 2 * d_kv, size),
        "q": (size, size),
        "k": (d_kv, size),
        "gate_up": (2 * config.d_ffn, size),
        "gate": (config.d_ffn, size),
        "down": (size, config.d_ffn),
    }
    for name, (n_out, n_in) in shapes.items():
        x, grad, weight = draw(tokens, n_in), draw(tokens, n_out), draw(n_out, n_in)
        flops = 2 * tokens * n_in * n_out
        time_of(f"{name}, forward", lambda x=x, w=weight: x @ w.T, flops=flops)
        time_of(f"{name}, input gradient", lambda g=grad, w=weight: g @ w, flops=flops)
        time_of(
            f"{name}, weight gradient, fp32",
            lambda g=grad, x=x: weight_gradient(g, x),
            flops=flops,
        )
        time_of(f"{name}, weight gradient, bf16", lambda g=grad, x=x: g.T @ x, flops=flops)
        if name in ("q", "k", "gate"):
            continue
        fp8_products(name, x, grad, weight, flops)


def fp8_products(name: str, x: Tensor, grad: Tensor, weight: Tensor, flops: int) -> None:
    matrix = fp8.Fp8Matrix(weight)
    (a, a_scales), (b, b_scales) = (elementwise.quantise_rows(t, fp8.FORMAT) for t in (x, weight))
    one = torch.ones((), device="cuda")

    def scaled(row_wise: bool, fast: bool) -> Tensor:
        scales = (a_scales, b_scales.T) if row_wise else (one, one)
        return torch._scaled_mm(a, b.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

    time_of(f"{name}, fp8 rows, product alone", lambda: scaled(True, True), flops=flops)
    time_of(f"{name}, fp8 rows, slow sums", lambda: scaled(True, False), flops=flops)
    time_of(f"{name}, fp8 one scale, product alone", lambda: scaled(False, True), flops=flops)
    time_of(f"{name}, fp8 forward with rounding", lambda: matrix.apply(Rows(x)), flops=flops)
    rounded = Rows(None, (a, a_scales))
    time_of(f"{name}, fp8 forward, rows rounded", lambda: matrix.apply(rounded), flops=flops)
    time_of(f"{name}, fp8 input gradient", lambda: matrix.input_gradient(Rows(grad)), flops=flops)


if __name__ == "__main__":
    main()
