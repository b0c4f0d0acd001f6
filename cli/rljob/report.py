"""`rljob report RUN...`: one HTML page about a run, or about several side by side. It refers to nothing outside itself.

Made from steps.jsonl, workers.jsonl, run.json and, where they are there, summary.json and the record.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rljob import plots
from rljob.leak import REWARD_BELOW, Leak, find_leak
from rljob.plots import PlottedRun
from rljob.record import Record
from rljob.run_directory import RunDirectory, RunInfo
from rljob.summary import Summary, summarise
from rljob_api.errors import MalformedMessage, RljobError, StorageError
from rljob_api.messages import StepReport, WorkerState

MAX_WORKER_ROWS = 200

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: #fff; color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 40px 0 12px; }
p.sub, figcaption, .note { color: var(--soft); margin: 4px 0 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 20px; align-items: start; }
figure { margin: 0; padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figure h3 { font-size: 14px; margin: 0 0 2px; } figcaption { font-size: 12.5px; margin-bottom: 8px; }
figure svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; min-width: 220px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; } .tile span { color: var(--soft); font-size: 12.5px; }
.good { color: #047857; } .bad { color: #b91c1c; font-weight: 600; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
@media (max-width: 600px) { .grid { grid-template-columns: minmax(0, 1fr); } }
"""

PLOTS: tuple[tuple[str, str, Callable[[Sequence[PlottedRun]], str]], ...] = (
    ("Reward", "Mean reward of each step's batch; dotted: a constant answer on the same tasks.", plots.reward),
    (
        "Staleness",
        "Versions between the one that sampled a token and the one that the step began with.",
        plots.staleness,
    ),
    (
        "Mask and clip",
        "Shares of the loss tokens: inside the discrepancy mask, stopped by the clip, and carrying gradient.",
        plots.fractions,
    ),
    (
        "Discrepancy by staleness",
        "r_d compares trainer and engine at the token's own version: only noise is left. It grows with training too, so "
        "bars may differ where no staleness leaked; the sentence above is from a test that takes this out.",
        plots.discrepancy_by_staleness,
    ),
    ("Discrepancy over steps", "The same for each step.", plots.discrepancy_over_steps),
    ("Tokens", "Model tokens trained, and dropped by the trainer with the reason.", plots.tokens),
    ("Optimisation", "How sure the policy is, and how large its updates are.", plots.optimisation),
    (
        "Time",
        "Where each step's wall time went; waiting is the trainer's idle time. The longest steps (start-up) are cut off.",
        plots.time_breakdown,
    ),
    (
        "Pauses",
        "How long a worker's gate was shut to change version (the last 64 changes of each worker).",
        plots.pauses,
    ),
)


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """What is known of one run."""

    label: str
    info: RunInfo
    steps: tuple[StepReport, ...]
    workers: tuple[WorkerState, ...]
    summary: Summary
    leak: Leak | str
    """The test for staleness in log r_d, or why there is none."""


def write_report(directories: Sequence[RunDirectory], output: Path) -> None:
    """Write the page, all of it or nothing.

    Raises:
        RljobError: a folder is no run, has no trained step yet, or the page cannot be written.
    """
    page = render([_read(directory) for directory in directories])
    temporary = output.with_name(f".{output.name}.partial")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise RljobError(f"{output} cannot be written ({error.strerror}): choose another --output") from error


def render(runs: Sequence[ReportedRun]) -> str:
    """The page."""
    plotted = [PlottedRun(run.label, run.steps, run.workers) for run in runs]
    title = runs[0].info.name if len(runs) == 1 else f"{len(runs)} runs compared"
    figures = "\n".join(
        f"<figure><h3>{_text(name)}</h3><figcaption>{_text(caption)}</figcaption>{draw(plotted)}</figure>"
        for name, caption, draw in PLOTS
    )
    head = _one_run(runs[0]) if len(runs) == 1 else _several(runs)
    tables = "\n".join(
        f"<h2>Workers{'' if len(runs) == 1 else ' of ' + _text(run.label)}</h2>{_worker_table(run)}" for run in runs
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)} – rljob report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{head}\n{''.join(_leak(run) for run in runs)}\n<h2>Curves</h2>\n"
        f'<div class="grid">\n{figures}\n</div>\n<h2>Summary</h2>\n{_summary_table(runs)}\n{tables}\n</body>\n</html>\n'
    )


