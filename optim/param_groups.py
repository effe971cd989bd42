"""Which parameters decay: the matrices inside the blocks, nothing else.

Norm weights have a natural size of 1, and an embedding row is touched only when its token appears,
while decay would shrink rare rows all the time; OLMo 2 and SmolLM3 leave the embedding out too.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """The optimizer groups "decay" and "no_decay", each trainable parameter in exactly one.

    Both are always there, so that a checkpoint's groups match whatever is frozen.
    """
    decay, no_decay = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and "embedding" not in name
            (decay if is_matrix else no_decay).append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
