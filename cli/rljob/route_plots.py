"""Plots that set routes to old log-probabilities side by side: where values came from, what they cost, what leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from rljob.drawing import WIDTH, PlottedRun, colored, legend, single, svg
from rljob.plots import PHASES
from rljob.record import EXACT_SOURCES
from rljob_api.messages import StepReport
from rljob_runtime.correction.leak import TOLERANCE

EXACT_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#7fcdbb", "#0b3c5d")
OTHER_COLORS = ("#d55e00", "#e69f00", "#cc79a7", "#8c564b", "#f0c987")
"""Warm: what is not the old policy."""
MISSING_COLOR = "#9ca3af"


def sources(runs: Sequence[PlottedRun]) -> str:
    """Where the old log-probabilities of all trained tokens came from, a bar for each run."""
    shares = [source_shares(run.steps) for run in runs]
    names = sorted({name for of_run in shares for name in of_run}, key=lambda name: (name not in EXACT_SOURCES, name))
    exact, other = iter(EXACT_COLORS * 4), iter(OTHER_COLORS * 4)
    colors = {
        name: MISSING_COLOR if name == "missing" else next(exact) if name in EXACT_SOURCES else next(other)
        for name in names
    }
    return _bars(
        "sources", runs, [[of_run.get(name, 0.0) for name in names] for of_run in shares], colors, "share of tokens"
    )


def cost(runs: Sequence[PlottedRun]) -> str:
    """Mean seconds of a step by what they went to, a bar for each run."""
    seconds = [[mean_seconds(run.steps, field) for _, field, _ in PHASES] for run in runs]
    return _bars("cost", runs, seconds, {name: color for name, _, color in PHASES}, "seconds a step, mean")


def leak(runs: Sequence[PlottedRun]) -> str:
    """RMS of log r_d per staleness, relative to that of the freshest tokens of the same versions and positions."""

    def draw(axes: Axes) -> None:
        axes.axhspan(1 / (1 + TOLERANCE), 1 + TOLERANCE, color="#e5e7eb", linewidth=0)
        shown = [
            (run, color) for run, color in colored(runs) if run.leak is not None and len(run.leak.relative_rms) > 1
        ]
        for index, (run, color) in enumerate(shown):
            assert run.leak is not None
            x = np.array(list(run.leak.relative_rms)) + 0.06 * (index - (len(shown) - 1) / 2)
            rms, error = (np.array(list(of.values())) for of in (run.leak.relative_rms, run.leak.error))
            bars = np.stack([rms - rms * np.exp(-1.96 * error), rms * np.exp(1.96 * error) - rms])
            axes.errorbar(x, rms, bars, color=color, marker="o", markersize=4, capsize=2, linewidth=1.2, label=run.name)
        if shown:
            axes.set_xticks(sorted({n for run, _ in shown if run.leak is not None for n in run.leak.relative_rms}))
            axes.set_ylim(bottom=0)
        else:
            axes.text(0.5, 0.7, "too few tokens to say", transform=axes.transAxes, ha="center", color="#6b7280")
            axes.set(xticks=[], ylim=(0, 2))
        axes.set(xlabel="staleness of the token, in versions", ylabel="RMS of log r_d, relative")
        legend(axes)

    return single("leak", draw)


def source_shares(steps: Sequence[StepReport]) -> Mapping[str, float]:
    """Share of each source of all trainable tokens over all steps; `missing` comes last."""
    tokens: Counter[str] = Counter()
    missing = 0
    for step in steps:
        of_step = {name: stats.tokens for name, stats in step.sources.items()}
        tokens.update(of_step)
        share = 0.0 if step.diagnostics is None else step.diagnostics.missing_share
        if 0 < share < 1:
            missing += round(sum(of_step.values()) * share / (1 - share))
    tokens["missing"] = missing
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items() if count}


def mean_seconds(steps: Sequence[StepReport], field: str) -> float:
    """Mean over steps of one of the report's times."""
    return float(np.mean([getattr(step, field) for step in steps]))


def _bars(
    name: str, runs: Sequence[PlottedRun], values: Sequence[Sequence[float]], colors: Mapping[str, str], label: str
) -> str:
    """One stacked horizontal bar for each run, the first run on top."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(runs))
        left = np.zeros(len(runs))
        for series, (part, color) in enumerate(colors.items()):
            widths = np.array([of_run[series] for of_run in values])
            axes.barh(places, widths, 0.6, left=left, color=color, label=part, edgecolor="white", linewidth=0.5)
            left += widths
        axes.set_yticks(places, [run.name for run in runs])
        axes.set(xlabel=label, ylim=(len(runs) - 0.4, -0.6), xlim=(0, float(left.max()) or 1))
        axes.grid(visible=False, axis="y")
        if not colors:
            axes.text(0.5, 0.5, "not reported", transform=axes.transAxes, ha="center", color="#6b7280")
        legend(axes)

    return svg(name, lambda figure: draw(figure.subplots()), WIDTH, max(1.9, 1.1 + 0.42 * len(runs)))
