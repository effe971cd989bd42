"""Documents to rows: the `Batch` that every stage's model sees, and the packer that fills it.

    piece  piece      piece ...
    [BOS a b EOS][BOS c d e | f g EOS][BOS ...      cut where a row ends; nothing is padded
    row 0: T tokens          row 1: T tokens

A piece cut by the end of a row goes on in the next row as a document of its own: positions restart
and attention does not look back. Its last token before the cut still learns to predict the token
after it, because targets travel with the pieces: packing loses no target, and no target ever
crosses from one document to the next.

`cu_seqlens` is as long as the documents need, rounded up in steps of 64: attention kernels set
memory aside for every entry, 128 rows in flash-attn-4's backward pass, so room for as many
documents as rows may hold would cost more than the documents (docs/LOG.md). A row that holds
`max_documents` pieces is closed early; its tail is padding, a document of its own in which nothing
is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from utils.seed import derive, shuffle_order

IGNORE = -100
BOUNDS_STEP = 64  # cu_seqlens comes in few lengths, and with few entries to spare


@dataclass
class Batch:
    """One micro-batch of packed rows.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, the token to predict at each place, -100 where nothing is learned.
        positions: (B, T) int64, restarting at each document.
        cu_seqlens: (documents + 1,) int32, where documents begin and end in the B * T tokens;
            documents do not cross rows; unused entries repeat the end.
        max_seqlen: T.
        weight: denominator of the loss; here the number of targets.
        attended_pairs: (query, key) pairs that the causal document mask leaves, for counting FLOPs.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    weight: float
    attended_pairs: int

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; a copy to a GPU does not block the host."""
        whole = self.pin_memory() if device.type == "cuda" else self
        return whole._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch with what lies in host memory in pinned memory, from which GPUs read."""
        return self._each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


@dataclass
class Piece:
    """Consecutive tokens of one document and the token each is to predict, both (n,) int64."""

    tokens: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, at: int) -> tuple[Piece, Piece]:
        return (
            Piece(self.tokens[:at], self.targets[:at]),
            Piece(self.tokens[at:], self.targets[at:]),
        )


Row = list[Piece]


def cut_document(document: np.ndarray, start: int, most: int) -> Piece:
    """The piece of at most `most` tokens that begins at `start`.

    Each token's target is the next token of the document, also past the end of the piece; the
    document's last token has none.
    """
    end = min(start + most, len(document))
    tokens = document[start:end].astype(np.int64)
    targets = np.full(end - start, IGNORE, dtype=np.int64)
    following = document[start + 1 : end + 1]
    targets[: len(following)] = following
    return Piece(tokens, targets)


class RowPacker:
    """Fills rows of `seq_len` tokens from an endless stream of pieces.

    Args:
        max_documents: pieces a row may hold before it is closed early.
    """

    def __init__(self, seq_len: int, max_documents: int) -> None:
        self.seq_len = seq_len
        self.max_documents = max_documents
        self.open: Piece | None = None  # what the last row had no room for

    def next_row(self, pieces: Iterator[Piece]) -> Row:
        """The next row; takes from `pieces` only what it needs. Shorter only where they end."""
        row, room = [], self.seq_len
        while room > 0 and len(row) < self.max_documents:
            piece, self.open = self.open or next(pieces, None), None
            if piece is None:
                break
            if len(piece) > room:
                piece, self.open = piece.split(room)
            row.append(piece)
            room -= len(piece)
        return row

    def state_dict(self) -> dict:
        if self.open is None:
            return {"open": None}
        tokens, targets = map(torch.from_numpy, (self.open.tokens, self.open.targets))
        return {"open": {"tokens": tokens, "targets": targets}}

    def load_state_dict(self, state: dict) -> None:
        opened = state["open"]
        self.open = opened and Piece(opened["tokens"].numpy(), opened["targets"].numpy())


def pack_rows(documents: Iterable[np.ndarray], seq_len: int, max_documents: int) -> list[Row]:
    """A finite list of documents as rows; the last one may be short."""
    pieces = (
        cut_document(document, start, seq_len)
        for document in documents
        for start in range(0, len(document), seq_len)
    )
    packer, rows = RowPacker(seq_len, max_documents), []
    while row := packer.next_row(pieces):
        rows.append(row)
    return rows


