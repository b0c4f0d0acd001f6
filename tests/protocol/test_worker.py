"""The worker's machine, one claim each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.fakes.cluster import published_version

from rljob_api.messages import CoordinatorHeartbeat, DesiredVersion, PublishedVersion, WorkerPhase
from rljob_protocol.worker import (
    Applied,
    Apply,
    ApplyFailed,
    CoordinatorBeat,
    DesiredSeen,
    DrainRequested,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    GateShut,
    OpenGate,
    Poison,
    Probe,
    ProbeFailed,
    ProbePassed,
    PublishedSeen,
    Report,
    ShutGate,
    Tick,
    Worker,
    WorkerSettings,
    is_converged,
    new_worker,
    step,
)

SETTINGS = WorkerSettings(
    coordinator_timeout_seconds=30.0,
    fetch_deadline_seconds=100.0,
    gate_deadline_seconds=10.0,
    apply_deadline_seconds=20.0,
    probe_deadline_seconds=15.0,
    backoff_seconds=1.0,
    max_backoff_seconds=4.0,
    corrupt_attempts=3,
)
V = [published_version(version) for version in range(10)]


def order(version: int, generation: int, *, term: int = 1, quarantined: tuple[int, ...] = ()) -> DesiredSeen:
    desired = DesiredVersion(term=term, generation=generation, published=V[version], quarantined=quarantined)
    return DesiredSeen(desired)


def beat(number: int, term: int = 1) -> CoordinatorBeat:
    return CoordinatorBeat(CoordinatorHeartbeat(term=term, generation=1, beat=number))


class Driver:
    """A worker and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.worker: Worker = new_worker(SETTINGS, self.now)

    def __call__(self, *events: Event) -> tuple[Effect, ...]:
        effects: tuple[Effect, ...] = ()
        for event in events:
            self.worker, more = step(self.worker, event, self.now)
            effects += more
        return effects

    def wait(self, seconds: float) -> tuple[Effect, ...]:
        self.now += seconds
        return self(Tick())

    def swap(self, published: PublishedVersion) -> tuple[Effect, ...]:
        return self(Fetched(published), GateShut(), Applied(published), ProbePassed(published))

    def serve(self, version: int, generation: int = 1) -> None:
        self(order(version, generation))
        self.swap(V[version])
        assert self.worker.serving == V[version] and is_converged(self.worker)


# ------------------------------------------------------------------------------------------------------------ swap


def test_a_new_worker_serves_nothing_and_keeps_its_gate_shut() -> None:
    drive = Driver()
    assert drive.wait(1.0) == ()
    assert (drive.worker.phase, drive.worker.is_gate_open) == (WorkerPhase.STARTING, False)


def test_a_swap_is_shut_apply_probe_open_in_this_order() -> None:
    drive = Driver()
    assert drive(order(0, 1)) == (Fetch(V[0]),)
    assert drive(Fetched(V[0])) == (ShutGate(),)
    assert drive(GateShut()) == (Apply(V[0]),)
    assert drive(Applied(V[0])) == (Probe(V[0]),)
    assert not drive.worker.is_gate_open
    assert drive(ProbePassed(V[0])) == (OpenGate(), Report())
    assert (drive.worker.phase, drive.worker.is_gate_open) == (WorkerPhase.SERVING, True)
    assert drive.worker.order == (1, 1)


def test_a_worker_serves_on_while_it_fetches_and_not_while_it_swaps() -> None:
    drive = Driver()
    drive.serve(0)
    drive(order(1, 2))
    assert (drive.worker.phase, drive.worker.is_gate_open) == (WorkerPhase.SERVING, True)
    drive(Fetched(V[1]))
    assert (drive.worker.phase, drive.worker.is_gate_open) == (WorkerPhase.SWAPPING, False)


