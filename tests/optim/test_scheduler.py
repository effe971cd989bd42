"""Factors derived by hand at every boundary; branches; what a resume restores; the rules."""

import pytest
import torch

from optim.scheduler import Schedule, ScheduleConfig
from utils.config import ConfigError, validate

WSD = {"kind": "wsd", "warmup_steps": 4, "decay_fraction": 0.2, "final_lr_ratio": 0.1}


def schedule(total_steps, **values):
    return Schedule(validate(ScheduleConfig, values, "test"), total_steps)


def factors(of, steps):
    return [of.factor(step) for step in steps]


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        # Four steps of decay from 1 to 0.1: 0.1 + 0.9 x (1, 3/4, 1/2, 1/4), then the end.
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        # (1 + cos(pi p)) / 2 at p = 1/4, 1/2, 3/4 is 0.853553, 0.5, 0.146447.
        ("cosine", [1.0, 0.868198, 0.55, 0.231802, 0.1, 0.1]),
        # 1 - sqrt(p) at the same p is 0.5, 0.292893, 0.133975.
        ("1-sqrt", [1.0, 0.55, 0.363604, 0.220577, 0.1, 0.1]),
    ],
)
def test_wsd(shape, decay):
    wsd = schedule(20, **WSD, decay_shape=shape)
    assert factors(wsd, range(5)) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(wsd, range(5, 16)) == [1.0] * 11
    assert factors(wsd, range(16, 22)) == pytest.approx(decay, abs=1e-6)


def test_cosine():
    """Steps 4 to 12 are an eighth of a half turn each: (1 + cos(pi p)) / 2 at 0, 1/4, 1/2, 3/4."""
    cosine = schedule(12, kind="cosine", warmup_steps=4, final_lr_ratio=0.1)
    assert factors(cosine, range(4)) == [0.25, 0.5, 0.75, 1.0]
    halves = factors(cosine, [4, 6, 8, 10, 12, 13])
    assert halves == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_no_step_is_wasted_at_zero(kind):
    of = schedule(10, kind=kind, warmup_steps=2, decay_fraction=0.5, final_lr_ratio=0.0)
    assert all(factor > 0 for factor in factors(of, range(10)))
    assert of.factor(10) == 0


def test_phases_may_be_absent():
    assert factors(schedule(3, decay_fraction=0.0), range(3)) == [1.0, 1.0, 1.0]
    assert factors(schedule(2, decay_fraction=1.0), range(3)) == [1.0, 0.5, 0.0]
    full = schedule(4, warmup_steps=2, decay_fraction=0.5)
    assert factors(full, range(4)) == [0.5, 1.0, 1.0, 0.5]


def test_apply_keeps_each_groups_peak():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.02}]
    )
    wsd = schedule(20, **WSD)
    for step, rates in ((0, [0.25, 0.005]), (1, [0.5, 0.01]), (18, [0.55, 0.011])):
        wsd.apply(optimizer, step)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates)
    resumed = torch.optim.SGD([{"params": [p]} for p in parameters], lr=9.0)
    resumed.load_state_dict(optimizer.state_dict())
    wsd.apply(resumed, 5)
    assert [g["lr"] for g in resumed.param_groups] == pytest.approx([1.0, 0.02])


def test_a_branch_decays_from_the_stable_phase():
    branch = schedule(1000, **WSD, decay_now=True, decay_steps=4)
    branch.branch(10)
    assert branch.total_steps == 14
    assert factors(branch, [9, 10, 11, 12, 13, 14]) == pytest.approx(
        [1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
    )


def test_a_branch_inside_a_decay_goes_on_from_the_rate_in_force():
    branch = schedule(20, **WSD, decay_now=True, decay_steps=9)
    branch.branch(18)  # the linear decay is at 0.55 there
    assert branch.factor(18) == pytest.approx(0.55)
    assert branch.factor(21) == pytest.approx(0.1 + 0.45 * 6 / 9)
    assert branch.total_steps == 27


def test_a_resumed_branch_goes_on():
    first = schedule(1000, **WSD, decay_now=True, decay_steps=4)
    first.branch(10)
    resumed = schedule(1000, **WSD, decay_now=True, decay_steps=4)
    resumed.load_state_dict(first.state_dict())
    assert factors(resumed, range(16)) == factors(first, range(16))
    assert resumed.total_steps == 14


def test_a_branch_off_a_branch_goes_on_from_its_rate():
    first = schedule(1000, **WSD, decay_now=True, decay_steps=4)
    first.branch(10)
    second = schedule(1000, **WSD, decay_now=True, decay_steps=8)
    second.load_state_dict(first.state_dict())
    second.branch(12)
    assert second.total_steps == 20
    assert second.factor(12) == first.factor(12)
    end, rate = second.config.final_lr_ratio, first.factor(12)
    assert second.factor(16) == pytest.approx((rate + end) / 2)


def test_a_resume_may_lengthen_a_run_that_has_not_branched():
    longer = schedule(40, **WSD)
    longer.load_state_dict(schedule(20, **WSD).state_dict())
    assert longer.total_steps == 40
    assert longer.factor(17) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_now": True}, "decay_now needs decay_steps"),
        ({"decay_steps": 5}, r"decay_steps \(5\) is read only with decay_now=true"),
        ({"kind": "cosine", "decay_now": True, "decay_steps": 5}, "decay_now needs kind 'wsd'"),
        ({"decay_fraction": 1.5}, "decay_fraction: should be less than or equal to 1"),
        ({"decay_shape": "1-sqr"}, "did you mean '1-sqrt'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        schedule(100, **values)


@pytest.mark.parametrize(("kind", "decay"), [("wsd", 20), ("cosine", 0)])
def test_phases_that_do_not_fit_are_refused(kind, decay):
    message = rf"warmup_steps \(101\) and a decay of {decay} steps do not fit into 100 steps"
    with pytest.raises(ConfigError, match=message):
        schedule(100, kind=kind, warmup_steps=101, decay_fraction=0.2)
