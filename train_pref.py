"""Train a chat model on preferences: DPO and its relatives, or a verifier that scores answers.

    python train_pref.py --config configs/demo/dpo.yaml \\
        --base-model runs/demo/sft/sft_final.pt                               # CPU, one minute
    python train_pref.py --config configs/dpo_160m.yaml --dry-run             # what it would cost
    python train_pref.py --config configs/dpo_160m.yaml \\
        --base-model runs/sft_160m/sft_160m_final.pt                          # start
    python train_pref.py --config configs/dpo_160m.yaml --resume              # go on after a stop

Any key of the config can be given as key=value: preference.loss=ipo preference.beta=0.1.

What it learns is one of the losses of `train/preference.py` on pairs of a chosen and a rejected
answer. The model that it starts from, an sft or a pref checkpoint, is also the reference that it
is held to. With `preference.reference=live`, --resume needs --base-model again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from data.chat import ChatTemplate
from data.chat_loader import Question
from data.pair_loader import PairBatch, PairLoader, batches_of, choose_questions, held_out_batches
from data.preferences import PairDataConfig, Pairs, load_pairs
from data.streaming import Prefetcher
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from models.verifier import HEAD, Verifier
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train import plan, setup
from train.chat_evals import ChatEvalConfig, answer_questions
from train.loop import Training, fit
from train.pairs import (
    LossFn,
    cached_reference,
    held_out_preference,
    preference_loss,
    score_statistics,
    verifier_loss,
)
from train.preference import PreferenceConfig, chosen_fall
from train.runtime import RuntimeConfig, build_model, start_devices
from train.setup import EpochTrainConfig
from utils.checkpoint import weights_fingerprint
from utils.command_line import CommandLine, parse_command_line, run_script
from utils.config import Config, Problem, load_config
from utils.cost_tracker import CostConfig
from utils.distributed import Distributed
from utils.logging import MetricsLog, get_logger, read_metrics

BASE_STAGES = ("sft", "pref")
CHOSEN = "pref/val_chosen_logp"


class PrefConfig(Config):
    """One preference run; each section is documented where it is used."""

    name: str
    """The run's folder under `runs_dir`, and the name of its final checkpoint."""
    runs_dir: str = "runs"
    seed: int = 0
    model: ModelConfig
    """The base model's shape."""
    data: PairDataConfig
    preference: PreferenceConfig = PreferenceConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: EpochTrainConfig
    eval: ChatEvalConfig = ChatEvalConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cost: CostConfig = CostConfig()

    @property
    def stage(self) -> str:
        return "verifier" if self.preference.is_verifier else "pref"

    def problems(self) -> Iterator[Problem]:
        yield from setup.shape_problems(self.train, self.data.seq_len, self.model)
        if self.train.z_loss:
            yield Problem(
                ("train.z_loss",),
                f"train.z_loss ({self.train.z_loss}) is no part of a preference loss; set it to 0",
            )


def main(argv: list[str]) -> None:
    args = parse_command_line(__doc__, base_model=True, argv=argv)
    config = load_config(PrefConfig, args.config, args.overrides)
    if args.dry_run:
        planned = plan.with_steps(config, plan.expected_steps(config))
        plan.print_plan(planned, config.data.seq_len)
        return

    dist = start_devices(config.runtime, config.seed)
    run, checkpointer, state = setup.open_run(args, config, config.stage, dist)

    base = state or setup.load_base(args, BASE_STAGES, config.model)
    tokenizer = Tokenizer.from_state(base["tokenizer"])
    template = setup.load_template(base, args)
    pairs = prepare_pairs(config.data, tokenizer, template, dist)

    is_verifier = config.preference.is_verifier
    kind = Verifier if is_verifier else Transformer
    model = build_model(config.model, config.runtime, dist, kind)
    model.load_state_dict(model.state_dict() | base["model"])  # a new head stays as drawn
    reference = find_reference(args, config, model, pairs, state, dist)
    loader = make_loader(config, pairs, reference.logp, dist)
    asked = [] if is_verifier else choose_questions(pairs, config.eval.questions, tokenizer.eos_id)

    optimizer = make_optimizer(model.named_parameters(), config.optim)
    epochs = config.train.epochs
    steps = config.train.total_steps if epochs is None else loader.steps(epochs)
    schedule = Schedule(config.schedule, steps)
    training = Training(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loader=Prefetcher(loader),
        cost=setup.make_cost_tracker(config.cost, dist),
        identity=setup.identity(
            config.stage, config, tokenizer, template, reference=reference.fingerprint
        ),
    )
    setup.restore(training, state)
    rows = config.train.micro_batch
    held_out = held_out_batches(pairs, reference.logp, config.data, rows, dist.world_size)

    loss_fn = partial(preference_loss, config=config.preference, reference=reference.model)
    if is_verifier:
        loss_fn = verifier_loss
    samples = setup.open_log(run.samples, training, dist)
    metrics = setup.open_log(run.metrics, training, dist)
    evaluate = partial(
        measure, training, held_out, loss_fn, asked, tokenizer, config, metrics, samples, dist
    )
    done = fit(training, loss_fn, config.train, checkpointer, metrics, dist, evaluate)
    if done and is_verifier:
        training.identity["head"] = HEAD | score_statistics(model, held_out, dist)
    setup.finish(training, args, run, checkpointer, dist, done)


