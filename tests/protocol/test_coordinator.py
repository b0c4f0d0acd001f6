"""The coordinator's machine, one claim each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.fakes.cluster import published_version

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerCounters, WorkerPhase, WorkerState
from rljob_protocol.coordinator import (
    Beat,
    CheckManifest,
    Coordinator,
    CoordinatorSettings,
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
    crashed_tokens,
    is_converged,
    new_coordinator,
    step,
    summary,
    totals,
)

SETTINGS = CoordinatorSettings(
    timeout_seconds=120.0,
    start_timeout_seconds=900.0,
    liveness_seconds=30.0,
    heartbeat_seconds=1000.0,  # out of the way; heartbeats have their own test
    retry_seconds=5.0,
    answer_seconds=60.0,
    restart_budget=2,
    restart_window_seconds=600.0,
    forget_seconds=1000.0,
)
V = [published_version(version) for version in range(20)]


def order(version: int, generation: int, *, term: int = 1, quarantined: tuple[int, ...] = ()) -> DesiredVersion:
    return DesiredVersion(term=term, generation=generation, published=V[version], quarantined=quarantined)


class Driver:
    """A coordinator, a clock and the revisions of its workers."""

    def __init__(self, settings: CoordinatorSettings = SETTINGS) -> None:
        self.now = 0.0
        self.coordinator: Coordinator = new_coordinator(settings)
        self.revision = 0

    def __call__(self, *events: Event) -> tuple[Effect, ...]:
        effects: tuple[Effect, ...] = ()
        for event in events:
            self.coordinator, more = step(self.coordinator, event, self.now)
            effects += more
        return tuple(effect for effect in effects if not isinstance(effect, Beat))

    def wait(self, seconds: float) -> tuple[Effect, ...]:
        self.now += seconds
        return self(Tick())

    def order(self, version: int) -> DesiredVersion:
        """Publish a version and see it ordered."""
        self(PublishedSeen(V[version]))
        [write] = self(ManifestChecked(V[version], None))
        assert isinstance(write, WriteDesired)
        self(DesiredWritten(write.desired))
        return write.desired

    def worker(self, name: str, serving: int | None = None, **fields: object) -> WorkerState:
        self.revision += 1
        phase = WorkerPhase.STARTING if serving is None else WorkerPhase.SERVING
        base = WorkerState(
            worker=name,
            pool="main",
            incarnation=f"{name}-a",
            revision=self.revision,
            phase=phase,
            epoch=0 if serving is None else 1,
            serving_version=serving,
        )
        return base.model_copy(update=fields)

    def see(self, *workers: WorkerState) -> tuple[Effect, ...]:
        return self(WorkersSeen(workers))


def leading(version: int = 0) -> Driver:
    """A coordinator of term 1 whose first order stands."""
    drive = Driver()
    drive(TermClaimed(1, None))
    drive.order(version)
    return drive


# ---------------------------------------------------------------------------------------------------------- orders


def test_a_version_is_ordered_once_its_manifest_was_read() -> None:
    drive = Driver()
    drive(TermClaimed(1, None))
    assert drive(PublishedSeen(V[0])) == (CheckManifest(V[0]),)
    assert drive(ManifestChecked(V[0], None)) == (WriteDesired(order(0, 1)),)
    assert drive(DesiredWritten(order(0, 1))) == ()
    assert drive(PublishedSeen(V[0]), Tick()) == ()


def test_a_manifest_that_cannot_be_read_is_tried_again_and_never_ordered() -> None:
    drive = leading()
    assert drive(PublishedSeen(V[1])) == (CheckManifest(V[1]),)
    assert drive(ManifestChecked(V[1], "blob m-1-1 is missing")) == ()
    assert summary(drive.coordinator, drive.now).manifest_error == "blob m-1-1 is missing"
    assert drive.wait(4.9) == ()
    assert drive.wait(0.1) == (CheckManifest(V[1]),)
    assert drive(ManifestChecked(V[1], None)) == (WriteDesired(order(1, 2)),)
    assert summary(drive.coordinator, drive.now).manifest_error == ""


def test_the_verdict_on_a_superseded_version_is_ignored() -> None:
    drive = leading()
    drive(PublishedSeen(V[1]))
    assert drive(PublishedSeen(V[2])) == (CheckManifest(V[2]),)
    assert drive(ManifestChecked(V[1], None)) == ()
    assert drive(ManifestChecked(V[2], None)) == (WriteDesired(order(2, 2)),)


@pytest.mark.parametrize(
    "announced",
    [published_version(4, epoch=2), published_version(5, epoch=2), published_version(9, epoch=1)],
    ids=["lower version", "version used twice", "older epoch"],
)
def test_an_announcement_that_does_not_rise_is_refused(announced: PublishedVersion) -> None:
    drive = Driver()
    drive(TermClaimed(1, None))
    newest = published_version(5, epoch=2).model_copy(update={"step": 3})
    drive(PublishedSeen(newest))
    assert drive(PublishedSeen(announced)) == ()
    assert (drive.coordinator.published, drive.coordinator.num_refused) == (newest, 1)


def test_nothing_is_written_before_a_term_is_claimed() -> None:
    drive = Driver()
    drive(PublishedSeen(V[0]))
    assert drive(ManifestChecked(V[0], None)) == ()
    assert drive(TermClaimed(4, None)) == (WriteDesired(order(0, 1, term=4)),)


def test_a_coordinator_that_takes_over_orders_under_its_own_term_from_the_store_alone() -> None:
    drive = Driver()
    drive(PublishedSeen(V[3]))
    held = order(3, 17, quarantined=(2,))
    assert drive(TermClaimed(2, held)) == (WriteDesired(order(3, 1, term=2, quarantined=(2,))),)


def test_a_coordinator_that_takes_over_does_not_pull_back_workers_that_went_ahead_degraded() -> None:
    drive = Driver()
    assert drive(PublishedSeen(V[5])) == (CheckManifest(V[5]),)
    assert drive(TermClaimed(2, order(3, 17))) == ()
    assert drive(ManifestChecked(V[5], None)) == (WriteDesired(order(5, 1, term=2)),)


def test_a_takeover_orders_the_old_version_when_the_new_one_cannot_be_read() -> None:
    drive = Driver()
    drive(PublishedSeen(V[5]), TermClaimed(2, order(3, 17)))
    assert drive(ManifestChecked(V[5], "gone")) == (WriteDesired(order(3, 1, term=2)),)


def test_one_write_is_under_way_at_a_time() -> None:
    drive = Driver()
    drive(TermClaimed(1, None), PublishedSeen(V[0]), ManifestChecked(V[0], None))
    drive(PublishedSeen(V[1]))
    assert drive(ManifestChecked(V[1], None)) == ()
    assert drive(DesiredWritten(order(0, 1))) == (WriteDesired(order(1, 2)),)


def test_an_effect_without_an_answer_is_asked_for_again() -> None:
    drive = Driver()
    drive(TermClaimed(1, None), PublishedSeen(V[0]))
    assert drive.wait(60.0) == (CheckManifest(V[0]),)
    drive(ManifestChecked(V[0], None))
    assert drive.wait(59.9) == ()
    assert drive.wait(0.1) == (WriteDesired(order(0, 1)),)


def test_a_fenced_coordinator_stops_for_good() -> None:
    drive = leading()
    assert drive(Fenced()) == (Stop("term 1 was superseded by another coordinator"),)
    assert drive(PublishedSeen(V[1]), TermClaimed(9, None), Tick()) == ()


def test_heartbeats_come_at_their_interval_once_a_term_is_held() -> None:
    coordinator = new_coordinator(replace(SETTINGS, heartbeat_seconds=5.0))
    beats = []
    coordinator, effects = step(coordinator, Tick(), 0.0)
    assert effects == ()
    coordinator, effects = step(coordinator, TermClaimed(1, None), 1.0)
    assert effects == (Beat(),)
    for second in range(2, 20):
        coordinator, effects = step(coordinator, Tick(), float(second))
        beats += [second for effect in effects if effect == Beat()]
    assert beats == [6, 11, 16]


# ------------------------------------------------------------------------------------------------------ quarantine


def test_a_version_that_two_workers_cannot_load_is_quarantined_and_the_newest_good_one_ordered() -> None:
    drive = leading(0)
    drive.order(1)
    drive.order(2)
    drive.see(drive.worker("a", 1), drive.worker("b", 1), drive.worker("c", 1))
    poisoned = {"phase": WorkerPhase.POISONED, "failed_version": 2}
    assert drive.see(drive.worker("a", None, **poisoned)) == ()
    assert drive.see(drive.worker("b", None, **poisoned)) == (WriteDesired(order(1, 4, quarantined=(2,))),)
    assert summary(drive.coordinator, drive.now).quarantined == (2,)
    assert summary(drive.coordinator, drive.now).workers_poisoned == 2


def test_one_worker_alone_does_not_quarantine_while_others_may_load_the_version() -> None:
    drive = leading(0)
    drive.order(1)
    drive.see(drive.worker("a", 0), drive.worker("b", 0))
    for incarnation in ("a-1", "a-2", "a-3"):
        failed = {"phase": WorkerPhase.POISONED, "failed_version": 1, "incarnation": incarnation}
        assert drive.see(drive.worker("a", None, **failed)) == ()
    assert drive.coordinator.num_poisoned == 3


def test_the_only_worker_quarantines_alone() -> None:
    drive = leading(0)
    drive.order(1)
    failed = drive.worker("a", None, phase=WorkerPhase.POISONED, failed_version=1)
    assert drive.see(failed) == (WriteDesired(order(0, 3, quarantined=(1,))),)


def test_a_worker_that_loads_the_version_after_all_takes_its_failure_back() -> None:
    drive = leading(0)
    drive.order(1)
    drive.see(drive.worker("a", 0), drive.worker("b", 0))
    drive.see(drive.worker("a", None, phase=WorkerPhase.POISONED, failed_version=1))
    drive.see(drive.worker("a", 1, incarnation="a-2"))
    drive.now = 31.0  # b falls silent: now a is all live workers
    assert drive.see(drive.worker("a", 1, incarnation="a-2")) == ()
    assert drive.coordinator.quarantined == ()


def test_an_order_stands_while_there_is_no_good_version_to_go_back_to() -> None:
    drive = leading(0)
    assert drive.see(drive.worker("a", None, phase=WorkerPhase.POISONED, failed_version=0)) == ()
    assert summary(drive.coordinator, drive.now).quarantined == (0,)
    drive(PublishedSeen(V[1]))
    assert drive(ManifestChecked(V[1], None)) == (WriteDesired(order(1, 2, quarantined=(0,))),)


def test_a_version_newer_than_the_quarantined_one_is_ordered_as_usual() -> None:
    drive = leading(0)
    drive.order(1)
    [write] = drive.see(drive.worker("a", None, phase=WorkerPhase.POISONED, failed_version=1))
    assert isinstance(write, WriteDesired)
    drive(DesiredWritten(write.desired), PublishedSeen(V[2]))
    assert drive(ManifestChecked(V[2], None)) == (WriteDesired(order(2, 4, quarantined=(1,))),)


# -------------------------------------------------------------------------------------------------------- laggards


def test_a_worker_without_progress_is_restarted_once_with_the_reason() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0), drive.worker("b", 0))
    drive.order(1)
    for _ in range(11):
        drive.now += 10.0
        assert drive.see(drive.worker("a", 0), drive.worker("b", 1)) == ()
    drive.now += 10.0
    reason = "it serves version 0 in phase Serving and made no progress towards version 1 for 120 s"
    assert drive.see(drive.worker("a", 0), drive.worker("b", 1)) == (RestartWorker("a", "a-a", reason),)
    assert summary(drive.coordinator, drive.now).laggards == ("a",)
    drive.now += 10.0
    assert drive.see(drive.worker("a", 0), drive.worker("b", 1)) == ()
    assert summary(drive.coordinator, drive.now).restarts == 1


def test_orders_that_come_faster_than_the_timeout_do_not_hide_a_stuck_worker() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0))
    effects: list[Effect] = []
    for version in range(1, 8):
        drive.order(version)
        drive.now += 20.0
        effects += drive.see(drive.worker("a", 0))
    assert [effect.worker for effect in effects if isinstance(effect, RestartWorker)] == ["a"]


def test_a_worker_that_is_always_behind_but_moves_is_no_laggard() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0))
    for version in range(1, 12):
        drive.order(version)
        drive.now += 25.0
        assert drive.see(drive.worker("a", version - 1)) == ()


def test_a_worker_whose_engine_still_starts_has_the_start_timeout() -> None:
    drive = leading(0)
    for _ in range(44):
        assert drive.see(drive.worker("a")) == ()
        drive.now += 20.0
    drive.see(drive.worker("a"))
    drive.now += 20.0
    [restart] = drive.see(drive.worker("a"))
    assert isinstance(restart, RestartWorker)
    assert restart.reason == ("it serves no version in phase Starting and made no progress towards version 0 for 900 s")


def test_a_draining_worker_is_no_laggard() -> None:
    drive = leading(0)
    drive.order(1)
    for _ in range(20):
        drive.now += 20.0
        assert drive.see(drive.worker("a", 0, phase=WorkerPhase.DRAINING)) == ()


def test_restarts_stop_at_their_budget_and_laggards_are_still_reported() -> None:
    drive = leading(0)
    restarted = []
    for second in range(0, 400, 20):
        drive.now = float(second)
        if second == 20:
            drive.order(1)
        effects = drive.see(*(drive.worker(name, 0) for name in "abc"))
        restarted += [effect.worker for effect in effects if isinstance(effect, RestartWorker)]
    assert restarted == ["a", "b"]
    assert summary(drive.coordinator, drive.now).laggards == ("a", "b", "c")
    for second in range(400, 900, 20):
        drive.now = float(second)
        effects = drive.see(*(drive.worker(name, 0) for name in "abc"))
        restarted += [effect.worker for effect in effects if isinstance(effect, RestartWorker)]
    assert restarted == ["a", "b", "c"]  # the window has passed


def test_a_changed_timeout_counts_at_once() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0))
    drive.order(1)
    drive.see(drive.worker("a", 0))
    drive.now = 20.0
    drive.see(drive.worker("a", 0))
    [restart] = drive(SettingsChanged(replace(SETTINGS, timeout_seconds=15.0)))
    assert isinstance(restart, RestartWorker)


# ----------------------------------------------------------------------------------------------- life and counters


def test_life_is_judged_by_the_readers_clock_since_the_revision_last_rose() -> None:
    drive = leading(0)
    state = drive.worker("a", 0)
    drive.see(state)
    drive.now = 30.0
    drive.see(state)  # the same key, read again, is no sign of life
    assert summary(drive.coordinator, drive.now).workers_total == 1
    drive.now = 30.1
    drive.see(state)
    assert summary(drive.coordinator, drive.now).workers_total == 0
    drive.see(drive.worker("a", 0))
    assert summary(drive.coordinator, drive.now).workers_total == 1


def test_an_older_reading_of_a_worker_changes_nothing() -> None:
    drive = leading(0)
    older, newer = drive.worker("a"), drive.worker("a", 0)
    drive.see(newer)
    drive.see(older)
    assert drive.coordinator.seats[0].state == newer


def counters(generated: int, delivered: int, in_flight: int, dropped: int = 0) -> WorkerCounters:
    return WorkerCounters(
        tokens_generated=generated,
        tokens_delivered=delivered,
        tokens_in_flight=in_flight,
        tokens_dropped={"EnvironmentFailed": dropped} if dropped else {},
    )


def assert_conserved(coordinator: Coordinator) -> None:
    total = totals(coordinator)
    ended = total.tokens_delivered + sum(total.tokens_dropped.values()) + crashed_tokens(coordinator)
    assert total.tokens_generated == ended + total.tokens_in_flight


def test_counters_of_a_restarted_incarnation_stay_and_its_tokens_in_flight_are_lost_to_the_crash() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0, counters=counters(100, 60, 30, 10)))
    drive.see(drive.worker("a", 0, incarnation="a-2", counters=counters(5, 0, 5)))
    assert totals(drive.coordinator) == counters(105, 60, 5, 10)
    assert crashed_tokens(drive.coordinator) == 30
    assert_conserved(drive.coordinator)


def test_a_lost_worker_counts_as_crashed_until_it_is_heard_again() -> None:
    drive = leading(0)
    drive.see(drive.worker("a", 0, counters=counters(100, 70, 30)))
    drive.wait(31.0)
    assert (totals(drive.coordinator).tokens_in_flight, crashed_tokens(drive.coordinator)) == (0, 30)
    drive.see(drive.worker("a", 0, counters=counters(120, 110, 10)))
    assert totals(drive.coordinator) == counters(120, 110, 10)
    assert crashed_tokens(drive.coordinator) == 0


def test_a_late_reading_of_an_ended_incarnation_is_not_counted_twice() -> None:
    drive = leading(0)
    first = drive.worker("a", 0, counters=counters(100, 70, 30))
    drive.see(first)
    second = drive.worker("a", 0, incarnation="a-2", counters=counters(7, 0, 7))
    drive.see(second)
    drive.see(first.model_copy(update={"revision": 99}))
    assert totals(drive.coordinator).tokens_generated == 107
    assert drive.coordinator.seats[0].state == second


def test_a_worker_that_is_silent_for_very_long_leaves_the_list_and_stays_in_the_totals() -> None:
    drive = leading(0)
    drive.see(drive.worker("old-pod", 0, counters=counters(100, 70, 30)))
    drive.wait(1000.1)
    assert drive.coordinator.seats == ()
    assert totals(drive.coordinator) == counters(100, 70, 0)
    assert crashed_tokens(drive.coordinator) == 30


def test_every_counter_field_is_added() -> None:
    ones = WorkerCounters(**{name: {"x": 1} if name == "tokens_dropped" else 1 for name in WorkerCounters.model_fields})
    twos = add_counters(ones, ones)
    assert set(twos.model_dump().keys()) == set(WorkerCounters.model_fields)
    assert all(value == ({"x": 2} if name == "tokens_dropped" else 2) for name, value in twos.model_dump().items())


def test_the_summary_counts_live_workers_by_the_version_they_serve() -> None:
    drive = leading(0)
    drive.order(1)
    drive.see(
        drive.worker("a", 1),
        drive.worker("b", 0),
        drive.worker("c", 1),
        drive.worker("d"),
        drive.worker("e", 1, degraded=True),
        drive.worker("f", 1, phase=WorkerPhase.STOPPED),
    )
    seen = summary(drive.coordinator, drive.now)
    assert (seen.workers_total, seen.workers_converged, seen.workers_degraded) == (5, 3, 1)
    assert seen.serving_versions == ((1, 3), (0, 1))
    assert (seen.term, seen.generation, seen.epoch, seen.published_version, seen.desired_version) == (1, 2, 1, 1, 1)
    assert not is_converged(drive.coordinator)


def test_at_most_ten_laggards_are_named() -> None:
    drive = leading(0)
    drive.order(1)
    for _ in range(7):
        drive.see(*(drive.worker(f"w{i:02d}", 0) for i in range(15)))
        drive.now += 20.0
    drive.see(*(drive.worker(f"w{i:02d}", 0) for i in range(15)))
    assert summary(drive.coordinator, drive.now).laggards == tuple(f"w{i:02d}" for i in range(10))
