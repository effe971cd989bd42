"""What the four stage scripts do alike: the plan, the run directory, resume, hand-over.

Plain functions in the order in which a script calls them. What differs between stages (data, loss,
measures) stays in the scripts.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from data.chat import ChatTemplate
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from train.loop import LoopConfig, Training
from train.runtime import PRECISIONS, RuntimeConfig, build_model, start_devices  # noqa: F401
from utils import checkpoint
from utils.checkpoint import Checkpointer, CheckpointError
from utils.command_line import CommandLine
from utils.config import Config, ConfigError, Problem, check_resume, plain, save_yaml, validate
from utils.cost_tracker import CostConfig, CostTracker
from utils.distributed import Distributed
from utils.logging import MetricsLog, RunDirectory, get_logger, human_count
from utils.mirror import open_mirror
from utils.report import write_report
from utils.versions import versions
from utils.wandb_log import WandbLog

# A resumed run may differ in these: they change speed, place or bookkeeping, not what is learned.
RESUME_MAY_CHANGE = (
    "train.micro_batch", "train.log_every", "train.eval_every", "train.save_every",
    "train.save_every_hours", "train.keep_checkpoints", "train.mirror_dir",
    "train.stability", "train.wandb_project", "train.eval_tasks", "train.eval_data_dir",
    "train.profile_steps", "runtime", "cost", "runs_dir", "data.cache_dir", "data.workers",
    "data.max_cache_gb",
)  # fmt: skip
# A run branched off another's checkpoint may also change where it goes from there; not
# `optim.kind`, since one optimizer's state is of no use to another.
BRANCH_MAY_CHANGE = (
    *RESUME_MAY_CHANGE, "name", "schedule", "train.steps", "train.tokens", "train.epochs",
    "optim.lr", "optim.weight_decay", "optim.betas", "optim.eps", "optim.muon_lr",
    "optim.muon_momentum",
)  # fmt: skip
OPTIM_VALUES = ("initial_lr", "weight_decay", "betas", "eps", "momentum")  # of a parameter group


class TrainConfig(LoopConfig):
    """The size of a step, the length of training, and the loop's own settings."""

    LENGTHS: ClassVar = ("steps", "tokens")  # the keys of which one gives the length of training

    batch_tokens: int
    """Tokens per optimizer step, over all micro-batches and GPUs."""
    micro_batch: int
    """Rows that one GPU processes at once; lower it when out of memory, the result is the same."""
    steps: int | None = None
    """Length of training in steps; give this or `tokens`."""
    tokens: int | None = None
    """Length of training in tokens, rounded up to whole steps."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (PaLM's auxiliary loss; 1e-4 there); 0: off."""
    eval_tasks: tuple[str, ...] = ()
    """Benchmarks that the final checkpoint is measured on, as `eval.py --tasks` names them."""
    eval_data_dir: str | None = None
    """A folder with their files; null: the hub."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for key in ("batch_tokens", "micro_batch", *self.LENGTHS):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem((key,), f"{key} ({value:,}) must be above 0")
        if sum(getattr(self, key) is not None for key in self.LENGTHS) != 1:
            yield Problem(
                self.LENGTHS, f"give the length as {' or '.join(self.LENGTHS)}, one of them"
            )
        if self.eval_tasks and find_spec("lm_eval") is None:
            needs = "eval_tasks needs lm-eval: pip install -r requirements-eval.txt"
            yield Problem(("eval_tasks",), needs)

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.tokens / self.batch_tokens)


class EpochTrainConfig(TrainConfig):
    """A training over finite data, whose length may also be given in epochs."""

    LENGTHS: ClassVar = ("steps", "tokens", "epochs")

    epochs: int | None = None
    """Length of training in passes over the data, rounded up to whole steps."""


def shape_problems(train: TrainConfig, seq_len: int, model: ModelConfig) -> Iterator[Problem]:
    """The rules that tie batch, rows, GPUs and model together; the same for every stage."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    unit = train.micro_batch * seq_len * world_size
    if unit > 0 and train.batch_tokens % unit:
        nearest = max(1, round(train.batch_tokens / unit)) * unit
        yield Problem(
            ("train.batch_tokens", "train.micro_batch", "data.seq_len"),
            f"train.batch_tokens ({train.batch_tokens:,}) must be a multiple of micro_batch "
            f"({train.micro_batch}) x seq_len ({seq_len:,}) x world_size ({world_size}) = "
            f"{unit:,}; nearest: {nearest:,}",
        )
    if seq_len > model.max_seq_len:
        yield Problem(
            ("data.seq_len", "model.max_seq_len"),
            f"data.seq_len ({seq_len:,}) must not exceed model.max_seq_len ({model.max_seq_len:,})",
        )


