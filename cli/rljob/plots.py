"""The report's plots, each as one inline SVG. Figures are made without pyplot: no global state, no display."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rljob_api.messages import BucketStats, StepReport, WorkerState

MAX_POINTS = 400
"""More steps than that are averaged in stretches: an SVG with a point a step would weigh megabytes."""
SMOOTHING_SHARE = 0.05
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
PHASES = (
    ("waiting", "seconds_waiting", "#d1d5db"),
    ("scoring", "seconds_scoring", "#93c5fd"),
    ("training", "seconds_training", "#2563eb"),
    ("publishing", "seconds_publishing", "#f59e0b"),
    ("checkpointing", "seconds_checkpointing", "#7c3aed"),
)
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


def reward(runs: Sequence[PlottedRun]) -> str:
    """Reward over steps, smoothed over the raw values, with the constant answer's reward."""

    def draw(axes: Axes) -> None:
        for run, color in _colored(runs):
            x, y = _curve(run, lambda s: s.reward)
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, _smooth(y), color=color, label=run.name)
            if run.steps[-1].baseline is not None:
                x, y = _curve(run, lambda s: s.baseline if s.baseline is not None else np.nan)
                axes.plot(x, y, color=color, linestyle=":", linewidth=1, label=f"{run.name}: constant answer")
        axes.set(xlabel="step", ylabel="mean reward")
        _legend(axes)

    return _one("reward", draw)


def staleness(runs: Sequence[PlottedRun]) -> str:
    """Share of the batch's tokens at each staleness, stacked, a row for each run."""
    top = max((int(bucket) for run in runs for step in run.steps for bucket in step.staleness.histogram), default=0)
    colors = _scale(top + 1)

    def draw(axes: Axes, run: PlottedRun) -> None:
        counts = np.array(
            [[step.staleness.histogram.get(str(bucket), 0) for bucket in range(top + 1)] for step in run.steps], float
        )
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        x, y = _thin(run, shares)
        axes.stackplot(x, y.T, colors=colors, labels=[f"{bucket}" for bucket in range(top + 1)], linewidth=0)
        axes.set(ylabel="share of tokens", ylim=(0, 1))
        axes.grid(False)
        _legend(axes, title="versions old", reverse=True)

    return _each("staleness", runs, draw)


def fractions(runs: Sequence[PlottedRun]) -> str:
    """Shares of the loss tokens that the mask keeps, that the clip stops, and that carry gradient."""
    panels: tuple[tuple[str, Callable[[StepReport], float]], ...] = (
        ("kept by the discrepancy mask", lambda s: s.keep_fraction),
        ("stopped by the clip", lambda s: s.clip_fraction),
        ("active", lambda s: s.active_fraction),
    )

    def draw(figure: Figure) -> None:
        for place, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
            for run, color in _colored(runs):
                x, y = _curve(run, value)
                place.plot(x, y, color=color, label=run.name, linewidth=1.2)
            low, high = place.get_ylim()
            # Three shares that hardly move: without a floor on the range rounding noise fills the panel.
            middle, half = (low + high) / 2, max((high - low) / 2, 0.01)
            place.set(title=title, xlabel="step", ylim=(middle - half, middle + half))
        if len(runs) > 1:
            _legend(figure.axes[0])

    return _svg("fractions", draw, WIDTH, HEIGHT)


def discrepancy_over_steps(runs: Sequence[PlottedRun]) -> str:
    """RMS and largest |log r_d| of each step, a line for each staleness."""
    buckets = sorted({int(b) for run in runs for step in run.steps for b in step.discrepancy_by_staleness})
    colors = dict(zip(buckets, _scale(len(buckets)), strict=True))
    panels: tuple[tuple[str, Callable[[BucketStats], float]], ...] = (
        ("RMS", lambda stats: stats.rms_log_discrepancy),
        ("largest", lambda stats: stats.max_abs_log_discrepancy),
    )

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(runs), 2, squeeze=False, sharey="col")
        for row, run in zip(grid, runs, strict=True):
            for axes, (title, value) in zip(row, panels, strict=True):
                for bucket in buckets:
                    stats = [step.discrepancy_by_staleness.get(str(bucket)) for step in run.steps]
                    values = np.array([value(s) if s is not None and s.tokens else np.nan for s in stats])
                    x, y = _thin(run, np.where(values > 0, values, np.nan))
                    axes.plot(x, y, color=colors[bucket], label=str(bucket), linewidth=1, marker=".", markersize=2)
                axes.set(title=_titled(f"{title} |log r_d|", run, runs), xlabel="step")
        for column in grid.T:
            _log_scale(*column)
        _legend(figure.axes[-1], title="versions old")

    return _svg("discrepancy-steps", draw, WIDTH, HEIGHT * len(runs))


