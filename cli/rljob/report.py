"""The HTML report of one or more runs: one self-contained file, plots as inline SVG, runs side by side."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rljob.run_directory import RunDirectory
from rljob.summary import Summary
from rljob_api.errors import RljobError
from rljob_api.messages import StepReport, WorkerState

COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#ea580c", "#0891b2", "#be185d", "#4d7c0f")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p.note { color: #6b7280; margin: .2rem 0 .6rem; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { padding: .25rem .8rem; border-bottom: 1px solid #e5e7eb; }
th { text-align: left; font-weight: 600; } td { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { text-align: left; } .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(500px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } .bad { color: #b91c1c; font-weight: 600; }
"""


@dataclass(frozen=True, slots=True)
class Run:
    """What the report reads of a run."""

    label: str
    steps: Sequence[StepReport]
    workers: Sequence[WorkerState]
    summary: Summary | None


def write_report(directories: Sequence[RunDirectory], output: Path) -> None:
    """Write the report.

    Raises:
        RljobError: a run has no step to report.
    """
    runs = [_load(directory) for directory in directories]
    output.write_text(page(runs))


def page(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    title = " · ".join(run.label for run in runs)
    plots = [
        ("Reward", "Mean reward of each step's trajectories; dashed: a constant answer.", _reward),
        ("Staleness of the trained tokens", "Mean and largest, in versions.", _staleness),
        ("Staleness distribution", "Share of the tokens per staleness, of the first run.", _staleness_shares),
        ("Mask and clip", "Shares of the tokens in the loss.", _mask),
        (
            "Discrepancy by staleness",
            "RMS of log r_d over the whole run. Flat is clean; rising means that staleness leaks into the discrepancy mask.",
            _discrepancy,
        ),
        ("Largest |log r_d| by staleness", "Over the whole run, logarithmic.", _largest_discrepancy),
        ("Where a step's time goes", "Seconds, mean of stretches of steps, of the first run.", _time),
        ("Pause of a version change", "Gate shut to gate open, of the last interruptions of each worker.", _pauses),
        ("Entropy and gradient norm", "Entropy in nats (solid), gradient norm before clipping (dotted).", _entropy),
        ("Trained and dropped tokens", "Cumulative.", _tokens),
    ]
    figures = "\n".join(
        f"<figure><h2>{html.escape(name)}</h2><p class='note'>{html.escape(note)}</p>{_svg(draw, runs)}</figure>"
        for name, note, draw in plots
    )
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>rljob: {html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{_verdicts(runs)}\n{_summary_table(runs)}\n"
        f"<div class='plots'>\n{figures}\n</div>\n{_worker_table(runs)}\n</body></html>\n"
    )


def _load(directory: RunDirectory) -> Run:
    steps = directory.read_steps()
    if not steps:
        raise RljobError(f"{directory.root} has no trained step to report")
    summary = None
    if directory.summary_file.exists():
        summary = Summary.model_validate_json(directory.summary_file.read_bytes())
    return Run(directory.root.resolve().name, steps, directory.read_workers(), summary)


def _svg(draw: Callable[[Any, Sequence[Run]], None], runs: Sequence[Run]) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "rljob",
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.1))
        draw(axes, runs)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue().split("?>", 1)[1].split(">", 1)[1].strip()


def _numbers(run: Run) -> list[int]:
    return [step.step for step in run.steps]


