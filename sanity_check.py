"""Check this machine, this checkout and a run's config, before a run does.

    python sanity_check.py                                             # no config, no network
    python sanity_check.py --config configs/pretrain_160m.yaml         # and what this run needs
    python sanity_check.py --config configs/sft_160m.yaml data.seq_len=1024 \\
        --base-model runs/pretrain_160m/pretrain_160m_final.pt

Each check says PASS, FAIL or SKIP and why, and a failed one how to mend it. Without a config the
small model and the built-in text are checked. Exit code: 0, or 1 where a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.sources import SourceConfig
from data.tokenizer import Tokenizer, TokenizerConfig
from models.attention import choose_kernel
from models.config import GIB, ModelConfig
from models.transformer import Transformer
from optim.optimizer import OptimConfig
from train import sanity, sanity_run
from train.runtime import PRECISIONS, RuntimeConfig, choose_precision
from train.sanity import MODEL_FILES, Result, perform
from utils import checkpoint
from utils.command_line import run_script
from utils.config import Config, ConfigError, load_config, load_yaml, validate

ROOT = Path(__file__).resolve().parent
STAGES = {name: f"train_{name}" for name in ("pretrain", "sft", "pref", "rlvr")}
BYTES_PER_PARAMETER = 12  # weights, gradients, and room for activations
Check = tuple[str, Callable[..., Result], *tuple[Any, ...]]  # name, function, arguments


def main(argv: list[str]) -> None:
    args, overrides = parse_arguments(argv)
    if args.config is None:
        checks = machine_checks(None)
    else:
        config = load_stage_config(args.config, overrides, args.stage)
        tokenizer = find_tokenizer(config, args.base_model)
        checks = (*machine_checks(config), *run_checks(config, tokenizer))
    statuses = []
    for name, check, *arguments in checks:
        result = perform(check, *arguments)
        show(name, result)
        statuses.append(result.status)
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("PASS", "FAIL", "SKIP"))
    print(f"\n{counts}")
    if "FAIL" in statuses:
        sys.exit(1)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the key=value overrides of the config."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE [flags] [key.sub=value ...]]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a stage's YAML file")
    parser.add_argument("--stage", choices=STAGES, help="whose, where a file fits several")
    parser.add_argument(
        "--base-model", type=Path, metavar="FILE", help="checkpoint whose tokenizer is tried"
    )
    args, overrides = parser.parse_known_args(argv)
    for text in overrides:
        if text.startswith("-") or "=" not in text or args.config is None:
            raise ConfigError(
                f"'{text}' is no flag and no key=value override of a --config; see --help"
            )
    return args, overrides


# ---------------------------------------------------------------------------------------------
# The config of any stage


def load_stage_config(path: Path, overrides: list[str], stage: str | None) -> Config:
    """The config, read as the stage that it is of.

    Raises:
        ConfigError: it has mistakes (those that the nearest stage sees), or fits several stages.
    """
    fitting: dict[str, Config] = {}
    mistakes: list[ConfigError] = []
    for name in [stage] if stage else STAGES:
        if not (ROOT / f"{STAGES[name]}.py").exists():
            continue
        try:
            fitting[name] = load_config(config_class(STAGES[name]), path, overrides)
        except ConfigError as error:
            mistakes.append(error)
    if not fitting:
        raise min(mistakes, key=lambda error: str(error).count("\n"))
    if len(fitting) > 1:
        raise ConfigError(
            f"{path} fits {' and '.join(fitting)}: add --stage and the one that is meant"
        )
    return next(iter(fitting.values()))


def config_class(script: str) -> type[Config]:
    """A stage script's own config: the one class in it that has a model and data.

    Nothing else imports a script. A config is only known to be right when the stage itself reads
    it, and this script is run by hand, before any of them.
    """
    module = importlib.import_module(script)
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Config)
        and value.__module__ == script
        and {"model", "data"} <= value.model_fields.keys()
    )


def find_tokenizer(config: Any, base_model: Path | None) -> Tokenizer | TokenizerConfig | None:
    """The base model's, else what the config says of one, else none."""
    if base_model is not None:
        return Tokenizer.from_state(checkpoint.load(base_model)["tokenizer"])
    return getattr(config, "tokenizer", None)