def load_base(args: CommandLine, stages: Sequence[str], model: ModelConfig) -> dict:
    """The checkpoint that a stage starts from.

    Raises:
        ConfigError: none given, of a stage that is not among `stages`, or of another shape.
    """
    wanted = f"a {' or '.join(stages)} checkpoint, such as runs/NAME/NAME_final.pt"
    path = args.base_model
    if path is None:
        raise ConfigError(f"--base-model is missing: this stage starts from {wanted}")
    base = checkpoint.load(path)
    if base["stage"] not in stages:
        raise CheckpointError(
            f"--base-model {path} is of stage '{base['stage']}', but this one starts from {wanted}"
        )
    theirs = plain(validate(ModelConfig, base["model_config"], f"the model of --base-model {path}"))
    differences = [
        f"{key}: {value} in the config, {theirs[key]} in the checkpoint"
        for key, value in plain(model).items()
        if value != theirs[key]
    ]
    if differences:
        raise ConfigError(
            "\n  ".join([f"the config's model is not that of --base-model {path}:", *differences])
            + "\nset model: to the file that the checkpoint was trained with"
        )
    return base


def load_reference(
    args: CommandLine, stages: Sequence[str], config: Config, fingerprint: str, dist: Distributed
) -> Transformer:
    """The base model a second time: what the policy is compared with, and does not learn.

    Args:
        fingerprint: of the weights that the run started from.

    Raises:
        ConfigError: `--base-model` is missing, or not what the run started from.
    """
    base = load_base(args, stages, config.model)
    if checkpoint.weights_fingerprint(base["model"]) != fingerprint:
        raise ConfigError(
            f"--base-model {args.base_model} is not the model that this run started from; "
            "its reference must stay the same"
        )
    reference = build_model(config.model, config.runtime, dist)
    reference.load_state_dict(base["model"])
    return reference.eval().requires_grad_(False)


def load_template(base: dict, args: CommandLine) -> ChatTemplate:
    """The chat template that the base model was trained with.

    Raises:
        ConfigError: it is of a pretraining run and has none.
    """
    if base["chat_template"] is None:
        raise ConfigError(
            f"--base-model {args.base_model} has no chat template: train it with train_sft.py "
            "first and pass that run's final checkpoint"
        )
    return ChatTemplate.from_state(base["chat_template"])


def open_run(
    args: CommandLine, config: Config, stage: str, dist: Distributed
) -> tuple[RunDirectory, Checkpointer, dict | None]:
    """The run directory, its checkpoints, and the state to go on from, if any.

    Raises:
        ConfigError: the directory holds a run and `--resume` is absent, the checkpoint does not
            fit, or the config has changed in a way that a resumed run may not.
    """
    run = RunDirectory(config.runs_dir, config.name)
    mirror = open_mirror(run.path, config.train.mirror_dir, args.resume)
    checkpointer = Checkpointer(run.checkpoints, config.train.keep_checkpoints, mirror)
    state = None
    found = _newest_checkpoint(checkpointer, dist) if args.resume else None
    if found is not None:
        path, state = found
        _check_state(state, stage, config, RESUME_MAY_CHANGE, path)
        get_logger().info(f"resuming from {path}, step {state['step']:,}")
    elif args.resume:
        places = " and ".join(str(m.path) for m in (run, mirror) if m)
        get_logger().info(f"--resume: no checkpoint in {places} yet")
    if state is None and args.resume_from:
        state = checkpoint.load(args.resume_from)
        _check_state(state, stage, config, BRANCH_MAY_CHANGE, args.resume_from)
        state["branched_from"] = args.resume_from
    if state is None and config.schedule.decay_now:
        raise ConfigError(
            "schedule.decay_now (true) needs --resume-from FILE, a checkpoint of the stable phase "
            "to decay from"
        )
    if dist.is_main:
        run.prepare(args.resume, plain(config))
        save_yaml(run.path / "versions.yaml", {"stage": stage, **versions()})
    dist.barrier()
    return run, checkpointer, state


def _newest_checkpoint(checkpointer: Checkpointer, dist: Distributed) -> tuple[Path, dict] | None:
    """The newest valid checkpoint of the run's folder or of its mirror, brought back from there."""
    found, restored = checkpointer.latest(), False
    if checkpointer.mirror is None:
        return found
    dist.barrier()  # all have looked before the first process writes there
    if dist.is_main:
        restored = checkpointer.mirror.restore(newer_than=found[0].name if found else "")
    total = dist.all_reduce_sum(torch.tensor(float(restored), device=dist.device))
    return checkpointer.latest() if total.item() else found


