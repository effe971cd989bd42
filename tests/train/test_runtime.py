"""The runtime section's rules, what cannot run here, and which form the blocks take."""

import pytest
import torch

from models.config import ModelConfig
from train.runtime import RuntimeConfig, build_model
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
        ({"fused": True}, {"memory": "fast", "matmul": "bf16"}, False),
        ({"memory": "low"}, {"memory": "low", "matmul": "bf16"}, False),
        ({"matmul": "fp8"}, {"memory": "fast", "matmul": "fp8"}, False),
        ({"compile": True}, None, True),
        ({"fused": True, "compile": True}, {"memory": "fast", "matmul": "bf16"}, False),
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


@pytest.mark.gpu
def test_fp8_is_refused_in_float32_on_a_gpu():
    device = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"fp8 cannot run: it needs"):
        build_model(TINY, runtime(matmul="fp8", precision="fp32"), device)


def test_an_attention_kernel_that_cannot_run_is_refused(cpu):
    with pytest.raises(ConfigError, match=r"runtime.attention: .*fa4"):
        build_model(TINY, runtime(attention="fa4"), cpu)
