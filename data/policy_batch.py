"""Completions to rows: what a policy-gradient step sees of a rollout.

    row   [ prompt completion ][ prompt completion ] pad      a document for each completion

Nothing is learned from a prompt. A completion stands whole in one row, and its last token is a
target but not an input, since nothing follows it. All shapes but that of `cu_seqlens` are fixed,
whatever was sampled.

Left out: one copy of the prompt for all completions of a group, which would need a mask that the
attention kernels for packed documents do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.packing import IGNORE, Batch, Piece, best_fit, make_batch


@dataclass
class Completions:
    """Sampled completions and what is known of them; n of them with N tokens in all.

    Attributes:
        prompt_ids: (n,) int64, which prompt each continues.
        lengths: (n,) int64, tokens of each.
        tokens: (N,) int64, one after the other.
        engine_logp: (N,) float32, log-probabilities when they were sampled.
        advantage: (n,) float32.
        old_logp, ref_logp: (N,) float32 under the policy of the rollout as the trainer computes it
            and under the reference, or None.
    """

    prompt_ids: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor
    engine_logp: torch.Tensor
    advantage: torch.Tensor
    old_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class PolicyBatch(Batch):
    """One micro-batch of completions; `weight` is chosen by how tokens are averaged.

    All are (B, T), at the place of the token that predicts, and 0 where nothing is learned.

    Attributes:
        lengths: int64, tokens of the completion that a target belongs to.
        advantage, engine_logp, old_logp, ref_logp: float32; the last two 0 where they are unknown.
        index: int64, the target's number among the N tokens of the completions.
        n_completions: how many the batch holds.
    """

    lengths: torch.Tensor
    advantage: torch.Tensor
    engine_logp: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    index: torch.Tensor
    n_completions: int

    @property
    def learned(self) -> torch.Tensor:
        """(B, T) bool: where a completion's token is predicted."""
        return self.targets != IGNORE


def policy_batches(
    completions: Completions,
    members: np.ndarray,
    prompts: Sequence[Sequence[int]],
    seq_len: int,
    max_documents: int,
    micro_batch: int,
    world_size: int = 1,
) -> list[PolicyBatch]:
    """The completions named by `members` in batches of one shape, as many for each rank.

    Args:
        prompts: the tokens of each prompt that `prompt_ids` may name.
    """
    starts = (completions.lengths.cumsum(0) - completions.lengths).tolist()
    spans = [slice(s, s + n) for s, n in zip(starts, completions.lengths.tolist(), strict=True)]
    prompt_of = [prompts[i] for i in completions.prompt_ids.tolist()]
    sizes = [len(prompt_of[m]) + spans[m].stop - spans[m].start - 1 for m in members]
    plan = best_fit(sizes, seq_len, max_documents)
    rows = [[int(members[i]) for i in row] for row in plan]
    unit = micro_batch * world_size
    rows += [[] for _ in range(-len(rows) % unit if rows else unit)]
    return [
        _batch(rows[i : i + micro_batch], completions, prompt_of, spans, seq_len, max_documents)
        for i in range(0, len(rows), micro_batch)
    ]


def _batch(
    rows: list[list[int]],
    completions: Completions,
    prompt_of: list[Sequence[int]],
    spans: list[slice],
    seq_len: int,
    max_documents: int,
) -> PolicyBatch:
    shape = (len(rows), seq_len)
    index = torch.zeros(shape, dtype=torch.int64)
    member = torch.zeros(shape, dtype=torch.int64)
    pieces = []
    for r, row in enumerate(rows):
        at, of_row = 0, []
        for m in row:
            piece = _piece(prompt_of[m], completions.tokens[spans[m]].numpy())
            at += len(piece)
            learned = slice(at - (spans[m].stop - spans[m].start), at)
            index[r, learned] = torch.arange(spans[m].start, spans[m].stop)
            member[r, learned] = m
            of_row.append(piece)
        pieces.append(of_row)
    batch = make_batch(pieces, seq_len, max_documents)
    learned = batch.targets != IGNORE

    def placed(values: torch.Tensor | None, where: torch.Tensor) -> torch.Tensor:
        if values is None or not learned.any():
            return torch.zeros(shape)
        return values[where].where(learned, 0)

    return PolicyBatch(
        **vars(batch),
        lengths=placed(completions.lengths, member),
        advantage=placed(completions.advantage, member),
        engine_logp=placed(completions.engine_logp, index),
        old_logp=placed(completions.old_logp, index),
        ref_logp=placed(completions.ref_logp, index),
        index=index,
        n_completions=sum(map(len, rows)),
    )


def _piece(prompt: Sequence[int], completion: np.ndarray) -> Piece:
    """The document of a completion: its targets are the completion's tokens, and those alone."""
    whole = np.concatenate([np.asarray(prompt, dtype=np.int64), completion])
    targets = whole[1:].copy()
    targets[: len(prompt) - 1] = IGNORE
    return Piece(whole[:-1], targets)
