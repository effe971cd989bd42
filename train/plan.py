"""What `--dry-run` shows of a run, without network or data: its size, memory, time and cost."""

from __future__ import annotations

import math

from utils import cost_tracker
from utils.config import Config, ConfigError
from utils.logging import human_time


def print_plan(config: Config, seq_len: int, batch_tokens: int | None = None) -> None:
    """What `--dry-run` shows: the run's size, memory, time and cost, without network or data.

    Args:
        batch_tokens: tokens per step where the config does not fix them.
    """
    model, train = config.model, config.train
    batch_tokens = batch_tokens or train.batch_tokens
    tokens = train.total_steps * batch_tokens
    flops = model.flops_per_token(seq_len) * tokens
    mode = None if config.runtime.fused is False else config.runtime.memory
    memory = model.memory_gib(train.micro_batch, seq_len, mode)
    device = cost_tracker.find_device(config.cost.device or cost_tracker.PROJECTION_DEVICE)
    projected = cost_tracker.projection(config.cost, flops, device)
    parts = " + ".join(f"{part} {gib:.1f}" for part, gib in memory.items() if part != "total")
    blocks = "blocks that are not fused" if mode is None else f"runtime.memory {mode}"
    rows = {
        "parameters": f"{model.n_params:,}",
        "tokens per step": f"{batch_tokens:,}",
        "micro-batch": f"{train.micro_batch} rows of {seq_len:,}",
        "steps": f"{train.total_steps:,}",
        "tokens": f"{tokens:,} ({tokens / model.n_params:.1f} per parameter)",
        "FLOPs per token": f"{model.flops_per_token(seq_len):,} (rows of one document)",
        "memory": f"{memory['total']:.1f} GiB, estimated for {blocks}: {parts}",
        "time, projected": f"{human_time(projected.hours * 3600)} on {projected.assumption}",
        "cost, projected": f"${projected.dollars:,.2f}",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def expected_steps(config: Config) -> int:
    """The length that --dry-run assumes: it has no data from which to tell an epoch's.

    Raises:
        ConfigError: the length is in epochs, and `data.expected_tokens` is not given.
    """
    train, tokens = config.train, config.data.expected_tokens
    if train.epochs is None:
        return train.total_steps
    if tokens is None:
        raise ConfigError(
            "--dry-run reads no data and cannot tell how long an epoch is: give a rough "
            "data.expected_tokens, or the length as train.steps"
        )
    return math.ceil(train.epochs * tokens / train.batch_tokens)


def with_steps(config: Config, steps: int) -> Config:
    """The config with its length in steps: what epochs are once the data is known."""
    train = config.train.model_copy(update={"steps": steps, "tokens": None, "epochs": None})
    return config.model_copy(update={"train": train})
