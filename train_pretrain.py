"""Pretrain a language model from text.

    python train_pretrain.py --config configs/demo/pretrain.yaml              # CPU, three minutes
    python train_pretrain.py --config configs/pretrain_160m.yaml --dry-run    # what it would cost
    python train_pretrain.py --config configs/pretrain_160m.yaml              # start
    python train_pretrain.py --config configs/pretrain_160m.yaml --resume     # go on after a stop
    torchrun --nproc_per_node 2 train_pretrain.py --config configs/pretrain_160m.yaml

Any key of the config can be given as key=value: optim.lr=1e-3 train.micro_batch=48.

Decay off any checkpoint of the stable phase, into a run of its own:

    python train_pretrain.py --config configs/pretrain_160m.yaml name=pretrain_160m_3k \\
        --resume-from runs/pretrain_160m/checkpoints/step_00003000.pt \\
        schedule.decay_now=true schedule.decay_steps=500
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from data.shards import ShardStore
from data.streaming import (
    DataConfig,
    Prefetcher,
    PretrainLoader,
    held_out_batches,
    make_tokenizer,
    open_stores,
)
from data.tokenizer import Tokenizer, TokenizerConfig
from data.workers import WorkerPool
from models.config import ModelConfig
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from train import plan, setup
from train.evals import held_out_loss
from train.loop import Training, fit
from train.loss import cross_entropy_loss
from train.runtime import RuntimeConfig, build_model, start_devices
from train.setup import TrainConfig
from utils.command_line import parse_command_line, run_script
from utils.config import Config, ConfigError, Problem, load_config
from utils.cost_tracker import CostConfig
from utils.distributed import Distributed

STAGE = "pretrain"


class PretrainConfig(Config):
    """One pretraining run; each section is documented where it is used."""

    name: str
    """The run's folder under `runs_dir`, and the name of its final checkpoint."""
    runs_dir: str = "runs"
    seed: int = 0
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    runtime: RuntimeConfig = RuntimeConfig()
    cost: CostConfig = CostConfig()

    def problems(self) -> Iterator[Problem]:
        yield from setup.shape_problems(self.train, self.data.seq_len, self.model)


def main(argv: list[str]) -> None:
    args = parse_command_line(__doc__, argv=argv)
    config = load_config(PretrainConfig, args.config, args.overrides)
    if args.dry_run:
        plan.print_plan(config, config.data.seq_len)
        return

    dist = start_devices(config.runtime, config.seed)
    run, checkpointer, state = setup.open_run(args, config, STAGE, dist)

    tokenizer = load_or_make_tokenizer(config, state)
    stores = prepare_stores(config.data, tokenizer, state, dist)
    loader = PretrainLoader(
        stores,
        config.data,
        config.seed,
        rows_per_step=config.train.batch_tokens // config.data.seq_len,
        micro_batch=config.train.micro_batch,
        rank=dist.rank,
        world_size=dist.world_size,
        pool=start_workers(config.data, tokenizer, dist),
    )
    held_out = held_out_batches(stores, config.data, config.train.micro_batch)

    model = build_model(config.model, config.runtime, dist)
    optimizer = make_optimizer(model.named_parameters(), config.optim)
    schedule = Schedule(config.schedule, config.train.total_steps)
    training = Training(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loader=Prefetcher(loader),
        cost=setup.make_cost_tracker(config.cost, dist),
        identity=setup.identity(STAGE, config, tokenizer, None),
    )
    setup.restore(training, state)

    evaluate = partial(
        held_out_loss, model, held_out, domain_shares(config.data), cross_entropy_loss, dist
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


def load_or_make_tokenizer(config: PretrainConfig, state: dict | None) -> Tokenizer:
    """A resumed run's own tokenizer, else the configured one.

    Raises:
        ConfigError: its vocabulary does not fit the model's embedding.
    """
    if state is not None:
        tokenizer = Tokenizer.from_state(state["tokenizer"])
    else:
        tokenizer = make_tokenizer(config.tokenizer, config.data.sources)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, more than model.vocab_size "
            f"({config.model.vocab_size:,}): raise model.vocab_size or choose another tokenizer"
        )
    return tokenizer


def prepare_stores(
    data: DataConfig, tokenizer: Tokenizer, state: dict | None, dist: Distributed
) -> list[ShardStore]:
    """Every source's shards, as far as they are made, and held-out documents.

    The first process looks up what the sources hold, and the others read what it wrote.
    """
    loader_state = state and state["loader"]
    if dist.is_main:
        stores = open_stores(data, tokenizer, loader_state)
    dist.barrier()
    return stores if dist.is_main else open_stores(data, tokenizer, loader_state)


def start_workers(data: DataConfig, tokenizer: Tokenizer, dist: Distributed) -> WorkerPool | None:
    """The processes that tokenize while training reads; the first process has them."""
    return WorkerPool(data.workers, tokenizer) if data.workers and dist.is_main else None


def domain_shares(data: DataConfig) -> dict[str, float]:
    """Each domain's share of the training tokens."""
    total = sum(s.weight for s in data.sources)
    shares: dict[str, float] = {}
    for source in data.sources:
        shares[source.domain] = shares.get(source.domain, 0.0) + source.weight / total
    return shares


if __name__ == "__main__":
    run_script(main)
