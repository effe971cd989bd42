"""The preference loader: pairs -> rows -> paired batches, with exact state; and what is held out.

    row   [ x0 c0 ][ x0 r0 ][ x7 c7 ][ x7 r7 ] pad      two documents for a pair, its prompt twice
    place     0        0        1        1              of a pair among the P of a micro-batch
    seq_ids     0        1        2        3            2 x place + side, on the answers' targets

A pair stands in one row, so it is in one micro-batch and rows are planned from the pairs' lengths.
Every row has room for `max_pairs_per_row` pairs, used or not: all shapes but that of `cu_seqlens`
are fixed, and P is the rows of a micro-batch times that.

Left out: one copy of the prompt for both answers. It would save the prompt's second pass, but needs
positions and a mask that the attention kernels for packed documents do not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.chat_loader import Question
from data.packing import IGNORE, Batch, RowPlan, best_fit, make_batch
from data.preferences import PairDataConfig, Pairs
from utils.config import ConfigError


@dataclass
class PairBatch(Batch):
    """One micro-batch of pairs; `weight` is their number.

    Attributes:
        seq_ids: (B, T) int64, the sequence that a target belongs to, -1 where there is none.
        last_tokens: (P, 2) int64, where in the B * T tokens each sequence ends; 0 without a pair.
        pair_ids: (P,) int64, the pair at each place; -1 where there is none.
        lengths: (P, 2) float32, tokens of the answers; 1 without a pair.
        ref_logp: (P, 2) float32, the answers' log-probabilities under the reference, 0 if unknown.
    """

    seq_ids: torch.Tensor
    last_tokens: torch.Tensor
    pair_ids: torch.Tensor
    lengths: torch.Tensor
    ref_logp: torch.Tensor


def make_pair_batch(
    rows: list[list[int]], pairs: Pairs, reference: torch.Tensor | None, config: PairDataConfig
) -> PairBatch:
    """The pairs named in each row as tensors; `reference` (pairs, 2), None: not known."""
    most, seq_len = config.max_pairs_per_row, config.seq_len
    pieces = [[piece for index in row for piece in pairs.pieces(index)] for row in rows]
    seq_ids = np.full((len(rows), seq_len), -1)
    pair_ids = np.full(len(rows) * most, -1)
    last_tokens = np.zeros((len(pair_ids), 2), dtype=np.int64)
    lengths = np.ones((len(pair_ids), 2), dtype=np.float32)
    for r, row in enumerate(rows):
        pair_ids[r * most : r * most + len(row)] = row
        at = 0
        for number, piece in enumerate(pieces[r]):
            place, side = r * most + number // 2, number % 2
            learned = piece.targets != IGNORE
            seq_ids[r, at : at + len(piece)][learned] = 2 * place + side
            at += len(piece)
            last_tokens[place, side] = r * seq_len + at - 1
            lengths[place, side] = learned.sum()
    ids = torch.from_numpy(pair_ids)
    ref_logp = torch.zeros(len(ids), 2)
    if reference is not None:
        ref_logp[ids >= 0] = reference[ids[ids >= 0]]
    return PairBatch(
        **vars(make_batch(pieces, seq_len, 2 * most)) | {"weight": float(sum(map(len, rows)))},
        seq_ids=torch.from_numpy(seq_ids),
        last_tokens=torch.from_numpy(last_tokens),
        pair_ids=ids,
        lengths=torch.from_numpy(lengths),
        ref_logp=ref_logp,
    )


class PairLoader:
    """Yields, for each optimizer step, this rank's list of micro-batches.

    Its state holds `reference` too, so that a resumed run needs neither the reference model nor a
    cache: on a new disk there may be nothing but the checkpoint.

    Args:
        reference: (pairs, 2) log-probabilities under the reference, or None.
        rows_per_step: rows of all micro-batches and ranks together.
        micro_batch: rows per micro-batch of one rank.
    """

    def __init__(
        self,
        pairs: Pairs,
        reference: torch.Tensor | None,
        config: PairDataConfig,
        seed: int,
        rows_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pairs = pairs
        self.reference = reference
        self.config = config
        self.rows_per_step = rows_per_step
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = pairs.fingerprint()
        self.members = np.flatnonzero(~pairs.held_out)
        lengths = pairs.lengths[self.members]
        self.plan = RowPlan(lengths, config.seq_len, config.max_pairs_per_row, seed)

    def __iter__(self) -> Iterator[list[PairBatch]]:
        return self

    def __next__(self) -> list[PairBatch]:
        rows = [self.members[self.plan.next_row()].tolist() for _ in range(self.rows_per_step)]
        mine = range(self.rank * self.micro_batch, len(rows), self.world_size * self.micro_batch)
        return [
            make_pair_batch(
                rows[start : start + self.micro_batch], self.pairs, self.reference, self.config
            )
            for start in mine
        ]

    def steps(self, epochs: int) -> int:
        """Steps in which every pair is seen in `epochs` epochs."""
        return -(-self.plan.rows_in(epochs) // self.rows_per_step)

    def __str__(self) -> str:
        pairs, rows = len(self.members), self.plan.rows_in(1)
        per_step = self.rows_per_step * pairs / rows
        return f"an epoch: {pairs:,} pairs, {self.plan}; {per_step:,.0f} pairs a step on average"

    def state_dict(self) -> dict:
        return {
            **self.plan.state_dict(),
            "fingerprint": self.fingerprint,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is of other pairs, so that their order would be another.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the pairs are not those of the checkpoint (a file, a hub dataset or its revision "
                "has changed); restore them, or start another run"
            )
        self.plan.load_state_dict(state)
        self.reference = state["reference"]


# ---------------------------------------------------------------------------------------------
# Held out, and everything once


def held_out_batches(
    pairs: Pairs,
    reference: torch.Tensor | None,
    config: PairDataConfig,
    micro_batch: int,
    world_size: int = 1,
) -> list[PairBatch]:
    """At most `held_out_pairs` held-out pairs, from all over them, as batches."""
    chosen = _spread(np.flatnonzero(pairs.held_out), config.held_out_pairs)
    return list(batches_of(chosen, pairs, reference, config, micro_batch, world_size))


def batches_of(
    members: np.ndarray,
    pairs: Pairs,
    reference: torch.Tensor | None,
    config: PairDataConfig,
    micro_batch: int,
    world_size: int = 1,
) -> Iterator[PairBatch]:
    """Each of the pairs once, in batches of one shape, as many for each rank: the last are filled
    with empty rows."""
    plan = best_fit(pairs.lengths[members], config.seq_len, config.max_pairs_per_row)
    rows = [members[row].tolist() for row in plan]
    rows += [[] for _ in range(-len(rows) % (micro_batch * world_size))]
    for start in range(0, len(rows), micro_batch):
        yield make_pair_batch(rows[start : start + micro_batch], pairs, reference, config)


def choose_questions(pairs: Pairs, count: int, eos_id: int) -> list[Question]:
    """At most `count` held-out prompts, from all over them, with the first turn of the chosen
    answer."""
    last = pairs.ends[::2] - 1
    whole = (pairs.tokens[last] == eos_id) & pairs.learned[last]  # not cut
    members = _spread(np.flatnonzero(pairs.held_out & whole), count)
    return [_question(pairs, index) for index in members]


def _question(pairs: Pairs, index: int) -> Question:
    span = pairs.slice(2 * index)
    tokens, learned = pairs.tokens[span], pairs.learned[span]
    start, *later = np.flatnonzero(np.diff(learned, prepend=False)).tolist()
    end = later[0] if later else len(tokens)
    return Question(
        tokens[:start].tolist(), tokens[start : end - 1].tolist(), bool(pairs.known[index])
    )


def _spread(members: np.ndarray, count: int) -> np.ndarray:
    few = min(len(members), count)
    return members[np.arange(few) * len(members) // max(1, few)]
