"""Packing against the obvious: every target once, no document sees or predicts another."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import (
    IGNORE,
    Batch,
    RowPacker,
    best_fit,
    cut_document,
    longest_first,
    make_batch,
    pack_rows,
)

documents_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=30)
shapes = {"seq_len": st.integers(2, 16), "max_documents": st.integers(1, 6)}


def numbered_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that each can be traced."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.uint32) + 1 for e, n in zip(ends, lengths, strict=True)]


def spans(batch: Batch) -> list[tuple[int, int]]:
    ends = batch.cu_seqlens.tolist()
    return [(a, b) for a, b in itertools.pairwise(ends) if a < b]


@given(lengths=documents_strategy, **shapes)
def test_packing_keeps_every_token_and_every_target_in_order(lengths, seq_len, max_documents):
    documents = numbered_documents(lengths)
    batch = make_batch(pack_rows(documents, seq_len, max_documents), seq_len, max_documents)
    tokens = batch.tokens.flatten()
    assert tokens[tokens > 0].tolist() == np.concatenate(documents).tolist()
    pairs = [(a, b) for d in documents for a, b in itertools.pairwise(d)]
    learned = batch.targets.flatten() != IGNORE
    assert [
        (a, b)
        for a, b in zip(
            tokens[learned].tolist(), batch.targets.flatten()[learned].tolist(), strict=True
        )
    ] == pairs
    assert batch.weight == len(pairs)


@given(lengths=documents_strategy, **shapes)
def test_boundaries_positions_and_pairs(lengths, seq_len, max_documents):
    documents = numbered_documents(lengths)
    owner = {int(t): i for i, d in enumerate(documents) for t in d}
    rows = pack_rows(documents, seq_len, max_documents)
    batch = make_batch(rows, seq_len, max_documents)
    tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
    assert batch.cu_seqlens.dtype == torch.int32
    most = len(rows) * (max_documents + 1) + 1
    assert len(batch.cu_seqlens) <= most
    assert len(batch.cu_seqlens) in (most, -(-(len(spans(batch)) + 1) // 64) * 64)
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == tokens.numel()
    pairs = 0
    for a, b in spans(batch):
        assert a // seq_len == (b - 1) // seq_len, "a document crosses rows"
        assert len({owner.get(t) for t in tokens[a:b].tolist()}) == 1, "two documents in one span"
        assert positions[a:b].tolist() == list(range(b - a))
        pairs += sum(range(1, b - a + 1)) if tokens[a] > 0 else 0
    assert batch.attended_pairs == pairs


@given(lengths=documents_strategy, at=st.integers(0, 8), **shapes)
def test_a_restored_packer_goes_on_alike(lengths, at, seq_len, max_documents):
    documents = numbered_documents(lengths)
    pieces = [cut_document(d, s, seq_len) for d in documents for s in range(0, len(d), seq_len)]
    endless, packer = iter(pieces * 50), RowPacker(seq_len, max_documents)
    for _ in range(at):
        packer.next_row(endless)
    restored = RowPacker(seq_len, max_documents)
    restored.load_state_dict(packer.state_dict())
    rest = list(endless)
    for a, b in zip(iter_rows(packer, rest), iter_rows(restored, rest), strict=True):
        assert torch.equal(
            make_batch([a], seq_len, max_documents).targets,
            make_batch([b], seq_len, max_documents).targets,
        )


def iter_rows(packer: RowPacker, pieces: list) -> list:
    stream = iter(pieces)
    return [packer.next_row(stream) for _ in range(5)]


def test_a_hand_packed_example():
    documents = [np.array([1, 2, 3], dtype=np.uint16), np.array([4, 5, 6, 7], dtype=np.uint16)]
    batch = make_batch(pack_rows(documents, 4, 3), 4, 3)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.targets.tolist() == [[2, 3, IGNORE, 5], [6, 7, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7, 8, 8, 8, 8, 8]
    assert batch.weight == 5
    assert batch.attended_pairs == 6 + 1 + 6


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    seq_len=st.integers(50, 80),
    most=st.integers(1, 9),
)
def test_best_fit_places_each_document_once_and_no_row_overflows(lengths, seq_len, most):
    rows = best_fit(lengths, seq_len, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= seq_len and len(row) <= most for row in rows)


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_against_the_obvious(lengths):
    """Looking through all rows for the one with the least room."""
    rooms = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=20) - length)
    rows = best_fit(lengths, 20, max_documents=40)
    assert sorted(rooms) == sorted(20 - sum(lengths[i] for i in row) for row in rows)


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_longest_first_is_first_fit_decreasing(lengths):
    """Against putting each document, the longest first, into the first row with room for it."""
    expected = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in expected:
            if sum(lengths[i] for i in row) + lengths[document] <= 20:
                row.append(document)
                break
        else:
            expected.append([document])
    assert list(longest_first(lengths, 20)) == expected
