"""Conservation: each way in which tokens can go missing is found, and each honest end is accepted."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.cli.synthetic import leaking, report, worker

from rljob.summary import Summary, as_text, conservation, summarise
from rljob_api.messages import StepReport, WorkerCounters, WorkerPhase, WorkerState


def last_step(received: dict[str, int], **changes: Any) -> list[StepReport]:
    return [report(1, tokens_received=received, **({"tokens_trained": 100, "tokens_dropped": {}} | changes))]


def crashed(generated: int, delivered: int, **changes: Any) -> WorkerState:
    return worker(generated, delivered, phase=WorkerPhase.SERVING, **changes)


def test_every_end_of_a_token_is_accepted() -> None:
    tokens = conservation(
        last_step({"main-0/a": 130, "main-1/b": 20}, tokens_trained=120, tokens_dropped={"Stale": 10}, tokens_pending=20),
        [
            worker(150, 135, counters=WorkerCounters(tokens_generated=150, tokens_delivered=135, tokens_in_flight=10, tokens_dropped={"EnvironmentFailed": 5})),
            crashed(26, 18, worker="main-1", incarnation="b"),
        ],
        {"main-0/a": 5},
    )  # fmt: skip
    assert tokens.problems == ()
    assert (tokens.generated, tokens.trained, tokens.in_flight, tokens.lost) == (176, 120, 35, 6)
    assert tokens.dropped == {"EnvironmentFailed": 5, "Stale": 10}
    assert tokens.generated == tokens.trained + sum(tokens.dropped.values()) + tokens.in_flight + tokens.lost


def test_what_a_killed_worker_delivered_after_its_last_report_counts_as_generated() -> None:
    tokens = conservation(last_step({"main-0/a": 100}), [crashed(90, 80)], {})
    assert (tokens.problems, tokens.generated, tokens.lost) == ((), 100, 0)


@pytest.mark.parametrize(
    ("steps", "state", "said"),
    [
        (last_step({"main-0/a": 90}), worker(100, 100), "delivered 100 tokens, 90 arrived"),
        (last_step({"main-0/a": 100}), worker(100, 90), "delivered 90 tokens, 100 arrived"),
        (
            last_step({"main-0/a": 100}),
            worker(100, 100, counters=WorkerCounters(tokens_generated=105, tokens_delivered=100)),
            "generated 105 tokens and accounts for 100",
        ),
        (last_step({"main-0/a": 100}, tokens_trained=99), worker(100, 100), "received 100 tokens and accounts for 99"),
        (
            last_step({"main-0/a": 100}, tokens_dropped={"Stale": 1}),
            worker(100, 100),
            "received 100 tokens and accounts for 101",
        ),
        (
            last_step({"main-0/a": 90, "main-9/z": 10}),
            worker(90, 90),
            "10 tokens arrived from main-9/z, of which no state is known",
        ),
    ],
)
def test_tokens_that_do_not_add_up_are_named(steps: list[StepReport], state: WorkerState, said: str) -> None:
    tokens = conservation(steps, [state], {})
    assert any(said in problem for problem in tokens.problems), tokens.problems
    assert not tokens.holds


def test_a_run_without_a_step_is_summarised_too() -> None:
    summary = summarise("x", finished=False, steps=[], workers=[], unread={}, seconds=3.0, worker_restarts=0)
    assert (summary.steps, summary.reward_last_tenth, summary.conservation.problems) == (0, 0.0, ())
    assert "stopped after 0 steps" in as_text(summary)


def test_a_summary_takes_rewards_of_the_first_and_the_last_tenth() -> None:
    steps = [report(step, reward=step / 100) for step in range(1, 41)]
    summary = summarise(
        "x", finished=True, steps=steps, workers=[worker(4120, 4120)], unread={}, seconds=10.0, worker_restarts=2
    )
    assert summary.reward_first_tenth == pytest.approx(0.025)
    assert summary.reward_last_tenth == pytest.approx(0.385)
    assert summary.share_spanning_versions == 0.25
    assert summary.trainer_idle_share == pytest.approx(2 / 7)
    assert summary.tokens_per_second == 412.0


def test_tokens_that_are_missing_stand_in_the_text() -> None:
    summary = summarise(
        "x", finished=True, steps=[report(1)], workers=[worker(1, 1)], unread={}, seconds=1.0, worker_restarts=0
    )
    assert "NOT CONSERVED" in as_text(summary)
    assert "problem        main-0/a delivered 1 tokens, 103 arrived" in as_text(summary)


def test_the_verdict_on_the_leak_is_one_line_of_the_text() -> None:
    def of(steps: list[StepReport]) -> Summary:
        return summarise("x", finished=True, steps=steps, workers=[], unread={}, seconds=1.0, worker_restarts=0)

    flat = of([report(step, reward=0.1, diagnostics=leaking(step)) for step in range(1, 31)])
    assert flat.leak == "flat: clean"
    assert "\n  leak           flat: clean\n" in as_text(flat)
    silent = of([report(step) for step in range(1, 31)])
    assert silent.leak == ""
    assert "  leak " not in as_text(silent)
