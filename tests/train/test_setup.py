"""What stages share: base checkpoints, also those that another version of the code wrote."""

from pathlib import Path

import pytest

from models.config import ModelConfig
from train.setup import load_base
from utils import checkpoint
from utils.command_line import CommandLine
from utils.config import ConfigError, plain

MODEL = ModelConfig(
    vocab_size=97, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=96, max_seq_len=32
)


def loaded(folder: Path, model_config: dict) -> dict:
    path = folder / "sft_final.pt"
    checkpoint.save(path, {"stage": "sft", "model_config": model_config})
    args = CommandLine(Path("x.yaml"), False, None, False, [], base_model=path)
    return load_base(args, ("sft",), MODEL)


def test_a_base_older_than_a_key_of_the_model_has_its_default(tmp_path):
    values = plain(MODEL)
    del values["rope_theta"]
    assert loaded(tmp_path, values)["stage"] == "sft"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_layers": 3}, "n_layers: 2 in the config, 3 in the checkpoint"),
        ({"qk_norm": True}, "qk_norm: unknown key"),
    ],
)
def test_a_base_of_another_shape_is_refused(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, plain(MODEL) | changed)
    assert "--base-model" in str(caught.value)
