"""The worker's side of the interruption route's barrier: one rule a test, with exact effects and reasons."""

from __future__ import annotations

import pytest
from tests.protocol.machine_events import ordered, published, run, swap_events

from rljob_api.messages import Barrier, BarrierState, WorkerPhase
from rljob_protocol.worker import Swap, WorkerSettings, WorkerState, held_reason, is_converged, new_state, step
from rljob_protocol.worker_events import (
    Applied,
    Apply,
    BarrierSeen,
    CoordinatorBeat,
    DrainRequested,
    Event,
    Fetch,
    Fetched,
    GateShut,
    HandedOver,
    HandOver,
    HandOverFailed,
    OpenGate,
    Poison,
    Probe,
    ProbePassed,
    PublishedSeen,
    Report,
    Resume,
    Resumed,
    ShutGate,
    Tick,
    TrainerBeat,
)

SETTINGS = WorkerSettings(
    coordinator_timeout_seconds=1e9,
    gate_timeout_seconds=60.0,
    hand_over_timeout_seconds=40.0,
    barrier_timeout_seconds=20.0,
)


def quiesce(version: int, epoch: int = 1) -> BarrierSeen:
    return BarrierSeen(Barrier(epoch=epoch, version=version, state=BarrierState.QUIESCE))


def released(version: int, epoch: int = 1) -> BarrierSeen:
    return BarrierSeen(Barrier(epoch=epoch, version=version, state=BarrierState.RELEASED))


def serving(version: int) -> WorkerState:
    state, _ = run(
        new_state(SETTINGS, 0.0),
        CoordinatorBeat(1),
        PublishedSeen(published(version)),
        ordered(version, 1),
        *swap_events(version),
    )
    assert is_converged(state)
    return state


def holding(version: int) -> WorkerState:
    """A worker that has acknowledged the barrier of the version that it serves."""
    state, _ = run(serving(version), quiesce(version), GateShut(), HandedOver())
    assert state.kept == (1, version)
    return state


# --------------------------------------------------------------------------------------------------------- keeping it


def test_a_barrier_is_acknowledged_after_the_gate_is_shut_and_everything_handed_over() -> None:
    state = serving(3)
    for event, expected, kept in (
        (quiesce(3), (ShutGate(), Report()), None),
        (GateShut(), (HandOver(),), None),
        (HandedOver(), (Report(),), (1, 3)),
        (Tick(), (), (1, 3)),
    ):
        state, effects = step(state, event, 0.0)
        assert (effects, state.kept, state.phase) == (expected, kept, WorkerPhase.HELD)
    assert held_reason(state, 0.0) == "holds still for the update of version 3"


def test_a_kept_barrier_is_kept_for_as_long_as_it_holds() -> None:
    state = holding(3)
    for now in (1.0, 1e3, 1e9):
        for event in (Tick(), TrainerBeat((1, int(now))), quiesce(3), GateShut(), HandedOver(), ordered(3, 2)):
            state, effects = step(state, event, now)
            assert {type(effect) for effect in effects} <= {Report}
    assert state.kept == (1, 3)


def test_the_next_version_is_swapped_to_from_the_shut_gate() -> None:
    state, effects = run(holding(3), PublishedSeen(published(4)), ordered(4, 2))
    assert effects == (Fetch(published(4)),)
    for event, expected in (
        (Fetched(published(4)), (Apply(published(4)), Report())),
        (Applied(published(4)), (Probe(published(4)),)),
        (ProbePassed(published(4)), (OpenGate(), Report())),
    ):
        assert state.kept == (1, 3)
        state, effects = step(state, event, 0.0)
        assert effects == expected
    assert (state.kept, state.serving, state.phase) == (None, published(4), WorkerPhase.SERVING)


def test_a_release_without_a_newer_version_resumes_with_the_one_that_the_engine_has() -> None:
    state, effects = run(holding(3), released(3))
    assert effects == (Resume(),)
    state, effects = run(state, Resumed())
    assert effects == (OpenGate(), Report())
    assert (state.kept, state.serving, state.phase) == (None, published(3), WorkerPhase.SERVING)


def test_a_release_with_a_newer_version_waits_for_its_order() -> None:
    """Tokens of the version from before the update can be scored by nobody any more."""
    state, effects = run(holding(3), PublishedSeen(published(4)), released(3), Tick())
    assert effects == ()
    assert held_reason(state, 0.0) == "waits for the next version"
    state, effects = run(state, ordered(4, 2), Fetched(published(4)))
    assert effects == (Fetch(published(4)), Apply(published(4)), Report())


def test_a_release_does_not_wait_for_a_quarantined_version() -> None:
    _, effects = run(holding(3), ordered(3, 2, quarantined=(4,)), PublishedSeen(published(4)), released(3))
    assert effects == (Report(), Resume())


def test_a_lower_or_replayed_barrier_changes_nothing() -> None:
    state, _ = run(holding(3), released(3), Resumed())
    for event in (quiesce(3), quiesce(2), released(2)):
        assert step(state, event, 0.0) == (state, ())


