"""Which parameters decay, and which are for Muon: the matrices inside the blocks, nothing else.

Norm weights have a natural size of 1, and an embedding row is touched only when its token appears,
while decay would shrink rare rows all the time; OLMo 2 and SmolLM3 leave the embedding out too.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, muon: bool = False
) -> list[dict[str, Any]]:
    """The optimizer groups "decay" and "no_decay", each trainable parameter in exactly one.

    They are always there, so that a checkpoint's groups match whatever is frozen.

    Args:
        muon: put the matrices of the blocks into a third group, "muon"; a verifier's head, which
            is no map between hidden states, stays in "decay".
    """
    members: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    if muon:
        members["muon"] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[_group_of(name, parameter, muon)].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "weight_decay": 0.0 if name == "no_decay" else weight_decay,
        }
        for name, params in members.items()
    ]


def _group_of(name: str, parameter: nn.Parameter, muon: bool) -> str:
    if parameter.ndim < 2 or "embedding" in name:
        return "no_decay"
    return "muon" if muon and name.startswith("blocks.") and parameter.ndim == 2 else "decay"
