"""The report's tables: runs in columns."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rljob.drawing import COLORS, PlottedRun
from rljob.leak import Leak
from rljob.run_directory import RunInfo
from rljob.summary import Summary
from rljob_api.messages import StepReport, WorkerState
from rljob_runtime.correction.leak import LeakVerdict

MAX_WORKER_ROWS = 200


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """What is known of one run."""

    label: str
    info: RunInfo
    steps: tuple[StepReport, ...]
    workers: tuple[WorkerState, ...]
    summary: Summary
    leak: Leak | str
    """The test for staleness in log r_d on the record, or why there is none."""
    verdict: LeakVerdict | None
    """On the record, or else on the steps' reports; None where neither has what it takes."""

    @property
    def plotted(self) -> PlottedRun:
        return PlottedRun(self.label, self.steps, self.workers, self.verdict)


def summary_table(runs: Sequence[ReportedRun]) -> str:
    """What each run did, a column for each."""
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
    body = "".join(table_row(name, [escaped(value(run.summary)) for run in runs]) for name, value in rows)
    return table(runs, body + table_row("Tokens conserved", [_conserved(run.summary) for run in runs]))


def worker_table(run: ReportedRun) -> str:
    """The last word of each worker incarnation of a run."""
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
            f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}<td class='text'>{escaped(worker.message)}</td></tr>"
        )
    more = len(run.workers) - MAX_WORKER_ROWS
    note = f'<p class="note">and {more:,} more in workers.jsonl</p>' if more > 0 else ""
    heads = "".join(f"<th>{escaped(column)}</th>" for column in columns)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def escaped(value: str) -> str:
    """Text as HTML."""
    return html.escape(value, quote=True)


def swatch(index: int) -> str:
    """A run's colour in the plots."""
    return f'<i class="swatch" style="background:{COLORS[index % len(COLORS)]}"></i>'


def table(runs: Sequence[ReportedRun], body: str) -> str:
    """Rows under the runs' names."""
    heads = "".join(f"<th>{swatch(i) if len(runs) > 1 else ''}{escaped(run.label)}</th>" for i, run in enumerate(runs))
    return f'<div class="wide"><table class="compared"><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def table_row(name: str, cells: Sequence[str]) -> str:
    """One row; the cells are HTML."""
    return f"<tr><td>{escaped(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _conserved(summary: Summary) -> str:
    if summary.conservation.holds:
        return '<span class="good">yes</span>'
    return f'<span class="bad">no: {escaped("; ".join(summary.conservation.problems))}</span>'
