"""How a run uses its machine: devices, precision, attention kernel, and how the blocks run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from models.config import ModelConfig
from models.fp8 import fp8_obstacle
from models.fused import MEMORY
from models.products import GEMM, MATMUL
from models.transformer import Transformer
from utils import distributed, seed
from utils.config import Config, ConfigError, Problem
from utils.distributed import Distributed
from utils.logging import get_logger

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RuntimeConfig(Config):
    """How a run uses its machine; nothing here changes what is learned beyond rounding."""

    precision: str = "auto"
    """Activations and matrix products: bf16, fp32, or auto (bf16 on a GPU that computes in it)."""
    attention: str = "auto"
    """fa4, fa2, varlen, flex, dense, or auto: the fastest that runs here."""
    fused: bool | None = None
    """Blocks with a hand-written backward pass (models/fused.py); null: on CUDA in bf16."""
    memory: str = "fast"
    """What a fused block keeps: fast, balanced (3/4, norms again), low (1/12, nearly all again)."""
    matmul: str = "bf16"
    """Matrix products of fused blocks: bf16 or fp8 (Ada, Hopper and later)."""
    gemm: str = "auto"
    """Whose bf16 products fused blocks use: quack (Hopper: SwiGLU within), cublas, or auto."""
    compile: bool | None = None
    """torch.compile blocks that are not fused; null: on CUDA."""
    deterministic: bool = False
    """Bit-identical reruns on the same machine; slower."""

    def problems(self) -> Iterator[Problem]:
        if self.precision not in ("auto", *PRECISIONS):
            yield Problem(
                ("precision",), f"precision ('{self.precision}') is none of auto, bf16, fp32"
            )
        plain = ("fast", "bf16", "auto", "cublas")
        gemms = ("auto", *GEMM)
        for key, allowed in (("memory", MEMORY), ("matmul", MATMUL), ("gemm", gemms)):
            value = getattr(self, key)
            if value not in allowed:
                yield Problem((key,), f"{key} ('{value}') is none of {', '.join(allowed)}")
            elif value not in plain and self.fused is False:
                yield Problem(
                    (key, "fused"), f"{key} ('{value}') needs fused blocks, and fused is false"
                )
        if (self.matmul, self.gemm) == ("fp8", "quack"):
            yield Problem(("gemm", "matmul"), "gemm ('quack') has no fp8; set auto")


def start_devices(runtime: RuntimeConfig, run_seed: int) -> Distributed:
    """Process group, device, memory, seeds and determinism."""
    use_expandable_segments()
    if runtime.deterministic:
        seed.set_deterministic(True)
    dist = distributed.setup()
    seed.seed_everything(run_seed)
    torch.set_float32_matmul_precision("high" if not runtime.deterministic else "highest")
    return dist


def use_expandable_segments() -> None:
    """Before the first allocation on a GPU, and unless the user has set the allocator up.

    Without it 3 GiB of 75 lie in gaps that no tensor fits (600M).
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """One of `PRECISIONS` and, for the log, why it and not the other.

    Raises:
        ValueError: bf16 was asked for on a GPU that has no arithmetic for it.
    """
    obstacle = None
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        # torch.cuda.is_bf16_supported() says yes here too: it counts conversion to float32 and back
        obstacle = f"bf16 needs compute capability 8.0 (Ampere) or later, not {found[0]}.{found[1]}"
    if requested == "bf16" and obstacle:
        raise ValueError(f"{obstacle}; set auto or fp32")
    if requested != "auto":
        return requested, "as requested"
    if device.type != "cuda":
        return "fp32", f"the device is {device.type}"
    return ("fp32", obstacle) if obstacle else ("bf16", "this GPU computes in it")


def build_model(
    config: ModelConfig,
    runtime: RuntimeConfig,
    dist: Distributed,
    kind: type[Transformer] = Transformer,
) -> Transformer:
    """The model on its device, its attention kernel chosen and said."""
    try:
        name, why = choose_precision(runtime.precision, dist.device)
    except ValueError as error:
        raise ConfigError(f"runtime.precision: {error}") from error
    model = kind(config, PRECISIONS[name], runtime.attention).to(dist.device)
    try:
        kernel, reason = model.attention_kernel()
    except ValueError as error:
        raise ConfigError(f"runtime.attention: {error}") from error
    steps = _fuse_or_compile(model, runtime)
    get_logger().info(
        f"model: {config.n_params:,} parameters, {name} ({why}), on {dist.device}; "
        f"attention: {kernel} ({reason}); blocks: {steps}"
    )
    return model


def _fuse_or_compile(model: Transformer, runtime: RuntimeConfig) -> str:
    """Chooses how the training path runs; returns what to say of it."""
    config, on_gpu = model.config, model.device.type == "cuda"
    asked = (runtime.memory, runtime.matmul) != ("fast", "bf16") or runtime.gemm == "quack"
    fused = runtime.fused
    if fused is None:
        fused = asked or (on_gpu and model.dtype == torch.bfloat16)
    if fused:
        if runtime.matmul == "fp8":
            sizes = [config.d_model, config.n_kv_heads * config.head_dim, config.d_ffn]
            if obstacle := fp8_obstacle(model.device, model.dtype, sizes):
                raise ConfigError(f"runtime.matmul: fp8 cannot run: it {obstacle}")
            model.fuse_blocks(runtime.memory, "fp8")
            return f"fused, memory {runtime.memory}, products in fp8"
        try:
            gemm, why = model.choose_gemm(runtime.gemm)
        except ValueError as error:
            raise ConfigError(f"runtime.gemm: {error}; set auto") from error
        model.fuse_blocks(runtime.memory, "bf16", gemm)
        products = f"products in {runtime.matmul} by {gemm} ({why})" if on_gpu else "plain products"
        return f"fused, memory {runtime.memory}, {products}"
    steps = "plain"
    if on_gpu if runtime.compile is None else runtime.compile:
        model.compile_blocks()
        steps = "compiled"
    if on_gpu and runtime.fused is None:
        steps += " (not fused: by itself in bf16 alone)"
    return steps
