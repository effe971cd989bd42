"""Costs: hand-computed numbers on a clock that the test moves."""

import pytest

from utils.config import ConfigError, validate
from utils.cost_tracker import (
    DEVICES,
    PROJECTION_DEVICE,
    CostConfig,
    CostTracker,
    find_device,
    projection,
)


class Clock:
    """Time that passes when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", "T4"),
        ("NVIDIA A100X", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A10-8Q", None),
        ("GRID A100-40C", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_devices_are_told_apart(name: str, expected: str | None) -> None:
    found = find_device(name)
    assert (found and found.name) == expected


def test_every_device_finds_itself() -> None:
    assert all(find_device(device.name) is device for device in DEVICES)
    assert find_device(PROJECTION_DEVICE).peak_flops == 989.4e12


@pytest.mark.parametrize(
    ("name", "tflops", "precision"),
    [
        ("Tesla T4", 8.1, "fp32"),
        ("NVIDIA L4", 121, "bf16"),
        ("NVIDIA A10G", 70, "bf16"),
        ("NVIDIA GeForce RTX 4090", 165.2, "bf16"),
        ("NVIDIA A100-SXM4-40GB", 312, "bf16"),
        ("NVIDIA A100-SXM4-80GB", 312, "bf16"),
        ("NVIDIA H100 80GB HBM3", 989.4, "bf16"),
        ("NVIDIA H200", 989.4, "bf16"),
        ("NVIDIA B200", 2250, "bf16"),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, tflops: float, precision: str) -> None:
    device = find_device(name)
    assert (device.peak_flops, device.precision) == (tflops * 1e12, precision)


def test_metrics_of_a_window() -> None:
    clock = Clock()
    cost = CostTracker(2.0, 1e12, clock=clock)
    clock.now += 20
    cost.update(100, 10**12)  # the first step compiles; throughput counts from here
    clock.now += 10
    cost.update(100, 10**12)
    cost.update(100, 10**12)
    metrics = cost.metrics(3, 10)
    assert metrics == pytest.approx(
        {
            "train/progress_percent": 30,
            "train/tokens_per_sec": 20,
            "train/mfu": 0.2,  # 2e12 FLOPs in 10 s of 1e12 per second
            "cost/usd_spent": 2 * 30 / 3600,
            "cost/tokens_per_dollar": 300 / (2 * 30 / 3600),
            "cost/eta_hours": 70 / 3600,  # 7 steps of 10 seconds
        }
    )
    clock.now += 4
    cost.update(100, 10**12)
    metrics = cost.metrics(4, 10)
    assert metrics["train/tokens_per_sec"] == 25
    assert metrics["train/mfu"] == 0.25
    assert metrics["train/progress_percent"] == 40


def test_pauses_cost_money_but_no_throughput() -> None:
    clock = Clock()
    cost = CostTracker(3600.0, None, clock=clock)
    cost.update(50, 1)
    clock.now += 5
    cost.update(50, 1)
    with cost.paused():
        clock.now += 7
    with pytest.raises(ZeroDivisionError), cost.paused():
        clock.now += 8
        1 / 0  # noqa: B018
    metrics = cost.metrics(2, 4)
    assert metrics["train/tokens_per_sec"] == 10
    assert metrics["cost/usd_spent"] == 20
    assert metrics["cost/eta_hours"] == 20 / 3600
    assert "train/mfu" not in metrics


def test_what_is_unknown_is_absent() -> None:
    clock = Clock()
    cost = CostTracker(None, None, clock=clock)
    assert cost.metrics(0, 10) == {"train/progress_percent": 0}
    clock.now += 1
    cost.update(1, 1)
    assert set(cost.metrics(1, 10)) == {"train/progress_percent", "cost/eta_hours"}
    clock.now += 1
    cost.update(1, 1)
    assert set(cost.metrics(2, 10)) == {
        "train/progress_percent", "train/tokens_per_sec", "cost/eta_hours"
    }  # fmt: skip


def test_spent_dollars_stay_spent() -> None:
    clock = Clock()
    first = CostTracker(3600.0, 1e12, clock=clock)
    clock.now += 5
    first.update(20, 1)
    state = first.state_dict()
    clock.now += 1000  # the machine is away
    second = CostTracker(1800.0, 1e12, clock=clock)
    second.load_state_dict(state)
    clock.now += 4
    second.update(20, 1)
    metrics = second.metrics(2, 5)
    assert metrics["cost/usd_spent"] == 5 + 2
    assert metrics["cost/tokens_per_dollar"] == 40 / 7
    assert metrics["train/progress_percent"] == 40
    assert metrics["cost/eta_hours"] == pytest.approx(12 / 3600)  # 3 steps of 4 seconds
    third = CostTracker(1800.0, 1e12, clock=clock)
    third.load_state_dict(second.state_dict())
    assert third.metrics(2, 5)["cost/usd_spent"] == 7


def test_for_device_takes_the_config_before_the_table() -> None:
    known = CostTracker.for_device(CostConfig(), "NVIDIA H200", world_size=2)
    assert (known.usd_per_hour, known.peak_flops) == (2 * 3.8, 2 * 989.4e12)
    own = CostTracker.for_device(CostConfig(usd_per_hour=0, peak_tflops=100), "NVIDIA H200")
    assert (own.usd_per_hour, own.peak_flops) == (0, 100e12)
    for name in ("cpu", "NVIDIA GeForce RTX 4090 D"):
        unknown = CostTracker.for_device(CostConfig(), name)
        assert (unknown.usd_per_hour, unknown.peak_flops) == (None, None)


def test_a_free_machine_has_no_tokens_per_dollar() -> None:
    cost = CostTracker(0.0, None, clock=Clock())
    cost.update(1, 1)
    metrics = cost.metrics(1, 10)
    assert metrics["cost/usd_spent"] == 0
    assert "cost/tokens_per_dollar" not in metrics


def test_projection() -> None:
    device = find_device("A100")
    result = projection(CostConfig(projected_mfu=0.5, usd_per_hour=2), 156e12 * 7200, device)
    assert (result.hours, result.dollars) == (2, 4)
    assert "A100" in result.assumption
    assert "50%" in result.assumption
    t4 = projection(CostConfig(), 8.1e12 * 0.4 * 3600, find_device("T4"))
    assert t4.hours == pytest.approx(1)
    assert "one T4 (8.1 TFLOP/s fp32) at 40%" in t4.assumption


def test_an_unknown_device_is_a_config_problem() -> None:
    with pytest.raises(ConfigError, match=r"device \(H10\) is not in the table: A100"):
        validate(CostConfig, {"device": "H10"}, "cost")