@pytest.mark.parametrize("stray", [Fetched(V[1]), GateShut(), Applied(V[1]), ProbePassed(V[1]), ProbeFailed(V[1], "")])
def test_a_result_that_nothing_asked_for_changes_nothing(stray: Event) -> None:
    drive = Driver()
    drive.serve(0)
    before = drive.worker
    assert drive(stray) == ()
    assert drive.worker == before


def test_a_newer_order_during_a_fetch_supersedes_it_when_the_fetch_returns() -> None:
    drive = Driver()
    drive(order(0, 1))
    assert drive(order(1, 2)) == ()
    assert drive(order(2, 3)) == ()
    assert drive(Fetched(V[0])) == (Fetch(V[2]),)


def test_a_newer_order_during_a_swap_waits_for_its_end() -> None:
    drive = Driver()
    drive(order(0, 1), Fetched(V[0]))
    assert drive(order(1, 2)) == ()
    assert drive(GateShut()) == (Apply(V[0]),)
    assert drive(Applied(V[0])) == (Probe(V[0]),)
    assert drive(ProbePassed(V[0])) == (OpenGate(), Fetch(V[1]), Report())


# ---------------------------------------------------------------------------------------------------------- orders


def test_a_lower_or_repeated_order_is_refused() -> None:
    drive = Driver()
    drive(order(2, 5, term=2))
    drive.swap(V[2])
    for replay in (order(3, 4, term=2), order(3, 5, term=2), order(3, 9, term=1)):
        assert drive(replay) == ()
    assert is_converged(drive.worker)


def test_a_higher_order_may_go_back_to_a_lower_version() -> None:
    drive = Driver()
    drive.serve(3)
    assert drive(order(2, 2, quarantined=(3,))) == (Fetch(V[2]),)
    drive.swap(V[2])
    assert drive.worker.serving == V[2]


def test_a_new_order_for_the_served_version_is_recorded_without_a_swap() -> None:
    drive = Driver()
    drive.serve(3)
    assert drive(order(3, 1, term=2)) == (Report(),)
    assert (drive.worker.order, drive.worker.is_gate_open) == ((2, 1), True)


def test_a_published_version_of_an_older_epoch_is_refused() -> None:
    drive = Driver()
    drive(PublishedSeen(published_version(4, epoch=2)))
    drive.now = 30.0
    drive(PublishedSeen(published_version(9, epoch=1)))
    assert drive.worker.published == published_version(4, epoch=2)


def test_an_order_fences_the_published_versions_of_older_epochs() -> None:
    drive = Driver()
    drive(DesiredSeen(DesiredVersion(term=1, generation=1, published=published_version(4, epoch=2))))
    drive(PublishedSeen(published_version(9, epoch=1)))
    assert drive.worker.published is None


# --------------------------------------------------------------------------------------------------- degraded mode


def test_without_a_heartbeat_the_worker_follows_published() -> None:
    drive = Driver()
    drive.serve(0)
    assert drive(PublishedSeen(V[2])) == ()
    assert drive.wait(29.9) == ()
    assert drive.wait(0.1) == (Fetch(V[2]), Report())
    drive.swap(V[2])
    assert (drive.worker.serving, drive.worker.order, drive.worker.is_degraded) == (V[2], None, True)
    assert is_converged(drive.worker)


def test_only_a_heartbeat_that_rises_is_a_sign_of_life() -> None:
    drive = Driver()
    drive.serve(0)
    drive(PublishedSeen(V[1]))
    for number in (5, 5, 4):
        drive(beat(number))
        drive.wait(15.0)
    assert drive.worker.is_degraded
    assert drive(beat(0, term=2)) == (Report(),)  # a new coordinator counts from the start
    assert not drive.worker.is_degraded


def test_a_degraded_worker_skips_quarantined_versions() -> None:
    drive = Driver()
    drive(order(0, 1, quarantined=(1,)))
    drive.swap(V[0])
    drive(PublishedSeen(V[1]))
    assert drive.wait(40.0) == (Report(),)
    assert drive(PublishedSeen(V[2])) == (Fetch(V[2]),)


