"""The report's plots, each as one inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rljob.drawing import (
    HEIGHT,
    WIDTH,
    PlottedRun,
    colored,
    curve,
    legend,
    log_scale,
    row_per_run,
    shades,
    single,
    smooth,
    svg,
    thin,
    thousands,
    titled,
)
from rljob_api.messages import BucketStats, StepReport

PHASES = (
    ("waiting", "seconds_waiting", "#d1d5db"),
    ("scoring", "seconds_scoring", "#93c5fd"),
    ("training", "seconds_training", "#2563eb"),
    ("publishing", "seconds_publishing", "#f59e0b"),
    ("checkpointing", "seconds_checkpointing", "#7c3aed"),
)


def reward(runs: Sequence[PlottedRun]) -> str:
    """Reward over steps, smoothed over the raw values, with the constant answer's reward and the mean of the last steps."""
    last = last_steps(runs)

    def draw(axes: Axes) -> None:
        for run, color in colored(runs):
            x, y = curve(run, lambda s: s.reward)
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(y), color=color, label=run.name)
            if run.steps[-1].baseline is not None:
                x, y = curve(run, lambda s: s.baseline if s.baseline is not None else np.nan)
                axes.plot(x, y, color=color, linestyle=":", linewidth=1, label=f"{run.name}: constant answer")
            end = [step.step for step in run.steps[-last:]]
            axes.hlines(mean_reward(run.steps, last), end[0], end[-1], colors=color, linewidth=4, alpha=0.5)
        axes.set(xlabel="step", ylabel="mean reward")
        legend(axes)

    return single("reward", draw)


def staleness(runs: Sequence[PlottedRun]) -> str:
    """Share of the batch's tokens at each staleness, stacked, a row for each run."""
    top = max((int(bucket) for run in runs for step in run.steps for bucket in step.staleness.histogram), default=0)
    colors = shades(top + 1)

    def draw(axes: Axes, run: PlottedRun) -> None:
        counts = np.array(
            [[step.staleness.histogram.get(str(bucket), 0) for bucket in range(top + 1)] for step in run.steps], float
        )
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        x, y = thin(run, shares)
        axes.stackplot(x, y.T, colors=colors, labels=[f"{bucket}" for bucket in range(top + 1)], linewidth=0)
        axes.set(ylabel="share of tokens", ylim=(0, 1))
        axes.grid(False)
        legend(axes, title="versions old", reverse=True)

    return row_per_run("staleness", runs, draw)


def fractions(runs: Sequence[PlottedRun]) -> str:
    """Shares of the loss tokens that the mask keeps, that the clip stops, and that carry gradient."""
    panels: tuple[tuple[str, Callable[[StepReport], float]], ...] = (
        ("kept by the discrepancy mask", lambda s: s.keep_fraction),
        ("stopped by the clip", lambda s: s.clip_fraction),
        ("active", lambda s: s.active_fraction),
    )

    def draw(figure: Figure) -> None:
        for place, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
            for run, color in colored(runs):
                x, y = curve(run, value)
                place.plot(x, y, color=color, alpha=0.2, linewidth=0.6)
                place.plot(x, smooth(y), color=color, label=run.name, linewidth=1.2)
            low, high = place.get_ylim()
            # Three shares that hardly move: without a floor on the range rounding noise fills the panel.
            middle, half = (low + high) / 2, max((high - low) / 2, 0.01)
            place.set(title=title, xlabel="step", ylim=(middle - half, middle + half))
        if len(runs) > 1:
            legend(figure.axes[0])

    return svg("fractions", draw, WIDTH, HEIGHT)


def discrepancy_over_steps(runs: Sequence[PlottedRun]) -> str:
    """RMS and largest |log r_d| of each step, a line for each staleness."""
    buckets = sorted({int(b) for run in runs for step in run.steps for b in step.discrepancy_by_staleness})
    colors = dict(zip(buckets, shades(len(buckets)), strict=True))
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
                    x, y = thin(run, np.where(values > 0, values, np.nan))
                    axes.plot(x, y, color=colors[bucket], label=str(bucket), linewidth=1, marker=".", markersize=2)
                axes.set(title=titled(f"{title} |log r_d|", run, runs), xlabel="step")
        for column in grid.T:
            log_scale(*column)
        legend(figure.axes[-1], title="versions old")

    return svg("discrepancy-steps", draw, WIDTH, HEIGHT * len(runs))


