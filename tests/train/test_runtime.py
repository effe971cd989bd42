"""The runtime section's rules, what cannot run here, and which form the blocks take."""

import pytest
import torch

from models import epilogues
from models.config import ModelConfig
from models.transformer import Transformer
from train.runtime import RuntimeConfig, build_model, choose_precision
from utils.config import ConfigError, validate
from utils.distributed import Distributed

TINY = ModelConfig(
    vocab_size=97, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=96, max_seq_len=32
)


def runtime(**values) -> RuntimeConfig:
    return validate(RuntimeConfig, values, "test")


@pytest.fixture
def cpu() -> Distributed:
    return Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"precision": "fp16"}, "precision ('fp16') is none of auto, bf16, fp32"),
        ({"memory": "none"}, "memory ('none') is none of fast, balanced, low"),
        ({"matmul": "int8"}, "matmul ('int8') is none of bf16, fp8"),
        ({"gemm": "blas"}, "gemm ('blas') is none of auto, quack, cublas"),
        ({"gemm": "quack", "matmul": "fp8"}, "gemm ('quack') has no fp8; set auto"),
        ({"gemm": "quack", "fused": False}, "gemm ('quack') needs fused blocks"),
        ({"memory": "low", "fused": False}, "memory ('low') needs fused blocks"),
        ({"matmul": "fp8", "fused": False}, "matmul ('fp8') needs fused blocks"),
    ],
)
def test_mistakes_are_named(values, rule):
    with pytest.raises(ConfigError) as caught:
        runtime(**values)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("values", "fused", "compiled"),
    [
        ({}, None, False),  # on a CPU
        ({"fused": True}, {"memory": "fast", "matmul": "bf16", "gemm": "cublas"}, False),
        ({"memory": "low"}, {"memory": "low", "matmul": "bf16", "gemm": "cublas"}, False),
        ({"matmul": "fp8"}, {"memory": "fast", "matmul": "fp8", "gemm": "cublas"}, False),
        ({"gemm": "quack"}, {"memory": "fast", "matmul": "bf16", "gemm": "quack"}, False),
        ({"compile": True}, None, True),
        (
            {"fused": True, "compile": True},
            {"memory": "fast", "matmul": "bf16", "gemm": "cublas"},
            False,
        ),
    ],
)
def test_which_form_the_blocks_take(cpu, values, fused, compiled):
    model = build_model(TINY, runtime(**values), cpu)
    assert (model.fused, model.compiled) == (fused, compiled)


def test_fp8_is_refused_where_sizes_do_not_fit(cpu):
    odd = TINY.model_copy(update={"d_ffn": 90})
    with pytest.raises(ConfigError, match=r"runtime.matmul: fp8 .* multiples of 16, not \[90\]"):
        build_model(odd, runtime(matmul="fp8"), cpu)
    build_model(odd, runtime(), cpu)


@pytest.mark.parametrize(
    ("capability", "requested", "precision", "reason"),
    [
        (None, "auto", "fp32", "the device is cpu"),
        (None, "bf16", "bf16", "as requested"),
        ((7, 0), "auto", "fp32", "bf16 needs compute capability 8.0 (Ampere) or later, not 7.0"),
        ((7, 5), "auto", "fp32", "bf16 needs compute capability 8.0 (Ampere) or later, not 7.5"),
        ((7, 5), "fp32", "fp32", "as requested"),
        ((8, 0), "auto", "bf16", "this GPU computes in it"),
        ((8, 0), "bf16", "bf16", "as requested"),
        ((8, 9), "auto", "bf16", "this GPU computes in it"),
        ((12, 0), "auto", "bf16", "this GPU computes in it"),
    ],
)
def test_the_precision_is_one_that_the_device_computes_in(
    monkeypatch, capability, requested, precision, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda" if capability else "cpu")
    assert choose_precision(requested, device) == (precision, reason)


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"runtime.precision: bf16 .* not 7.5; set auto or fp32"):
        build_model(TINY, runtime(precision="bf16"), device)


@pytest.mark.parametrize(
    ("capability", "said", "fused"),
    [
        ((7, 5), "fp32 (bf16 needs compute capability 8.0 (Ampere) or later, not 7.5)", None),
        (
            (8, 0),
            "bf16 (this GPU computes in it)",
            {"memory": "fast", "matmul": "bf16", "gemm": "cublas"},
        ),
    ],
)
def test_what_a_gpu_gets_is_said(monkeypatch, capsys, capability, said, fused):
    """A GPU is pretended: the model stays where it is, all choices are made for the other."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(Transformer, "to", lambda self, device: self)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    gpu = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cuda"))
    model = build_model(TINY, runtime(), gpu)
    assert model.fused == fused
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line
    if fused:
        assert "in bf16 by cublas (quack needs Hopper (compute capability 9), not 8)" in line
    if fused is None:
        assert "attention: flex (" in line
        assert "blocks: compiled (not fused: by itself in bf16 alone)" in line


def test_quack_is_used_on_hopper_and_refused_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(Transformer, "to", lambda self, device: self)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    monkeypatch.setattr(epilogues, "_missing", lambda: None)
    gpu = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert build_model(TINY, runtime(), gpu).fused["gemm"] == "quack"
    assert "in bf16 by quack (the fastest on this device)" in capsys.readouterr().out
    assert build_model(TINY, runtime(gemm="cublas"), gpu).fused["gemm"] == "cublas"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"runtime.gemm: quack cannot run: it needs Hopper"):
        build_model(TINY, runtime(gemm="quack"), gpu)


@pytest.mark.gpu
def test_fp8_is_refused_in_float32_on_a_gpu():
    device = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"fp8 cannot run: it needs"):
        build_model(TINY, runtime(matmul="fp8", precision="fp32"), device)


def test_an_attention_kernel_that_cannot_run_is_refused(cpu):
    with pytest.raises(ConfigError, match=r"runtime.attention: .*fa4"):
        build_model(TINY, runtime(attention="fa4"), cpu)