def _read(directory: RunDirectory) -> ReportedRun:
    info = directory.read_info()
    steps = tuple(directory.read_steps())
    if not steps:
        raise RljobError(f"{directory.root} has no trained step yet: there is nothing to report")
    workers = tuple(directory.read_workers())
    return ReportedRun(
        label=directory.root.resolve().name,
        info=info,
        steps=steps,
        workers=workers,
        summary=_summary(directory, info, steps, workers),
        leak=_test_leak(directory, steps),
    )


def _test_leak(directory: RunDirectory, steps: Sequence[StepReport]) -> Leak | str:
    try:
        found = find_leak(Record(directory.record), [step.reward for step in steps])
    except (StorageError, MalformedMessage) as error:
        return str(error)
    return found or f"no recorded tokens of different staleness from before the reward passed {REWARD_BELOW}"


def _summary(
    directory: RunDirectory, info: RunInfo, steps: Sequence[StepReport], workers: Sequence[WorkerState]
) -> Summary:
    """The run's own summary; one made from its steps while it still runs."""
    try:
        return Summary.model_validate(json.loads(directory.summary_file.read_text()))
    except (OSError, ValueError, ValidationError):
        return summarise(
            info.name,
            finished=False,
            steps=steps,
            workers=workers,
            unread={},
            seconds=sum(step.seconds_total for step in steps),
            worker_restarts=0,
        )


# --------------------------------------------------------------------------------------------------------------- pieces


def _leak(run: ReportedRun) -> str:
    """One sentence on whether the discrepancy ratio depends on staleness."""
    leak = run.leak
    if isinstance(leak, str):
        said = f"whether staleness leaks into log r_d was not tested: {leak}."
        return f'<p class="note">{_text(run.label)}: {_text(said)}</p>'
    verdict = (
        "it changes with staleness: staleness leaks into the discrepancy mask"
        if leak.found
        else "flat, no staleness in it"
    )
    said = (
        f"RMS of log r_d varies by {leak.effect:.1%} with staleness among tokens of like position and training phase, "
        f"p = {leak.p_value:.3f} over {leak.trajectories:,} trajectories: {verdict}."
    )
    return f'<p class="{"bad" if leak.found else "note"}">{_text(run.label)}: {_text(said)}</p>'


def _one_run(run: ReportedRun) -> str:
    summary = run.summary
    tokens = summary.conservation
    tiles = (
        (f"{summary.reward_last_tenth:.3f}", f"reward, from {summary.reward_first_tenth:.3f}"),
        (f"{summary.steps:,}", "steps, one weight version each"),
        (f"{summary.exact_fraction:.1%}", "exact old log-probabilities (worst step)"),
        (f"{summary.share_spanning_versions:.0%}", "of trajectories span versions"),
        (f"{summary.tokens_lost_to_interruptions:,}", f"tokens lost in {summary.interruptions:,} interruptions"),
        (f"{tokens.trained:,}", f"tokens trained of {tokens.generated:,}"),
        (f"{summary.tokens_per_second:,.0f}", "tokens a second"),
    )
    body = "".join(f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in tiles)
    state = "finished" if summary.finished else "not finished"
    return (
        f'<p class="sub">{_text(run.label)} · started {_text(run.info.created)} · {state}, '
        f"{summary.seconds:,.0f} s · old log-probabilities: {_text(summary.route)}</p>"
        f'<div class="tiles">{body}</div>'
    )


def _several(runs: Sequence[ReportedRun]) -> str:
    items = " · ".join(f"{_swatch(index)}{_text(run.label)}" for index, run in enumerate(runs))
    return f'<p class="sub">{items}</p>'


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:{plots.COLORS[index % len(plots.COLORS)]}"></i>'


