"""Peak memory of a training step on a GPU, predicted without one.

    python -m bench.memory --shape 600m --rows 48 --variants balanced,balanced+fp8,low
    python -m bench.memory --shape 600m --rows 32 --variants fast+fp8 --parts

The step runs as it is, forward and backward and full size, on tensors without memory: kernels do
nothing, attention is a stand-in that allocates what flash-attn-4 does. A model of torch's caching
allocator hears when each tensor is made and when its last owner lets go of it; it splits and merges
blocks and so tells what is reserved as well. --parts says who holds the peak.

Not counted: memory that kernels take for themselves, fragments left by other steps, the CUDA
context. Segments are those of an allocator without `expandable_segments`; with them, as training
has them, an H200 reserves hardly more than is allocated. Predicted allocated and reserved, and
measured reserved without and with them, GiB (bench.step):

    600m, 48 rows, balanced  70.9, 71.5-71.9    75.0, 71.3-71.8    low  18.6, 21.8    -, 18.8-19.2
    160m, 96 rows, fast      65.1, 65.8         66.9, 65.2-65.6    low  11.0, 13.6    -, 11.3-11.4
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import importlib.util
import json
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.packing import Batch
from models import elementwise
from models.config import GIB, ModelConfig
from models.transformer import Transformer
from train import loss
from utils.config import load_config

MIB = 2**20
WORKSPACE = 96 * MIB  # cuBLAS keeps 32 MiB for each of its handles on Hopper
PADDED_ROWS = 1.25  # flash-attn-4 rounds each document of its float32 gradients up to 128 rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="600m", choices=("tiny", "160m", "600m"))
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--variants", default="fast,balanced,low", help="memory[+fp8 or +cublas]")
    parser.add_argument(
        "--one", action="store_true", help="one micro-batch a step: no gradients at its beginning"
    )
    parser.add_argument("--parts", action="store_true", help="what is alive at the peak")
    args = parser.parse_args()
    config = load_config(ModelConfig, f"configs/model/smol_{args.shape}.yaml")
    results = {}
    for variant in args.variants.split(","):
        memory, *how = variant.split("+")
        matmul, gemm = "fp8" if "fp8" in how else "bf16", "cublas" if how else "quack"
        allocator = predict(config, args.rows, memory, matmul, gemm, not args.one)
        results[variant] = {
            "allocated_gib": allocator.peak_live / GIB,
            "reserved_gib": allocator.peak_reserved / GIB,
        }
        print(
            f"{variant:<16} allocated {allocator.peak_live / GIB:6.2f} GiB  "
            f"reserved {allocator.peak_reserved / GIB:6.2f} GiB",
            flush=True,
        )
        for owner, size in allocator.at_peak.most_common(16) if args.parts else ():
            print(f"    {size / GIB:7.2f} GiB  {owner}")
    print(json.dumps({"shape": args.shape, "rows": args.rows, "variants": results}))


def predict(
    config: ModelConfig,
    rows: int,
    memory: str,
    matmul: str = "bf16",
    gemm: str = "quack",
    accumulate: bool = True,
) -> Allocator:
    """The allocator after three micro-batches.

    Args:
        accumulate: gradients of one micro-batch are there while the next one runs.
    """
    allocator = Allocator()
    with pretended_gpu(), torch.device("meta"):
        model = Transformer(config, torch.bfloat16)
        model.fuse_blocks(memory, matmul, gemm)
        watch = Watch(allocator)
        shape = rows, config.max_seq_len
        tokens, targets, positions = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
        batch = Batch(
            tokens=tokens,
            targets=targets,
            positions=positions,
            cu_seqlens=torch.empty(4 * rows, dtype=torch.int32),
            max_seqlen=config.max_seq_len,
            weight=1.0,
            attended_pairs=0,
        )
        parameters = list(model.parameters())
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8)
        for tensor in (*parameters, *moments, workspace, tokens, targets, positions):
            watch.enter(tensor, "weights, optimizer, batch")
        for _ in range(3):
            with watch:
                (loss.cross_entropy_loss(model, batch)[0] / batch.weight).backward()
            if not accumulate:
                model.zero_grad(set_to_none=True)
    return allocator


class Allocator:
    """torch's caching allocator, as far as it decides what is reserved (CUDACachingAllocator.cpp).

    Sizes are rounded to 512 bytes. Up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from
    segments of 20 MiB, more from segments of its own size in steps of 2 MiB. The smallest free
    block that is large enough is taken and split; freed neighbours are joined.
    """

    def __init__(self) -> None:
        self.live = self.peak_live = self.reserved = self.peak_reserved = 0
        self.at_peak: Counter[str] = Counter()
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        self._segments: list[dict[int, tuple[int, bool]]] = []  # start -> size, is free
        self._taken: dict[int, tuple[int, int, int, bool, str]] = {}
        self._count = 0

    def take(self, size: int, owner: str) -> int:
        """Returns the block's number."""
        size = -(-size // 512) * 512
        small = size <= MIB
        pool = self._free[small]
        if bisect.bisect_left(pool, (size, -1, -1)) == len(pool):
            self._reserve(size, small)
        free, segment, start = pool.pop(bisect.bisect_left(pool, (size, -1, -1)))
        if free - size >= (512 if small else MIB + 1):
            self._set_free(segment, start + size, free - size, small)
        else:
            size = free
        self._segments[segment][start] = size, False
        self._count += 1
        self._taken[self._count] = segment, start, size, small, owner
        self.live += size
        if self.live > self.peak_live:
            self.peak_live = self.live
            self.at_peak = Counter()
            for _, _, taken, _, who in self._taken.values():
                self.at_peak[who] += taken
        return self._count

    def give(self, number: int) -> None:
        segment, start, size, small, _ = self._taken.pop(number)
        self.live -= size
        blocks = self._segments[segment]
        before = max((s for s in blocks if s < start), default=None)
        for neighbour in (start + size, before):
            if neighbour in blocks and blocks[neighbour][1]:
                more, _ = blocks.pop(neighbour)
                self._free[small].remove((more, segment, neighbour))
                del blocks[start]
                start, size = min(start, neighbour), size + more
                blocks[start] = size, False
        self._set_free(segment, start, size, small)

    def _reserve(self, size: int, small: bool) -> None:
        if small:
            whole = 2 * MIB
        else:
            whole = max(20 * MIB if size < 10 * MIB else 0, -(-size // (2 * MIB)) * 2 * MIB)
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._segments.append({})
        self._set_free(len(self._segments) - 1, 0, whole, small)

    def _set_free(self, segment: int, start: int, size: int, small: bool) -> None:
        self._segments[segment][start] = size, True
        bisect.insort(self._free[small], (size, segment, start))


class Watch(TorchDispatchMode):
    """Enters the memory of every tensor that an operation returns."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self._allocator = allocator
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.enter(tensor)
        return result

    def enter(self, tensor: Tensor, owner: str = "") -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if size == 0 or address in self._known:
            return
        number = self._allocator.take(size, owner or _owner())

        def gone(_: weakref.ref) -> None:
            del self._known[address]
            self._allocator.give(number)

        self._known[address] = weakref.ref(storage, gone)


def _owner() -> str:
    """The innermost line of models/ or train/ that is running."""
    frame = sys._getframe(2)
    while frame and Path(frame.f_code.co_filename).parent.name not in ("models", "train"):
        frame = frame.f_back
    if frame is None:
        return "gradients"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


class _Attention(torch.autograd.Function):
    """Allocates what flash-attn-4 does: sums of gradients in float32, rows of documents padded."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        logz = torch.empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logz)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        heads = [x.shape[2] for x in (q, k, v)]
        packed = q.new_empty(*q.shape[:2], sum(heads), q.shape[3])
        padded = int(q.shape[0] * q.shape[1] * PADDED_ROWS)
        sums = [torch.empty(padded, n, q.shape[3], dtype=torch.float32) for n in heads]
        del sums
        return packed.split(heads, 2)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors say that they are on a GPU; its kernels do nothing."""
    kernels = {name: _idle(name) for name in ("kernels", "loss_kernels")}
    kernels["epilogue_kernels"] = _IdleEpilogues
    fused, transformer = sys.modules["models.fused"], sys.modules["models.transformer"]
    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (torch.Tensor, "is_cuda", True),
            (elementwise, "_load", kernels.get),
            (loss, "_add_product", lambda total, a, b: None),
            (fused, "attention", lambda q, k, v, mask: _Attention.apply(q, k, v)),
            (transformer, "document_mask", lambda *_: None),
            (Transformer, "attention_kernel", lambda model: ("fa4", "")),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


class _IdleEpilogues:
    """What models/epilogue_kernels.py returns."""

    @staticmethod
    def product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
        return a.new_empty(len(a), b.shape[1])

    @staticmethod
    def wide_product(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(len(a), b.shape[1], dtype=torch.float32)

    @staticmethod
    def swiglu(x: Tensor, weight: Tensor, halves: bool) -> tuple[Tensor | None, Tensor]:
        wide = weight.shape[1]
        return x.new_empty(len(x), wide) if halves else None, x.new_empty(len(x), wide // 2)

    @staticmethod
    def swiglu_gradient(grad: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        return grad.new_empty(len(grad), weight.shape[1]), gate_up


class _IdleKernel:
    def __init__(self, function: Callable) -> None:
        pass

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *args, **options: None


def _idle(name: str) -> types.ModuleType:
    """The module models/`name`.py, of which the kernels only are left out."""
    triton = types.ModuleType("triton")
    triton.jit = _IdleKernel
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    triton.cdiv = lambda a, b: -(-a // b)
    triton.language = types.SimpleNamespace(constexpr=int)
    spec = importlib.util.spec_from_file_location(
        f"idle_{name}", Path(elementwise.__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    stubs = {"triton": triton, "triton.language": triton.language}
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
