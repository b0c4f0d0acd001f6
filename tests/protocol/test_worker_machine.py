"""A rollout worker's version machine: one rule of its docstring a test, with exact effects and reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.protocol.machine_events import ordered, published, run, swap_events

from rljob_api.messages import DesiredVersion
from rljob_protocol.worker import (
    FETCH_BACKOFF_MAX_SECONDS,
    Swap,
    WorkerSettings,
    WorkerState,
    is_converged,
    new_state,
    step,
)
from rljob_protocol.worker_events import (
    Applied,
    Apply,
    ApplyFailed,
    CoordinatorBeat,
    DesiredSeen,
    DrainRequested,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    GateShut,
    GateStuck,
    OpenGate,
    Poison,
    Probe,
    ProbeFailed,
    ProbePassed,
    PublishedSeen,
    Report,
    ShutGate,
    Tick,
)

SETTINGS = WorkerSettings(
    coordinator_timeout_seconds=30.0,
    fetch_timeout_seconds=600.0,
    gate_timeout_seconds=60.0,
    apply_timeout_seconds=500.0,
    probe_timeout_seconds=120.0,
)


def serving(version: int, generation: int = 1, now: float = 0.0) -> WorkerState:
    """A worker that serves what it was ordered to, with a live coordinator."""
    state, _ = run(
        new_state(SETTINGS, now), CoordinatorBeat(1), ordered(version, generation), *swap_events(version), now=now
    )
    assert is_converged(state)
    return state


# ------------------------------------------------------------------------------------------------------------- swaps


def test_a_swap_is_shut_apply_probe_open_in_this_order() -> None:
    three = published(3)
    state = new_state(SETTINGS, 0.0)
    for event, expected in (
        (ordered(3), (Fetch(three),)),
        (Fetched(three), (ShutGate(), Report())),
        (GateShut(), (Apply(three),)),
        (Applied(three), (Probe(three),)),
        (ProbePassed(three), (OpenGate(), Report())),
        (Tick(), ()),
    ):
        assert not is_converged(state) or isinstance(event, Tick)
        state, effects = step(state, event, 0.0)
        assert effects == expected
    assert is_converged(state)
    assert state.serving == three
    assert state.order == (1, 1)


def test_version_0_comes_the_same_way_as_any_other() -> None:
    state = new_state(SETTINGS, 0.0)
    assert state.serving is None
    _, effects = run(state, ordered(0), *swap_events(0))
    zero = published(0)
    assert effects == (
        Fetch(zero), ShutGate(), Report(), Apply(zero), Probe(zero), OpenGate(), Report(),
    )  # fmt: skip


def test_it_serves_on_while_it_fetches() -> None:
    state, effects = run(serving(3), ordered(4, 2))
    assert effects == (Fetch(published(4)),)
    assert state.swap is Swap.NONE
    assert state.serving == published(3)


@pytest.mark.parametrize("event", [GateShut(), Applied(published(4)), ProbePassed(published(4)), Fetched(published(4))])
def test_a_result_that_nothing_waits_for_changes_nothing(event: Event) -> None:
    state = serving(3)
    assert step(state, event, 0.0) == (state, ())


@pytest.mark.parametrize("event", [Applied(published(3)), ProbePassed(published(3)), ProbePassed(published(4))])
def test_a_result_for_another_version_or_stage_does_not_advance_a_swap(event: Event) -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), GateShut())
    assert step(state, event, 0.0) == (state, ())


def test_an_order_during_a_swap_waits_for_its_end() -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), GateShut())
    state, effects = run(state, ordered(5, 3), PublishedSeen(published(5)), Tick())
    assert effects == ()
    state, effects = run(state, Applied(published(4)), ProbePassed(published(4)))
    assert effects == (Probe(published(4)), OpenGate(), Report(), Fetch(published(5)))
    assert state.serving == published(4)
    assert state.order == (1, 2), "the order that version 4 was served under, not the newest"


# ------------------------------------------------------------------------------------------------------------ orders


def test_a_replayed_or_lower_order_changes_nothing() -> None:
    state = serving(3, generation=5)
    for event in (ordered(3, 5), ordered(9, 5), ordered(9, 4)):
        assert step(state, event, 0.0) == (state, ())


def test_a_higher_term_counts_whatever_its_generation() -> None:
    state, effects = run(serving(3, generation=5), ordered(4, generation=1, term=2))
    assert effects == (Fetch(published(4)),)
    assert run(state, ordered(9, generation=6, term=1)) == (state, ())


def test_a_higher_order_may_name_a_lower_version() -> None:
    state, effects = run(serving(3), ordered(2, 2), *swap_events(2))
    assert effects[0] == Fetch(published(2))
    assert state.serving == published(2)


def test_a_new_order_for_the_served_version_is_reported_without_a_swap() -> None:
    state, effects = run(serving(3), ordered(3, 2))
    assert effects == (Report(),)
    assert state.order == (1, 2)
    assert is_converged(state)


def test_the_same_version_number_of_another_epoch_is_another_version() -> None:
    desired = DesiredVersion(term=1, generation=2, published=published(3, epoch=2))
    state, effects = run(serving(3), DesiredSeen(desired))
    assert effects == (Fetch(published(3, epoch=2)),)
    assert not is_converged(state)


# ----------------------------------------------------------------------------------------------------------- fetches


def test_there_is_one_fetch_at_a_time_and_a_newer_order_supersedes_it_when_it_returns() -> None:
    state, effects = run(serving(3), ordered(4, 2), ordered(5, 3), Tick())
    assert effects == (Fetch(published(4)),)
    state, effects = run(state, Fetched(published(4)))
    assert effects == (Fetch(published(5)),)
    assert state.swap is Swap.NONE
    assert run(state, Fetched(published(5)))[1] == (ShutGate(), Report())


def test_a_failed_fetch_is_tried_again_with_a_growing_delay() -> None:
    state, _ = run(serving(3), ordered(4, 2))
    now, delays = 0.0, []
    for _ in range(7):
        state, effects = step(state, FetchFailed(published(4), "timed out", corrupt=False), now)
        assert effects == ()
        failed_at = now
        while not effects:
            now += 0.5
            state, effects = step(state, Tick(), now)
        assert effects == (Fetch(published(4)),)
        delays.append(now - failed_at)
    assert delays == [1, 2, 4, 8, 16, FETCH_BACKOFF_MAX_SECONDS, FETCH_BACKOFF_MAX_SECONDS]
    assert state.unreadable is None  # a store that cannot be reached is not a damaged one
    state, _ = run(state, Fetched(published(4)), now=now)
    assert state.fetch_failures == 0


def test_corrupt_bytes_are_told_until_the_next_try_and_never_applied() -> None:
    state, _ = run(serving(3), ordered(4, 2))
    state, effects = run(state, FetchFailed(published(4), "sha256 differs", corrupt=True))
    assert effects == ()
    assert state.unreadable == published(4)
    assert state.swap is Swap.NONE
    state, effects = run(state, CoordinatorBeat(2), Tick(), now=FETCH_BACKOFF_MAX_SECONDS)
    assert (effects, state.unreadable) == ((Fetch(published(4)),), None)


def test_a_fetch_that_never_returns_is_given_up_at_its_deadline() -> None:
    state, _ = run(serving(3), ordered(4, 2))
    assert run(state, Tick(), now=599.9)[1] == ()
    state, _ = run(state, CoordinatorBeat(2), Tick(), now=600.0)
    assert state.fetching is None
    state, effects = run(state, Tick(), now=601.0)
    assert effects == (Fetch(published(4)),)


def test_the_result_of_an_order_taken_back_is_not_applied() -> None:
    state, _ = run(serving(3), ordered(4, 2), ordered(3, 3))
    state, effects = run(state, Fetched(published(4)), Tick())
    assert effects == ()
    assert state.serving == published(3)


# ------------------------------------------------------------------------------------------------------------ poison


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ((GateStuck("3 requests left"),), "the gate could not be shut: 3 requests left"),
        ((GateShut(), ApplyFailed(published(4), "shape")), "version 4 could not be loaded: shape"),
        (
            (GateShut(), Applied(published(4)), ProbeFailed(published(4), "off by 0.3")),
            "the engine does not hold version 4: off by 0.3",
        ),
    ],
)
def test_what_fails_behind_the_gate_poisons_the_engine_for_good(events: tuple[Event, ...], reason: str) -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)))
    state, effects = run(state, *events)
    assert effects[-1] == Poison(reason)
    assert OpenGate() not in effects
    assert state.poisoned == reason
    for event in (Tick(), ordered(5, 3), ProbePassed(published(4)), DrainRequested()):
        assert step(state, event, 1e9) == (state, ())


@pytest.mark.parametrize(
    ("events", "deadline", "reason"),
    [
        ((), 60.0, "version 4: shutting took too long"),
        ((GateShut(),), 500.0, "version 4: applying took too long"),
        ((GateShut(), Applied(published(4))), 120.0, "version 4: probing took too long"),
    ],
)
def test_each_stage_of_a_swap_has_its_deadline(events: tuple[Event, ...], deadline: float, reason: str) -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), *events)
    assert step(state, Tick(), deadline - 0.1) == (state, ())
    _, effects = step(state, Tick(), deadline)
    assert effects == (Poison(reason),)


# ---------------------------------------------------------------------------------------------------------- degraded


def test_without_a_coordinators_beat_it_follows_published_after_the_timeout() -> None:
    state, effects = run(serving(3), PublishedSeen(published(4)), Tick(), now=29.9)
    assert effects == ()
    state, effects = run(state, Tick(), now=30.0)
    assert effects == (Fetch(published(4)),)
    assert state.degraded
    state, _ = run(state, *swap_events(4), now=31.0)
    assert state.serving == published(4)
    assert state.order is None


def test_a_worker_that_never_heard_a_coordinator_counts_from_its_start() -> None:
    state, effects = run(new_state(SETTINGS, 100.0), PublishedSeen(published(4)), Tick(), now=129.9)
    assert effects == ()
    assert run(state, Tick(), now=130.0)[1] == (Fetch(published(4)),)


def test_a_beat_counts_only_when_it_rose() -> None:
    state, _ = run(serving(3), PublishedSeen(published(4)))
    state, effects = run(state, CoordinatorBeat(1), Tick(), now=30.0)
    assert effects == (Fetch(published(4)),)
    alive, _ = run(serving(3), PublishedSeen(published(4)), CoordinatorBeat(2), now=20.0)
    assert run(alive, Tick(), now=49.9)[1] == ()


def test_a_quarantined_version_is_skipped_while_degraded() -> None:
    state, _ = run(serving(3), ordered(3, 2, quarantined=(4,)), PublishedSeen(published(4)))
    assert run(state, Tick(), now=100.0)[1] == ()
    state, effects = run(state, PublishedSeen(published(5)), now=100.0)
    assert effects == (Fetch(published(5)),)


def test_a_published_version_older_than_the_order_is_not_followed() -> None:
    state, _ = run(serving(3), PublishedSeen(published(2)))
    assert run(state, Tick(), now=100.0)[1] == ()
    assert run(state, PublishedSeen(published(1)), now=100.0)[1] == ()


def test_a_coordinator_that_returns_is_followed_by_its_new_order() -> None:
    state, _ = run(serving(3), PublishedSeen(published(4)), Tick(), *swap_events(4), now=30.0)
    state, effects = run(state, CoordinatorBeat(2), ordered(4, 1, term=2), now=40.0)
    assert effects[-1] == Report()
    assert state.serving == published(4)
    assert state.order == (2, 1)
    assert not state.degraded


def test_a_beat_alone_does_not_send_a_degraded_worker_back_to_the_old_order() -> None:
    """The coordinator that returned has not had time to order yet; the old order is older than what is served."""
    state, _ = run(serving(3), PublishedSeen(published(4)), Tick(), *swap_events(4), now=30.0)
    state, effects = run(state, CoordinatorBeat(2), Tick(), now=40.0)
    assert effects == ()
    state, effects = run(state, ordered(3, 2, quarantined=(4,)), now=41.0)
    assert effects == (Fetch(published(3)),), "a new order counts, a lower version too"


# ------------------------------------------------------------------------------------------------------------- drain


def test_a_draining_worker_starts_no_swap() -> None:
    state, effects = run(serving(3), DrainRequested(), ordered(4, 2), Tick())
    assert effects == (Report(),)
    assert state.serving == published(3)


def test_a_swap_under_way_is_ended_while_draining() -> None:
    state, _ = run(serving(3), ordered(4, 2), Fetched(published(4)), DrainRequested())
    state, effects = run(state, GateShut(), Applied(published(4)), ProbePassed(published(4)), ordered(5, 3))
    assert effects == (Apply(published(4)), Probe(published(4)), OpenGate(), Report())


def test_any_event_may_come_at_any_time_without_a_second_swap_or_fetch() -> None:
    """All orders of a small alphabet: at most one ShutGate without OpenGate, one Fetch without a result."""
    alphabet: tuple[Callable[[], Event], ...] = (
        lambda: ordered(4, 2),
        lambda: ordered(2, 3),
        lambda: Fetched(published(4)),
        lambda: Fetched(published(2)),
        GateShut,
        lambda: Applied(published(4)),
        lambda: ProbePassed(published(4)),
    )
    frontier: list[tuple[WorkerState, bool]] = [(serving(3), False)]
    for _ in range(6):
        following: list[tuple[WorkerState, bool]] = []
        for state, is_shut in frontier:
            for make in alphabet:
                event = make()
                after, effects = step(state, event, 0.0)
                if after == state:
                    continue
                shut = is_shut
                for effect in effects:
                    if effect == ShutGate():
                        assert not shut
                        shut = True
                    if effect == OpenGate():
                        assert shut
                        shut = False
                    if isinstance(effect, Apply | Probe):
                        assert shut
                    if isinstance(effect, Fetch):
                        assert state.fetching is None or isinstance(event, Fetched)
                following.append((after, shut))
        frontier = list({(repr(state), shut): (state, shut) for state, shut in following}.values())
    assert any(state.serving != published(3) for state, _ in frontier), "no history got through a swap"