def test_a_release_of_a_higher_barrier_ends_a_lower_one() -> None:
    assert run(holding(3), released(3, epoch=2))[1] == (Resume(),)


def test_a_barrier_of_a_version_before_the_served_one_is_past() -> None:
    state = serving(3)
    after, effects = step(state, quiesce(2), 0.0)
    assert effects == ()
    assert after.phase is WorkerPhase.SERVING


def test_a_higher_epochs_barrier_is_handed_over_for_and_acknowledged_by_itself() -> None:
    state, effects = run(holding(3), quiesce(5, epoch=2))
    assert effects == (HandOver(),)
    assert state.kept == (1, 3)
    state, effects = run(state, HandedOver())
    assert (effects, state.kept) == ((Report(),), (2, 5))


# ------------------------------------------------------------------------------------------- at any point of a swap


def test_a_version_of_the_barrier_itself_is_not_loaded_any_more() -> None:
    state, effects = run(serving(3), ordered(4, 2), quiesce(4), GateShut(), HandedOver(), Fetched(published(4)), Tick())
    assert effects == (Fetch(published(4)), ShutGate(), Report(), HandOver(), Report())
    assert (state.kept, state.serving) == ((1, 4), published(3))
    _, effects = run(state, ordered(5, 3), Fetched(published(5)))
    assert effects == (Fetch(published(5)), Apply(published(5)), Report())


def test_what_was_fetched_before_a_barrier_that_is_given_up_is_loaded_after_it() -> None:
    state, _ = run(serving(3), ordered(4, 2), quiesce(4), GateShut(), HandedOver(), Fetched(published(4)))
    assert run(state, released(4))[1] == (Apply(published(4)), Report())


def test_a_barrier_while_a_swap_shuts_the_gate_comes_before_the_swap() -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), quiesce(4))
    state, effects = run(state, GateShut(), HandedOver())
    assert effects == (HandOver(), Report())
    assert (state.kept, state.serving) == ((1, 4), published(3))
    assert run(state, released(4))[1] == (Apply(published(4)), Report()), "it is fetched already"


@pytest.mark.parametrize("before", [(), (Applied(published(4)),)])
def test_a_barrier_during_a_swap_is_kept_at_its_end_without_a_token_in_between(before: tuple[Event, ...]) -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), GateShut(), *before, quiesce(4))
    rest = (Applied(published(4)), ProbePassed(published(4)))[len(before) :]
    state, effects = run(state, *rest, GateShut(), HandedOver())
    assert effects[-4:] == (ShutGate(), Report(), HandOver(), Report())
    assert OpenGate() not in effects
    assert (state.kept, state.serving) == ((1, 4), published(4))


def test_a_swap_past_the_barrier_is_not_held_up_by_it() -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), quiesce(3))
    _, effects = run(state, GateShut(), Applied(published(4)), ProbePassed(published(4)))
    assert effects == (Apply(published(4)), Probe(published(4)), OpenGate(), Report())


def test_a_version_that_a_swap_ends_with_when_the_next_is_published_generates_nothing_and_the_next_one_does() -> None:
    """The trainer trained on while this worker swapped: tokens of version 4 would come after its barrier."""
    state, _ = run(holding(3), PublishedSeen(published(4)), ordered(4, 2), released(3), Fetched(published(4)))
    state, effects = run(
        state, PublishedSeen(published(5)), Applied(published(4)), ProbePassed(published(4)), GateShut(), Tick()
    )
    assert OpenGate() not in effects
    assert (state.serving, state.phase) == (published(4), WorkerPhase.HELD)
    _, effects = run(state, ordered(5, 3), *swap_events(5))
    assert effects[-2:] == (OpenGate(), Report())


def test_a_worker_that_learns_of_a_newer_version_without_a_barrier_stops_at_once() -> None:
    state, effects = run(serving(3), PublishedSeen(published(4)))
    assert effects == (ShutGate(), Report())
    assert run(state, GateShut(), ordered(3, 2, quarantined=(4,)))[1] == (Report(), Resume())


def test_a_worker_that_starts_while_a_barrier_holds_acknowledges_and_loads_the_next_version_first() -> None:
    state, effects = run(new_state(SETTINGS, 0.0), quiesce(3), GateShut(), HandedOver())
    assert effects == (ShutGate(), Report(), HandOver(), Report())
    assert (state.kept, state.phase) == ((1, 3), WorkerPhase.STARTING)
    state, effects = run(state, ordered(3, 1), Fetched(published(3)))
    assert effects == (Fetch(published(3)),)
    assert run(state, released(3))[1] == (Apply(published(3)), Report()), "there is nothing to resume with"
    _, effects = run(state, ordered(4, 2), *swap_events(4))
    assert effects == (Fetch(published(4)), Apply(published(4)), Report(), Probe(published(4)), OpenGate(), Report())