def best_fit(lengths: Iterable[int], seq_len: int, max_documents: int) -> list[list[int]]:
    """Which documents share a row, none of them cut: each goes where the least room is left over.

    Best fit, in the order given (Johnson 1974): a document goes into the fullest row that still has
    room for it, else into a new one. In shuffled order the rows mix long and short documents, which
    best fit *decreasing* would not.

    Args:
        lengths: at most `seq_len` each.

    Returns:
        The documents' numbers in each row; rows in the order in which they were begun.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> open rows with that much
    rooms = 0  # bit r is set where by_room[r] has a row
    for document, length in enumerate(map(int, lengths)):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: least room
            row = by_room[room].pop()
            if not by_room[room]:
                rooms -= 1 << room
        else:
            row, room = len(rows), seq_len
            rows.append([])
        rows[row].append(document)
        room -= length
        if room > 0 and len(rows[row]) < max_documents:
            by_room.setdefault(room, []).append(row)
            rooms |= 1 << room
    return rows


def longest_first(lengths: Sequence[int], seq_len: int) -> Iterator[list[int]]:
    """Which documents share a row, none of them cut: in each the longest that still fits is next.

    The same rows as those of first fit decreasing (Johnson 1974), but one is finished before the
    next is begun, so the first can be used while the last are not planned yet.

    Args:
        lengths: at least 1 and at most `seq_len` each.

    Yields:
        The documents' numbers in a row.
    """
    waiting: dict[int, list[int]] = {}  # length -> documents
    for document in reversed(range(len(lengths))):
        waiting.setdefault(lengths[document], []).append(document)
    left = sum(1 << length for length in waiting)  # bit n is set where waiting[n] is not empty
    while left:
        row, room = [], seq_len
        while fitting := left & ((2 << room) - 1):
            length = fitting.bit_length() - 1
            row.append(waiting[length].pop())
            if not waiting[length]:
                left -= 1 << length
            room -= length
        yield row


class RowPlan:
    """Endless rows of whole documents: each epoch is shuffled and planned anew by `best_fit`.

    After an epoch's last row comes the next one's first. The plan follows from lengths, seed and
    epoch, so the state is (epoch, row).

    Args:
        lengths: (n,) tokens that each document takes.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, max_documents: int, seed: int) -> None:
        self.lengths = lengths
        self.seq_len = seq_len
        self.max_documents = max_documents
        self.seed = seed
        self.epoch = self.row = 0
        self._planned = (0, self.of_epoch(0))

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The documents in each row of an epoch."""
        order = shuffle_order(len(self.lengths), derive(self.seed, "rows", epoch))
        rows = best_fit(self.lengths[order], self.seq_len, self.max_documents)
        return [order[row].tolist() for row in rows]

    def next_row(self) -> list[int]:
        if self._planned[0] != self.epoch:
            self._planned = (self.epoch, self.of_epoch(self.epoch))
        rows = self._planned[1]
        row = rows[self.row]
        self.row += 1
        if self.row == len(rows):
            self.epoch, self.row = self.epoch + 1, 0
        return row

    def rows_in(self, epochs: int) -> int:
        """Rows until every document has been seen in so many epochs."""
        return sum(len(self.of_epoch(epoch)) for epoch in range(epochs))

    def __str__(self) -> str:
        rows, tokens = len(self.of_epoch(0)), int(self.lengths.sum())
        return (
            f"{tokens:,} tokens in {rows:,} rows of {self.seq_len:,}, "
            f"{1 - tokens / (rows * self.seq_len):.2%} of them padding"
        )

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "row": self.row}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.row = state["epoch"], state["row"]


def document_bounds(ends: Sequence[int] | np.ndarray, step: int) -> np.ndarray:
    """`cu_seqlens` of documents that end at `ends`: (n,) int32, n a multiple of `step`."""
    bounds = np.full(-(-(len(ends) + 1) // step) * step, ends[-1], dtype=np.int32)
    bounds[0] = 0
    bounds[1 : len(ends) + 1] = ends
    return bounds


def make_batch(rows: list[Row], seq_len: int, max_documents: int) -> Batch:
    """Rows as tensors; room that a row left free is padding."""
    shape = (len(rows), seq_len)
    tokens = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    ends, pairs = [], 0
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            span = slice(at, at + len(piece))
            tokens[r, span], targets[r, span] = piece.tokens, piece.targets
            positions[r, span] = np.arange(len(piece))
            at += len(piece)
            ends.append(r * seq_len + at)
            pairs += len(piece) * (len(piece) + 1) // 2
        if at < seq_len:
            positions[r, at:] = np.arange(seq_len - at)
            ends.append((r + 1) * seq_len)
    # One entry more a row than pieces, for the padding.
    most = len(rows) * (max_documents + 1) + 1
    cu_seqlens = document_bounds(ends, BOUNDS_STEP)[:most]
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=seq_len,
        weight=float((targets != IGNORE).sum()),
        attended_pairs=pairs,
    )
