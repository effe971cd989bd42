"""Seeds, generator states and determinism.

`derive` and `shuffle_order` are pure functions of their arguments, so the order of the data does
not depend on a generator's state, on the number of workers, or on numpy's version (numpy keeps the
right to change what a seeded `Generator` gives). `shuffle_order` sorts the splitmix64 outputs
(Steele, Lea and Flood 2014) of consecutive counters.
"""

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, CUDA included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of all generators as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; the CUDA part only where there is CUDA."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_deterministic(enabled: bool) -> None:
    """Choose kernels that give the same bits on every run; call it before the first CUDA kernel.

    It also keeps cuDNN, and from torch 2.10 on inductor, from choosing kernels by timing them where
    the choice changes the numbers.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # Else every torch.empty is filled, a pass over memory; what is allocated here is written whole.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = False


def derive(*keys: int | str) -> int:
    """Return a 63-bit integer that depends on all keys, the same on every machine."""
    plain = [key if isinstance(key, str) else int(key) for key in keys]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffle_order(n: int, key: int) -> np.ndarray:
    """Return a permutation of 0..n-1 (int64) that depends on `key` and never changes."""
    counters = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = counters + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