def _check_state(
    state: dict, stage: str, config: Config, may_change: Collection[str], path: str | Path
) -> None:
    if state["stage"] != stage:
        raise CheckpointError(
            f"{path} is a checkpoint of stage '{state['stage']}', not '{stage}'; "
            "give one of this stage"
        )
    if "optimizer" not in state:
        raise CheckpointError(
            f"{path} holds weights only and cannot be resumed; "
            "give a step_*.pt file from the run's checkpoints folder"
        )
    check_resume(state["config"], config, may_change)


def identity(
    stage: str, config: Config, tokenizer: Tokenizer, template: ChatTemplate | None, **more: Any
) -> dict:
    """What a checkpoint says of itself, so that the next stage and inference need no other file."""
    return {
        "stage": stage,
        "model_config": plain(config.model),
        "tokenizer": tokenizer.state_dict(),
        "chat_template": template and template.state_dict(),
        "config": plain(config),
        **more,
    }


def restore(training: Training, state: dict | None) -> None:
    """Put a checkpoint's state into a freshly built training.

    On a branch (`--resume-from`) the config's own rates and schedule hold, and `schedule.decay_now`
    begins the decay, from the rate that the checkpoint's run had come to.

    Raises:
        ConfigError: a branch would end where it begins, or before.
    """
    if state is None:
        return
    branches, schedule = "branched_from" in state, training.schedule
    if branches and not schedule.config.decay_now:
        state = state | {"schedule": {"branch": None}}
    optimizer = training.optimizer
    configured = [
        {key: group[key] for key in OPTIM_VALUES if key in group}
        for group in optimizer.param_groups
    ]
    training.load_state_dict(state)
    if not branches:
        return
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)
    training.evaluated_at, training.is_branch = -1, True
    if schedule.config.decay_now:
        schedule.branch(training.step)
    if schedule.total_steps <= training.step:
        raise ConfigError(
            f"--resume-from {state['branched_from']} begins at step {training.step:,}, and the run "
            f"ends at step {schedule.total_steps:,}: train longer, or branch off an earlier one"
        )
    get_logger().info(
        f"branching off {state['branched_from']} at step {training.step:,}, "
        f"to end at step {schedule.total_steps:,}"
    )


def make_cost_tracker(config: CostConfig, dist: Distributed) -> CostTracker:
    """Dollars, tokens per dollar and MFU of this machine, as far as they are known."""
    name = torch.cuda.get_device_name() if dist.device.type == "cuda" else "cpu"
    return CostTracker.for_device(config, name, dist.world_size)


def open_log(path: Path, training: Training, dist: Distributed) -> MetricsLog:
    """A run's metrics or samples, cut back to where it goes on; the first process alone writes.

    The metrics go to W&B as well where the config asks for it; the others are cut back with them.
    """
    if not dist.is_main:
        return MetricsLog(os.devnull)
    log = MetricsLog(path)
    log.cut_back(training.step, evaluated=training.evaluated_at == training.step)
    config = training.identity["config"]
    project = config["train"]["wandb_project"]
    if path.name != "metrics.jsonl":
        training.logs.append(log)
    elif project:
        log.wandb = WandbLog(project, path.parent, config)
    return log


def finish(
    training: Training,
    args: CommandLine,
    run: RunDirectory,
    checkpointer: Checkpointer,
    dist: Distributed,
    done: bool,
) -> None:
    """Write the final checkpoint, or say how to go on; then leave the process group."""
    checkpointer.close()
    if dist.is_main:
        say = get_logger().info
        if done:
            checkpoint.save(run.final, training.weights())
            say(f"done: {run.final} ({human_count(training.tokens)} tokens)")
            say(f"metrics: {run.metrics}")
            from train.harness_run import evaluate_final  # which builds on this module

            evaluate_final(run.final, training.identity["config"]["train"], dist)
            _draw(run)
            if training.identity["stage"] != "verifier":  # which writes nothing
                command = f"python inference.py --checkpoint {run.final}"
                say(f'try it: {command} --prompt "Once upon a time"')
        else:
            models = {"--base-model": args.base_model, "--verifier-model": args.verifier_model}
            again = [f" {flag} {path}" for flag, path in models.items() if path]
            again += [f" {override}" for override in args.overrides]
            say(f"stopped at step {training.step:,}; everything is saved. To go on:")
            script = Path(sys.argv[0]).name
            say(f"  python {script} --config {args.config}{''.join(again)} --resume")
        if checkpointer.mirror:
            checkpointer.mirror.close()
    dist.close()


def _draw(run: RunDirectory) -> None:
    """The report; a run without one is finished all the same."""
    try:
        get_logger().info(f"report: {write_report([run.path])}")
    except Exception as error:
        get_logger().warning(f"no report ({error}); to try again: python report.py {run.path}")
