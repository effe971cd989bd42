"""Fine-tune a base model on conversations, so that it answers and stops.

    python train_sft.py --config configs/demo/sft.yaml \\
        --base-model runs/demo/pretrain/pretrain_final.pt                     # CPU, 90 seconds
    python train_sft.py --config configs/sft_160m.yaml --dry-run              # what it would cost
    python train_sft.py --config configs/sft_160m.yaml \\
        --base-model runs/pretrain_160m/pretrain_160m_final.pt                # start
    python train_sft.py --config configs/sft_160m.yaml --resume               # go on after a stop

Any key of the config can be given as key=value: optim.lr=3e-4 train.epochs=1.

What it learns is cross-entropy on the assistant's tokens alone, the end of its turn included. The
tokenizer comes with the base model, which may be a pretrain or an sft checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from data.chat import ChatTemplate
from data.chat_loader import ChatLoader, Question, choose_questions, held_out_batches
from data.conversations import ChatDataConfig, Conversations, load_conversations
from data.packing import Batch
from data.plain_text import load_plain_text, warn_of_leaks
from data.streaming import Prefetcher
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train import plan, setup
from train.chat_evals import ChatEvalConfig, answer_questions, few_shot_exact_match
from train.evals import held_out_loss
from train.loop import Training, fit
from train.loss import cross_entropy_loss
from train.runtime import RuntimeConfig, build_model, start_devices
from train.setup import EpochTrainConfig
from utils.command_line import parse_command_line, run_script
from utils.config import Config, Problem, load_config
from utils.cost_tracker import CostConfig
from utils.distributed import Distributed
from utils.logging import MetricsLog, get_logger

STAGE = "sft"
BASE_STAGES = ("pretrain", "sft")
SHOTS = 3  # solved examples that the base model is measured with


class SFTConfig(Config):
    """One SFT run; each section is documented where it is used."""

    name: str
    """The run's folder under `runs_dir`, and the name of its final checkpoint."""
    runs_dir: str = "runs"
    seed: int = 0
    model: ModelConfig
    """The base model's shape."""
    data: ChatDataConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: EpochTrainConfig
    eval: ChatEvalConfig = ChatEvalConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cost: CostConfig = CostConfig()

    def problems(self) -> Iterator[Problem]:
        yield from setup.shape_problems(self.train, self.data.seq_len, self.model)


def main(argv: list[str]) -> None:
    args = parse_command_line(__doc__, base_model=True, argv=argv)
    config = load_config(SFTConfig, args.config, args.overrides)
    if args.dry_run:
        planned = plan.with_steps(config, plan.expected_steps(config))
        plan.print_plan(planned, config.data.seq_len)
        return

    dist = start_devices(config.runtime, config.seed)
    run, checkpointer, state = setup.open_run(args, config, STAGE, dist)

    base = state or setup.load_base(args, BASE_STAGES, config.model)
    tokenizer = Tokenizer.from_state(base["tokenizer"])
    template = ChatTemplate.of(tokenizer)
    sources, texts = prepare_data(config.data, tokenizer, template, dist)
    loader = make_loader([*sources, *texts], config, dist)
    get_logger().info(str(loader))
    if texts and base["stage"] == "pretrain":
        warn_of_leaks(config.data, base["config"])
    held_out = choose_held_out(sources, texts, config)
    known = [s for s in sources if s.source.exact_match]
    asked = choose_questions(sources, config.eval.questions, tokenizer.eos_id)
    examples = choose_questions(known, SHOTS, tokenizer.eos_id, held_out=False)

    model = build_model(config.model, config.runtime, dist)
    model.load_state_dict(base["model"])
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
        identity=setup.identity(STAGE, config, tokenizer, template),
    )
    setup.restore(training, state)

    samples = setup.open_log(run.samples, training, dist)
    evaluate = partial(
        measure, training, held_out, asked, examples, tokenizer, config.eval, samples, dist
    )
    metrics = setup.open_log(run.metrics, training, dist)
    done = fit(
        training,
        partial(cross_entropy_loss, z_loss=config.train.z_loss),
        config.train,
        checkpointer,
        metrics,
        dist,
        evaluate,
    )
    setup.finish(training, args, run, checkpointer, dist, done)


def prepare_data(
    data: ChatDataConfig, tokenizer: Tokenizer, template: ChatTemplate, dist: Distributed
) -> tuple[list[Conversations], list[Conversations]]:
    """Conversations and plain text of every source, tokenized by the first process, read by all."""

    def load() -> tuple[list[Conversations], list[Conversations]]:
        chats = [load_conversations(s, data, tokenizer, template) for s in data.sources]
        return chats, [load_plain_text(s, data, tokenizer) for s in data.text_sources]

    loaded = load() if dist.is_main else None
    dist.barrier()
    return loaded or load()


def make_loader(sources: list[Conversations], config: SFTConfig, dist: Distributed) -> ChatLoader:
    return ChatLoader(
        sources,
        config.data,
        config.seed,
        rows_per_step=config.train.batch_tokens // config.data.seq_len,
        micro_batch=config.train.micro_batch,
        rank=dist.rank,
        world_size=dist.world_size,
    )


def choose_held_out(
    sources: list[Conversations], texts: list[Conversations], config: SFTConfig
) -> dict[str, list[Batch]]:
    """Batches of held-out conversations, and of held-out text if there is any."""
    rows = config.train.micro_batch
    held_out = {STAGE: held_out_batches(sources, config.data, rows)}
    if any(text.held_out.any() for text in texts):
        held_out["text"] = held_out_batches(texts, config.data, rows)
    return held_out


def measure(
    training: Training,
    held_out: dict[str, list[Batch]],
    asked: list[Question],
    examples: list[Question],
    tokenizer: Tokenizer,
    config: ChatEvalConfig,
    samples: MetricsLog,
    dist: Distributed,
) -> dict[str, float]:
    """Held-out loss, of conversations and apart from it of plain text, and what the model answers;
    before the first step also the base model's exact match when it is shown `examples` instead."""
    model = training.model
    shares = {kind: float(kind == STAGE) for kind in held_out}
    values = held_out_loss(model, held_out, shares, cross_entropy_loss, dist)
    metrics = {key: values[key] for key in ("val/loss", "val/ppl")}
    metrics["sft/val_loss"] = values["val/loss"]
    if "text" in held_out:
        metrics["text_val_loss"] = values["text_val_loss"]
    answered, answers = answer_questions(model, asked, tokenizer, config, dist)
    metrics |= answered
    if training.step == 0 and examples:
        metrics["sft/base_exact_match"] = few_shot_exact_match(
            model, examples, asked, tokenizer, dist
        )
    for answer in answers:
        samples.write(training.step, answer)
    return metrics


if __name__ == "__main__":
    run_script(main)
