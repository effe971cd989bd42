"""What a run costs: dollars, tokens per dollar, tokens per second, MFU and the time left.

MFU is the FLOPs the model needs (PaLM's count: no recomputation) over the device's dense bf16 peak,
whatever the run computes in; a device that is not in the table has none until the config gives one.
Throughput and MFU are those of training: steps, saves and waiting for data count, evaluations do
not, nor does the first step of a process, which compiles kernels and waits for the first shard.
Dollars and the time left count all the time that the machine is held.

Left out: spot prices, storage and traffic.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic import Field

from utils.config import Config, Problem


class Device(NamedTuple):
    """An accelerator; `name` is a part of what `torch.cuda.get_device_name` returns.

    Peaks are dense (without sparsity) FLOP/s with float32 accumulation, from the vendor's data
    sheet. Prices are typical on-demand ones of clouds that rent out single cards, as of 2025; a
    guess at yours, which goes into `cost.usd_per_hour`.
    """

    name: str
    peak_flops: float  # in `precision`
    fp8_flops: float | None
    memory_gb: int
    usd_per_hour: float
    precision: str = "bf16"


DEVICES = (
    Device("A100", 312e12, None, 80, 1.80),  # NVIDIA A100 data sheet
    Device("A100-SXM4-40GB", 312e12, None, 40, 1.30),
    Device("A100-PCIE-40GB", 312e12, None, 40, 1.30),
    Device("H100", 989.4e12, 1978.9e12, 80, 3.00),  # H100 data sheet, SXM5
    Device("H100 PCIe", 756e12, 1513e12, 80, 2.50),
    Device("H100 NVL", 835.5e12, 1671e12, 94, 2.80),
    Device("GH200", 989.4e12, 1978.9e12, 96, 2.00),  # GH200 data sheet
    Device("H200", 989.4e12, 1978.9e12, 141, 3.80),  # H200 data sheet, SXM5
    Device("H200 NVL", 835.5e12, 1671e12, 141, 3.50),
    Device("B200", 2250e12, 4500e12, 180, 6.00),  # HGX B200 data sheet
    # T4 data sheet. It has no bf16, and runs compute in float32 there; in fp16 it would be 65e12.
    Device("T4", 8.1e12, None, 16, 0.35, "fp32"),
    Device("L4", 121e12, 242.5e12, 24, 0.70),  # L4 data sheet
    Device("L40S", 362e12, 733e12, 48, 1.00),  # L40S data sheet
    Device("A10", 125e12, None, 24, 0.75),  # A10 data sheet
    Device("A10G", 70e12, None, 24, 1.00),  # AWS G5 instance description
    Device("A6000", 154.8e12, None, 48, 0.80),  # RTX A6000 data sheet
    Device("RTX 3090", 71e12, None, 24, 0.30),  # GA102 white paper
    Device("RTX 4090", 165.2e12, 330.3e12, 24, 0.50),  # Ada white paper
    Device("RTX 5090", 209.5e12, 419e12, 32, 0.80),  # RTX Blackwell white paper
)
PROJECTION_DEVICE = "H100"


def find_device(name: str) -> Device | None:
    """Return the device whose name is the longest found in `name`; None for one not in the table.

    Laptop chips, variants (`Ti`, `D`), MIG slices and virtual shares (`A10-8Q`) carry the name of
    another device and are not in the table.
    """
    if re.search(r"laptop|max-q|\b(MIG|Ti|D)\b|-\d+[ABCQ]\b", name, re.IGNORECASE):
        return None
    found = [d for d in DEVICES if re.search(rf"\b{re.escape(d.name)}\b", name, re.IGNORECASE)]
    return max(found, key=lambda device: len(device.name), default=None)


class CostConfig(Config):
    """Price and speed of the machine, where they are not those of the table."""

    usd_per_hour: float | None = Field(None, ge=0)
    """Price of one device; null: the table's typical one."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device, dense, in bf16 where it has it; null: the table's."""
    device: str | None = None
    """Device that --dry-run projects for, such as H100; null: an H100."""
    projected_mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak that --dry-run assumes is reached."""

    def problems(self) -> Iterator[Problem]:
        if self.device is not None and find_device(self.device) is None:
            known = ", ".join(device.name for device in DEVICES)
            yield Problem(("device",), f"device ({self.device}) is not in the table: {known}")


