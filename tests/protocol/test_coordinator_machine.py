"""The coordinator: one rule of its docstring a test, with exact effects and reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerCounters, WorkerPhase, WorkerState
from rljob_api.weights import Blob
from rljob_protocol.coordinator import (
    MAX_LAGGARDS,
    Beat,
    CheckManifest,
    CoordinatorSettings,
    CoordinatorState,
    DesiredWritten,
    Effect,
    Event,
    Fenced,
    ManifestChecked,
    PublishedSeen,
    RestartWorker,
    SettingsChanged,
    Stop,
    TermClaimed,
    Tick,
    WorkersSeen,
    WriteDesired,
    add_counters,
    new_state,
    order_of,
    step,
    summary,
)

SETTINGS = CoordinatorSettings(
    timeout_seconds=120.0, liveness_seconds=30.0, beat_seconds=1e9, check_retry_seconds=5.0, max_restarts_per_worker=2
)


def published(version: int, epoch: int = 1) -> PublishedVersion:
    blob = Blob(name=f"m-{epoch}-{version}", sha256="0" * 64, num_bytes=1)
    return PublishedVersion(epoch=epoch, version=version, step=version, manifest=blob, num_bytes=1)


def desired(version: int, generation: int, term: int = 1, quarantined: tuple[int, ...] = ()) -> DesiredVersion:
    return DesiredVersion(term=term, generation=generation, published=published(version), quarantined=quarantined)


def worker(
    name: str,
    version: int | None,
    revision: int = 1,
    *,
    phase: WorkerPhase = WorkerPhase.SERVING,
    incarnation: str = "a",
    epoch: int = 1,
    generated: int = 0,
    in_flight: int = 0,
    barrier: tuple[int, int] | None = None,
) -> WorkerState:
    return WorkerState(
        worker=name,
        pool="main",
        incarnation=incarnation,
        revision=revision,
        phase=phase,
        epoch=epoch,
        serving_version=version,
        counters=WorkerCounters(tokens_generated=generated, tokens_in_flight=in_flight),
        barrier=barrier,
    )


def run(state: CoordinatorState, *events: Event, now: float = 0.0) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    effects: tuple[Effect, ...] = ()
    for event in events:
        state, more = step(state, event, now)
        effects += more
    return state, effects


def ordering(version: int = 3, settings: CoordinatorSettings = SETTINGS) -> CoordinatorState:
    """A coordinator of term 1 whose first order, for `version`, is written."""
    state, _ = run(
        new_state(settings),
        TermClaimed(1, None),
        PublishedSeen(published(version)),
        ManifestChecked(published(version), None),
        DesiredWritten(desired(version, 1)),
    )
    assert order_of(state) == (1, 1)
    return state


# ------------------------------------------------------------------------------------------------------------ orders


def test_an_order_follows_a_published_version_whose_manifest_was_read() -> None:
    state, effects = run(new_state(SETTINGS), TermClaimed(1, None))
    assert effects == (Beat(),)
    state, effects = run(state, PublishedSeen(published(3)))
    assert effects == (CheckManifest(published(3)),)
    state, effects = run(state, ManifestChecked(published(3), None))
    assert effects == (WriteDesired(desired(3, 1)),)
    assert order_of(state) == (1, 0)
    state, effects = run(state, DesiredWritten(desired(3, 1)), Tick())
    assert effects == ()
    assert order_of(state) == (1, 1)


def test_nothing_happens_before_the_term_is_claimed() -> None:
    _, effects = run(new_state(SETTINGS), PublishedSeen(published(3)), WorkersSeen((worker("w", 2),)), Tick())
    assert effects == ()


def test_an_unreadable_manifest_is_checked_again_and_never_ordered() -> None:
    state, _ = run(ordering(3), PublishedSeen(published(4)))
    state, effects = run(state, ManifestChecked(published(4), "no such blob"), Tick(), now=10.0)
    assert effects == ()
    assert run(state, Tick(), now=14.9)[1] == ()
    _, effects = run(state, Tick(), now=15.0)
    assert effects == (CheckManifest(published(4)),)


def test_a_newer_version_is_checked_when_the_check_under_way_returns() -> None:
    state, effects = run(ordering(3), PublishedSeen(published(4)), PublishedSeen(published(5)))
    assert effects == (CheckManifest(published(4)),)
    state, effects = run(state, ManifestChecked(published(4), None))
    assert effects == (CheckManifest(published(5)), WriteDesired(desired(4, 2)))
    assert run(state, ManifestChecked(published(4), None))[1] == (), "a check that nothing waits for"


def test_one_write_at_a_time_and_generations_rise_by_one() -> None:
    state, _ = run(ordering(3), PublishedSeen(published(4)), ManifestChecked(published(4), None))
    state, effects = run(state, PublishedSeen(published(5)), ManifestChecked(published(5), None))
    assert effects == (CheckManifest(published(5)),)
    state, effects = run(state, DesiredWritten(desired(4, 2)))
    assert effects == (WriteDesired(desired(5, 3)),)
    assert run(state, DesiredWritten(desired(5, 3)))[1] == ()


@pytest.mark.parametrize("stale", [published(3), published(2), published(9, epoch=1)])
def test_an_older_epoch_or_version_is_never_ordered(stale: PublishedVersion) -> None:
    newest = published(3, epoch=2)
    state, _ = run(
        new_state(SETTINGS), TermClaimed(1, None), PublishedSeen(newest), ManifestChecked(newest, None),
        DesiredWritten(DesiredVersion(term=1, generation=1, published=newest)),
    )  # fmt: skip
    assert run(state, PublishedSeen(stale), Tick()) == (state, ())


def test_a_successor_repeats_the_last_order_under_its_own_term() -> None:
    state, effects = run(
        new_state(SETTINGS), TermClaimed(4, desired(3, 7, term=3, quarantined=(2,))), PublishedSeen(published(3))
    )
    assert effects == (Beat(), WriteDesired(desired(3, 1, term=4, quarantined=(2,))))
    assert summary(state, 0.0).quarantined == (2,)


def test_a_successor_looks_at_what_was_published_meanwhile_before_its_first_order() -> None:
    """Workers followed `published` by themselves while there was no coordinator: the old order would take them back."""
    state, effects = run(new_state(SETTINGS), TermClaimed(2, desired(3, 7)), Tick())
    assert effects == (Beat(),)
    state, effects = run(state, PublishedSeen(published(5)), Tick())
    assert effects == (CheckManifest(published(5)),)
    _, effects = run(state, ManifestChecked(published(5), None))
    assert effects == (WriteDesired(desired(5, 1, term=2)),)
    _, effects = run(state, ManifestChecked(published(5), "no such blob"))
    assert effects == (WriteDesired(desired(3, 1, term=2)),)


def test_a_write_that_meets_another_writer_stops_it_for_good() -> None:
    state, _ = run(ordering(3), PublishedSeen(published(4)), ManifestChecked(published(4), None))
    reason = "another coordinator wrote the desired version: this one stops"
    state, effects = run(state, Fenced())
    assert effects == (Stop(reason),)
    assert state.stopped == reason
    for event in (Tick(), PublishedSeen(published(9)), DesiredWritten(desired(4, 2)), WorkersSeen(())):
        assert step(state, event, 1e6) == (state, ())


def test_it_beats_at_its_interval() -> None:
    state, effects = run(new_state(CoordinatorSettings(beat_seconds=2.0)), TermClaimed(1, None))
    assert effects == (Beat(),)
    beats = []
    for tenth in range(1, 61):
        state, effects = step(state, Tick(), tenth / 10)
        beats += [tenth / 10] * effects.count(Beat())
    assert beats == [2.0, 4.0, 6.0]


# ----------------------------------------------------------------------------------------------------------- laggards


def test_a_worker_that_has_not_converged_in_time_is_restarted_once_an_incarnation_within_its_budget() -> None:
    def reason(seconds: int) -> str:
        return f"has served version 2 for {seconds} s while later ones were ordered, now version 3"

    settings = CoordinatorSettings(timeout_seconds=20.0, beat_seconds=1e9, max_restarts_per_worker=2)
    state, _ = run(ordering(3), SettingsChanged(settings), WorkersSeen((worker("w", 2), worker("x", 3))))
    state, effects = run(state, WorkersSeen((worker("w", 2, 2), worker("x", 3, 2))), now=19.9)
    assert effects == ()
    live = worker("w", 2, 3), worker("x", 3, 3)
    state, effects = run(state, WorkersSeen(live), Tick(), WorkersSeen(live), now=20.0)
    assert effects == (RestartWorker("w", "a", reason(20)),)
    state, effects = run(state, WorkersSeen((worker("w", 2, incarnation="b"),)), now=21.0)
    assert effects == (), "a new incarnation has its own time"
    state, effects = run(state, WorkersSeen((worker("w", 2, 2, incarnation="b"),)), now=42.0)
    assert effects == (RestartWorker("w", "b", reason(21)),)
    state, _ = run(state, WorkersSeen((worker("w", 2, incarnation="c"),)), now=43.0)
    state, effects = run(state, WorkersSeen((worker("w", 2, 2, incarnation="c"),)), now=64.0)
    assert effects == (), "the budget of 2 is spent"
    assert summary(state, 64.0).restarts == 2


@pytest.mark.parametrize("phase", [WorkerPhase.STARTING, WorkerPhase.DRAINING])
def test_a_worker_that_starts_or_drains_is_no_laggard_to_restart(phase: WorkerPhase) -> None:
    _, effects = run(ordering(3), WorkersSeen((worker("w", 2, phase=phase),)), now=500.0)
    assert effects == ()


def test_a_worker_that_keeps_the_ordered_versions_barrier_is_no_laggard_before_the_next_version_is_ordered() -> None:
    """At version 3 it was fetching when the barrier of 3 came: it loads no version before 4 any more."""

    def held(revision: int, version: int = 2, barrier: tuple[int, int] | None = (1, 3)) -> WorkerState:
        return worker("w", version, revision, phase=WorkerPhase.HELD, barrier=barrier)

    state, _ = run(ordering(3), WorkersSeen((worker("w", 2),)))
    for revision in range(2, 60):
        state, effects = run(state, WorkersSeen((held(revision),)), now=10.0 * revision)
        assert effects == ()
        assert summary(state, 10.0 * revision).laggards == ()
    state, _ = run(
        state,
        PublishedSeen(published(4)),
        ManifestChecked(published(4), None),
        DesiredWritten(desired(4, 2)),
        now=600.0,
    )
    state, effects = run(state, WorkersSeen((held(60),)), now=719.9)
    assert effects == (), "its time runs from the order that ends the barrier"
    _, effects = run(state, WorkersSeen((held(61),)), now=720.0)
    said = "has served version 2 for 120 s while later ones were ordered, now version 4"
    assert effects == (RestartWorker("w", "a", said),)


def test_a_held_worker_that_serves_the_ordered_version_counts_as_converged() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, phase=WorkerPhase.HELD, barrier=(1, 3)),)))
    state, effects = run(state, WorkersSeen((worker("w", 3, 2, phase=WorkerPhase.HELD),)), now=20.0)
    assert (effects, summary(state, 20.0).converged) == ((), 1)


def ordered_every(seconds: float, serving: Callable[[int], int]) -> tuple[Effect, ...]:
    """Effects of orders 4 to 8, one every `seconds`, with one worker that serves `serving(ordered)`."""
    state, found = ordering(3), []
    for number in range(4, 9):
        now = (number - 3) * seconds
        state, effects = run(
            state,
            WorkersSeen((worker("w", serving(number - 1), number),)),
            PublishedSeen(published(number)),
            ManifestChecked(published(number), None),
            DesiredWritten(desired(number, number - 2)),
            now=now,
        )
        found += [effect for effect in effects if isinstance(effect, RestartWorker)]
    return tuple(found)


def test_orders_faster_than_the_timeout_do_not_hide_a_worker_that_is_stuck() -> None:
    said = "has served version 2 for 120 s while later ones were ordered, now version 6"
    assert ordered_every(40.0, lambda _: 2) == (RestartWorker("w", "a", said),)


def test_a_worker_that_follows_one_version_late_is_never_restarted() -> None:
    assert ordered_every(100.0, lambda ordered: ordered - 1) == ()


def test_a_shorter_timeout_counts_at_once() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 2),)), now=100.0)
    state, effects = run(state, WorkersSeen((worker("w", 2, 2),)), now=125.0)
    assert effects == ()
    _, effects = run(state, SettingsChanged(CoordinatorSettings(timeout_seconds=20.0, beat_seconds=1e9)), now=125.0)
    said = "has served version 2 for 25 s while later ones were ordered, now version 3"
    assert effects == (RestartWorker("w", "a", said),)


def test_the_same_version_of_another_epoch_is_not_convergence() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, epoch=2), worker("x", 3))))
    found = summary(state, 0.0)
    assert (found.converged, found.laggards) == (1, ())
    assert summary(state, 120.0).laggards == ("w",)


def test_the_summary_counts_workers_by_version_newest_first_and_names_ten_laggards() -> None:
    workers = (*(worker(f"w{n:02}", 2) for n in range(12)), worker("x", 3), worker("y", None))
    state, _ = run(ordering(3), WorkersSeen(workers))
    found = summary(state, 0.0)
    assert found.serving == ((3, 1), (2, 12))
    assert summary(state, 119.0).laggards == ()
    assert summary(state, 120.0).laggards == tuple(f"w{n:02}" for n in range(MAX_LAGGARDS))
    assert (len(found.workers), found.converged) == (14, 1)
    assert (found.desired, found.published) == (published(3), published(3))


# --------------------------------------------------------------------------------------------------- life and counters


def test_life_is_judged_by_this_readers_clock_since_the_revision_rose() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, 1),)), now=0.0)
    state, _ = run(state, WorkersSeen((worker("w", 3, 1),)), now=29.9)
    assert len(summary(state, 29.9).workers) == 1
    assert len(summary(state, 30.0).workers) == 0
    state, _ = run(state, WorkersSeen((worker("w", 3, 2),)), now=29.9)
    assert len(summary(state, 59.8).workers) == 1


def test_a_crashed_incarnations_totals_stay_and_what_it_held_counts_as_lost_once() -> None:
    last = worker("w", 3, generated=100, in_flight=40)
    state, _ = run(ordering(3), WorkersSeen((last,)))
    for now in (30.0, 31.0, 65.0, 100.0):  # its key outlives it
        state, _ = run(state, WorkersSeen((last,)), now=now)
        found = summary(state, now)
        assert found.workers == ()
        assert found.totals.tokens_generated == 100
        assert found.totals.tokens_in_flight == 0
        assert found.crashed_tokens == 40
    state, _ = run(state, WorkersSeen((worker("w", 3, generated=7, in_flight=5, incarnation="b"),)), now=101.0)
    found = summary(state, 101.0)
    assert (found.totals.tokens_generated, found.totals.tokens_in_flight, found.crashed_tokens) == (107, 5, 40)


def test_a_restart_within_the_liveness_time_ends_the_incarnation_before() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, 9, generated=100, in_flight=40),)))
    state, _ = run(state, WorkersSeen((worker("w", 3, 1, generated=7, in_flight=5, incarnation="b"),)))
    found = summary(state, 0.0)
    assert (found.totals.tokens_generated, found.totals.tokens_in_flight, found.crashed_tokens) == (107, 5, 40)


def test_a_stopped_worker_counts_once_and_loses_nothing() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, 1, generated=90, in_flight=40),)))
    last = worker("w", 3, 2, generated=100, in_flight=40, phase=WorkerPhase.STOPPED)
    for now in (0.5, 1.0, 1.5):
        state, _ = run(state, WorkersSeen((last,)), now=now)
    found = summary(state, 1.5)
    assert found.workers == ()
    assert (found.totals.tokens_generated, found.totals.tokens_in_flight, found.crashed_tokens) == (100, 40, 0)


def test_a_worker_taken_for_dead_that_reports_again_is_not_counted_twice() -> None:
    state, _ = run(ordering(3), WorkersSeen((worker("w", 3, 1, generated=90, in_flight=40),)))
    state, _ = run(state, WorkersSeen(()), now=30.0)
    assert summary(state, 30.0).crashed_tokens == 40
    state, _ = run(state, WorkersSeen((worker("w", 3, 2, generated=95, in_flight=45),)), now=40.0)
    found = summary(state, 40.0)
    assert (found.totals.tokens_generated, found.totals.tokens_in_flight, found.crashed_tokens) == (95, 45, 0)


def test_counters_are_added_field_by_field_and_reasons_stay_apart() -> None:
    one = WorkerCounters(tokens_generated=1, interruptions=2, tokens_dropped={"A": 3})
    other = WorkerCounters(tokens_generated=10, tokens_lost=4, tokens_dropped={"A": 5, "B": 6})
    assert add_counters(one, other) == WorkerCounters(
        tokens_generated=11, interruptions=2, tokens_lost=4, tokens_dropped={"A": 8, "B": 6}
    )


# --------------------------------------------------------------------------------------------------------- quarantine


def poisoned(name: str, revision: int = 2) -> WorkerState:
    return worker(name, 3, revision, phase=WorkerPhase.POISONED)


def failing(*reports: WorkerState) -> CoordinatorState:
    """Version 4 was ordered to workers of version 3; then these reports."""
    state, _ = run(
        ordering(3), WorkersSeen((worker("w", 3), worker("x", 3), worker("y", 3))), PublishedSeen(published(4)),
        ManifestChecked(published(4), None), DesiredWritten(desired(4, 2)), WorkersSeen(reports),
    )  # fmt: skip
    return state


def test_a_version_that_two_workers_could_not_load_is_quarantined_and_named_in_the_next_order() -> None:
    assert summary(failing(poisoned("w")), 0.0).quarantined == ()
    assert summary(failing(poisoned("w"), poisoned("w", 3)), 0.0).quarantined == ()
    state = failing(poisoned("w"), poisoned("x"))
    assert summary(state, 0.0).quarantined == (4,)
    state, effects = run(state, PublishedSeen(published(5)), ManifestChecked(published(5), None))
    assert effects == (CheckManifest(published(5)), WriteDesired(desired(5, 3, quarantined=(4,))))


def test_a_version_that_some_worker_serves_is_not_quarantined() -> None:
    assert summary(failing(worker("y", 4, 2), poisoned("w"), poisoned("x")), 0.0).quarantined == ()


def test_a_version_that_the_only_worker_could_not_load_is_quarantined() -> None:
    state, _ = run(ordering(3), WorkersSeen((poisoned("w"),)))
    assert summary(state, 0.0).quarantined == (3,)
