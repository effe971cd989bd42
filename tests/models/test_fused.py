"""The fused step against the plain modules: values, gradients, memory; its elementwise steps."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from models.config import ModelConfig
from models.elementwise import Rows
from models.epilogues import epilogue_obstacle
from models.fused import MEMORY, _side_by_side
from models.products import GEMM
from models.transformer import Transformer
from utils.seed import set_deterministic

CUTS = [[5, 13], [], [23]]


def gradients(model, batch):
    model.zero_grad()
    hidden = model(*batch)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    hidden.backward(upstream.to(hidden))
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture
def model(tiny) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny, dtype=torch.float64).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # all ones would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5)
    return model


def test_neighbours_in_one_tensor_are_joined_without_a_copy():
    packed = torch.randn(5, 6, 4)
    parts = packed.split((3, 1, 2), 1)
    joined = _side_by_side(parts)
    assert torch.equal(joined, packed.flatten(1))
    assert joined.data_ptr() == packed.data_ptr()
    for others in ([parts[1], parts[0], parts[2]], [parts[0], parts[1], parts[2].clone()]):
        joined = _side_by_side(others)
        assert torch.equal(joined, torch.cat(tuple(others), 1).flatten(1))
        assert joined.data_ptr() != packed.data_ptr()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("gemm", GEMM)
def test_values_and_gradients_are_those_of_the_modules(model, documents, memory, gemm):
    batch = documents(model.config.vocab_size, 24, CUTS)
    expected = gradients(model, batch)
    model.fuse_blocks(memory, gemm=gemm)
    ours = gradients(model, batch)
    # Norms, rotations and SwiGLU are float32 in the modules whatever the dtype.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORY)
def test_fp8_follows_float32_within_its_three_bits(tiny, documents, memory):
    """Every product rounds to 3 bits of mantissa, so errors of a few percent and no more."""
    torch.manual_seed(0)
    model = Transformer(tiny)
    batch = documents(tiny.vocab_size, 24, CUTS)
    hidden, exact = gradients(model, batch)
    model.fuse_blocks(memory, "fp8")
    rounded, grads = gradients(model, batch)
    assert 0.005 < relative_error(rounded, hidden) < 0.06
    for name, grad in grads.items():
        assert relative_error(grad, exact[name]) < 0.15, name


PRODUCTS = [("bf16", "cublas"), ("bf16", "quack"), ("fp8", "cublas")]


@pytest.mark.parametrize(("matmul", "gemm"), PRODUCTS)
def test_what_is_computed_again_is_the_same_to_the_bit(tiny, documents, matmul, gemm):
    torch.manual_seed(0)
    model = Transformer(tiny)
    batch = documents(tiny.vocab_size, 24, CUTS)
    runs = []
    for memory in MEMORY:
        model.fuse_blocks(memory, matmul, gemm)
        runs.append(gradients(model, batch))
    for hidden, grads in runs[1:]:
        assert torch.equal(hidden, runs[0][0])
        assert all(torch.equal(grad, runs[0][1][name]) for name, grad in grads.items())


KEPT = {"fast": 4 * 64 + 64 + 128 + 2 * 96, "balanced": 64 + 64 + 128 + 2 * 96, "low": 64}


@pytest.mark.parametrize(("memory", "numbers"), KEPT.items())
@pytest.mark.parametrize(("matmul", "gemm"), PRODUCTS)
def test_a_block_keeps_what_its_mode_says(tiny, documents, memory, numbers, matmul, gemm):
    """Numbers kept of each token; what attention keeps for itself, a few more, not counted."""
    model = Transformer(tiny)
    model.fuse_blocks(memory, matmul, gemm)
    batch = documents(tiny.vocab_size, 24, CUTS)
    norm = model(*batch).grad_fn.next_functions[0][0]
    block = norm.next_functions[0][0]
    tensors = [t for t in tree_leaves(vars(block.keep)) if t is not None]
    rows = [t for t in tensors if isinstance(t, Rows)]
    assert all(r.rounded is None for r in rows)
    tensors = [t.wide if isinstance(t, Rows) else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == 4 * numbers * batch[0].numel()
    assert not [t for t in block.saved_tensors if len(t) == batch[0].numel()]


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("gemm", GEMM)
def test_evaluation_keeps_nothing_and_agrees(model, documents, gemm):
    batch = documents(model.config.vocab_size, 24, CUTS)
    model.fuse_blocks(gemm=gemm)
    with torch.no_grad():
        hidden = model(*batch)
    assert hidden.grad_fn is None
    torch.testing.assert_close(hidden, model(*batch).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("gemm", GEMM)
def test_micro_batches_accumulate(model, documents, gemm):
    """Two backward passes into the same gradients add up."""
    batch = documents(model.config.vocab_size, 24, CUTS)
    model.fuse_blocks(gemm=gemm)
    model(*batch).sum().backward()
    single = {n: p.grad.clone() for n, p in model.named_parameters()}
    model(*batch).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * single[name])


def test_a_second_backward_pass_is_refused_in_words(model, documents):
    batch = documents(model.config.vocab_size, 24, CUTS)
    model.fuse_blocks()
    total = model(*batch).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_a_changed_weight_is_used_at_once(model, documents):
    """Weights are cast at each use: fused AdamW and `data` leave no trace in `_version`."""
    batch = documents(model.config.vocab_size, 24, CUTS)
    model.fuse_blocks()
    model(*batch)
    model.blocks[0].ffn.down_proj.weight.data.mul_(2)
    plain = copy.deepcopy(model)
    plain.fused = None
    torch.testing.assert_close(model(*batch), plain(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("matmul", "gemm"), PRODUCTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fused_training_step_on_a_gpu(documents, memory, matmul, gemm, head_dim):
    """Hidden states and gradients in bf16 against the modules in float32 on the CPU."""
    config = ModelConfig(
        vocab_size=512, d_model=6 * head_dim, n_layers=4, n_heads=6, n_kv_heads=2, d_ffn=512
    )
    torch.manual_seed(0)
    exact = Transformer(config)
    ours = Transformer(config, dtype=torch.bfloat16).cuda()
    ours.load_state_dict(exact.state_dict())
    needs_quack(ours, gemm)
    ours.fuse_blocks(memory, matmul, gemm)
    for cuts in ([[100, 101], [37]], [[], [5, 128, 200]]):
        expected = gradients(exact, documents(config.vocab_size, 256, cuts))
        hidden, grads = gradients(ours, documents(config.vocab_size, 256, cuts, "cuda"))
        assert relative_error(hidden.cpu(), expected[0]) < (0.02 if matmul == "bf16" else 0.08)
        whole = [torch.cat([g.flatten().cpu() for g in x.values()]) for x in (grads, expected[1])]
        assert relative_error(*whole) < (0.03 if matmul == "bf16" else 0.15)


def needs_quack(model, gemm):
    if gemm == "quack" and (obstacle := epilogue_obstacle(model.device, model.dtype, [])):
        pytest.skip(f"quack {obstacle}")


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("gemm", GEMM)
def test_a_deterministic_step_repeats_to_the_bit_on_a_gpu(documents, memory, gemm):
    """Long rows of many documents, so that blocks of keys are summed by several programs."""
    config = ModelConfig(
        vocab_size=512, d_model=384, n_layers=2, n_heads=6, n_kv_heads=2, d_ffn=512
    )
    torch.manual_seed(0)
    model = Transformer(config, dtype=torch.bfloat16).cuda()
    needs_quack(model, gemm)
    model.fuse_blocks(memory, gemm=gemm)
    cuts = [[100, 700, 1500], [], [37, 38, 2000], [900]]
    batch = documents(config.vocab_size, 2048, cuts, "cuda")
    try:
        set_deterministic(True)
        runs = [gradients(model, batch) for _ in range(3)]
    finally:
        set_deterministic(False)
    for hidden, grads in runs[1:]:
        assert torch.equal(hidden, runs[0][0])
        assert all(torch.equal(grad, runs[0][1][name]) for name, grad in grads.items())
