"""Reinforcement learning with verifiable rewards: sample answers, check them, learn from it.

    python train_rlvr.py --config configs/demo/rlvr.yaml \\
        --base-model runs/demo/dpo/dpo_final.pt                               # CPU, three minutes
    python train_rlvr.py --config configs/rlvr_160m.yaml --dry-run            # what it would cost
    python train_rlvr.py --config configs/rlvr_160m.yaml \\
        --base-model runs/dpo_160m/dpo_160m_final.pt                          # start
    python train_rlvr.py --config configs/rlvr_160m.yaml --resume             # go on after a stop

Any key of the config can be given as key=value: policy.advantage=normalised rollout.prompts=128.
With --verifier-model PATH a trained verifier scores the answers as well (reward.model_weight) or
alone (reward.rule_weight=0); --resume needs the same one again.

What it learns is group-relative policy optimisation: the clipped policy loss of `train/policy.py`
on the completions that `train/rollout.py` samples and `train/rewards.py` scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from data.prompts import PromptDataConfig, Prompts, load_prompts
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.generate import Engine
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train import plan, setup
from train.evals import PassConfig, held_out_pass
from train.judge import Judge
from train.loop import LoopConfig, Training, fit
from train.policy import PolicyConfig
from train.reward_model import load_reward_model
from train.rewards import RewardConfig, check_answer
from train.rollout import RolloutConfig, RolloutLoader, make_engine, policy_objective
from train.setup import RuntimeConfig
from utils.checkpoint import weights_fingerprint
from utils.command_line import CommandLine, parse_command_line, run_script
from utils.config import Config, ConfigError, Problem, load_config
from utils.cost_tracker import CostConfig
from utils.distributed import Distributed
from utils.logging import MetricsLog

STAGE = "rlvr"
BASE_STAGES = ("sft", "pref", "rlvr")


class RLTrainConfig(LoopConfig):
    """The length of training, and the loop's own settings."""

    LENGTHS: ClassVar = ("steps",)

    steps: int
    """Length of training in optimizer steps."""
    micro_batch: int
    """Rows that one GPU processes at once; lower it when out of memory, the result is the same."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for key in ("steps", "micro_batch"):
            if getattr(self, key) <= 0:
                yield Problem((key,), f"{key} ({getattr(self, key):,}) must be above 0")

    @property
    def total_steps(self) -> int:
        return self.steps


class RlvrConfig(Config):
    """One RLVR run; each section is documented where it is used."""

    name: str
    """The run's folder under `runs_dir`, and the name of its final checkpoint."""
    runs_dir: str = "runs"
    seed: int = 0
    model: ModelConfig
    """The base model's shape."""
    data: PromptDataConfig
    rollout: RolloutConfig
    policy: PolicyConfig = PolicyConfig()
    reward: RewardConfig = RewardConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: RLTrainConfig
    eval: PassConfig = PassConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cost: CostConfig = CostConfig()

    def problems(self) -> Iterator[Problem]:
        whole = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        for key, room in (
            ("rollout.seq_len", self.rollout.seq_len),
            ("model.max_seq_len", self.model.max_seq_len),
        ):
            if whole > room:
                yield Problem(
                    ("data.max_prompt_tokens", "rollout.max_new_tokens", key),
                    f"data.max_prompt_tokens ({self.data.max_prompt_tokens:,}) + "
                    f"rollout.max_new_tokens ({self.rollout.max_new_tokens:,}) = {whole:,} must "
                    f"not exceed {key} ({room:,})",
                )
        if self.policy.overlong_tokens > self.rollout.max_new_tokens:
            yield Problem(
                ("policy.overlong_tokens", "rollout.max_new_tokens"),
                f"policy.overlong_tokens ({self.policy.overlong_tokens:,}) must not exceed "
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens:,}): every completion would "
                "be punished",
            )


