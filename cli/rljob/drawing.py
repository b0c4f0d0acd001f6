"""How the report's plots are drawn: style, colours, axes, and a figure as one inline SVG.

Figures are made without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rljob_api.messages import StepReport, WorkerState
from rljob_runtime.correction.leak import LeakVerdict

MAX_POINTS = 400
"""More steps than that are averaged in stretches: an SVG with a point a step would weigh megabytes."""
SMOOTHING_SHARE = 0.05
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a", "#4b5563")
"""Okabe and Ito's palette, in front: told apart with any colour vision."""
WIDTH, HEIGHT = 7.2, 2.9
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 9,
    "axes.titlecolor": "#374151",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PlottedRun:
    """One run's data."""

    name: str
    steps: Sequence[StepReport]
    workers: Sequence[WorkerState]
    leak: LeakVerdict | None = None


def colored(runs: Sequence[PlottedRun]) -> list[tuple[PlottedRun, str]]:
    return [(run, COLORS[index % len(COLORS)]) for index, run in enumerate(runs)]


def shades(count: int) -> list[tuple[float, ...]]:
    """Light to dark with staleness."""
    colors = mpl.colormaps["YlGnBu"](np.linspace(0.25, 0.95, max(count, 1)))
    return [tuple(color) for color in colors[:count]]


def curve(run: PlottedRun, value: Callable[[StepReport], float]) -> tuple[Floats, Floats]:
    return thin(run, np.array([value(step) for step in run.steps], float))


def thin(run: PlottedRun, values: Floats) -> tuple[Floats, Floats]:
    """(step numbers, values), averaged in stretches to at most MAX_POINTS; NaN is left out of the averages."""
    steps = np.array([step.step for step in run.steps], float)
    if len(steps) <= MAX_POINTS:
        return steps, values
    stretches = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return (
        np.array([steps[part].mean() for part in stretches]),
        np.array([_mean(values[part]) for part in stretches]),
    )


def _mean(values: Floats) -> Floats:
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def smooth(values: Floats) -> Floats:
    """Centred running mean; at the ends over what is there."""
    width = min(max(1, round(len(values) * SMOOTHING_SHARE)), (len(values) - 1) // 2)
    kernel = np.ones(2 * width + 1)
    return np.asarray(np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same"))


def log_scale(*shared: Axes, lowest: float | None = None) -> None:
    """Whole decades, where there is something to show: all zero (engine and trainer agree exactly) has no logarithm.

    Several axes are those that share their scale. Bars reach down to `lowest` less a decade: on a logarithmic axis they have no natural foot.
    """
    intervals = [axes.dataLim.intervaly for axes in shared if np.isfinite(axes.dataLim.intervaly).all()]
    if not intervals:
        return
    low, high = min(interval[0] for interval in intervals), max(interval[1] for interval in intervals)
    low = low if lowest is None else lowest
    if not (np.isfinite(high) and high > 0 and low > 0):
        return
    for axes in shared:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    shared[0].set_ylim(10 ** np.floor(np.log10(low) - (lowest is not None)), 10 ** np.ceil(np.log10(high) + 1e-9))


def thousands(axes: Axes, axis: str) -> None:
    place = axes.yaxis if axis == "y" else axes.xaxis
    place.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")


def titled(text: str, run: PlottedRun, runs: Sequence[PlottedRun]) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def legend(axes: Axes, *, title: str | None = None, reverse: bool = False) -> None:
    """Beside the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles, labels, title=title, reverse=reverse, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0
        )


def single(name: str, draw: Callable[[Axes], None]) -> str:
    return svg(name, lambda figure: draw(figure.subplots()), WIDTH, HEIGHT)


def row_per_run(name: str, runs: Sequence[PlottedRun], draw: Callable[[Axes, PlottedRun], None]) -> str:
    """One row of axes for each run."""

    def rows(figure: Figure) -> None:
        grid = figure.subplots(len(runs), 1, squeeze=False)
        for axes, run in zip(grid[:, 0], runs, strict=True):
            draw(axes, run)
            axes.set(xlabel="step", xlim=(run.steps[0].step, max(run.steps[-1].step, run.steps[0].step + 1)))
            if len(runs) > 1:
                axes.set_title(run.name)

    return svg(name, rows, WIDTH, HEIGHT * len(runs) * (1 if len(runs) == 1 else 0.9))


def svg(name: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
    """The figure as an <svg> element that scales with its place and refers to nothing outside the page."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))
        draw(figure)
        for axes in figure.axes:
            if axes.get_xlabel() == "step":
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids of one plot must not meet another's: only the definitions' hashed ids are referred to.
    text = re.sub(r' (?:xmlns|xmlns:xlink|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg height="[^"]*"', "<svg", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
