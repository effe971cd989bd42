"""Two gloo processes against the same sums in one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from utils import distributed

SHAPES = [(3, 4), (50,), (7,), (2, 2, 2), (1,)]


def model_of(rank: int) -> torch.nn.Module:
    """Parameters and gradients that depend on the rank; one gradient is missing on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    module = torch.nn.Module()
    for i, shape in enumerate(SHAPES):
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        module.register_parameter(f"p{i}", parameter)
    module.register_buffer("buffer", torch.randn(3, generator=generator))
    module.p0.grad = module.p0.grad.t().contiguous().t()  # not contiguous
    module.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    if rank == 1:
        module.p2.grad = None
    return module


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    distributed.BUCKET_ELEMENTS = 20  # p0 | p1, alone and too large | p2, p3, p4
    group = distributed.setup()
    module = model_of(rank)
    group.all_reduce_gradients(module.parameters())
    group.broadcast_module(module)
    group.barrier()
    result = {
        "gradients": [p.grad for p in module.parameters()],
        "state": module.state_dict(),
        "sum": group.all_reduce_sum(torch.tensor([rank + 1.0, 10.0])),
        "main": group.is_main,
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    group.close()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    # The store is here, as with torchrun: a port that is only looked for could be another's soon.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(worker, (store.port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gradients_are_summed_over_ranks(results: list[dict]) -> None:
    first, second = model_of(0), model_of(1)
    second.p2.grad = torch.zeros(7)
    for rank in range(2):
        *summed, frozen = results[rank]["gradients"]
        assert frozen is None
        for a, b, total in zip(first.parameters(), second.parameters(), summed, strict=False):
            torch.testing.assert_close(total, a.grad + b.grad, rtol=0, atol=0)


def test_the_first_rank_gives_its_weights(results: list[dict]) -> None:
    for name, tensor in model_of(0).state_dict().items():
        assert torch.equal(results[1]["state"][name], tensor)
        assert torch.equal(results[0]["state"][name], tensor)


def test_sums_and_the_main_rank(results: list[dict]) -> None:
    assert [r["sum"].tolist() for r in results] == [[3.0, 20.0]] * 2
    assert [r["main"] for r in results] == [True, False]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    group = distributed.setup()
    assert not dist.is_initialized()
    assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
    module = model_of(1)
    expected = model_of(1)
    group.all_reduce_gradients(module.parameters())
    group.broadcast_module(module)
    group.barrier()
    assert torch.equal(module.p0.grad, expected.p0.grad)
    assert module.p2.grad is None
    assert group.all_reduce_sum(torch.ones(1)).item() == 1
    group.close()


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(distributed.ConfigError, match="--nproc-per-node"):
        distributed.setup()
