"""The figures of docs/results.md, drawn from stored runs. Bands are smallest and largest of the seeds, never errors of a mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pages import save_figure
from bench.staleness.delays import DelayKind
from bench.staleness.measures import Floats
from bench.staleness.results import Run
from bench.staleness.settings import ARMS, Arm
from bench.staleness.summaries import chosen, curves, last_mean, leak, pooled_buckets, spread
from bench.staleness.sweeps import CAPS, DECAYS
from rljob.drawing import COLORS

ARM_COLORS: dict[Arm, str] = {**dict(zip(ARMS, COLORS, strict=False)), "engine": "#111827"}
FRESH_COLOR = "#9ca3af"
MIDDLE_PHASE = 1


def learning(fresh: Sequence[Run], runs: Sequence[Run], delay: DelayKind, path: Path) -> None:
    """Reward over steps, a panel a cap."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(CAPS), sharey=True)
        for axes, cap in zip(panels, CAPS, strict=True):
            _band(axes, *curves(fresh), FRESH_COLOR, "no staleness", linestyle="--")
            for arm in ARMS:
                if found := chosen(runs, arm=arm, cap=cap):
                    _band(axes, *curves(found), ARM_COLORS[arm], arm)
            at_most = "" if delay == "fixed" else "at most "
            axes.set(title=f"{delay} delay, {at_most}{cap} versions", xlabel="step")
        panels[0].set(ylabel="reward on fixed prompts", ylim=(0, 1.02))
        _legend_below(figure, panels[0])

    save_figure(draw, path, 9.6, 3.4)


def behind_exact(runs: Sequence[Run], path: Path) -> None:
    """Reward less that of `exact` with the same seed, a panel a cap: for gaps smaller than those between seeds."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(CAPS), sharey=True)
        for axes, cap in zip(panels, CAPS, strict=True):
            steps, exact = curves(chosen(runs, arm="exact", cap=cap))
            axes.axhline(0, color=ARM_COLORS["exact"], label="exact")
            for arm in ARMS[1:]:
                rewards = curves(chosen(runs, arm=arm, cap=cap))[1]
                _band(axes, steps, rewards - exact, ARM_COLORS[arm], arm)
            axes.set(title=f"variable delay, at most {cap} versions", xlabel="step")
        panels[0].set(ylabel="reward less that of exact")
        _legend_below(figure, panels[0])

    save_figure(draw, path, 9.6, 3.4)


def discrepancy(runs: Sequence[Run], cap: int, path: Path) -> None:
    """RMS of log r_d by staleness, in the middle third of training."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm in ARMS:
            buckets = pooled_buckets(chosen(runs, arm=arm, cap=cap), MIDDLE_PHASE)
            found = {n: used for n, (used, _) in buckets.items() if used > 0}  # where mu is the reference, it is 0
            if found:
                axes.plot(list(found), list(found.values()), "o-", color=ARM_COLORS[arm], markersize=3, label=arm)
        axes.set(
            yscale="log",
            xlabel="staleness of the token, versions",
            ylabel="RMS of log r_d",
            title=f"what the discrepancy mask sees, cap {cap}",
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    save_figure(draw, path, 6.0, 3.0)


def decays(runs: Sequence[Run], bounds: Sequence[float], path: Path) -> None:
    """Averaged weights at fixed decays without resets: what leaks, and what is learned."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for bound, color in zip(bounds, COLORS, strict=False):
            for axes, value in ((left, leak), (right, last_mean)):
                found = [(decay, spread(chosen(runs, decay=decay, discrepancy_bound=bound), value)) for decay in DECAYS]
                found = [(decay, of_decay) for decay, of_decay in found if of_decay.values]
                axes.plot(
                    [d for d, _ in found],
                    [v.mean for _, v in found],
                    color=color,
                    label=f"mask [1/{bound:g}, {bound:g}]",
                )
                for d, of_decay in found:
                    axes.plot([d] * len(of_decay.values), of_decay.values, ".", color=color)
        left.set(title="leak: RMS of used minus exact", xlabel="decay β", ylim=(0, None))
        right.set(title="reward, mean of the last 3 evaluations", xlabel="decay β", ylim=(0, 1.02))
        left.legend()

    save_figure(draw, path, 7.6, 3.0)


def proposition(document: Any, path: Path) -> None:
    """The log-linear run and the two that know the total ratio alone; and how far those are from it, in two precisions."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        styles = {
            ("log-linear", "float32"): ("log-linear reference", "-", COLORS[0], 3.5),
            ("moved", "float32"): ("total ratio, thresholds moved", "--", COLORS[1], 1.5),
            ("moved", "float64"): ("the same in float64", "-.", COLORS[2], 1.5),
            ("as they were", "float32"): ("total ratio, thresholds as they were", ":", COLORS[7], 1.5),
        }
        drawn = {}
        for (name, trainer), (label, line, color, width) in styles.items():
            for run in (run for run in document["runs"] if run["trainer"] == trainer):
                if trainer == "float32":
                    alpha = 0.4 if name == "log-linear" else 1.0
                    (drawn[label],) = left.plot(
                        run["steps"], run["reward"][name], line, color=color, linewidth=width, alpha=alpha
                    )
                if name != "log-linear":
                    (drawn[label],) = right.plot(run["steps"][1:], run["difference"][name][1:], line, color=color)
        left.set(title="reward in float32, three seeds", xlabel="step", ylim=(0, 1.02))
        right.set(title="largest difference of a parameter, relative", xlabel="step", yscale="log")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=2)

    save_figure(draw, path, 7.6, 3.6)


def _band(axes: Axes, steps: Floats, values: Floats, color: str, label: str, **style: Any) -> None:
    """Mean, smallest and largest of values [seeds, steps]."""
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.13, linewidth=0)
    axes.plot(steps, values.mean(axis=0), color=color, label=label, **style)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7))
