"""Muon against torch's, which goes a matrix at a time; skipped steps; what a checkpoint keeps."""

import copy
import math

import pytest
import torch

from models.config import ModelConfig
from models.transformer import Transformer
from models.verifier import Verifier
from optim import muon
from optim.muon import orthogonalized
from optim.optimizer import OptimConfig, make_optimizer
from optim.scheduler import Schedule, ScheduleConfig
from utils.config import ConfigError, validate

SHAPE = ModelConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=24)
MUON = OptimConfig(kind="muon", lr=0.01, weight_decay=0.1)


def start(config: OptimConfig = MUON, seed: int = 0) -> tuple[Transformer, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Transformer(SHAPE)
    return model, make_optimizer(model.named_parameters(), config)


def give_gradients(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def snapshot(model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Weights and optimizer state, as plain tensors by name."""
    values = {f"weight {i}": p.detach().clone() for i, p in enumerate(model.parameters())}
    for index, state in optimizer.state_dict()["state"].items():
        values |= {f"{name} {index}": torch.as_tensor(x).clone() for name, x in state.items()}
    return values


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_matrices_of_the_blocks_are_muons_and_the_rest_is_adamws():
    torch.manual_seed(0)
    model = Verifier(SHAPE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model.named_parameters(), MUON)
    members = {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert members["muon"] == {name for name in names.values() if name.endswith("_proj.weight")}
    assert members["decay"] == {"score.weight"}
    assert set().union(*members.values()) == set(names.values())
    assert sum(map(len, members.values())) == len(names)


@pytest.mark.parametrize("elements", [2**26, 2 * 16 * 24, 1])  # all, two matrices, one
def test_it_is_torchs_muon_and_adamw(elements, monkeypatch):
    """Ten steps of rates that change; where a stack is multiplied as its matrices are, as on the
    CPUs tried, the ways walked differ by 5e-7 of their lengths."""
    monkeypatch.setattr(muon, "STACK_ELEMENTS", elements)
    model, optimizer = start()
    reference = copy.deepcopy(model)
    inside = [p for n, p in reference.named_parameters() if n.endswith("_proj.weight")]
    rest = [p for n, p in reference.named_parameters() if not n.endswith("_proj.weight")]
    theirs = [
        torch.optim.Muon(inside, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(10):
        rate = 0.01 / (1 + step)
        for group in [g for o in (optimizer, *theirs) for g in o.param_groups]:
            group["lr"] = rate
        for each in (model, reference):
            give_gradients(each, step)
        for each in (optimizer, *theirs):
            each.step()
    for begin, ours, other in zip(before, model.parameters(), reference.parameters(), strict=True):
        assert (other - begin).norm() > 0.01
        assert (ours - other).norm() < 0.01 * (other - begin).norm()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (5, 16, 64)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    made = u.mT @ orthogonalized(matrices) @ vt.mT  # diagonal, if the vectors are the same
    diagonal = made.diagonal(dim1=1, dim2=2)
    assert diagonal[s > 0.05 * s.amax()].min() > 0.5
    assert diagonal.max() < 1.35
    assert (made - torch.diag_embed(diagonal)).abs().max() < 0.1


def test_an_update_is_as_large_as_adamws():
    model, optimizer = start(MUON.model_copy(update={"weight_decay": 0.0}))
    before = copy.deepcopy(model)
    give_gradients(model, 0)
    optimizer.step()
    for old, new in zip(before.blocks.parameters(), model.blocks.parameters(), strict=True):
        if old.ndim == 2:
            rms = (new - old).square().mean().sqrt().item()
            assert rms == pytest.approx(0.2 * 0.01, rel=0.25)


def test_a_skipped_step_leaves_everything_as_it_was():
    model, optimizer = start()
    for step in range(2):  # skipped before there is any momentum, and after
        before = snapshot(model, optimizer)
        for bad in (math.nan, math.inf, 1e30):
            give_gradients(model, 0)
            next(model.blocks.parameters()).grad.fill_(bad)
            model.blocks[0].ffn.up_proj.weight.grad.fill_(bad)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(bad), torch.tensor(1.0)
            optimizer.step()
            after = snapshot(model, optimizer)
            assert equal({k: after[k] for k in before}, before)
            assert all(not x.any() for k, x in after.items() if k not in before)
        give_gradients(model, step)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        optimizer.step()
        assert not equal(snapshot(model, optimizer), before)


def test_gradients_are_divided_by_the_scale():
    (one, a), (two, b) = start(), start()
    for step in range(3):
        for model in (one, two):
            give_gradients(model, step)
        for parameter in two.parameters():
            parameter.grad *= 8  # a power of two changes no digit
        a.grad_scale, b.grad_scale = torch.tensor(1.0), torch.tensor(8.0)
        a.found_inf = b.found_inf = torch.tensor(0.0)
        a.step()
        b.step()
    assert equal(snapshot(one, a), snapshot(two, b))


def test_a_saved_state_goes_on_to_the_bit():
    model, optimizer = start()
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    other, resumed = start(seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for each, its in ((model, optimizer), (other, resumed)):
            give_gradients(each, step)
            its.step()
    assert equal(snapshot(model, optimizer), snapshot(other, resumed))


def test_the_schedule_rules_both_rates():
    _, optimizer = start(MUON.model_copy(update={"muon_lr": 0.1}))
    schedule = Schedule(ScheduleConfig(warmup_steps=4, decay_fraction=0.5), 20)
    for step, factor in ((0, 0.25), (3, 1.0), (15, 0.5)):
        schedule.apply(optimizer, step)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["muon"] == pytest.approx(0.1 * factor)
        assert rates["decay"] == rates["no_decay"] == pytest.approx(0.01 * factor)


def test_frozen_matrices_stay():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    frozen = model.blocks[0].requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), MUON)
    before = copy.deepcopy(frozen.state_dict())
    give_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in frozen.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "muno"}, "did you mean 'muon'?"),
        ({"kind": "muon", "muon_lr": 0.0}, "muon_lr (0.0) must be above 0"),
        ({"kind": "muon", "muon_momentum": 1.0}, "must be at least 0 and below 1"),
        ({"muon_lr": 0.02}, "read only with kind 'muon'"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(ConfigError) as error:
        validate(OptimConfig, values, "test")
    assert message in str(error.value)
