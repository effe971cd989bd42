"""Where the GPU's time goes: a few steps under torch's profiler, added up by kind of work.

Kernels are told apart by their names, so the categories are those of the reader (matrix products,
attention, elementwise ...) and not of the library that runs them. The products of the head count
as matrix products; "head and loss" is the work on the logits alone. Idle is the time between the
first kernel and the last in which none ran.

The trace file opens in https://ui.perfetto.dev. Left out: time on the host.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from utils.logging import get_logger

CATEGORIES = (  # the first that matches, in this order
    ("attention", r"flash|fmha|flex_attention|varlen_att|_attention_"),
    ("head and loss", r"softmax|logits|cross_entropy|nll_loss|log_softmax"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitk|cublas|wgmma|matmul"),
    ("optimizer", r"adam|lpnorm|multi_tensor_apply(?!.*copy)|muon"),
    ("copies and casts", r"^(?!triton_).*(memcpy|memset|copy|catarray|fill)"),
    ("norms, rotations, SwiGLU, other", r""),
)


def trace_steps(step: Callable[[], object], steps: int, file: Path) -> None:
    """Runs `step` so many times under the profiler and writes the trace, gzipped, to `file`."""
    _synchronize()
    with profile(activities=_activities()) as profiler:
        for _ in range(steps):
            step()
        _synchronize()
    profiler.export_chrome_trace(str(file))  # compresses by itself where the name ends in .gz


class StepTrace:
    """Traces some steps of a run, once its first steps are over.

    `tick` before each step does all of it: it begins, ends, writes the file and logs the table.

    Args:
        steps: how many; 0: none.
        file: its name ends in .json.gz.
        skip: steps before the first one traced, which compile and allocate.
    """

    def __init__(self, steps: int, file: Path, skip: int = 5) -> None:
        self.steps, self.file = steps, file
        self._ticks = -skip
        self._profiler: profile | None = None

    def tick(self) -> None:
        if self.steps and self._ticks == 0:
            self._profiler = profile(activities=_activities())
            _synchronize()
            self._profiler.start()
        elif self._ticks == self.steps:
            self.close()
        self._ticks += 1

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._profiler is None:
            return
        _synchronize()
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None
        get_logger().info(f"trace: {self.file}\n{gpu_time_table(self.file, self._ticks)}")


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * torch.cuda.is_available())]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_time(file: Path, steps: int) -> tuple[dict[str, float], list[tuple[str, str, int, float]]]:
    """Milliseconds a step by category, and by kernel: (category, name, calls a step, ms a step)."""
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    work = [e for e in events if e.get("cat") in kinds and e.get("ph") == "X"]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in work:
        by_name[event["name"]].append(event["dur"])
    totals = {category: 0.0 for category, _ in CATEGORIES}
    kernels = []
    for name, durations in by_name.items():
        milliseconds = sum(durations) / 1e3 / steps
        totals[category_of(name)] += milliseconds
        kernels.append((category_of(name), name, round(len(durations) / steps), milliseconds))
    totals["idle"] = _idle(work) / 1e3 / steps
    return totals, sorted(kernels, key=lambda kernel: -kernel[3])


def category_of(kernel: str) -> str:
    return next(c for c, pattern in CATEGORIES if re.search(pattern, kernel.lower()))


def _idle(work: list[dict]) -> float:
    """Microseconds between the first and the last in which nothing ran."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in work)
    idle, busy_until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return idle


def gpu_time_table(file: Path, steps: int, kernels: int = 20) -> str:
    """The two tables as text, the second of the `kernels` that take longest."""
    totals, longest = gpu_time(file, steps)
    whole = sum(totals.values())
    if not whole:
        return f"no GPU work in {file}"
    lines = [f"{'GPU time by kind of work':<34} ms/step   share"]
    lines += [f"{c:<34} {ms:7.1f}  {ms / whole:6.1%}" for c, ms in totals.items()]
    lines += [f"{'all':<34} {whole:7.1f}", "", f"{'ms/step':>7} {'calls':>5}  kernel"]
    lines += [f"{ms:7.2f} {n:5}  [{c}] {name[:90]}" for c, name, n, ms in longest[:kernels]]
    return "\n".join(lines)
