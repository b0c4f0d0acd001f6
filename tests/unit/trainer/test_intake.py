"""What the trainer makes of trajectories that an earlier attempt left on the stream: each token is counted once."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
from tests.e2e.running import job

from rljob_api.messages import Outcome, Task, TrajectoryHeader
from rljob_api.spec import Staleness
from rljob_api.validate import parse_job
from rljob_protocol import admission
from rljob_runtime.trainer.intake import NOTHING, Intake, IntakeTotals, Taken
from rljob_runtime.trajectory_codec import Trajectory, encode_trajectory

SPEC = parse_job(job(sampling__samplesPerTask=2, training__tasksPerStep=1, staleness__maxVersions=1)).spec
TOKENS = 5


class FakeTasks:
    def __init__(self) -> None:
        self.published: list[tuple[int, int]] = []
        self.withdrawn_from: int | None = None

    async def publish(self, task: Task) -> bool:
        self.published.append((task.task, task.sample))
        return True

    async def withdraw(self, first_task: int) -> int:
        self.withdrawn_from = first_task
        return 0


class FakeLog:
    """The stream: message n has sequence n + 1."""

    def __init__(self, *trajectories: Trajectory) -> None:
        self.messages = [encode_trajectory(trajectory) for trajectory in trajectories]

    async def last_sequence(self) -> int:
        return len(self.messages)

    async def read(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        for sequence, data in enumerate(self.messages[after:], start=after + 1):
            yield sequence, data


def finished(task: int, sample: int, version: int) -> Trajectory:
    header = TrajectoryHeader(
        task=task,
        sample=sample,
        attempt=1,
        epoch=1,
        worker="main-0",
        incarnation="a",
        outcome=Outcome.FINISHED,
        turn_rewards=(1.0,),
        reward=1.0,
    )
    turn = np.array([-1, *[0] * TOKENS], np.int32)
    return Trajectory(
        header=header,
        tokens=np.arange(TOKENS + 1, dtype=np.int32),
        turn=turn,
        weight_version=np.where(turn >= 0, version, -1).astype(np.int32),
        behavior_logprobs=np.where(turn >= 0, -1.0, 0.0).astype(np.float32),
    )


def resumed(log: FakeLog, version: int, totals: IntakeTotals = NOTHING, cursor: int = 0) -> tuple[Intake, FakeTasks]:
    """The intake of an attempt that goes on from the checkpoint of step 0 and publishes it as `version`."""
    tasks: Any = FakeTasks()
    stream: Any = log
    intake = Intake(
        spec=SPEC,
        epoch=2,
        ledger=admission.on_resume(admission.new_ledger(), version),
        cursor=cursor,
        totals=totals,
        tasks=tasks,
        log=stream,
        logger=logging.getLogger("test"),
    )
    return intake, tasks


def accounted(totals: IntakeTotals) -> tuple[int, int, dict[str, int]]:
    return sum(totals.received.values()), totals.pending, {name: n for name, n in totals.dropped.items() if n}


async def test_what_a_dead_attempt_finished_counts_where_it_is_fresh_enough_and_is_else_rolled_out_anew() -> None:
    # Task 0 is for step 0, task 1 for step 1: by then versions 0 to 2, rolled back to step 0, count as 2 steps old.
    log = FakeLog(finished(0, 0, 0), finished(1, 0, 1), finished(1, 1, 2), finished(9, 0, 2))
    intake, tasks = resumed(log, version=3)
    await intake.recover()
    await intake._admit()
    assert tasks.withdrawn_from == 0
    assert tasks.published == [(0, 1), (1, 0), (1, 1)]
    totals = await intake.totals()
    assert accounted(totals) == (4 * TOKENS, 2 * TOKENS, {"RolledBack": 2 * TOKENS})
    assert totals.rolled_back == (2, 3)


async def test_waiting_tokens_are_counted_by_version_as_long_as_they_may_train_in_the_coming_step() -> None:
    # A resume as version 3 of step 0: versions 0 to 2 and 3 itself are one step old when 4 comes, two when 5 does.
    intake, _ = resumed(FakeLog(finished(0, 0, 0), finished(0, 1, 2), finished(1, 0, 3)), version=3)
    await intake.recover()
    all_three = {0: TOKENS, 2: TOKENS, 3: TOKENS}
    assert await intake.waiting_tokens(3) == all_three
    assert await intake.waiting_tokens(4) == all_three
    await intake.step_trained(4)
    assert await intake.waiting_tokens(4) == all_three
    assert await intake.waiting_tokens(5) == {}
    await intake.use(Staleness(max_versions=2))
    assert await intake.waiting_tokens(5) == all_three


async def test_a_sample_that_was_rolled_back_before_the_checkpoint_is_not_counted_again_after_another_death() -> None:
    log = FakeLog(finished(0, 0, 0), finished(1, 0, 1), finished(9, 0, 2))
    first, _ = resumed(log, version=3)
    await first.recover()
    await first._admit()
    _, cursor = await first.snapshot()
    totals = await first.totals()
    assert (cursor, totals.rolled_back) == (0, (2,))

    log.messages.append(encode_trajectory(finished(1, 0, 3)))  # rolled out anew, then the trainer died again
    second, tasks = resumed(log, version=4, totals=replace(totals, pending=0, last_sequence=0), cursor=cursor)
    await second.recover()
    await second._admit()
    totals = await second.totals()
    # Its second message is too old by now as well; its first one was dropped for good, and both are counted once.
    received, pending, dropped = accounted(totals)
    assert received == 4 * TOKENS == pending + sum(dropped.values())
    assert dropped == {"RolledBack": 2 * TOKENS}
    assert totals.rolled_back == (2, 4)
    assert (1, 0) in tasks.published


async def test_of_two_messages_of_one_sample_the_later_counts_and_the_first_is_dropped_once() -> None:
    intake, tasks = resumed(FakeLog(finished(0, 1, 0), finished(0, 1, 2)), version=3)
    await intake.recover()
    await intake._admit()
    assert accounted(await intake.totals()) == (2 * TOKENS, TOKENS, {"RolledBack": TOKENS})
    assert (0, 1) not in tasks.published


async def test_a_bound_that_changes_while_the_job_runs_counts_for_admission_and_from_the_next_batch_on() -> None:
    log = FakeLog(*(finished(task, sample, 3) for task in (0, 1) for sample in (0, 1)))
    intake, tasks = resumed(log, version=3)
    await intake.recover()
    await intake._admit()
    assert tasks.published == [], "two groups are admitted under a bound of 1, and both are finished"
    await intake.use(Staleness(max_versions=3))
    await intake._admit()
    assert {task for task, _ in tasks.published} == {2, 3}
    first = await intake.next_batch(0.0)
    await intake.step_trained(4)
    await intake.use(Staleness(max_versions=0))
    second = await intake.next_batch(0.0)
    assert first is not None and second is not None
    assert (first.max_versions, second.max_versions) == (3, 0)
    assert second.staleness == {3: 1}, "over the new bound: the batch masks its tokens"


async def test_a_malformed_trajectory_is_passed_over_and_the_next_one_is_read() -> None:
    log = FakeLog(finished(0, 0, 0), finished(0, 1, 0))
    log.messages.insert(1, b"no trajectory")
    intake, _ = resumed(log, version=3)
    await intake.recover()
    await intake._admit()
    totals = await intake.totals()
    assert (totals.last_sequence, totals.pending) == (3, 2 * TOKENS)


async def test_a_batch_that_may_not_train_yet_stays_in_the_ledger_and_the_next_answer_lets_it_go() -> None:
    """Else a stop while a step waits for old log-probabilities would lose its groups: the checkpoint passes them."""
    log = FakeLog(finished(0, 0, 3), finished(0, 1, 3))
    tasks: Any = FakeTasks()
    stream: Any = log
    asked: list[Taken] = []
    intake = Intake(
        spec=SPEC,
        epoch=2,
        ledger=admission.on_resume(admission.new_ledger(), 3),
        cursor=0,
        totals=NOTHING,
        tasks=tasks,
        log=stream,
        logger=logging.getLogger("test"),
        may_train=lambda taken: asked.append(taken) or len(asked) > 2,  # type: ignore[func-returns-value]
    )
    await intake.recover()
    await intake._admit()
    before = await intake.snapshot()
    assert await intake.next_batch(0.0) is None
    assert await intake.next_batch(0.0) is None
    assert await intake.snapshot() == before
    assert (await intake.totals()).pending == 2 * TOKENS
    taken = await intake.next_batch(0.0)
    assert taken is not None
    assert taken.sequences == {(0, 0): 1, (0, 1): 2}
    assert [look.sequences for look in asked] == [taken.sequences] * 3
    assert (await intake.totals()).pending == 0
    assert await intake.snapshot() != before
