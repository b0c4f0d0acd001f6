"""The live view of a run: a panel on a terminal, one line a step elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rljob.leak import reported_leak
from rljob_api.messages import DedicatedReport, StepReport
from rljob_protocol.coordinator import CoordinationSummary

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60
LEAK_STEPS = 200
"""Last steps that the verdict on the leak is taken over: the view is drawn again and again."""


@dataclass(frozen=True, slots=True)
class LiveView:
    """Everything that the view shows."""

    name: str
    total_steps: int
    steps: Sequence[StepReport]
    coordination: CoordinationSummary
    seconds: float
    message: str = ""


def plain_line(report: StepReport, coordination: CoordinationSummary, total_steps: int) -> str:
    """One step on one line."""
    rate = sum(worker.tokens_per_second for worker in coordination.workers)
    serving = " ".join(f"v{version}x{count}" for version, count in coordination.serving) or "-"
    waiting = report.seconds_waiting / report.seconds_total if report.seconds_total else 0.0
    dedicated = "" if report.dedicated is None else f" old-policy pool: {pool_line(report.dedicated)}"
    return (
        f"step {report.step}/{total_steps} reward {report.reward:.3f} version {report.version} serving {serving} "
        f"staleness {report.staleness.p50}/{report.staleness.p95}/{report.staleness.max} keep {report.keep_fraction:.3f} "
        f"clip {report.clip_fraction:.3f} exact {report.exact_fraction:.3f} {rate:.0f} tokens/s "
        f"trainer idle {waiting:.0%} step {report.seconds_total:.2f} s{dedicated}"
    )


def render(view: LiveView) -> RenderableType:
    """The panel."""
    if not view.steps:
        waiting = view.message or "starting: the trainer makes version 0 and the engines load it (about half a minute)"
        return Panel(Group(Text(waiting), _workers(view)), title=Text(view.name), title_align="left")
    last = view.steps[-1]
    return Panel(
        Group(_progress(view, last), Text(), _staleness(last), Text(), _workers(view)),
        title=Text(view.name),
        title_align="left",
    )


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Values in [0, 1] as bars, at most `width` of them, each the mean of its stretch."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return "".join(BARS[min(len(BARS) - 1, max(0, int(value * len(BARS))))] for value in means)


def pool_line(pool: DedicatedReport) -> str:
    """How the old-policy pool did in one step."""
    total = pool.tokens_scored + pool.tokens_late
    late = f", {pool.tokens_late:,} of {total:,} stale tokens late" if pool.tokens_late else ""
    alive = f"{pool.workers} workers alive" if pool.workers else "no worker alive"
    return f"{alive}, backlog {pool.backlog}, waited {pool.waiting_seconds:.1f} s{late}"


def _progress(view: LiveView, last: StepReport) -> Table:
    table = Table.grid(padding=(0, 2))
    recent = view.steps[-20:]
    pace = sum(step.seconds_total for step in recent) / len(recent)
    left = (view.total_steps - last.step) * pace
    totals = view.coordination.totals
    waiting = sum(step.seconds_waiting for step in recent) / max(1e-9, sum(step.seconds_total for step in recent))
    desired = view.coordination.desired
    baseline = "" if last.baseline is None else f"  (constant answer {last.baseline:.2f})"
    rows = [
        ("step", f"{last.step} of {view.total_steps}, {pace:.2f} s each, about {left:.0f} s to go"),
        ("reward", f"{last.reward:.3f}{baseline}  {sparkline([step.reward for step in view.steps])}"),
        (
            "versions",
            f"published {last.version}, desired {'-' if desired is None else desired.version}, "
            f"{view.coordination.converged} of {len(view.coordination.workers)} workers serve it",
        ),
        ("mask", f"keep {last.keep_fraction:.3f}, clip {last.clip_fraction:.3f}, active {last.active_fraction:.3f}"),
        ("old logprobs", f"{last.route}, exact {last.exact_fraction:.3f}"),
        *_leak(view),
        (
            "interruptions",
            f"{totals.interruptions}, {totals.partials_continued:,} partials went on, {totals.tokens_salvaged:,} tokens "
            f"salvaged, {totals.tokens_lost} lost",
        ),
        (
            "flow",
            f"{sum(worker.tokens_per_second for worker in view.coordination.workers):,.0f} tokens/s, trainer idle "
            f"{waiting:.0%}, queues: {last.queue_tasks} tasks, {last.queue_trajectories} trajectories",
        ),
    ]
    if last.dedicated is not None:
        rows.append(("old-policy pool", pool_line(last.dedicated)))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), text)
    return table


def _leak(view: LiveView) -> list[tuple[str, str]]:
    verdict = reported_leak(view.steps, last=LEAK_STEPS)
    return [] if verdict is None else [("leak", str(verdict))]


def _staleness(last: StepReport) -> Table:
    table = Table.grid(padding=(0, 2))
    total = sum(last.staleness.histogram.values()) or 1
    for bucket, tokens in sorted(last.staleness.histogram.items(), key=lambda item: int(item[0])):
        share = tokens / total
        table.add_row(Text(f"staleness {bucket}", style="bold"), f"{share:5.0%} {'█' * round(share * 40)}")
    return table


def _workers(view: LiveView) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "phase", "version", "episodes", "tokens/s", "idle", "interruptions"):
        table.add_column(column, justify="left" if column in ("worker", "phase") else "right")
    for worker in view.coordination.workers:
        table.add_row(
            Text(worker.worker),
            worker.phase.value,
            "-" if worker.serving_version is None else str(worker.serving_version),
            str(worker.in_flight),
            f"{worker.tokens_per_second:,.0f}",
            f"{worker.idle_share:.0%}",
            str(worker.counters.interruptions),
        )
    return table
