"""The plots of a report: each once as SVG for the page and once as PNG for everything else.

The SVG goes into the page as it is: text stays text, and its colours become variables of the page's
style, so that one drawing suits light and dark. Title and legend of the SVG are the page's; the PNG
carries its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.logging import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils.report import Curve, Panel, Run

# Light and dark of each curve's colour, tellable apart by most colour-blind eyes.
COLOURS = (
    ("#2563eb", "#6ea8ff"), ("#d9480f", "#ff9f5a"), ("#0b8f6a", "#3ddbaa"), ("#9333ea", "#c58bff"),
    ("#b7791f", "#f2c94c"), ("#be185d", "#ff7eb6"), ("#0e7490", "#5ad1e6"), ("#5b6470", "#a5afbd"),
)  # fmt: skip
INK, GRID, ALERT = ("#4b5563", "#9aa7b6"), ("#e3e7ec", "#2a323d"), ("#c81e1e", "#ff6b6b")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
SIZE_INCHES = (4.4, 2.5)
HEAD = 0.05  # the share of a run whose higher values do not set the scale of its losses
LOG_SCALE_FROM = 30  # ratio of largest to median value


def colour(curve: Curve, n_runs: int) -> int:
    """Index of a curve's colour: runs differ by colour, in a single run its curves do."""
    return (curve.run if n_runs > 1 else curve.style) % len(COLOURS)


def style_variables(dark: bool) -> str:
    """CSS declarations of the colours that drawings use."""
    named = {"ink": INK, "grid": GRID, "alert": ALERT}
    named |= {f"c{i}": pair for i, pair in enumerate(COLOURS)}
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in named.items())


def draw(panel: Panel, runs: Sequence[Run], png: Path) -> str:
    """The panel as an `<svg>` element; also writes it to `png`."""
    figure = _figure(panel, len(runs))
    svg = _svg(figure)
    axes = figure.axes[0]
    axes.set_position((0.13, 0.17, 0.84, 0.69))
    axes.set_title(_title(panel), loc="left", fontweight="bold", color="#111827")
    if any(curve.label for curve in panel.curves):
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(png, dpi=200)
    return svg


def _title(panel: Panel) -> str:
    return f"{panel.title} ({panel.unit})" if panel.unit else panel.title


def _figure(panel: Panel, n_runs: int) -> Figure:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install matplotlib") from error

    with rc_context(_settings()):
        figure = Figure(SIZE_INCHES)
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.81))
        for curve in panel.curves:
            _draw_curve(axes, curve, n_runs)
        _mark_skips(axes, panel)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=GRID[0], linewidth=1)
        axes.tick_params(length=0, pad=5)
        axes.set_xlabel("step", loc="right", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_count(x)))
        axes.margins(x=0.02, y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        _scale(axes, panel)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick_text(y, panel.unit)))
    return figure


def _settings() -> dict[str, object]:
    return {
        "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "report", "text.color": INK[0],
        "axes.labelcolor": INK[0], "axes.edgecolor": GRID[0], "xtick.color": INK[0],
        "ytick.color": INK[0], "axes.axisbelow": True,
    }  # fmt: skip


def _draw_curve(axes: Axes, curve: Curve, n_runs: int) -> None:
    axes.plot(
        curve.steps,
        curve.values,
        color=COLOURS[colour(curve, n_runs)][0],
        linestyle=DASHES[curve.style % len(DASHES)] if n_runs > 1 else "-",
        linewidth=1.6,
        marker="o" if curve.sparse or len(curve.steps) < 3 else None,
        markersize=3.5,
        label=curve.label,
        solid_capstyle="round",
    )


def _mark_skips(axes: Axes, panel: Panel) -> None:
    """A cross below the curve for each log line that tells of skipped steps."""
    steps = [step for _, step in panel.marks]
    if steps:
        axes.plot(
            steps, [0.04] * len(steps), "x", color=ALERT[0], markersize=6, markeredgewidth=1.8,
            transform=axes.get_xaxis_transform(), label="steps skipped", clip_on=False,
        )  # fmt: skip


def _scale(axes: Axes, panel: Panel) -> None:
    """Show where a curve ends rather than how high it began."""
    values = sorted(value for curve in panel.curves for value in curve.values)
    low, high = values[0], values[-1]
    median = values[len(values) // 2]
    if panel.title == "Gradient norm" and low > 0 and high > LOG_SCALE_FROM * median:
        axes.set_yscale("log")
    elif "loss" in panel.title.lower():
        last = max(curve.steps[-1] for curve in panel.curves)
        later = [
            value
            for curve in panel.curves
            for step, value in zip(curve.steps, curve.values, strict=True)
            if step >= HEAD * last
        ]
        if later and low < max(later) and high - low > 1.5 * (max(later) - low):
            room = 0.08 * (max(later) - low)
            axes.set_ylim(low - room, max(later) + room)
    elif low >= 0 and (panel.unit or panel.title == "Gradient norm"):
        axes.set_ylim(bottom=0)


def tick_text(value: float, unit: str) -> str:
    """A number at an axis: 0.3 as 30% of MFU, 400,000 as 400K tokens/s."""
    if unit == "%":
        return f"{100 * value:.3g}%"
    if unit == "$":
        return f"${value:.3g}"
    if abs(value) >= 1000:
        return human_count(value)
    return f"{value:.4g}".replace("e-0", "e-")


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_settings()):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*|\n\s*", " ", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)
    named = {INK[0]: "ink", GRID[0]: "grid", ALERT[0]: "alert"}
    named |= {pair[0]: f"c{i}" for i, pair in enumerate(COLOURS)}
    for value, name in named.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg.replace("'DejaVu Sans', ", "").strip()