def discrepancy_by_staleness(runs: Sequence[PlottedRun]) -> str:
    """The same over the whole run: flat is clean, rising means that staleness leaked into the discrepancy ratio."""
    pooled = [pooled_discrepancy(run.steps) for run in runs]
    buckets = sorted({bucket for one in pooled for bucket in one})

    def draw(axes: Axes) -> None:
        width = 0.8 / len(runs)
        for index, (run, color) in enumerate(_colored(runs)):
            have = [bucket for bucket in buckets if bucket in pooled[index]]
            x = np.array([buckets.index(bucket) for bucket in have]) + (index - (len(runs) - 1) / 2) * width
            rms = [pooled[index][bucket].rms_log_discrepancy for bucket in have]
            largest = [pooled[index][bucket].max_abs_log_discrepancy for bucket in have]
            axes.bar(x, rms, width * 0.92, color=color, alpha=0.85, label=f"{run.name}: RMS")
            axes.plot(x, largest, "_", color=color, markersize=12, markeredgewidth=2, label=f"{run.name}: largest")
        axes.set_xticks(range(len(buckets)), [str(bucket) for bucket in buckets])
        axes.set(xlabel="staleness of the token, in versions", ylabel="|log r_d|")
        _log_scale(axes, lowest=min((one.rms_log_discrepancy for run in pooled for one in run.values()), default=0.0))
        _legend(axes)

    return _one("discrepancy-staleness", draw)


def tokens(runs: Sequence[PlottedRun]) -> str:
    """Tokens trained, cumulative, and those that the trainer dropped, by reason."""
    reasons = sorted({reason for run in runs for reason, n in run.steps[-1].tokens_dropped.items() if n})

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for index, (run, color) in enumerate(_colored(runs)):
            x, y = _curve(run, lambda s: float(s.tokens_trained))
            left.plot(x, y, color=color, label=f"{run.name}: trained")
            x, y = _curve(run, lambda s: float(sum(s.tokens_dropped.values())))
            left.plot(x, y, color=color, linestyle="--", label=f"{run.name}: dropped")
            height = 0.8 / len(runs)
            places = np.arange(len(reasons)) + index * height - 0.4 + height / 2
            right.barh(
                places,
                [run.steps[-1].tokens_dropped.get(reason, 0) for reason in reasons],
                height * 0.9,
                color=color,
                label=run.name,
            )
        left.set(title="tokens, cumulative", xlabel="step")
        _legend(left)
        right.set(title="dropped, by reason", xlabel="tokens")
        right.set_yticks(range(len(reasons)), reasons)
        right.set_ylim(max(2, len(reasons) - 0.5), -0.5)
        if not reasons:
            right.text(0.5, 0.5, "none dropped", transform=right.transAxes, ha="center", color="#6b7280")
            right.set(xticks=[])
        _thousands(left, "y")
        _thousands(right, "x")

    return _svg("tokens", draw, WIDTH, HEIGHT)


def time_breakdown(runs: Sequence[PlottedRun]) -> str:
    """Where each step's wall time went, stacked, a row for each run."""

    def draw(axes: Axes, run: PlottedRun) -> None:
        seconds = np.array([[getattr(step, field) for _, field, _ in PHASES] for step in run.steps], float)
        x, y = _thin(run, seconds)
        colors = [color for _, _, color in PHASES]
        axes.stackplot(x, y.T, labels=[name for name, _, _ in PHASES], colors=colors, linewidth=0)
        # The first step waits for the engines to start, and would squeeze all others.
        heights = np.sort(y.sum(axis=1))
        top = float(heights[: max(1, round(0.98 * len(heights)) - 1)][-1])
        axes.set(ylabel="seconds a step", ylim=(0, top * 1.15 or 1))
        _legend(axes, reverse=True)

    return _each("time", runs, draw)


