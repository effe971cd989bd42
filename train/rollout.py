"""Rollouts: prompts are sampled, scored and handed to the training loop as batches.

    prompts --> engine --> completions --> rewards --> advantages --> batches of a step
       ^                                                                          |
       +----------------------- the weights have changed <------------------------+

A rollout is a number of groups, each some completions of one prompt. It is used up in `minibatches`
optimizer steps; then the next one is sampled from the weights as they are. To `train.loop.fit` it
is a loader like any other.

Every completion has a seed of its own, keyed by (rollout, place, prompt, sample): a run that is
killed while it samples samples the same again. A finished rollout is part of the state until it is
used up.

Sources: groups, GRPO (Shao et al. 2024); groups without signal replaced by others, DAPO (Yu et al.
2025). Left out: sampling while the model trains, and rollouts older than one policy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from data.policy_batch import Completions, PolicyBatch, policy_batches
from data.prompts import PromptOrder, Prompts
from models.generate import Engine
from models.sampling import Sampling
from models.transformer import Transformer
from train.groups import Group, sample_groups
from train.judge import Judge
from train.loss import token_logprobs
from train.policy import (
    PolicyConfig,
    advantages,
    batch_weight,
    has_signal,
    metric_shares,
    overlong_penalty,
    policy_loss,
    token_shares,
)
from utils.config import Config, Problem
from utils.distributed import Distributed


class RolloutConfig(Config):
    """How much is sampled, and how it is used."""

    prompts: int
    """Groups of a rollout."""
    group_size: int
    """Completions of one prompt."""
    max_new_tokens: int
    """Where a completion that does not stop is cut off."""
    temperature: float = 1.0
    minibatches: int = 1
    """Optimizer steps per rollout."""
    dynamic_sampling: bool = True
    """Drop groups whose rewards are all equal, which teach nothing, and sample others in their
    place."""
    max_refills: int = 3
    """So often at most; then a smaller rollout is used."""
    slots: int | None = None
    """Completions sampled at once; null: all of a rollout. Fewer need less memory."""
    seq_len: int = 2048
    """Tokens per row when training on completions."""
    max_completions_per_row: int = 32

    def problems(self) -> Iterator[Problem]:
        least = {"prompts": 1, "group_size": 2, "max_new_tokens": 1, "minibatches": 1}
        least |= {"max_refills": 0, "slots": 1, "seq_len": 2, "max_completions_per_row": 1}
        for key, minimum in least.items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                yield Problem((key,), f"{key} ({value}) must be {minimum} or more")
        if self.temperature <= 0:
            yield Problem(
                ("temperature",),
                f"temperature ({self.temperature}) must be above 0: equal completions of a group "
                "teach nothing",
            )
        if self.minibatches > self.prompts:
            yield Problem(
                ("minibatches", "prompts"),
                f"minibatches ({self.minibatches}) must not exceed prompts ({self.prompts}): each "
                "needs a group",
            )


def make_engine(
    model: Transformer,
    config: RolloutConfig,
    max_prompt_tokens: int,
    eos_id: int,
    world_size: int = 1,
) -> Engine:
    """One rank's engine for a run's rollouts and evaluations."""
    return Engine(
        model,
        config.slots or -(-config.prompts // world_size) * config.group_size,
        max_prompt_tokens + config.max_new_tokens,
        sampling=Sampling(temperature=config.temperature),
        stop_ids=[eos_id],
    )


class RolloutLoader:
    """Yields, for each optimizer step, this rank's list of micro-batches.

    Args:
        model: the policy; its weights at the time of a rollout are used.
        reference: the model that the KL divergence is measured to, or None.
        micro_batch: rows per micro-batch of one rank.
    """

    def __init__(
        self,
        model: Transformer,
        engine: Engine,
        prompts: Prompts,
        judge: Judge,
        config: RolloutConfig,
        policy: PolicyConfig,
        seed: int,
        micro_batch: int,
        dist: Distributed,
        reference: Transformer | None = None,
    ) -> None:
        self.model, self.reference, self.engine = model, reference, engine
        self.prompts, self.judge = prompts.train, judge
        self.prompt_tokens = [prompt.tokens for prompt in prompts.train]
        self.config, self.policy = config, policy
        self.seed, self.micro_batch, self.dist = seed, micro_batch, dist
        self.order = PromptOrder(prompts, seed)
        self.rollout = 0
        self.minibatch = 0
        self.completions: Completions | None = None
        self.window: dict[str, float] = {}  # sums since the last line of metrics
        self.seconds = 0.0  # of sampling and scoring, in this window
        self.window_began = time.monotonic()

    def __iter__(self) -> Iterator[list[PolicyBatch]]:
        return self

    def __next__(self) -> list[PolicyBatch]:
        if self.completions is None:
            self.completions = self._roll_out()
            self.rollout += 1
        batches = self._batches(self.minibatch)
        self.minibatch = (self.minibatch + 1) % self.config.minibatches
        if self.minibatch == 0:
            self.completions = None
        return batches

    # -----------------------------------------------------------------------------------------
    # Sampling

    def _roll_out(self) -> Completions:
        began = time.monotonic()
        self.engine.refresh()
        groups: list[Group] = []
        for refill in range(1 + self.config.max_refills):
            missing = self.config.prompts - len(groups)
            numbers = [next(self.order) for _ in range(missing)]
            key = (self.seed, "rollout", self.rollout, refill)
            sampled = sample_groups(
                self.engine,
                self.prompts,
                numbers,
                self.config.group_size,
                self.config.max_new_tokens,
                key,
                self.judge,
                self.dist,
            )
            self._count(sampled)
            groups += [g for g in sampled if self._teaches(g)]
            if len(groups) == self.config.prompts:
                break
        completions = self._completions(groups)
        self.seconds += time.monotonic() - began
        return completions

    def _teaches(self, group: Group) -> bool:
        return not self.config.dynamic_sampling or bool(has_signal(self._rewards([group])))

    def _rewards(self, groups: list[Group]) -> Tensor:
        """(groups, G), long completions punished."""
        lengths = torch.tensor([[len(c.tokens) for c in group.completions] for group in groups])
        rewards = torch.tensor([group.reward for group in groups])
        most, buffer = self.config.max_new_tokens, self.policy.overlong_tokens
        return rewards + overlong_penalty(lengths, most, buffer)

    def _completions(self, groups: list[Group]) -> Completions:
        """Everything that training needs of the groups, as tensors."""
        if not groups:
            empty = torch.zeros(0)
            whole = torch.zeros(0, dtype=torch.int64)
            return Completions(whole, whole, whole, empty, empty)
        sampled = [completion for group in groups for completion in group.completions]
        result = Completions(
            prompt_ids=torch.tensor([group.prompt for group in groups]).repeat_interleave(
                self.config.group_size
            ),
            lengths=torch.tensor([len(completion.tokens) for completion in sampled]),
            tokens=torch.tensor([token for completion in sampled for token in completion.tokens]),
            engine_logp=torch.tensor([p for completion in sampled for p in completion.logprobs]),
            advantage=advantages(self._rewards(groups), self.policy.advantage).flatten(),
        )
        if self.config.minibatches > 1:  # else the policy has not moved when it is trained
            # In float32 on a CPU the engine's are the trainer's, to 1e-5.
            exact = self.model.dtype == torch.float32 and self.model.device.type == "cpu"
            result.old_logp = result.engine_logp if exact else self._logprobs(self.model, result)
        if self.reference is not None:
            result.ref_logp = self._logprobs(self.reference, result)
        return result

    @torch.no_grad()
    def _logprobs(self, model: Transformer, completions: Completions) -> Tensor:
        """(N,) of the completions' tokens under a model, as the trainer computes them."""
        result = torch.zeros(len(completions.tokens), device=self.dist.device)
        for batch in self._pack(completions, np.arange(len(completions))):
            batch = batch.to(self.dist.device)
            logp = tempered_logprobs(model, batch, self.config.temperature)
            learned = batch.learned.flatten()
            result[batch.index.flatten()[learned]] = logp[learned].float()
        return self.dist.all_reduce_sum(result).cpu()

    # -----------------------------------------------------------------------------------------
    # Batches

    def _batches(self, minibatch: int) -> list[PolicyBatch]:
        """A part of the groups, as much as every other minibatch has."""
        completions = self.completions
        groups = np.arange(len(completions)).reshape(-1, self.config.group_size)
        members = np.array_split(groups, self.config.minibatches)[minibatch].flatten()
        return self._pack(completions, members)

    def _pack(self, completions: Completions, members: np.ndarray) -> list[PolicyBatch]:
        """This rank's batches; one empty batch where there is nothing."""
        batches = policy_batches(
            completions,
            members,
            self.prompt_tokens,
            self.config.seq_len,
            self.config.max_completions_per_row,
            self.micro_batch,
            self.dist.world_size,
        )[self.dist.rank :: self.dist.world_size]
        for batch in batches:
            tokens = int(batch.weight)  # targets
            batch.weight = batch_weight(
                batch.n_completions,
                tokens,
                self.policy.normalisation,
                self.config.max_new_tokens,
            )
        return batches

    # -----------------------------------------------------------------------------------------
    # Measures and state

    def _count(self, groups: list[Group]) -> None:
        """Adds what was sampled to the sums of this window, dropped groups included."""
        sampled = [completion for group in groups for completion in group.completions]
        sums = {
            "groups": len(groups),
            "zero_std": len(groups) - int(has_signal(self._rewards(groups)).sum()),
            "completions": len(sampled),
            "reward": sum(reward for group in groups for reward in group.reward),
            "passed": sum(rule == 1 for group in groups for rule in group.rule),
            "tokens": sum(len(completion.tokens) for completion in sampled),
            "stopped": sum(completion.stopped for completion in sampled),
        }
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0) + value

    def measures(self) -> dict[str, float]:
        """Means over what was sampled since the last call; nothing if nothing was."""
        sums, seconds, now = self.window, self.seconds, time.monotonic()
        passed = now - self.window_began
        self.window, self.seconds, self.window_began = {}, 0.0, now
        if not sums:
            return {}
        n = sums["completions"]
        return {
            "rlvr/reward_mean": sums["reward"] / n,
            "rlvr/pass_rate": sums["passed"] / n,
            "rlvr/zero_std_frac": sums["zero_std"] / sums["groups"],
            "rlvr/response_tokens": sums["tokens"] / n,
            "rlvr/stopped_frac": sums["stopped"] / n,
            "rlvr/rollout_tokens_per_sec": sums["tokens"] / max(seconds, 1e-9),
            "rlvr/rollout_frac": seconds / max(passed, 1e-9),
        }

    def state_dict(self) -> dict:
        left = self.completions
        return {
            "order": self.order.state_dict(),
            "rollout": self.rollout,
            "minibatch": self.minibatch,
            "completions": (
                None if left is None else {f.name: getattr(left, f.name) for f in fields(left)}
            ),
            "window": dict(self.window),
            "seconds": self.seconds,
            "window_seconds": time.monotonic() - self.window_began,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is of other prompts.
        """
        self.order.load_state_dict(state["order"])
        self.rollout, self.minibatch = state["rollout"], state["minibatch"]
        left = state["completions"]
        self.completions = None if left is None else Completions(**left)
        self.window, self.seconds = dict(state["window"]), state["seconds"]
        self.window_began = time.monotonic() - state["window_seconds"]


def policy_objective(
    model: Transformer, batch: PolicyBatch, config: PolicyConfig, rollout: RolloutConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed policy loss of a batch's tokens, and what to log of it, summed."""
    logp = tempered_logprobs(model, batch, rollout.temperature)  # (B T,)
    old = batch.old_logp.flatten() if rollout.minibatches > 1 else logp.detach()
    losses, metrics = policy_loss(
        logp,
        old,
        batch.advantage.flatten(),
        config,
        engine_logp=batch.engine_logp.flatten(),
        ref_logp=batch.ref_logp.flatten() if config.kl_weight else None,
    )
    lengths = batch.lengths.flatten()
    kind = config.normalisation
    shares = metric_shares(lengths, kind, rollout.max_new_tokens)
    sums = {name: (value * shares).sum() for name, value in metrics.items()}
    return (losses * token_shares(lengths, kind)).sum(), sums


def tempered_logprobs(model: Transformer, batch: PolicyBatch, temperature: float) -> Tensor:
    """(B T,) log-probabilities of the targets under softmax(logits / temperature), 0 elsewhere."""
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens).flatten(0, 1)  # (B T, C)
    if temperature != 1:
        hidden = hidden / temperature
    return token_logprobs(hidden, model.head_weight, batch.targets.flatten())[0]