def main(argv: list[str]) -> None:
    args = parse_command_line(__doc__, base_model=True, verifier_model=True, argv=argv)
    config = load_config(RlvrConfig, args.config, args.overrides)
    if args.dry_run:
        print_plan(config)
        return

    dist = setup.start_devices(config.runtime, config.seed)
    run, checkpointer, state = setup.open_run(args, config, STAGE, dist)

    base = state or setup.load_base(args, BASE_STAGES, config.model)
    tokenizer = Tokenizer.from_state(base["tokenizer"])
    template = setup.load_template(base, args)
    prompts = load_prompts(config.data, tokenizer, template, check_answer)

    model = setup.build_model(config.model, config.runtime, dist)
    model.load_state_dict(base["model"])
    fingerprint = state["reference"] if state else weights_fingerprint(base["model"])
    reference = None
    if config.policy.kl_weight:
        reference = setup.load_reference(args, BASE_STAGES, config, fingerprint, dist)
    judge, verifier = make_judge(args, config, prompts, tokenizer, model, state)
    engine = make_engine(
        model, config.rollout, config.data.max_prompt_tokens, tokenizer.eos_id, dist.world_size
    )
    loader = RolloutLoader(
        model,
        engine,
        prompts,
        judge,
        config.rollout,
        config.policy,
        config.seed,
        config.train.micro_batch,
        dist,
        reference,
    )

    optimizer = make_optimizer(model.named_parameters(), config.optim)
    training = Training(
        model=model,
        optimizer=optimizer,
        schedule=Schedule(config.schedule, config.train.steps),
        loader=loader,
        cost=setup.make_cost_tracker(config.cost, dist),
        identity=setup.identity(
            STAGE, config, tokenizer, template, reference=fingerprint, verifier=verifier
        ),
        measures=loader.measures,
    )
    setup.restore(training, state)

    loss_fn = partial(policy_objective, config=config.policy, rollout=config.rollout)
    samples = setup.open_log(run.samples, training, dist)
    metrics = setup.open_log(run.metrics, training, dist)
    evaluate = partial(measure, training, engine, prompts, config, judge, tokenizer, samples, dist)
    done = fit(training, loss_fn, config.train, checkpointer, metrics, dist, evaluate)
    setup.finish(training, args, run, checkpointer, dist, done)


def print_plan(config: RlvrConfig) -> None:
    """The run's size and cost if every completion were as long as it may be."""
    rollout = config.rollout
    sampled = rollout.prompts * rollout.group_size
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    plan.print_plan(config, rollout.seq_len, sampled * longest // rollout.minibatches)
    print(
        f"a rollout: {rollout.prompts:,} prompts x {rollout.group_size} completions of at most "
        f"{rollout.max_new_tokens:,} tokens, for {rollout.minibatches} step(s). Tokens are the "
        "most that can come; time is that of training on them, sampling comes on top "
        "(bench/decode.py measures it)"
    )


def make_judge(
    args: CommandLine,
    config: RlvrConfig,
    prompts: Prompts,
    tokenizer: Tokenizer,
    model: Transformer,
    state: dict | None,
) -> tuple[Judge, str | None]:
    """The verifiers by rule and the one given as a model, and that one's fingerprint.

    Raises:
        ConfigError: the weights and --verifier-model do not fit, a verifier cannot run here, or a
            resumed run began with another model.
    """
    if bool(args.verifier_model) != bool(config.reward.model_weight):
        raise ConfigError(
            f"reward.model_weight ({config.reward.model_weight}) and --verifier-model "
            f"({args.verifier_model}) go together: give both or neither"
        )
    if not args.verifier_model:
        return Judge(config.reward, tokenizer, prompts.verifiers), None
    loaded = load_reward_model(args.verifier_model, config.reward, model.device, model.dtype)
    began = (state or {}).get("verifier") or loaded.fingerprint  # older checkpoints do not say
    if loaded.fingerprint != began:
        raise ConfigError(
            f"--verifier-model {args.verifier_model} (fingerprint {loaded.fingerprint}) is not the "
            f"model that this run began with ({began}), and what is rewarded must stay the same: "
            "give that one, or start another run"
        )
    return Judge(config.reward, tokenizer, prompts.verifiers, loaded.score), loaded.fingerprint


def measure(
    training: Training,
    engine: Engine,
    prompts: Prompts,
    config: RlvrConfig,
    judge: Judge,
    tokenizer: Tokenizer,
    samples: MetricsLog,
    dist: Distributed,
) -> dict[str, float]:
    """Held-out pass@1 and pass@k, and what was answered."""
    values, kept = held_out_pass(
        engine,
        prompts.held_out,
        config.eval,
        config.rollout.max_new_tokens,
        config.seed,
        judge,
        tokenizer,
        dist,
    )
    for sample in kept:
        samples.write(training.step, sample)
    return values


if __name__ == "__main__":
    run_script(main)