def _summary_table(runs: Sequence[ReportedRun]) -> str:
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("Finished", lambda s: "yes" if s.finished else "no"),
        ("Old log-probabilities", lambda s: s.route),
        ("Exact fraction, worst step", lambda s: f"{s.exact_fraction:.4f}"),
        ("Steps", lambda s: f"{s.steps:,}"),
        ("Weight versions", lambda s: f"{s.versions:,}"),
        ("Attempts of the trainer", lambda s: f"{s.epochs}"),
        ("Reward, first tenth", lambda s: f"{s.reward_first_tenth:.4f}"),
        ("Reward, last tenth", lambda s: f"{s.reward_last_tenth:.4f}"),
        ("Reward of a constant answer", lambda s: "–" if s.baseline is None else f"{s.baseline:.4f}"),
        ("Largest staleness", lambda s: f"{s.staleness_max}"),
        ("Trajectories spanning versions", lambda s: f"{s.share_spanning_versions:.1%}"),
        ("Interruptions", lambda s: f"{s.interruptions:,}"),
        ("Partial rollouts continued", lambda s: f"{s.partials_continued:,}"),
        ("Tokens salvaged", lambda s: f"{s.tokens_salvaged:,}"),
        ("Tokens lost to interruptions", lambda s: f"{s.tokens_lost_to_interruptions:,}"),
        ("Tokens generated", lambda s: f"{s.conservation.generated:,}"),
        ("… trained", lambda s: f"{s.conservation.trained:,}"),
        ("… dropped", lambda s: ", ".join(f"{reason} {n:,}" for reason, n in s.conservation.dropped.items()) or "0"),
        ("… in flight at the end", lambda s: f"{s.conservation.in_flight:,}"),
        ("… lost in crashes", lambda s: f"{s.conservation.lost:,}"),
        ("Tokens a second", lambda s: f"{s.tokens_per_second:,.1f}"),
        ("Wall time", lambda s: f"{s.seconds:,.0f} s"),
        ("Trainer idle", lambda s: f"{s.trainer_idle_share:.1%}"),
        ("Workers idle", lambda s: f"{s.rollout_idle_share:.1%}"),
        ("Pause, p50 / p95", lambda s: f"{s.pause_seconds_p50 * 1e3:,.0f} / {s.pause_seconds_p95 * 1e3:,.0f} ms"),
        ("Worker restarts", lambda s: f"{s.worker_restarts}"),
    ]
    heads = "".join(f"<th>{_swatch(i) if len(runs) > 1 else ''}{_text(run.label)}</th>" for i, run in enumerate(runs))
    body = "".join(
        f"<tr><td>{_text(name)}</td>{''.join(f'<td>{_text(value(run.summary))}</td>' for run in runs)}</tr>"
        for name, value in rows
    )
    body += "".join(
        f"<tr><td>{_text(name)}</td>{''.join(f'<td>{_text(value(run))}</td>' for run in runs)}</tr>"
        for name, value in (("Largest |log r_d|, staleness 0 / above", _largest_discrepancy), ("Flatness, p", _p_value))
    )
    verdicts = "".join(f"<td>{_verdict(run.summary)}</td>" for run in runs)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}'
        f"<tr><td>Tokens conserved</td>{verdicts}</tr></tbody></table></div>"
    )


def _largest_discrepancy(run: ReportedRun) -> str:
    pooled = plots.pooled_discrepancy(run.steps)
    fresh = [stats.max_abs_log_discrepancy for staleness, stats in pooled.items() if staleness == 0]
    stale = [stats.max_abs_log_discrepancy for staleness, stats in pooled.items() if staleness > 0]
    return " / ".join(f"{max(found):.1e}" if found else "–" for found in (fresh, stale))


def _p_value(run: ReportedRun) -> str:
    return "–" if isinstance(run.leak, str) else f"{run.leak.p_value:.3f}"


def _verdict(summary: Summary) -> str:
    if summary.conservation.holds:
        return '<span class="good">yes</span>'
    return f'<span class="bad">no: {_text("; ".join(summary.conservation.problems))}</span>'


def _worker_table(run: ReportedRun) -> str:
    columns = (
        "worker",
        "incarnation",
        "last phase",
        "version",
        "generated",
        "delivered",
        "in flight",
        "trajectories",
        "interruptions",
        "continued",
        "failures",
        "idle",
        "message",
    )
    rows = []
    for worker in sorted(run.workers, key=lambda w: (w.worker, w.incarnation))[:MAX_WORKER_ROWS]:
        counters = worker.counters
        cells = (
            worker.worker,
            worker.incarnation,
            worker.phase.value,
            "–" if worker.serving_version is None else str(worker.serving_version),
            f"{counters.tokens_generated:,}",
            f"{counters.tokens_delivered:,}",
            f"{counters.tokens_in_flight:,}",
            f"{counters.trajectories:,}",
            f"{counters.interruptions:,}",
            f"{counters.partials_continued:,}",
            f"{counters.environment_failures + counters.malformed + counters.swaps_failed:,}",
            f"{worker.idle_share:.0%}",
        )
        rows.append(
            f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}<td class='text'>{_text(worker.message)}</td></tr>"
        )
    more = len(run.workers) - MAX_WORKER_ROWS
    note = f'<p class="note">and {more:,} more in workers.jsonl</p>' if more > 0 else ""
    heads = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _text(value: str) -> str:
    return html.escape(value, quote=True)
