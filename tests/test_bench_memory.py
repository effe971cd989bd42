"""The predicted memory of a training step: the allocator's model, and what must fit."""

from pathlib import Path

import pytest
import torch

from bench.memory import GIB, MIB, Allocator, predict
from models.config import ModelConfig
from utils.config import load_config

SHAPE = Path(__file__).parents[1] / "configs/model/smol_600m.yaml"


def test_blocks_are_split_joined_and_taken_where_they_fit_best():
    allocator = Allocator()
    first, second = (allocator.take(size * MIB, "") for size in (30, 50))
    assert (allocator.live, allocator.reserved) == (80 * MIB, 80 * MIB)
    allocator.give(second)
    third = allocator.take(20 * MIB, "")  # the front of the 50
    allocator.give(first)
    fourth = allocator.take(25 * MIB, "")  # of the 30 and the 30 left of the 50
    assert (allocator.live, allocator.reserved) == (45 * MIB, 80 * MIB)
    allocator.give(third)
    allocator.take(50 * MIB, "")  # whole again
    assert allocator.reserved == 80 * MIB
    allocator.give(fourth)
    assert (allocator.live, allocator.peak_live) == (50 * MIB, 80 * MIB)


def test_small_blocks_have_segments_of_their_own():
    allocator = Allocator()
    allocator.take(1, "")
    assert (allocator.live, allocator.reserved) == (512, 2 * MIB)
    allocator.take(MIB + 1, "")
    assert allocator.reserved == 22 * MIB
    allocator.take(10 * MIB + 1, "")
    assert (allocator.live, allocator.reserved) == (512 + MIB + 512 + 10 * MIB + 512, 22 * MIB)


@pytest.mark.parametrize(("rows", "memory"), [(48, "balanced"), (32, "fast")])
def test_600m_in_fp8_fits_80_gb_cards(rows, memory):
    """A step reserves 0.4 to 1.4 GiB more than it allocates, measured; 76 GiB are the limit."""
    config = load_config(ModelConfig, SHAPE)
    predicted = predict(config, rows, memory, "fp8", accumulate=memory == "fast")
    assert 60 * GIB < predicted.peak_live < 74 * GIB
    assert predicted.peak_reserved < 76 * GIB
    assert not torch.empty(1).is_cuda