def prepare_pairs(
    data: PairDataConfig, tokenizer: Tokenizer, template: ChatTemplate, dist: Distributed
) -> Pairs:
    """The pairs of all sources, tokenized by the first process and read by all."""
    load = partial(load_pairs, data, tokenizer, template)
    pairs = load() if dist.is_main else None
    dist.barrier()
    return pairs or load()


@dataclass
class Reference:
    """What the policy is held to: a model that does not learn (live), or what it says of every
    pair (cached); a verifier has neither. `fingerprint` is that of its weights."""

    fingerprint: str
    model: Transformer | None = None
    logp: Tensor | None = None


def find_reference(
    args: CommandLine,
    config: PrefConfig,
    model: Transformer,
    pairs: Pairs,
    state: dict | None,
    dist: Distributed,
) -> Reference:
    """The reference of a resumed run, or of one that begins: then it is `model` as it stands."""
    if state is not None:
        found = Reference(state["reference"], logp=state["loader"]["reference"])
    else:
        found = Reference(weights_fingerprint(model.state_dict()))
    if config.preference.is_verifier:
        return found
    if config.preference.reference == "live":
        found.model = setup.load_reference(args, BASE_STAGES, config, found.fingerprint, dist)
    elif found.logp is None:
        rows = config.train.micro_batch
        batches = batches_of(np.arange(len(pairs)), pairs, None, config.data, rows)
        identity = {"weights": found.fingerprint, "pairs": pairs.fingerprint()}
        found.logp = cached_reference(
            model, batches, len(pairs), identity, config.data.cache_dir, dist
        )
    return found


def make_loader(
    config: PrefConfig, pairs: Pairs, reference: Tensor | None, dist: Distributed
) -> PairLoader:
    """The loader of this rank's batches, described in the log."""
    loader = PairLoader(
        pairs,
        reference,
        config.data,
        config.seed,
        rows_per_step=config.train.batch_tokens // config.data.seq_len,
        micro_batch=config.train.micro_batch,
        rank=dist.rank,
        world_size=dist.world_size,
    )
    get_logger().info(str(loader))
    return loader


def measure(
    training: Training,
    held_out: list[PairBatch],
    loss_fn: LossFn,
    asked: list[Question],
    tokenizer: Tokenizer,
    config: PrefConfig,
    metrics: MetricsLog,
    samples: MetricsLog,
    dist: Distributed,
) -> dict[str, float]:
    """The held-out pairs' loss and measures, and what the model answers."""
    values = held_out_preference(training.model, held_out, loss_fn, dist)
    if asked:
        answered, answers = answer_questions(training.model, asked, tokenizer, config.eval, dist)
        values |= answered
        for answer in answers:
            samples.write(training.step, answer)
    if CHOSEN in values and dist.is_main:
        tokens = sum(batch.lengths[batch.pair_ids >= 0, 0].sum().item() for batch in held_out)
        mean_tokens = tokens / sum(batch.weight for batch in held_out)
        warn_of_fall(metrics.path, training.step, values[CHOSEN], mean_tokens, config.preference)
    return values


def warn_of_fall(
    path: Path, step: int, chosen: float, tokens: float, config: PreferenceConfig
) -> None:
    """Say so when the chosen answers, of `tokens` each on average, have become much less likely."""
    earlier = [(line["step"], line[CHOSEN]) for line in read_metrics(path) if line.get(CHOSEN)]
    fall = chosen_fall([*earlier, (step, chosen)], config.warn_window) / tokens
    if fall > config.warn_fall:
        get_logger().warning(
            f"within {config.warn_window:,} steps the held-out chosen answers have lost {fall:.3f} "
            f"nats per token (preference.warn_fall: {config.warn_fall}): the policy unlearns what "
            "it should prefer. A smaller optim.lr, a larger preference.beta or nll_weight holds it"
        )


if __name__ == "__main__":
    run_script(main)