def test_a_barrier_while_the_engine_resumes_shuts_the_gate_before_it_opens() -> None:
    state, _ = run(holding(3), released(3), quiesce(4))
    assert state.swap is Swap.RESUMING
    state, effects = run(state, Resumed(), GateShut(), HandedOver())
    assert effects == (ShutGate(), Report(), HandOver(), Report())
    assert state.kept == (1, 4)


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_hand_over_that_failed_is_tried_again_and_nothing_is_acknowledged_before_it_succeeds() -> None:
    state, _ = run(serving(3), quiesce(3), GateShut())
    state, effects = step(state, HandOverFailed("no server"), 5.0)
    assert (effects, state.kept) == ((), None)
    assert state.last_error == "open trajectories could not be handed over: no server"
    assert step(state, Tick(), 5.9)[1] == ()
    state, effects = step(state, Tick(), 6.0)
    assert effects == (HandOver(),)
    state, effects = step(state, HandedOver(), 6.0)
    assert (effects, state.kept, state.last_error) == ((Report(),), (1, 3), "")


def test_a_barrier_that_ends_before_it_could_be_acknowledged_ends() -> None:
    state, _ = run(serving(3), quiesce(3), GateShut(), HandOverFailed("no server"))
    assert run(state, released(3))[1] == (Resume(),)


@pytest.mark.parametrize(
    ("events", "deadline", "reason"),
    [
        ((quiesce(3),), 60.0, "shutting took too long"),
        ((quiesce(3), GateShut()), 40.0, "handing over took too long"),
        ((quiesce(3), GateShut(), HandedOver(), released(3)), 60.0, "resuming took too long"),
    ],
)
def test_each_stage_of_a_hold_has_its_deadline(events: tuple[Event, ...], deadline: float, reason: str) -> None:
    state, _ = run(serving(3), *events)
    assert step(state, Tick(), deadline - 0.1)[1] == ()
    after, effects = step(state, Tick(), deadline)
    assert effects == (Poison(reason),)
    assert after.failed_version is None


def test_a_draining_worker_acknowledges_and_generates_no_more() -> None:
    state, effects = run(serving(3), DrainRequested(), quiesce(3), GateShut(), HandedOver())
    assert effects == (Report(), ShutGate(), Report(), HandOver(), Report())
    assert (state.kept, state.phase) == ((1, 3), WorkerPhase.DRAINING)
    assert run(state, released(3), ordered(4, 2), Tick())[1] == ()


# ------------------------------------------------------------------------------------------------------------ silence


def test_without_a_sign_of_the_trainer_it_stops_at_the_timeout_and_goes_on_with_the_next_one() -> None:
    state, effects = run(serving(3), Tick(), now=19.9)
    assert effects == ()
    state, effects = run(state, Tick(), GateShut(), Tick(), now=20.0)
    assert effects == (ShutGate(), Report()), "nobody is there to hand over to"
    assert (state.kept, state.phase) == (None, WorkerPhase.HELD)
    assert held_reason(state, 25.0) == "stopped generating: nothing was heard of the trainer for 25 s"
    state, effects = run(state, TrainerBeat((1, 1)), Resumed(), now=100.0)
    assert effects == (Resume(), OpenGate(), Report())


def test_each_sign_of_the_trainer_counts_once() -> None:
    signs: tuple[tuple[Event, bool], ...] = (
        (TrainerBeat((1, 1)), True),
        (TrainerBeat((1, 1)), False),
        (TrainerBeat((2, 1)), True),
        (PublishedSeen(published(3)), False),
        (PublishedSeen(published(4)), True),
        (released(2), True),
        (released(2), False),
        (CoordinatorBeat(2), False),
        (Tick(), False),
    )
    state, now = serving(3), 0.0
    for event, counts in signs:
        now += 1.0
        state, _ = step(state, event, now)
        assert state.trainer is not None
        assert (state.trainer.heard_at == now) is counts, event


def test_a_barrier_that_comes_to_a_silent_worker_is_kept() -> None:
    state, _ = run(serving(3), Tick(), GateShut(), now=20.0)
    state, effects = run(state, quiesce(3), HandedOver(), now=30.0)
    assert effects == (HandOver(), Report())
    assert state.kept == (1, 3)


def test_a_silent_worker_loads_what_is_ordered_and_still_generates_nothing() -> None:
    state, _ = run(serving(3), Tick(), GateShut(), now=20.0)
    state, effects = run(state, ordered(4, 2), *swap_events(4), GateShut(), Tick(), now=30.0)
    assert OpenGate() not in effects
    assert (state.serving, state.phase) == (published(4), WorkerPhase.HELD)


def test_a_route_without_a_barrier_follows_none_and_needs_no_trainer() -> None:
    state, _ = run(new_state(WorkerSettings(coordinator_timeout_seconds=1e9), 0.0), ordered(3, 1), *swap_events(3))
    for event in (quiesce(3), TrainerBeat((1, 1)), Tick()):
        assert step(state, event, 1e6) == (state, ())
