"""Writes the tables of docs/results.md between their markers, and the figure, from stored replays and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pages import DOCS, IMAGES, filled, save_figure, table
from bench.routes.real_runs import RealRun
from bench.routes.results import Document, load_replay, load_runs
from bench.routes.summaries import BASE, Ratio, Summary, summarised
from bench.routes.ways import Way
from rljob.drawing import COLORS

PAGE = DOCS / "results.md"
FIGURE = IMAGES / "routes.svg"
RUNS = {
    "busy": "quickstart, bf16 engines: the trainer never waits",
    "waiting": "slow engines",
    "late": "slow engines, prefixTokens 0",
    "interruption": "as busy, route Interruption",
}
"""What the runs are, by the names of their folders; a replay is named RUN-MODEL."""
TITLES = {"waiting": "trainer waits for slow engines", "busy": "trainer never waits"}
"""Runs that all ways were replayed on."""
PARTS = {"training": COLORS[0], "old_logprobs": COLORS[1], "upkeep": COLORS[6]}
LABELS = {"training": "training", "old_logprobs": "old log-probabilities", "upkeep": "snapshot or average kept"}
OVERLAPPED_COLOR = "#9ca3af"


def write() -> None:
    """Make everything anew from bench/routes/results/."""
    PAGE.write_text(filled(PAGE.read_text(), "routes", tables()))
    figure({TITLES[stream]: load_replay(f"{stream}-wide") for stream in TITLES}, FIGURE)


def tables() -> dict[str, str]:
    """Each table of the page, by the name in its marker."""
    documents = {stream: (load_replay(f"{stream}-wide"), load_replay(f"{stream}-quickstart")) for stream in TITLES}
    return {
        **{stream: routes_table(*of_stream) for stream, of_stream in documents.items()},
        "machine": machine_line([document for of_stream in documents.values() for document in of_stream]),
        "runs": runs_table(load_runs(), {run: _snapshot(f"{run}-quickstart") for run in ("busy", "waiting", "late")}),
    }


def routes_table(wide: Document, small: Document) -> str:
    """One row a way: costs on the wide model, and the ratio on the quickstart's."""
    of_small = {summary.way: summary for summary in summarised(small.costs)}
    rows = [
        [
            summary.way.value,
            summary.over_base.text(),
            f"{summary.old_logprobs * 1e3:,.0f}",
            f"{summary.upkeep * 1e3:,.0f}",
            f"{summary.own_training * 1e3:,.0f}",
            f"{summary.overlapped * 1e3:,.0f}",
            summary.compute_over_base.text(),
            f"{summary.held_bytes / wide.copy_bytes:.1f}",
            f"{summary.exact_fraction:.0%}",
            of_small[summary.way].over_base.text(),
        ]
        for summary in summarised(wide.costs)
    ]
    head = (
        "way",
        "critical path over *current*",
        "old log-probs, ms",
        "kept, ms",
        "training, ms",
        "overlapped, ms",
        "all compute over *current*",
        "memory, copies",
        "exact",
        "critical path, quickstart's model",
    )
    return table(head, rows)


def runs_table(runs: Sequence[RealRun], chain: Mapping[str, Ratio]) -> str:
    """What the runs themselves say, in wall-clock seconds a step, and the replayed chain's critical path."""
    rows = [
        [
            RUNS[run.name],
            f"{run.mean_staleness:.1f}",
            f"{run.spanning_share:.0%}",
            f"{run.pooled_share:.0%}",
            f"{run.waiting:.2f}",
            f"{run.ahead:.2f}",
            f"{run.scoring:.2f}",
            f"{run.training:.2f}",
            "–" if run.barrier is None else f"{run.barrier:.2f}",
            f"{run.total:.2f}",
            chain[run.name].text() if run.name in chain else "–",
        ]
        for run in runs
    ]
    head = (
        "run",
        "staleness",
        "trajectories of several versions",
        "stale tokens scored ahead",
        "waits for a batch, s",
        "of it scoring ahead, s",
        "scoring in the step, s",
        "training, s",
        "of it at the barrier, s",
        "whole step, s",
        "snapshot chain, quickstart's model",
    )
    return table(head, rows)


def _snapshot(name: str) -> Ratio:
    """Of the chain as the run scored ahead, over *current*."""
    return next(found.over_base for found in summarised(load_replay(name).costs) if found.way is Way.SNAPSHOT)


def machine_line(documents: Sequence[Document]) -> str:
    """Machines and dates, models and tokens."""
    machines = sorted({document.machine for document in documents})
    dates = sorted({document.date for document in documents})
    models = sorted({document.parameters for document in documents})
    said = " and ".join(f"{parameters / 1e6:.1f} M" for parameters in models)
    tokens = sorted({document.tokens for document in documents})
    steps = sorted({len({cost.step for cost in document.costs}) for document in documents})
    return (
        f"{'; '.join(machines)}. {' to '.join(sorted({dates[0], dates[-1]}))}; models of {said} parameters, "
        f"{tokens[0]:,} to {tokens[-1]:,} tokens a step, over {' or '.join(map(str, steps))} steps."
    )


def figure(documents: dict[str, Document], path: Path) -> None:
    """Each way's critical path over that of *current*, by part; beside it what ran at other times or elsewhere."""

    def draw(whole: Figure) -> None:
        panels = whole.subplots(1, len(documents), sharey=True, sharex=True)
        for axes, (title, document) in zip(panels, documents.items(), strict=True):
            _bars(axes, summarised(document.costs))
            axes.set(title=title, xlabel="step's critical path over current")
        # Shared axes: what is set on one panel holds on all of them.
        summaries = [found for document in documents.values() for found in summarised(document.costs)]
        panels[0].set_xlim(0, max(found.over_base.value for found in summaries) + 0.2)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower center", ncols=len(labels))

    save_figure(draw, path, 9.2, 3.9)


def _bars(axes: Axes, summaries: Sequence[Summary]) -> None:
    of_base = next(summary for summary in summaries if summary.way is BASE)
    base = of_base.old_logprobs + of_base.upkeep + of_base.training
    places = list(range(len(summaries)))
    left = [0.0] * len(summaries)
    for part, color in PARTS.items():
        widths = [getattr(summary, part) / base for summary in summaries]
        axes.barh([place - 0.12 for place in places], widths, 0.5, left=left, color=color, label=LABELS[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    overlapped = [summary.overlapped / base for summary in summaries]
    axes.barh(
        [place + 0.27 for place in places], overlapped, 0.22, color=OVERLAPPED_COLOR, label="beside the critical path"
    )
    for place, end, summary in zip(places, left, summaries, strict=True):
        axes.text(end + 0.015, place - 0.12, f"{summary.over_base.value:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="#374151", linewidth=0.8)
    axes.set_yticks(places, [summary.way.value for summary in summaries])
    axes.grid(axis="y", visible=False)
