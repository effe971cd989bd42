"""Counts against the model itself and torch's FLOP counter; the shipped sizes; the rules."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig
from models.transformer import Transformer
from utils.config import ConfigError, load_config, plain, validate

SHIPPED = Path(__file__).parents[2] / "configs/model"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smol_tiny", 1_049_728), ("smol_160m", 137_850_624), ("smol_600m", 653_207_040)],
)
def test_shipped_sizes_have_the_stated_parameters(name, parameters):
    file = SHIPPED / f"{name}.yaml"
    assert load_config(ModelConfig, file).n_params == parameters
    assert f"{parameters:,} parameters" in file.read_text()


def test_counts_by_part_are_those_of_the_model(tiny):
    counted = dict.fromkeys(tiny.parameter_counts(), 0)
    for name, parameter in Transformer(tiny).named_parameters():
        part = "norms" if "norm" in name else next(p for p in counted if p in name)
        counted[part] += parameter.numel()
    assert counted == tiny.parameter_counts()
    assert tiny.n_params == sum(counted.values())


def test_flops_match_torchs_counter(tiny):
    """torch counts all T x T pairs of the dense kernel, so the formula is given as many."""
    batch, length = 2, 16
    model = Transformer(tiny)
    tokens = torch.randint(tiny.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, length)
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens, positions, bounds)).sum().backward()
    expected = tiny.training_flops(batch * length, attended_pairs=batch * length**2)
    assert counter.get_total_flops() == expected


def test_flops_per_token_counts_the_causal_half(tiny):
    documents = tiny.training_flops(tokens=8, attended_pairs=4 * 3)  # 4 documents of 2: 1 + 2 pairs
    row = tiny.training_flops(tokens=8, attended_pairs=1 + 2 + 3 + 4 + 5 + 6 + 7 + 8)
    assert tiny.flops_per_token(8) * 8 == row
    assert row - documents == 12 * tiny.n_layers * tiny.d_model * (36 - 12)


def test_memory_adds_up_and_grows_with_the_batch(tiny):
    small, large = tiny.memory_gib(1, 32), tiny.memory_gib(8, 32)
    assert small["total"] == pytest.approx(sum(small.values()) - small["total"])
    assert large["activations"] == pytest.approx(8 * small["activations"])
    assert large["optimizer"] == small["optimizer"] == 8 * tiny.n_params / 2**30


def test_memory_modes_keep_what_they_say(tiny):
    totals = [tiny.memory_gib(8, 32, mode)["total"] for mode in ("low", "balanced", "fast", None)]
    assert totals == sorted(totals) and len(set(totals)) == 4
    low = tiny.memory_gib(8, 32, "low")["activations"]
    assert low == 8 * 32 * tiny.n_layers * tiny.d_model * 2 / 2**30


def test_which_layers_have_no_rope(tiny):
    assert [tiny.has_rope(layer) for layer in range(8)] == [True, True, True, False] * 2
    always = validate(ModelConfig, plain(tiny) | {"nope_every": 0}, "test")
    assert all(always.has_rope(layer) for layer in range(8))


def test_heads_that_do_not_fit_are_refused_together(tiny):
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig, plain(tiny) | {"d_model": 60, "n_kv_heads": 3}, "test")
    assert "d_model (60) must be a multiple of 2 x n_heads (4)" in str(caught.value)
    assert "n_heads (4) must be a multiple of n_kv_heads (3)" in str(caught.value)