def _reward(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(_numbers(run), [step.reward for step in run.steps], color=colour, label=run.label)
        if all(step.baseline is not None for step in run.steps):
            axes.plot(_numbers(run), [step.baseline for step in run.steps], color=colour, linestyle="--", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)


def _staleness(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(_numbers(run), [step.staleness.mean for step in run.steps], color=colour, label=f"{run.label}, mean")
        axes.plot(_numbers(run), [step.staleness.max for step in run.steps], color=colour, linewidth=0.6, alpha=0.6)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)


def _staleness_shares(axes: Any, runs: Sequence[Run]) -> None:
    run = runs[0]
    buckets = sorted({int(bucket) for step in run.steps for bucket in step.staleness.histogram})
    shares = []
    for bucket in buckets:
        shares.append(
            [
                step.staleness.histogram.get(str(bucket), 0) / max(1, sum(step.staleness.histogram.values()))
                for step in run.steps
            ]
        )
    axes.stackplot(_numbers(run), *shares, labels=[str(bucket) for bucket in buckets], colors=COLOURS)
    axes.set_xlabel("step")
    axes.set_ylim(0, 1)


def _mask(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(_numbers(run), [step.keep_fraction for step in run.steps], color=colour, label=f"{run.label}, keep")
        axes.plot(
            _numbers(run),
            [step.clip_fraction for step in run.steps],
            color=colour,
            linestyle=":",
            label=f"{run.label}, clip",
        )
    axes.set_xlabel("step")
    axes.set_ylim(0, 1.02)


def _by_staleness(run: Run) -> tuple[list[int], list[float], list[float]]:
    """(staleness, RMS, largest) of log r_d over all steps, weighed by tokens."""
    tokens: dict[int, int] = {}
    squares: dict[int, float] = {}
    largest: dict[int, float] = {}
    for step in run.steps:
        for name, bucket in step.discrepancy_by_staleness.items():
            key = int(name)
            tokens[key] = tokens.get(key, 0) + bucket.tokens
            squares[key] = squares.get(key, 0.0) + bucket.tokens * bucket.rms_log_discrepancy**2
            largest[key] = max(largest.get(key, 0.0), bucket.max_abs_log_discrepancy)
    keys = sorted(key for key in tokens if tokens[key])
    return keys, [(squares[key] / tokens[key]) ** 0.5 for key in keys], [largest[key] for key in keys]


def _discrepancy(axes: Any, runs: Sequence[Run]) -> None:
    _bars(axes, runs, lambda run: _by_staleness(run)[:2])
    axes.set_ylabel("RMS log r_d")


def _largest_discrepancy(axes: Any, runs: Sequence[Run]) -> None:
    _bars(axes, runs, lambda run: (_by_staleness(run)[0], _by_staleness(run)[2]))
    axes.set_yscale("log")


def _bars(axes: Any, runs: Sequence[Run], values: Callable[[Run], tuple[list[int], list[float]]]) -> None:
    width = 0.8 / len(runs)
    for index, (run, colour) in enumerate(zip(runs, COLOURS * len(runs), strict=False)):
        keys, heights = values(run)
        axes.bar(
            [key + (index - (len(runs) - 1) / 2) * width for key in keys], heights, width, color=colour, label=run.label
        )
    axes.set_xlabel("staleness (versions)")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _time(axes: Any, runs: Sequence[Run]) -> None:
    run = runs[0]
    parts = ("waiting", "scoring", "training", "publishing", "checkpointing")
    window = max(1, len(run.steps) // 80)
    groups = [run.steps[i : i + window] for i in range(0, len(run.steps), window)]
    series = [
        [sum(getattr(step, f"seconds_{part}") for step in group) / len(group) for group in groups] for part in parts
    ]
    axes.stackplot([group[-1].step for group in groups], *series, labels=parts, colors=COLOURS)
    axes.set_xlabel("step")


def _pauses(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        pauses = sorted(1e3 * pause for worker in run.workers for pause in worker.pause_seconds)
        if pauses:
            axes.plot(pauses, [(i + 1) / len(pauses) for i in range(len(pauses))], color=colour, label=run.label)
    axes.set_xlabel("ms")
    axes.set_ylabel("share at most that long")


def _entropy(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(_numbers(run), [step.entropy for step in run.steps], color=colour, label=run.label)
        axes.plot(_numbers(run), [step.gradient_norm for step in run.steps], color=colour, linestyle=":", linewidth=0.8)
    axes.set_xlabel("step")


def _tokens(axes: Any, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(
            _numbers(run), [step.tokens_trained for step in run.steps], color=colour, label=f"{run.label}, trained"
        )
        dropped = [sum(step.tokens_dropped.values()) for step in run.steps]
        axes.plot(_numbers(run), dropped, color=colour, linestyle=":", label=f"{run.label}, dropped")
    axes.set_xlabel("step")


def _verdicts(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        keys, rms, _ = _by_staleness(run)
        if len(keys) > 1 and rms[0] > 0:
            ratio = rms[-1] / rms[0]
            said = "flat: clean" if ratio < 1.5 else "rises with staleness: staleness leaks into the discrepancy mask"
            lines.append(f"<p class='note'>{html.escape(run.label)}: RMS(log r_d) {said} (factor {ratio:.2f})</p>")
        for problem in run.summary.conservation.problems if run.summary is not None else ():
            lines.append(f"<p class='bad'>{html.escape(run.label)}: {html.escape(problem)}</p>")
    return "\n".join(lines)


def _summary_table(runs: Sequence[Run]) -> str:
    def cells(name: str, value: Callable[[Summary], str]) -> str:
        shown = (html.escape(value(run.summary)) if run.summary is not None else "-" for run in runs)
        return f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>"

    rows = [
        cells("steps", lambda s: f"{s.steps}{'' if s.finished else ' (stopped)'}"),
        cells("reward, first tenth", lambda s: f"{s.reward_first_tenth:.3f}"),
        cells("reward, last tenth", lambda s: f"{s.reward_last_tenth:.3f}"),
        cells("old log-probabilities", lambda s: s.route),
        cells("exact fraction (least)", lambda s: f"{s.exact_fraction:.3f}"),
        cells("largest staleness", lambda s: str(s.staleness_max)),
        cells("trajectories over several versions", lambda s: f"{s.share_spanning_versions:.0%}"),
        cells("partial rollouts continued", lambda s: f"{s.partials_continued:,}"),
        cells(
            "tokens salvaged / lost by interruptions",
            lambda s: f"{s.tokens_salvaged:,} / {s.tokens_lost_to_interruptions}",
        ),
        cells("tokens generated", lambda s: f"{s.conservation.generated:,}"),
        cells("tokens trained", lambda s: f"{s.conservation.trained:,}"),
        cells("tokens dropped", lambda s: ", ".join(f"{k} {v:,}" for k, v in s.conservation.dropped.items()) or "0"),
        cells("tokens in flight at the end", lambda s: f"{s.conservation.in_flight:,}"),
        cells("tokens lost in crashes", lambda s: f"{s.conservation.lost:,}"),
        cells("tokens/s", lambda s: f"{s.tokens_per_second:,.0f}"),
        cells("idle: trainer / rollout", lambda s: f"{s.trainer_idle_share:.0%} / {s.rollout_idle_share:.0%}"),
        cells("pause p50 / p95", lambda s: f"{s.pause_seconds_p50 * 1e3:.0f} / {s.pause_seconds_p95 * 1e3:.0f} ms"),
        cells("wall time", lambda s: f"{s.seconds:.0f} s"),
    ]
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _worker_table(runs: Sequence[Run]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(run.label)}</td><td>{html.escape(worker.worker)}</td><td>{html.escape(worker.phase.value)}</td>"
        f"<td>{worker.counters.trajectories:,}</td><td>{worker.counters.tokens_generated:,}</td>"
        f"<td>{worker.counters.interruptions}</td><td>{worker.idle_share:.0%}</td><td>{html.escape(worker.message)}</td></tr>"
        for run in runs
        for worker in run.workers
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("run", "worker", "last phase", "trajectories", "tokens", "interruptions", "idle", "message")
    )
    return f"<h2>Workers</h2><table><tr>{head}</tr>{rows}</table>"