# ---------------------------------------------------------------------------------------------
# What is checked


def machine_checks(config: Any) -> Iterator[Check]:
    """The device, the model and what trains it; the config's model where it fits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = RuntimeConfig() if config is None else config.runtime
    optim = OptimConfig() if config is None else config.optim
    shape = validate(ModelConfig, load_yaml(MODEL_FILES / "smol_tiny.yaml"), "smol_tiny.yaml")
    own = None if config is None else config.model
    yield "device", sanity_run.check_device, device, needed_gib(config, device)
    if own is not None:
        needed = own.n_params * BYTES_PER_PARAMETER / GIB
        if needed < sanity_run.free_memory_gib(device):
            shape = own
        else:
            print(f"      the config's model needs {needed:.1f} GiB: checking smol_tiny instead")
    try:
        name, _ = choose_precision(runtime.precision, device)
    except ValueError as error:
        raise ConfigError(f"runtime.precision: {error}") from error
    dtype = PRECISIONS[name]
    kernel = runtime.attention
    yield "attention kernels", sanity.check_attention, kernel, device, dtype, shape.head_dim
    yield "parameter counts", sanity.check_parameter_counts, own
    try:
        choose_kernel(kernel, device, dtype, shape.head_dim)
    except ValueError:
        kernel = "auto"  # the check above has told of it
    torch.manual_seed(0)
    model = Transformer(shape, dtype, kernel).to(device)
    yield "initial loss", sanity.check_initial_loss, model
    yield "gradients", sanity.check_gradients, model
    yield "documents apart", sanity.check_documents_apart, model
    yield "optimizer", sanity.check_optimizer, model, optim
    yield "overfitting", sanity.check_overfitting, optim, device
    del model
    folder = Path("runs" if config is None else config.runs_dir)
    small = Transformer(sanity.MEMORIZER, kernel="dense").to(device)
    yield "checkpoint", sanity_run.check_checkpoint, small, folder
    if config is None:
        for domain in ("web", "code", "math"):
            source = SourceConfig(name=domain, path=f"builtin:{domain}", weight=1.0)
            yield f"source {domain}", sanity_run.check_source, source, TokenizerConfig()
        for name in ("disk", "mirror", "W&B"):
            yield name, sanity.skipped, "give --config: it depends on the run"


def needed_gib(config: Any, device: torch.device) -> float | None:
    """What a run is estimated to take; None without one."""
    if config is None:
        return None
    rows = getattr(config.train, "micro_batch", 1)
    seq_len = getattr(config.data, "seq_len", config.model.max_seq_len)
    fused = device.type == "cuda" and config.runtime.fused is not False
    mode = config.runtime.memory if fused else None
    width = 2 if device.type == "cuda" else 4  # bytes of an activation
    return config.model.memory_gib(rows, seq_len, mode, width)["total"]


def run_checks(config: Any, tokenizer: Tokenizer | TokenizerConfig | None) -> Iterator[Check]:
    """The data and the disks of a run, and W&B."""
    for source in [*config.data.sources, *getattr(config.data, "text_sources", ())]:
        yield f"source {source.name}", sanity_run.check_source, source, tokenizer
    yield "disk", sanity_run.check_disk, config
    yield "mirror", sanity_run.check_mirror, config
    yield "W&B", sanity_run.check_wandb, config


def show(name: str, result: Result) -> None:
    indent = " " * 26
    print(f"{result.status}  {name:<18}  {result.reason}".replace("\n", f"\n{indent}"), flush=True)
    if result.remedy:
        print(f"{indent}to mend: {result.remedy}", flush=True)


if __name__ == "__main__":
    run_script(main)