def test_a_degraded_worker_that_joins_late_takes_the_last_order_when_published_is_quarantined() -> None:
    drive = Driver()
    drive(PublishedSeen(V[2]))
    drive.now = 29.0
    drive(order(1, 7, quarantined=(2,)))
    drive.wait(40.0)
    assert drive(Fetched(V[1])) == (ShutGate(),)


def test_orders_win_again_when_one_comes_back() -> None:
    drive = Driver()
    drive.serve(0)
    drive(PublishedSeen(V[2]))
    drive.wait(40.0)
    drive.swap(V[2])
    assert drive(order(1, 1, term=2)) == (Fetch(V[1]), Report())
    assert not drive.worker.is_degraded


def test_an_order_from_before_the_silence_does_not_pull_a_worker_back() -> None:
    drive = Driver()
    drive.serve(0)
    drive(PublishedSeen(V[2]))
    drive.wait(40.0)
    drive.swap(V[2])
    assert drive(beat(9)) == (Report(),)
    assert drive.wait(1.0) == ()
    assert drive.worker.serving == V[2]
    assert drive(order(2, 2)) == (Report(),)
    assert is_converged(drive.worker)


# -------------------------------------------------------------------------------------------------------- failures


def test_a_failed_fetch_is_retried_with_a_bounded_backoff() -> None:
    drive = Driver()
    drive(order(0, 1))
    for wait in (1.0, 2.0, 4.0, 4.0, 4.0):
        assert drive(FetchFailed(V[0], "no route", corrupt=False)) == ()
        assert drive.wait(wait - 0.1) == ()
        assert drive.wait(0.1) == (Fetch(V[0]),)
    assert drive.worker.last_error == "version 0 could not be fetched: no route"
    assert drive.worker.failed_version is None


def test_a_version_that_keeps_coming_corrupt_is_given_up_and_reported() -> None:
    drive = Driver()
    drive.serve(0)
    drive(order(1, 2))
    for _ in range(2):
        drive(FetchFailed(V[1], "digest differs", corrupt=True))
        assert drive.wait(4.0) == (Fetch(V[1]),)
    assert drive(FetchFailed(V[1], "digest differs", corrupt=True)) == (Report(),)
    assert (drive.worker.failed_version, drive.worker.corrupt_fetches) == (1, 3)
    assert drive.worker.last_error == "version 1 came corrupt 3 times: digest differs"
    drive(beat(1))
    assert drive.wait(20.0) == ()
    assert (drive.worker.phase, drive.worker.serving) == (WorkerPhase.SERVING, V[0])


def test_a_new_order_gives_a_version_that_was_given_up_another_chance() -> None:
    drive = Driver()
    drive(order(1, 1))
    for _ in range(3):
        drive(FetchFailed(V[1], "digest differs", corrupt=True))
        drive.wait(4.0)
    assert drive(order(1, 2)) == (Fetch(V[1]),)
    drive.swap(V[1])
    assert drive.worker.failed_version is None


def test_a_newer_order_cuts_a_backoff_short() -> None:
    drive = Driver()
    drive(order(0, 1), FetchFailed(V[0], "no route", corrupt=False))
    assert drive(order(1, 2)) == (Fetch(V[1]),)


@pytest.mark.parametrize(
    ("before", "failure", "reason"),
    [
        ((Fetched(V[1]), GateShut()), ApplyFailed(V[1], "shape"), "version 1 could not be applied: shape"),
        (
            (Fetched(V[1]), GateShut(), Applied(V[1])),
            ProbeFailed(V[1], "0.3 off"),
            "version 1 failed its probe: 0.3 off",
        ),
    ],
)
def test_a_failed_apply_or_probe_poisons_the_engine_for_good(
    before: tuple[Event, ...], failure: Event, reason: str
) -> None:
    drive = Driver()
    drive.serve(0)
    drive(order(1, 2), *before)
    assert drive(failure) == (Poison(reason), Report())
    worker = drive.worker
    assert (worker.phase, worker.serving, worker.is_gate_open) == (WorkerPhase.POISONED, None, False)
    assert (worker.failed_version, worker.swaps_failed) == (1, 1)
    assert drive(ProbePassed(V[1]), order(2, 3), Tick(), DrainRequested()) == ()
    assert drive.worker == worker


