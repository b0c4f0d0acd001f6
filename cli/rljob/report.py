"""`rljob report RUN...`: one HTML page about a run, or about several side by side. It refers to nothing outside itself.

Made from steps.jsonl, workers.jsonl, run.json and, where they are there, summary.json and the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from rljob import plots, route_plots
from rljob.correction_table import correction_table
from rljob.drawing import PlottedRun
from rljob.leak import REWARD_BELOW, Leak, find_leak, reported_leak
from rljob.record import Record
from rljob.report_tables import ReportedRun, escaped, summary_table, swatch, worker_table
from rljob.run_directory import RunDirectory, RunInfo
from rljob.summary import Summary, summarise
from rljob_api.errors import MalformedMessage, RljobError, StorageError
from rljob_api.messages import StepReport, WorkerState
from rljob_runtime.correction.leak import Shape

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: #fff; color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 40px 0 12px; }
p.sub, figcaption, .note { color: var(--soft); margin: 4px 0 0; }
.grid { columns: 2 480px; column-gap: 20px; }
figure { margin: 0 0 20px; break-inside: avoid; padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
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
.compared td + td { white-space: normal; overflow-wrap: anywhere; min-width: 110px; max-width: 300px; vertical-align: top; }
@media (max-width: 600px) { .grid { columns: 1; } }
"""

PLOTS: tuple[tuple[str, str, Callable[[Sequence[PlottedRun]], str]], ...] = (
    (
        "Reward",
        "Mean reward of each step's batch; wide: mean of the last steps; dotted: a constant answer on the same tasks.",
        plots.reward,
    ),
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
        "bars may differ where no staleness leaked.",
        plots.discrepancy_by_staleness,
    ),
    (
        "Leak",
        "The same size relative to the freshest tokens, among tokens of like weight version and position, with 95 % "
        "intervals: flat is clean, rising means that staleness leaks into the mask, a V is an average of weights.",
        route_plots.leak,
    ),
    (
        "Discrepancy over steps",
        "RMS and largest size of log r_d, for each step and staleness.",
        plots.discrepancy_over_steps,
    ),
    ("Sources", "Where the old log-probabilities came from: blue and green are exact.", route_plots.sources),
    ("Cost", "What a step's time went to, means over the run; waiting is the trainer's idle time.", route_plots.cost),
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
    plotted = [run.plotted for run in runs]
    title = runs[0].info.name if len(runs) == 1 else f"{len(runs)} runs compared"
    figures = "\n".join(
        f"<figure><h3>{escaped(name)}</h3><figcaption>{escaped(caption)}</figcaption>{draw(plotted)}</figure>"
        for name, caption, draw in PLOTS
    )
    head = _one_run(runs[0]) if len(runs) == 1 else _several(runs)
    correction = f"<h2>Correction</h2>\n{correction_table(runs)}\n"  # first where runs are compared
    tables = "\n".join(
        f"<h2>Workers{'' if len(runs) == 1 else ' of ' + escaped(run.label)}</h2>{worker_table(run)}" for run in runs
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)} – rljob report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n{head}\n{''.join(_leak(run) for run in runs)}\n"
        f'{correction if len(runs) > 1 else ""}<h2>Curves</h2>\n<div class="grid">\n{figures}\n</div>\n'
        f"{correction if len(runs) == 1 else ''}<h2>Summary</h2>\n{summary_table(runs)}\n{tables}\n</body>\n</html>\n"
    )


def _read(directory: RunDirectory) -> ReportedRun:
    info = directory.read_info()
    steps = tuple(directory.read_steps())
    if not steps:
        raise RljobError(f"{directory.root} has no trained step yet: there is nothing to report")
    workers = tuple(directory.read_workers())
    leak = _test_leak(directory, steps)
    return ReportedRun(
        label=directory.root.resolve().name,
        info=info,
        steps=steps,
        workers=workers,
        summary=_summary(directory, info, steps, workers),
        leak=leak,
        verdict=reported_leak(steps) if isinstance(leak, str) else leak.verdict,
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
        found, said = False, f"whether staleness leaks into log r_d was not tested: {leak}."
        if run.verdict is not None:
            found = run.verdict.shape in (Shape.RISING, Shape.VALLEY)
            said = f"RMS of log r_d by the steps' own reports: {run.verdict}. Not tested on the record: {leak}."
        return f'<p class="{"bad" if found else "note"}">{escaped(run.label)}: {escaped(said)}</p>'
    said = (
        f"RMS of log r_d varies by {leak.effect:.1%} with staleness among tokens of like position and training phase, "
        f"p = {leak.p_value:.3f} over {leak.trajectories:,} trajectories: {leak.verdict}."
    )
    return f'<p class="{"bad" if leak.found else "note"}">{escaped(run.label)}: {escaped(said)}</p>'


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
    body = "".join(
        f'<div class="tile"><b>{escaped(value)}</b><span>{escaped(name)}</span></div>' for value, name in tiles
    )
    state = "finished" if summary.finished else "not finished"
    return (
        f'<p class="sub">{escaped(run.label)} · started {escaped(run.info.created)} · {state}, '
        f"{summary.seconds:,.0f} s · old log-probabilities: {escaped(summary.route)}</p>"
        f'<div class="tiles">{body}</div>'
    )


def _several(runs: Sequence[ReportedRun]) -> str:
    items = " · ".join(f"{swatch(index)}{escaped(run.label)}" for index, run in enumerate(runs))
    return f'<p class="sub">{items}</p>'