def pauses(runs: Sequence[PlottedRun]) -> str:
    """How long workers stood still for a version change: the share of changes that took at most so long."""

    def draw(axes: Axes) -> None:
        for run, color in _colored(runs):
            seconds = np.sort([pause for worker in run.workers for pause in worker.pause_seconds])
            if seconds.size:
                shares = np.arange(1, seconds.size + 1) / seconds.size
                axes.step(
                    seconds * 1e3, shares, color=color, where="post", label=f"{run.name} ({seconds.size} changes)"
                )
        if not axes.lines:
            axes.text(0.5, 0.5, "no version change", transform=axes.transAxes, ha="center", color="#6b7280")
        axes.set(xlabel="gate shut, milliseconds", ylabel="share of changes", ylim=(0, 1.02))
        _legend(axes)

    return _one("pauses", draw)


def optimisation(runs: Sequence[PlottedRun]) -> str:
    """Entropy of the policy and gradient norm."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for run, color in _colored(runs):
            left.plot(*_curve(run, lambda s: s.entropy), color=color, label=run.name)
            right.plot(*_curve(run, lambda s: s.gradient_norm), color=color, linewidth=1)
        left.set(title="entropy, nats", xlabel="step")
        right.set(title="gradient norm before clipping", xlabel="step")
        _log_scale(right)
        if len(runs) > 1:
            _legend(left)

    return _svg("optimisation", draw, WIDTH, HEIGHT)


# -------------------------------------------------------------------------------------------------------------- helpers


def pooled_discrepancy(steps: Sequence[StepReport]) -> Mapping[int, BucketStats]:
    """Per staleness over all steps: RMS weighted by tokens, and the largest."""
    found: dict[int, BucketStats] = {}
    for step in steps:
        for name, stats in step.discrepancy_by_staleness.items():
            if stats.tokens == 0:
                continue
            held = found.get(int(name), BucketStats(tokens=0, rms_log_discrepancy=0, max_abs_log_discrepancy=0))
            count = held.tokens + stats.tokens
            square = held.tokens * held.rms_log_discrepancy**2 + stats.tokens * stats.rms_log_discrepancy**2
            found[int(name)] = BucketStats(
                tokens=count,
                rms_log_discrepancy=(square / count) ** 0.5,
                max_abs_log_discrepancy=max(held.max_abs_log_discrepancy, stats.max_abs_log_discrepancy),
            )
    return found


def _colored(runs: Sequence[PlottedRun]) -> list[tuple[PlottedRun, str]]:
    return [(run, COLORS[index % len(COLORS)]) for index, run in enumerate(runs)]


def _scale(count: int) -> list[tuple[float, ...]]:
    """Light to dark with staleness."""
    colors = mpl.colormaps["YlGnBu"](np.linspace(0.25, 0.95, max(count, 1)))
    return [tuple(color) for color in colors[:count]]


def _curve(run: PlottedRun, value: Callable[[StepReport], float]) -> tuple[Floats, Floats]:
    return _thin(run, np.array([value(step) for step in run.steps], float))


def _thin(run: PlottedRun, values: Floats) -> tuple[Floats, Floats]:
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


def _smooth(values: Floats) -> Floats:
    """Centred running mean; at the ends over what is there."""
    width = min(max(1, round(len(values) * SMOOTHING_SHARE)), (len(values) - 1) // 2)
    kernel = np.ones(2 * width + 1)
    return np.asarray(np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same"))


def _log_scale(*shared: Axes, lowest: float | None = None) -> None:
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


def _thousands(axes: Axes, axis: str) -> None:
    place = axes.yaxis if axis == "y" else axes.xaxis
    place.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")


def _titled(text: str, run: PlottedRun, runs: Sequence[PlottedRun]) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def _legend(axes: Axes, *, title: str | None = None, reverse: bool = False) -> None:
    """Beside the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles, labels, title=title, reverse=reverse, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0
        )


def _one(name: str, draw: Callable[[Axes], None]) -> str:
    return _svg(name, lambda figure: draw(figure.subplots()), WIDTH, HEIGHT)


def _each(name: str, runs: Sequence[PlottedRun], draw: Callable[[Axes, PlottedRun], None]) -> str:
    """One row of axes for each run."""

    def rows(figure: Figure) -> None:
        grid = figure.subplots(len(runs), 1, squeeze=False)
        for axes, run in zip(grid[:, 0], runs, strict=True):
            draw(axes, run)
            axes.set(xlabel="step", xlim=(run.steps[0].step, max(run.steps[-1].step, run.steps[0].step + 1)))
            if len(runs) > 1:
                axes.set_title(run.name)

    return _svg(name, rows, WIDTH, HEIGHT * len(runs) * (1 if len(runs) == 1 else 0.9))


def _svg(name: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
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