class CostTracker:
    """Counts tokens, FLOPs, seconds and dollars of a run, over all its resumes.

    Args:
        usd_per_hour: price of all devices together; None leaves the dollars out.
        peak_flops: their peak FLOP/s together; None leaves MFU out.
    """

    def __init__(
        self,
        usd_per_hour: float | None,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.usd_per_hour = usd_per_hour
        self.peak_flops = peak_flops
        self.tokens = 0
        self._clock = clock
        self._earlier_usd = 0.0
        self._steps_here = 0  # of this process
        self._started = self._window_started = clock()
        self._window_tokens = self._window_flops = 0

    @classmethod
    def for_device(cls, config: CostConfig, name: str, world_size: int = 1) -> "CostTracker":
        """Make a tracker for `world_size` devices of this name, with what config or table know."""
        usd, peak = _price_and_peak(config, find_device(name))
        return cls(usd and usd * world_size, peak and peak * world_size)

    def update(self, tokens: int, flops: int) -> None:
        """Count a step; throughput counts from the end of the first one on."""
        self.tokens += tokens
        self._steps_here += 1
        if self._steps_here == 1:
            self._window_started = self._clock()
            return
        self._window_tokens += tokens
        self._window_flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time inside, an evaluation, out of throughput and MFU."""
        began = self._clock()
        try:
            yield
        finally:
            self._window_started += self._clock() - began

    def metrics(self, step: int, total_steps: int) -> dict[str, float]:
        """Return what is known: throughput since the last call, money and progress in total."""
        now = self._clock()
        values = {"train/progress_percent": 100 * step / total_steps}
        seconds = now - self._window_started
        if self._window_tokens and seconds > 0:
            values["train/tokens_per_sec"] = self._window_tokens / seconds
            if self.peak_flops:
                values["train/mfu"] = self._window_flops / seconds / self.peak_flops
        if self.usd_per_hour is not None:
            values["cost/usd_spent"] = usd = self._usd(now)
            if usd > 0:
                values["cost/tokens_per_dollar"] = self.tokens / usd
        if self._steps_here:
            hours = (now - self._started) / 3600
            values["cost/eta_hours"] = max(0, total_steps - step) * hours / self._steps_here
        self._window_started, self._window_tokens, self._window_flops = now, 0, 0
        return values

    def _usd(self, now: float) -> float:
        return self._earlier_usd + (now - self._started) / 3600 * (self.usd_per_hour or 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent so far."""
        return {"tokens": self.tokens, "usd": self._usd(self._clock())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what was spent before to what this process spends."""
        self._earlier_usd = state["usd"]
        self.tokens = state["tokens"]


def _price_and_peak(config: CostConfig, device: Device | None) -> tuple[float | None, float | None]:
    """Return one device's dollars per hour and peak FLOP/s; the config comes before the table."""
    usd, peak = (device.usd_per_hour, device.peak_flops) if device else (None, None)
    if config.usd_per_hour is not None:
        usd = config.usd_per_hour
    if config.peak_tflops is not None:
        peak = config.peak_tflops * 1e12
    return usd, peak


class Projection(NamedTuple):
    """A guess at hours and dollars, and what it assumes."""

    hours: float
    dollars: float
    assumption: str


def projection(config: CostConfig, flops: float, device: Device) -> Projection:
    """Guess what `flops` take on one `device` at the assumed utilisation."""
    usd, peak = _price_and_peak(config, device)
    hours = flops / (peak * config.projected_mfu) / 3600
    tflops = f"{round(peak / 1e12, 1):g} TFLOP/s {device.precision}"
    assumption = (
        f"one {device.name} ({tflops}) at {config.projected_mfu:.0%} of its peak, "
        f"${usd:.2f} per hour"
    )
    return Projection(hours, hours * usd, assumption)