@pytest.mark.parametrize(
    ("before", "seconds", "reason", "failed"),
    [
        ((), 100.0, "the fetch of version 1 hung for 100 s", None),
        ((Fetched(V[1]),), 10.0, "the gate did not shut within 10 s", None),
        ((Fetched(V[1]), GateShut()), 20.0, "version 1 was not applied within 20 s", 1),
        ((Fetched(V[1]), GateShut(), Applied(V[1])), 15.0, "version 1 was not probed within 15 s", 1),
    ],
)
def test_every_wait_ends_in_poison_at_its_deadline(
    before: tuple[Event, ...], seconds: float, reason: str, failed: int | None
) -> None:
    drive = Driver()
    drive.worker = replace(drive.worker, settings=replace(SETTINGS, coordinator_timeout_seconds=1e9))
    drive.serve(0)
    drive(order(1, 2), *before)
    assert drive.wait(seconds - 0.1) == ()
    assert drive.wait(0.1) == (Poison(reason), Report())
    assert drive.worker.failed_version == failed


def test_a_restarted_worker_goes_on_reporting_the_version_it_failed_on_until_it_loads() -> None:
    drive = Driver()
    drive.worker = new_worker(SETTINGS, 0.0, failed_version=1)
    drive.serve(0)
    assert drive.worker.failed_version == 1
    drive.serve(1, generation=2)
    assert drive.worker.failed_version is None


def test_a_restarted_worker_takes_the_order_it_failed_on_only_from_a_living_coordinator() -> None:
    drive = Driver()
    drive.worker = new_worker(SETTINGS, 0.0, failed_version=1)
    assert drive(order(1, 5), beat(7)) == ()  # what the keys held: it may be all that is left of a dead coordinator
    assert drive(beat(8)) == (Fetch(V[1]),)


def test_a_restarted_worker_leaves_the_order_it_failed_on_for_published_without_a_coordinator() -> None:
    drive = Driver()
    drive.worker = new_worker(SETTINGS, 0.0, failed_version=1)
    drive(order(1, 5), beat(7), PublishedSeen(V[2]))
    assert drive.wait(29.9) == ()
    assert drive.wait(0.1) == (Fetch(V[2]), Report())


# ----------------------------------------------------------------------------------------------------------- drain


def test_a_draining_worker_starts_no_swap_and_keeps_serving() -> None:
    drive = Driver()
    drive.serve(0)
    assert drive(DrainRequested()) == (Report(),)
    assert drive(DrainRequested(), order(1, 2), beat(1)) == ()
    worker = drive.worker
    assert (worker.phase, worker.serving, worker.is_gate_open) == (WorkerPhase.DRAINING, V[0], True)


def test_a_fetch_that_returns_during_a_drain_is_dropped() -> None:
    drive = Driver()
    drive.serve(0)
    drive(order(1, 2), DrainRequested())
    assert drive(Fetched(V[1])) == ()


def test_a_swap_under_way_ends_before_the_drain_so_that_partials_can_go_on() -> None:
    drive = Driver()
    drive.serve(0)
    drive(order(1, 2), Fetched(V[1]), DrainRequested())
    assert drive(GateShut()) == (Apply(V[1]),)
    assert drive(Applied(V[1])) == (Probe(V[1]),)
    assert drive(ProbePassed(V[1])) == (OpenGate(), Report())
    assert (drive.worker.phase, drive.worker.is_gate_open) == (WorkerPhase.DRAINING, True)
