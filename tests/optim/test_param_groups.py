"""Every parameter of the model in the right group, once."""

import torch
from torch import nn

from models.config import ModelConfig
from models.transformer import Transformer
from optim.param_groups import param_groups


def test_matrices_of_the_blocks_decay_and_nothing_else():
    config = ModelConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=24)
    model = Transformer(config)
    groups = param_groups(model.named_parameters(), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert members["decay"] == {name for name in names.values() if name.endswith("_proj.weight")}
    assert members["no_decay"] == set(names.values()) - members["decay"]
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {g["name"]: g["weight_decay"] for g in groups} == {"decay": 0.1, "no_decay": 0.0}


def test_frozen_parameters_are_in_no_group_and_biases_do_not_decay():
    layer, frozen = nn.Linear(3, 4), nn.Linear(3, 4).requires_grad_(False)
    named = [*layer.named_parameters(), *frozen.named_parameters(prefix="frozen")]
    decay, no_decay = param_groups(named, weight_decay=0.1)
    assert decay["params"] == [layer.weight]
    assert no_decay["params"] == [layer.bias]


def test_the_optimizer_takes_and_keeps_the_names():
    groups = param_groups(nn.Linear(3, 4).named_parameters(), weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    names = [group["name"] for group in optimizer.state_dict()["param_groups"]]
    assert names == ["decay", "no_decay"]
