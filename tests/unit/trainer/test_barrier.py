"""The barrier before an update: who is awaited, when it is over, and what is written for the workers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rljob_api.errors import Fenced
from rljob_api.messages import Barrier, BarrierReport, BarrierState, WorkerPhase, WorkerState
from rljob_api.names import KEY_BARRIER, JobNames
from rljob_protocol.link import Versioned
from rljob_runtime.trainer.barrier import LIVENESS_SECONDS, BarrierKeeper, Watch, begin, judge, observe

EPOCH, VERSION, TIMEOUT = 2, 7, 60.0
SERVING, SWAPPING = WorkerPhase.SERVING, WorkerPhase.SWAPPING


def worker(
    name: str, barrier: tuple[int, int] | None = None, phase: WorkerPhase = SERVING, **fields: Any
) -> WorkerState:
    return WorkerState(worker=name, pool="main", incarnation="a", phase=phase, barrier=barrier, **fields)


def watch(*states: WorkerState, at: float = 100.0) -> Watch:
    """A barrier that began at 100, and workers that were seen then."""
    return observe(begin(None, epoch=EPOCH, version=VERSION, timeout_seconds=TIMEOUT, now=100.0), states, at)


KEEPS = (EPOCH, VERSION)
TABLE = {
    "all keep it": ([worker("a", KEEPS), worker("b", KEEPS)], 0.0, ("a", "b"), (), True),
    "one does not yet": ([worker("a", KEEPS), worker("b")], 0.0, ("a", "b"), ("b",), False),
    "one keeps the barrier before": ([worker("a", (EPOCH, VERSION - 1))], 0.0, ("a",), ("a",), False),
    "one keeps that of the trainer before": ([worker("a", (EPOCH - 1, VERSION))], 0.0, ("a",), ("a",), False),
    "one is between two versions": ([worker("a", None, SWAPPING)], 0.0, ("a",), ("a",), False),
    "one holds still, and has not handed over": ([worker("a", None, WorkerPhase.HELD)], 0.0, ("a",), ("a",), False),
    "one holds still for it": ([worker("a", KEEPS, WorkerPhase.HELD)], 0.0, ("a",), (), True),
    "nobody generates": ([], 0.0, (), (), True),
    "those that start, drain, or are about to end make nothing": (
        [
            worker(phase.value, None, phase)
            for phase in (WorkerPhase.STARTING, WorkerPhase.POISONED, WorkerPhase.DRAINING, WorkerPhase.STOPPED)
        ],
        0.0,
        (),
        (),
        True,
    ),
    "the time is not up": ([worker("a")], TIMEOUT - 0.01, ("a",), ("a",), False),
}


@pytest.mark.parametrize(("states", "after", "awaited", "missing", "is_over"), TABLE.values(), ids=TABLE)
def test_the_trainer_goes_on_when_every_live_worker_that_generates_keeps_the_barrier(
    states: list[WorkerState], after: float, awaited: tuple[str, ...], missing: tuple[str, ...], is_over: bool
) -> None:
    # Nobody dies in this table: each state was new a moment ago.
    found = judge(watch(*states, at=100.0 + after), 100.0 + after)
    assert (found.awaited, found.missing, found.is_over) == (awaited, missing, is_over)


def test_at_the_timeout_it_goes_on_and_names_who_is_missing() -> None:
    began = watch(worker("a", KEEPS), worker("b", revision=1))
    later = observe(began, (worker("a", KEEPS, revision=1), worker("b", revision=2)), 100.0 + TIMEOUT)
    found = judge(later, 100.0 + TIMEOUT)
    assert (found.is_over, found.awaited, found.missing) == (True, ("a", "b"), ("b",))


def test_a_worker_whose_revision_stands_still_is_dead_by_the_readers_clock_and_one_that_rises_is_not() -> None:
    began = watch(worker("a", revision=5), worker("b", revision=5))
    last = 100.0 + LIVENESS_SECONDS
    later = observe(began, (worker("a", revision=5), worker("b", revision=6)), last - 1)
    assert judge(later, last - 0.01).missing == ("a", "b")
    assert judge(later, last).missing == ("b",)


def test_another_incarnation_of_a_worker_is_news_whatever_its_revision() -> None:
    began = watch(worker("a", revision=50))
    restarted = worker("a", revision=1).model_copy(update={"incarnation": "b"})
    last = 100.0 + LIVENESS_SECONDS
    assert judge(observe(began, (restarted,), last - 1), last).missing == ("a",)


def test_a_worker_that_was_dead_at_the_barrier_before_is_not_waited_for_again() -> None:
    first = watch(worker("a", revision=5))
    now = 100.0 + LIVENESS_SECONDS
    second = begin(first, epoch=EPOCH, version=VERSION + 1, timeout_seconds=TIMEOUT, now=now)
    assert not judge(second, now).is_over, "nobody was looked at yet"
    found = judge(observe(second, (worker("a", revision=5),), now), now)
    assert (found.is_over, found.awaited) == (True, ())
    gone = judge(observe(first, (), 101.0), 101.0)
    assert (gone.is_over, gone.awaited) == (True, ()), "its key is not there any more"


def test_streams_are_read_up_to_what_any_worker_says_is_on_them() -> None:
    found = judge(
        watch(
            worker("a", KEEPS, segments_sequence=9, trajectories_sequence=4),
            worker("b", None, WorkerPhase.STOPPED, segments_sequence=3, trajectories_sequence=11),
        ),
        100.0,
    )
    assert (found.segments_sequence, found.trajectories_sequence) == (9, 11)


# ------------------------------------------------------------------------------------------------------- the keeper


class FakeLink:
    """One control key, and worker states: one answer a look, the last one for ever."""

    names = JobNames("test")

    def __init__(self, *answers: tuple[WorkerState, ...], held: Barrier | None = None) -> None:
        self.answers = list(answers)
        self.held = None if held is None else Versioned(held, 5)
        self.written: list[tuple[int, BarrierState]] = []
        self.loses_answer = False
        self.hints: list[str] = []

    async def read(self, key: str, kind: type[Any]) -> Versioned[Barrier] | None:
        assert key == KEY_BARRIER
        return self.held

    async def write(self, key: str, value: Barrier, *, expected_revision: int | None) -> int:
        if expected_revision != (None if self.held is None else self.held.revision):
            raise Fenced("another writer")
        self.held = Versioned(value, 1 + (expected_revision or 0))
        self.written.append((value.version, value.state))
        if self.loses_answer:
            raise Fenced("the retry met its own write")
        return self.held.revision

    async def hint(self, subject: str) -> None:
        self.hints.append(subject)

    async def live_workers(self) -> tuple[WorkerState, ...]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def keeper(link: Any, read: list[tuple[int, int]] | None = None, timeout_seconds: float = TIMEOUT) -> BarrierKeeper:
    async def read_up_to(trajectory: int, segment: int, seconds: float) -> bool:
        if read is not None:
            read.append((trajectory, segment))
        return True

    return BarrierKeeper(
        link=link,
        epoch=EPOCH,
        timeout_seconds=timeout_seconds,
        read_up_to=read_up_to,
        logger=logging.getLogger("test"),
    )


async def test_a_barrier_is_announced_kept_read_and_released_in_that_order() -> None:
    link = FakeLink((worker("a"),), (worker("a", KEEPS, revision=1, segments_sequence=3, trajectories_sequence=2),))
    read: list[tuple[int, int]] = []
    barrier = keeper(link, read)
    await barrier.recover()
    assert link.written == []
    await barrier.quiesce(VERSION)
    assert link.written == [(VERSION, BarrierState.QUIESCE)]
    assert not await barrier.is_over(0.0)
    assert barrier.report is None and read == []
    assert await barrier.is_over(5.0)
    assert read == [(2, 3)]
    report = barrier.report
    assert isinstance(report, BarrierReport) and (report.workers, report.missing) == (1, 0)
    await barrier.release()
    await barrier.release()
    assert link.hints == [link.names.barrier_hint] * 2
    assert link.written == [(VERSION, BarrierState.QUIESCE), (VERSION, BarrierState.RELEASED)]


async def test_missing_workers_are_counted_when_the_time_is_up_or_the_trainer_is_to_stop() -> None:
    for timeout, give_up in ((0.0, False), (TIMEOUT, True)):
        barrier = keeper(FakeLink((worker("a", KEEPS), worker("b"))), timeout_seconds=timeout)
        await barrier.quiesce(VERSION)
        assert await barrier.is_over(0.0, give_up=give_up)
        assert barrier.report is not None and (barrier.report.workers, barrier.report.missing) == (2, 1)


async def test_a_trainer_that_starts_releases_what_one_that_died_left_shut() -> None:
    left = Barrier(epoch=1, version=4, state=BarrierState.QUIESCE)
    link = FakeLink((), held=left)
    barrier = keeper(link)
    await barrier.recover()
    assert link.held is not None
    assert link.held.value == left.model_copy(update={"state": BarrierState.RELEASED})
    await barrier.quiesce(VERSION)
    assert link.held.value == Barrier(epoch=EPOCH, version=VERSION, state=BarrierState.QUIESCE)


async def test_a_newer_trainers_barrier_ends_this_one_and_a_lost_answer_does_not() -> None:
    link = FakeLink(())
    barrier = keeper(link)
    link.loses_answer = True
    await barrier.quiesce(VERSION)
    link.loses_answer = False
    await barrier.release()
    link.held = Versioned(Barrier(epoch=EPOCH + 1, version=9, state=BarrierState.QUIESCE), 99)
    with pytest.raises(Fenced):
        await barrier.quiesce(VERSION + 1)
