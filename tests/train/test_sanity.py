"""Every check of the model passes as things are, and fails when what it is for is broken."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import models.transformer
import optim.optimizer
from models import attention
from models.attention import DocumentMask
from models.config import ModelConfig
from models.layers import SwiGLU
from models.transformer import Transformer
from optim.optimizer import OptimConfig
from train import sanity, sanity_run
from train.sanity import Result, perform

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Transformer:
    """Four layers, so that one has no rotary embedding."""
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=500, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=96,
            max_seq_len=128,
        )
    )  # fmt: skip


def assert_passed(result: Result) -> None:
    assert result.status == "PASS", result


def assert_failed(result: Result, reason: str) -> None:
    """It failed for this reason, and says what to do about it."""
    assert result.status == "FAIL", result
    assert reason in result.reason
    assert result.remedy or ":" in result.reason


def test_device(monkeypatch):
    assert_passed(perform(sanity_run.check_device, CPU, None))
    assert_passed(perform(sanity_run.check_device, CPU, 0.001))
    assert_failed(perform(sanity_run.check_device, CPU, 1e6), "1000000.0 GiB estimated")
    right = torch.Tensor.__matmul__
    calls = iter((lambda a, b: right(a, b) + 1, right))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: next(calls)(a, b))
    assert_failed(perform(sanity_run.check_device, CPU, None), "a matrix product is wrong by 1")


def check_attention() -> Result:
    return perform(sanity.check_attention, "auto", CPU, torch.float32, 16)


def dense_without_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def dense_with_wrong_groups(q, k, v, mask):
    k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))  # heads 0 1 0 1 for 0 0 1 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed)


def dense_with_wrong_gradient(q, k, v, mask):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, enable_gqa=True)
    return out + 0.01 * (q - q.detach())


@pytest.mark.parametrize(
    "fault", [dense_without_mask, dense_with_wrong_groups, dense_with_wrong_gradient]
)
def test_attention_kernels(monkeypatch, fault):
    assert_passed(check_attention())
    monkeypatch.setattr(attention, "_dense", fault)
    assert_failed(check_attention(), "dense differs from the reference")


def test_a_kernel_that_cannot_run_here():
    result = perform(sanity.check_attention, "fa4", CPU, torch.float32, 64)
    assert_failed(result, "needs a CUDA device")


def test_parameter_counts(tmp_path, monkeypatch, model):
    result = perform(sanity.check_parameter_counts, model.config)
    assert_passed(result)
    assert "137,850,624" in result.reason
    assert "653,207,040" in result.reason
    shutil.copytree(sanity.MODEL_FILES, tmp_path / "model")
    file = tmp_path / "model/smol_160m.yaml"
    file.write_text(file.read_text().replace("n_layers: 18", "n_layers: 17"))
    assert_failed(perform(sanity.check_parameter_counts, None, tmp_path / "model"), "smol_160m")
    monkeypatch.setattr(ModelConfig, "n_params", 137_850_624)
    assert_failed(perform(sanity.check_parameter_counts, model.config), "smol_600m")


@pytest.mark.parametrize("factor", [0.0, 1.0, 4.0])
def test_initial_loss(model, factor):
    """At 0 the model says nothing, which is the loss of knowing nothing: right as well."""
    with torch.no_grad():
        model.embedding.weight *= factor
    result = perform(sanity.check_initial_loss, model)
    if factor <= 1:
        assert_passed(result)
    else:
        assert_failed(result, "allowed ± 0.3")


def test_gradients(model, monkeypatch):
    assert_passed(perform(sanity.check_gradients, model))
    model.blocks[1].ffn_norm.weight.requires_grad_(False)
    assert_failed(perform(sanity.check_gradients, model), "do not require a gradient")
    model.requires_grad_(True)
    with monkeypatch.context() as patch:
        patch.setattr(SwiGLU, "forward", lambda self, x: x)
        assert_failed(perform(sanity.check_gradients, model), "ffn.gate_proj.weight gets no")
    with torch.no_grad():
        model.blocks[2].attention.q_proj.weight[0, 0] = float("nan")
    assert_failed(perform(sanity.check_gradients, model), "the loss is nan")


def masks_of(change):
    """`document_mask` with its answer changed."""
    right = models.transformer.document_mask

    def changed(*arguments) -> DocumentMask:
        mask = right(*arguments)
        mask.allowed = change(mask.allowed)
        return mask

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda allowed: allowed | allowed.mT, "not causal"),
        (lambda allowed: torch.ones_like(allowed).tril(), "packed documents leak"),
        (lambda allowed: allowed & torch.eye(allowed.shape[-1], dtype=bool), "does not reach"),
    ],
    ids=["not causal", "leaking", "seeing nothing"],
)
def test_documents_apart(model, monkeypatch, change, reason):
    assert_passed(perform(sanity.check_documents_apart, model))
    monkeypatch.setattr(models.transformer, "document_mask", masks_of(change))
    assert_failed(perform(sanity.check_documents_apart, model), reason)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer(model, monkeypatch, kind):
    config, right = OptimConfig(kind=kind), optim.optimizer.param_groups
    assert_passed(perform(sanity.check_optimizer, model, config))
    name = list(dict(model.named_parameters()))[-1]

    def without_last(named, *arguments):
        return right(list(named)[:-1], *arguments)

    def last_twice(named, *arguments):
        groups = right(named, *arguments)
        groups[0]["params"].append(dict(model.named_parameters())[name])
        return groups

    monkeypatch.setattr(optim.optimizer, "param_groups", without_last)
    assert_failed(perform(sanity.check_optimizer, model, config), f"{name} stands in 0 groups")
    monkeypatch.setattr(optim.optimizer, "param_groups", last_twice)
    assert_failed(perform(sanity.check_optimizer, model, config), "more than one parameter group")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_overfitting(monkeypatch, kind):
    config = OptimConfig(kind=kind)
    assert_passed(perform(sanity.check_overfitting, config, CPU))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(float("nan")))
    assert_failed(perform(sanity.check_overfitting, config, CPU), "in 60 steps on one batch")
