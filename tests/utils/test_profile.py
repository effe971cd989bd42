"""Traces: sums by kernel and kind on a hand-made one, and real ones of a CPU run."""

import gzip
import json

import pytest
import torch

from utils.profile import CATEGORIES, StepTrace, category_of, gpu_time, gpu_time_table, trace_steps

NAMES = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "matrix products",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90": "attention",
    "_softmax_statistics": "head and loss",
    "_logits_gradient": "head and loss",
    "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>": "optimizer",
    "void multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float>>": "copies and casts",
    "Memcpy DtoD (Device -> Device)": "copies and casts",
    "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>": "copies and casts",
    "_add_norm_backward": "norms, rotations, SwiGLU, other",
    "triton_poi_fused_copy_mul_0": "norms, rotations, SwiGLU, other",
}


@pytest.mark.parametrize(("name", "category"), NAMES.items())
def test_kernels_are_told_apart_by_name(name, category):
    assert category_of(name) == category


def write(path, kernels):
    """A trace of (category, name, start, duration), times in microseconds."""
    events = [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}
        for cat, name, ts, dur in kernels
    ]
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": events}, stream)


def test_times_are_added_up_by_the_step(tmp_path):
    path = tmp_path / "trace.json.gz"
    write(
        path,
        [
            ("kernel", "nvjet_a", 1000, 400),
            ("kernel", "nvjet_a", 1300, 400),  # overlaps the first on another stream
            ("gpu_memcpy", "Memcpy DtoD", 2000, 200),  # 300 idle before it
            ("cpu_op", "aten::mm", 0, 9000),  # the host's time does not count
        ],
    )
    totals, kernels = gpu_time(path, steps=2)
    assert totals["matrix products"] == pytest.approx(0.4)
    assert totals["copies and casts"] == pytest.approx(0.1)
    assert totals["idle"] == pytest.approx(0.15)
    assert set(totals) == {*(c for c, _ in CATEGORIES), "idle"}
    assert kernels == [
        ("matrix products", "nvjet_a", 1, pytest.approx(0.4)),
        ("copies and casts", "Memcpy DtoD", 0, pytest.approx(0.1)),
    ]
    table = gpu_time_table(path, steps=2, kernels=1)
    assert "nvjet_a" in table and "Memcpy" not in table


def test_a_trace_without_a_gpu_says_so(tmp_path):
    path = tmp_path / "trace.json.gz"
    trace_steps(lambda: torch.ones(3) @ torch.ones(3), 2, path)
    assert gpu_time_table(path, 2) == f"no GPU work in {path}"


@pytest.mark.parametrize(("ticks", "traced"), [(3, None), (4, 1), (6, 2), (20, 2)])
def test_a_step_trace_skips_the_first_and_stops_by_itself(tmp_path, capsys, ticks, traced):
    path = tmp_path / "trace.json.gz"
    trace = StepTrace(2, path, skip=3)
    for _ in range(ticks):
        trace.tick()
        torch.ones(3) @ torch.ones(3)
    trace.close()
    assert path.exists() == bool(traced) == ("trace: " in capsys.readouterr().out)
    if traced:
        with gzip.open(path, "rt") as stream:
            events = json.load(stream)["traceEvents"]
        assert sum(e.get("name") == "aten::dot" for e in events) == traced


def test_no_steps_no_trace(tmp_path):
    trace = StepTrace(0, tmp_path / "trace.json.gz", skip=0)
    for _ in range(3):
        trace.tick()
    trace.close()
    assert not list(tmp_path.iterdir())