def discrepancy_by_staleness(runs: Sequence[PlottedRun]) -> str:
    """The same over the whole run: flat is clean, rising means that staleness leaked into the discrepancy ratio."""
    pooled = [pooled_discrepancy(run.steps) for run in runs]
    buckets = sorted({bucket for one in pooled for bucket in one})

    def draw(axes: Axes) -> None:
        width = 0.8 / len(runs)
        for index, (run, color) in enumerate(colored(runs)):
            have = [bucket for bucket in buckets if bucket in pooled[index]]
            x = np.array([buckets.index(bucket) for bucket in have]) + (index - (len(runs) - 1) / 2) * width
            rms = [pooled[index][bucket].rms_log_discrepancy for bucket in have]
            largest = [pooled[index][bucket].max_abs_log_discrepancy for bucket in have]
            axes.bar(x, rms, width * 0.92, color=color, alpha=0.85, label=f"{run.name}: RMS")
            axes.plot(x, largest, "_", color=color, markersize=12, markeredgewidth=2, label=f"{run.name}: largest")
        axes.set_xticks(range(len(buckets)), [str(bucket) for bucket in buckets])
        axes.set(xlabel="staleness of the token, in versions", ylabel="|log r_d|")
        log_scale(axes, lowest=min((one.rms_log_discrepancy for run in pooled for one in run.values()), default=0.0))
        legend(axes)

    return single("discrepancy-staleness", draw)


def tokens(runs: Sequence[PlottedRun]) -> str:
    """Tokens trained, cumulative, and those that the trainer dropped, by reason."""
    reasons = sorted({reason for run in runs for reason, n in run.steps[-1].tokens_dropped.items() if n})

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for index, (run, color) in enumerate(colored(runs)):
            x, y = curve(run, lambda s: float(s.tokens_trained))
            left.plot(x, y, color=color, label=f"{run.name}: trained")
            x, y = curve(run, lambda s: float(sum(s.tokens_dropped.values())))
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
        legend(left)
        right.set(title="dropped, by reason", xlabel="tokens")
        right.set_yticks(range(len(reasons)), reasons)
        right.set_ylim(max(2, len(reasons) - 0.5), -0.5)
        if not reasons:
            right.text(0.5, 0.5, "none dropped", transform=right.transAxes, ha="center", color="#6b7280")
            right.set(xticks=[])
        thousands(left, "y")
        thousands(right, "x")

    return svg("tokens", draw, WIDTH, HEIGHT)


def time_breakdown(runs: Sequence[PlottedRun]) -> str:
    """Where each step's wall time went, stacked, a row for each run."""

    def draw(axes: Axes, run: PlottedRun) -> None:
        seconds = np.array([[getattr(step, field) for _, field, _ in PHASES] for step in run.steps], float)
        x, y = thin(run, seconds)
        colors = [color for _, _, color in PHASES]
        axes.stackplot(x, y.T, labels=[name for name, _, _ in PHASES], colors=colors, linewidth=0)
        # The first step waits for the engines to start, and would squeeze all others.
        heights = np.sort(y.sum(axis=1))
        top = float(heights[: max(1, round(0.98 * len(heights)) - 1)][-1])
        axes.set(ylabel="seconds a step", ylim=(0, top * 1.15 or 1))
        legend(axes, reverse=True)

    return row_per_run("time", runs, draw)


def pauses(runs: Sequence[PlottedRun]) -> str:
    """How long workers stood still for a version change: the share of changes that took at most so long."""

    def draw(axes: Axes) -> None:
        for run, color in colored(runs):
            seconds = np.sort([pause for worker in run.workers for pause in worker.pause_seconds])
            if seconds.size:
                shares = np.arange(1, seconds.size + 1) / seconds.size
                axes.step(
                    seconds * 1e3, shares, color=color, where="post", label=f"{run.name} ({seconds.size} changes)"
                )
        if not axes.lines:
            axes.text(0.5, 0.5, "no version change", transform=axes.transAxes, ha="center", color="#6b7280")
        axes.set(xlabel="gate shut, milliseconds", ylabel="share of changes", ylim=(0, 1.02))
        legend(axes)

    return single("pauses", draw)


def optimisation(runs: Sequence[PlottedRun]) -> str:
    """Entropy of the policy and gradient norm."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for run, color in colored(runs):
            left.plot(*curve(run, lambda s: s.entropy), color=color, label=run.name)
            right.plot(*curve(run, lambda s: s.gradient_norm), color=color, linewidth=1)
        left.set(title="entropy, nats", xlabel="step")
        right.set(title="gradient norm before clipping", xlabel="step")
        log_scale(right)
        if len(runs) > 1:
            legend(left)

    return svg("optimisation", draw, WIDTH, HEIGHT)


def last_steps(runs: Sequence[PlottedRun]) -> int:
    """How many of the last steps a mean is over: a tenth of the shortest run's, the same for every run."""
    return max(1, min(len(run.steps) for run in runs) // 10)


def mean_reward(steps: Sequence[StepReport], last: int) -> float:
    """Mean reward of the last steps."""
    return float(np.mean([step.reward for step in steps[-last:]]))


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
