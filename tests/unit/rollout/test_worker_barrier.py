"""The interruption route's barrier, and streamed prefixes, in a worker over fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.messaging import FakeLink
from tests.fakes.rollout_rig import Rig, is_conserved, job, sample, until

from rljob_api.messages import Barrier, BarrierState, PublishedVersion, TrainerPhase, TrainerState, WorkerPhase
from rljob_api.names import KEY_BARRIER, KEY_PUBLISHED, KEY_TRAINER, JobNames
from rljob_protocol.worker_events import BarrierSeen, Event, PublishedSeen
from rljob_runtime.rollout.followers import Followers
from rljob_runtime.rollout.worker import EXIT_RESTART, EXIT_STOPPED

Make = Callable[..., Rig]


def put_barrier(rig: Rig, version: int, state: BarrierState = BarrierState.QUIESCE) -> None:
    rig.link.put(KEY_BARRIER, Barrier(epoch=1, version=version, state=state))


def tokens_with_the_trainer(rig: Rig) -> dict[tuple[int, int], int]:
    """Version of each model token by (task, position), on the streams up to what the last state names."""
    known: dict[tuple[int, int], int] = {}
    for segment in rig.segments.segments[: rig.last.segments_sequence]:
        for offset, version in enumerate(segment.weight_version.tolist()):
            if version >= 0:
                known[segment.header.task, segment.header.start + offset] = version
    for trajectory in rig.log.trajectories[: rig.last.trajectories_sequence]:
        for position, version in enumerate(trajectory.weight_version.tolist()):
            if version >= 0:
                known[trajectory.header.task, position] = version
    return known


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Rig] = []

    def build(route: str = "Interruption", *, correction: dict[str, Any] | None = None, **changes: Any) -> Rig:
        made.append(Rig(tmp_path, job(correction={"oldLogprobs": route, **(correction or {})}, **changes)))
        return made[-1]

    yield build
    for rig in made:
        if rig.exit is not None and not rig.exit.done():
            await rig.stop()


async def at_barrier(rig: Rig, tokens: int = 9) -> None:
    """Four trajectories under version 0, interrupted after `tokens` model tokens by the barrier, acknowledged."""
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(4)))
    rig.engine.stop_at(tokens)
    rig.start()
    await rig.engine.held.wait()
    put_barrier(rig, 0)
    await until(lambda: rig.last.barrier == (1, 0))


async def test_a_barrier_stops_generation_and_is_acknowledged_with_every_token_on_a_stream(make: Make) -> None:
    rig = make()
    await at_barrier(rig)
    assert rig.last.phase is WorkerPhase.HELD and rig.last.serving_version == 0
    assert rig.last.message == "holds still for the update of version 0"
    known = tokens_with_the_trainer(rig)
    assert len(known) == rig.last.counters.tokens_generated == 9 and set(known.values()) == {0}
    await asyncio.sleep(0.1)
    assert rig.engine.sampled == 9 and rig.engine.events[-1] == "pause"
    rig.order(1)
    await until(lambda: rig.last.trajectories_sequence == 4)
    later = {key: version for key, version in tokens_with_the_trainer(rig).items() if key not in known}
    assert set(later.values()) == {1}, "no token of version 0 was made after the acknowledgement"
    for trajectory in rig.log.trajectories:
        for position, version in enumerate(trajectory.weight_version.tolist()):
            assert version < 0 or version == known.get((trajectory.header.task, position), 1)
    start = rig.engine.events.index("load:1")
    assert rig.engine.events[start - 1 : start + 3] == ["pause", "load:1", "resume", "score"]
    await until(lambda: rig.last.barrier is None)
    assert await rig.stop() == EXIT_STOPPED
    assert is_conserved(rig.last) and rig.last.counters.tokens_lost == 0
    assert rig.last.counters.interruptions == 1 and len(rig.last.pause_seconds) == 1
    assert rig.last.counters.barrier_seconds >= 0.1


async def test_a_trajectory_on_its_way_to_the_log_is_handed_over_too(make: Make) -> None:
    rig = make()
    store = asyncio.Event()
    append = rig.log.append

    async def blocked(task: int, number: int, data: bytes, *, deadline_seconds: float) -> int:
        await store.wait()
        return await append(task, number, data, deadline_seconds=deadline_seconds)

    rig.log.append = blocked  # type: ignore[method-assign]
    rig.order(0)
    rig.queue.put(sample(0))
    rig.start()
    await until(lambda: rig.engine.sampled == 6)
    put_barrier(rig, 0)
    await until(lambda: rig.last.barrier == (1, 0))
    assert rig.last.trajectories_sequence == 0 and len(tokens_with_the_trainer(rig)) == 6
    store.set()
    await until(lambda: rig.last.trajectories_sequence == 1)


async def test_a_barrier_given_up_lets_every_trajectory_go_on_without_an_interruption(make: Make) -> None:
    rig = make()
    await at_barrier(rig)
    put_barrier(rig, 0, BarrierState.RELEASED)
    await until(lambda: len(rig.queue.acked) == 4)
    await until(lambda: rig.last.phase is WorkerPhase.SERVING)
    assert rig.last.barrier is None
    assert {version for t in rig.log.trajectories for version in t.versions} == {0}
    counters = rig.state.counters
    assert (counters.interruptions, counters.tokens_salvaged, rig.state.pause_seconds) == (0, 0, ())
    assert counters.barrier_seconds > 0
    assert rig.engine.events.count("load:0") == 1 and "load:1" not in rig.engine.events


async def test_a_worker_that_starts_behind_a_barrier_acknowledges_and_generates_nothing_before_the_next_version(
    make: Make,
) -> None:
    rig = make()
    rig.order(0)
    put_barrier(rig, 0)
    rig.queue.put(sample(0))
    rig.start()
    await until(lambda: bool(rig.link.states) and rig.last.barrier == (1, 0))
    await asyncio.sleep(0.1)
    assert rig.engine.sampled == 0 and rig.last.phase is WorkerPhase.STARTING
    rig.order(1)
    await until(lambda: len(rig.queue.acked) == 1)
    assert rig.log.trajectories[0].versions == (1,)


async def test_a_barrier_that_cannot_be_handed_over_for_is_not_acknowledged_until_it_can(make: Make) -> None:
    rig = make()
    rig.order(0)
    rig.queue.put(sample(0))
    rig.engine.stop_at(3)
    rig.start()
    await rig.engine.held.wait()
    rig.segments.loses = 1
    put_barrier(rig, 0)
    await until(lambda: "could not be handed over: the answer was lost" in rig.last.message)
    assert rig.last.barrier is None and rig.engine.sampled == 3
    await until(lambda: rig.last.barrier == (1, 0))
    assert len(tokens_with_the_trainer(rig)) == 3
    assert rig.last.counters.segments_failed == 1


async def test_a_drained_worker_has_handed_over_what_it_began_also_where_no_barrier_is(make: Make) -> None:
    rig = make()
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(4)))
    rig.engine.stop_at(11)
    rig.start()
    await rig.engine.held.wait()
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.counters.tokens_dropped == {"Drained": 11} and is_conserved(rig.last)
    assert len(tokens_with_the_trainer(rig)) == 11


async def test_a_drain_behind_a_barrier_ends_at_once_with_the_barrier_kept(make: Make) -> None:
    rig = make()
    await at_barrier(rig)
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.phase is WorkerPhase.STOPPED and rig.last.barrier == (1, 0)
    assert rig.engine.sampled == 9 and is_conserved(rig.last)
    assert len(tokens_with_the_trainer(rig)) == 9
    assert len(rig.queue.released) == 4


async def test_a_version_that_poisons_the_engine_behind_a_barrier_ends_the_worker_for_a_restart(make: Make) -> None:
    rig = make()
    await at_barrier(rig)
    rig.engine.scores_wrong = True
    rig.order(1)
    assert await rig.ended() == EXIT_RESTART
    assert rig.last.phase is WorkerPhase.POISONED and rig.last.failed_version == 1
    assert rig.last.counters.tokens_dropped == {"EngineFailed": 9} and is_conserved(rig.last)


async def test_a_worker_without_a_sign_of_the_trainer_stops_and_goes_on_when_there_is_one(make: Make) -> None:
    rig = make(correction={"barrierTimeoutSeconds": 0.4})
    rig.order(0)
    rig.engine.token_seconds = 0.01
    rig.queue.redelivers = True
    rig.queue.put(*(sample(n) for n in range(4000)))
    state = TrainerState(epoch=1, beat=1, phase=TrainerPhase.TRAINING, step=0, steps=9, version=0)
    rig.link.live[KEY_TRAINER] = state
    rig.start()
    await until(lambda: bool(rig.link.states) and rig.last.phase is WorkerPhase.HELD)
    assert "nothing was heard of the trainer for" in rig.last.message and rig.last.barrier is None
    sampled = rig.engine.sampled
    await asyncio.sleep(0.6)
    assert rig.engine.sampled == sampled
    rig.link.live[KEY_TRAINER] = state.model_copy(update={"beat": 2})
    await until(lambda: rig.engine.sampled > sampled)


@pytest.mark.parametrize(("route", "follows"), [("Snapshot", False), ("Dedicated", False), ("Interruption", True)])
async def test_only_the_interruption_route_follows_the_barrier(make: Make, route: str, follows: bool) -> None:
    rig = make(route)
    read: list[str] = []
    follow, live = rig.link.follow, rig.link.read_live

    def noting(key: str, kind: type[Any], **options: Any) -> AsyncIterator[Any]:
        read.append(key)
        return follow(key, kind, **options)

    async def noting_live(key: str, kind: type[Any]) -> Any:
        read.append(key)
        return await live(key, kind)

    rig.link.follow, rig.link.read_live = noting, noting_live  # type: ignore[method-assign, assignment]
    put_barrier(rig, 0, BarrierState.RELEASED)
    rig.order(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    assert (KEY_BARRIER in read, KEY_TRAINER in read) == (follows, follows)


@pytest.mark.parametrize(
    ("route", "eager", "streams"),
    [
        ("Snapshot", {"prefixTokens": 2}, True),
        ("Interruption", {"prefixTokens": 2}, True),
        ("Dedicated", {"prefixTokens": 2}, False),
        ("Ewma", {"prefixTokens": 2}, False),
        ("Snapshot", {"prefixTokens": 0}, False),
        ("Snapshot", {"prefixTokens": 2, "enabled": False}, False),
    ],
)
async def test_prefixes_are_streamed_on_the_routes_that_score_ahead_where_they_are_wanted(
    make: Make, route: str, eager: dict[str, Any], streams: bool
) -> None:
    sampling = {"maxTokens": 5, "maxTrajectoryTokens": 64}
    rig = make(route, correction={"eager": eager}, sampling=sampling)
    rig.order(0)
    rig.queue.put(sample(0))
    rig.engine.stop_at(4)  # inside the first turn
    rig.start()
    await rig.engine.held.wait()

    def streamed() -> int:
        return sum(int((segment.turn >= 0).sum()) for segment in rig.segments.segments)

    if streams:
        await until(lambda: streamed() == 4)
    await asyncio.sleep(0.05)
    assert streamed() == (4 if streams else 0)


async def test_a_release_is_never_learnt_before_the_publication_that_it_is_for() -> None:
    link, found = FakeLink(), []
    blob = {"name": "m", "sha256": "0" * 64, "num_bytes": 1}
    published = PublishedVersion(epoch=1, version=4, step=4, manifest=blob, num_bytes=1)  # type: ignore[arg-type]
    link.put(KEY_PUBLISHED, published)
    events: list[Event] = []
    followers = Followers(link, JobNames("u"), events.append)  # type: ignore[arg-type]
    following = asyncio.create_task(followers.barrier())
    try:
        for state in (BarrierState.QUIESCE, BarrierState.RELEASED):
            barrier = Barrier(epoch=1, version=3, state=state)
            link.put(KEY_BARRIER, barrier)
            found.append(BarrierSeen(barrier))
            await until(lambda: events[-1:] == found[-1:])
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert events == [found[0], PublishedSeen(published), found[1]]
