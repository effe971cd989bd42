"""One process as a special case of many: data parallelism over torchrun's processes.

Every rank holds the whole model, sees its share of each batch and adds up gradients once per step.
DDP is not used: the loss is a sum that is divided by a global weight, gradient accumulation would
need its `no_sync`, and the plain all-reduce below is all that is left. It does not overlap with the
backward pass; at 600M parameters that is 2.6 GB per step.

Left out: sharding of weights and optimizer state.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.config import ConfigError

BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32: few calls, and little memory for the copy
TIMEOUT = timedelta(hours=2)  # ranks wait while the first one tokenizes or evaluates


@dataclass(frozen=True)
class Distributed:
    """This process's place among all; with one process every method is free."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its sum over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks; a missing one counts as zero."""
        if self.world_size == 1:
            return
        for bucket in _buckets(p for p in parameters if p.requires_grad):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            sums = flat.split([gradient.numel() for gradient in bucket])
            for gradient, total in zip(bucket, sums, strict=True):
                gradient.copy_(total.view_as(gradient))

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        if self.world_size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)

    def all_gather(self, value: object) -> list:
        """What each rank has, in their order; of small Python objects."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Group gradients into buckets of BUCKET_ELEMENTS; a larger one is alone in its bucket."""
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(g.numel() for g in bucket) + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        yield bucket


def setup() -> Distributed:
    """Read torchrun's environment, choose this process's device and join the group, if any."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ConfigError(
                f"more processes than GPUs: start torchrun with --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Distributed(rank, world_size, local_rank, device)
