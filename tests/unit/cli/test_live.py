from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from tests.unit.cli.synthetic import leaking, report, worker

from rljob.live import LiveView, plain_line, render, sparkline
from rljob_api.messages import DedicatedReport, PublishedVersion, WorkerPhase
from rljob_api.weights import Blob
from rljob_protocol.coordinator import CoordinationSummary, CoordinatorSettings, new_state, summary

EMPTY = summary(new_state(CoordinatorSettings()), 0.0)


def coordination() -> CoordinationSummary:
    blob = Blob(name="m", sha256="0" * 64, num_bytes=1)
    desired = PublishedVersion(epoch=1, version=7, step=7, manifest=blob, num_bytes=1)
    serving = worker(100, 90, phase=WorkerPhase.SERVING, serving_version=7, tokens_per_second=250.0)
    behind = worker(100, 90, worker="main-1", phase=WorkerPhase.SWAPPING, serving_version=6, tokens_per_second=150.0)
    return replace(
        EMPTY,
        desired=desired,
        workers=(serving, behind),
        converged=1,
        serving=((7, 1), (6, 1)),
        totals=serving.counters,
    )


def text_of(view: LiveView) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(render(view))
    return out.getvalue()


def test_before_the_first_step_the_view_says_what_it_waits_for() -> None:
    text = text_of(LiveView("toy", 40, (), EMPTY, 3.0))
    assert "toy" in text
    assert "starting" in text


def test_the_view_shows_progress_versions_staleness_and_each_worker() -> None:
    text = text_of(LiveView("toy", 40, tuple(report(step) for step in range(1, 8)), coordination(), 30.0))
    for said in (
        "7 of 40",
        "about 23 s to go",
        "desired 7",
        "1 of 2 workers",
        "staleness 2",
        "10%",
        "main-1",
        "Swapping",
    ):
        assert said in text, said
    assert "400 tokens/s" in text
    assert "trainer idle 29%" in text


def test_a_name_with_markup_is_shown_as_it_is() -> None:
    text = text_of(
        LiveView("toy", 40, (report(1),), replace(coordination(), workers=(worker(1, 1, worker="[red]x"),)), 1.0)
    )
    assert "[red]x" in text


def test_one_step_is_one_line() -> None:
    line = plain_line(report(3), coordination(), 40)
    assert "\n" not in line
    assert line.startswith("step 3/40 reward 0.060 version 3 serving v7x1 v6x1 staleness 1/2/2 keep 0.990 clip 0.020")
    assert "400 tokens/s" in line
    assert "trainer idle 29%" in line


def test_the_old_policy_pool_is_shown_where_there_is_one_and_says_when_it_is_late() -> None:
    in_time = DedicatedReport(waiting_seconds=0.25, tokens_scored=900, backlog=3, workers=2)
    late = DedicatedReport(waiting_seconds=60.0, tokens_scored=1000, tokens_late=500, backlog=40)
    line = plain_line(report(3, dedicated=in_time), coordination(), 40)
    assert line.endswith(" old-policy pool: 2 workers alive, backlog 3, waited 0.2 s")
    text = text_of(LiveView("toy", 40, (report(1, dedicated=late),), coordination(), 1.0))
    assert "no worker alive, backlog 40, waited 60.0 s, 500 of 1,500 stale tokens late" in text
    assert "old-policy pool" not in text_of(LiveView("toy", 40, (report(1),), coordination(), 1.0))


def test_a_sparkline_is_as_wide_as_its_values_up_to_its_bound_and_clamps() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([-1.0, 2.0]) == "▁█"
    assert len(sparkline([0.3] * 1000)) == 60


def test_the_view_says_in_one_line_whether_staleness_leaks() -> None:
    steps = tuple(report(step, reward=0.1, diagnostics=leaking(step, rising=0.5)) for step in range(1, 31))
    text = text_of(LiveView("toy", 40, steps, coordination(), 30.0))
    assert "leak           rises with staleness: staleness leaks into the discrepancy mask" in text
    assert "leak  " not in text_of(LiveView("toy", 40, (report(1),), coordination(), 30.0))
