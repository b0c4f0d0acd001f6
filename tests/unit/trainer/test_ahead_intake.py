"""Rank 0 takes in segments and scores beside the trajectories, and a batch comes with what was scored of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from tests.e2e.running import job

from rljob_api.messages import Outcome, ScoreHeader, SegmentHeader, TrajectoryHeader
from rljob_api.validate import parse_job
from rljob_protocol import admission
from rljob_runtime.correction.score_pool import ScorePool, Wanted
from rljob_runtime.correction.sources import Source
from rljob_runtime.score_codec import Scores, encode_scores
from rljob_runtime.segment_codec import OpenSegment, encode_segment
from rljob_runtime.trainer.ahead import Ahead
from rljob_runtime.trainer.batch import build_batch
from rljob_runtime.trainer.eager import ScoreRound, pool_report
from rljob_runtime.trainer.intake import NOTHING, Intake
from rljob_runtime.trajectory_codec import Trajectory, encode_trajectory

SPEC = parse_job(job(sampling__samplesPerTask=2, training__tasksPerStep=1, staleness__maxVersions=2)).spec
LENGTH = 6
BUDGET = 1000


class Tasks:
    async def publish(self, task: Any) -> bool:
        return True

    async def withdraw(self, first_task: int) -> int:
        return 0


class Log:
    """A stream whose messages the test appends; message n has sequence n + 1."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def last_sequence(self) -> int:
        return 0  # nothing is there when the trainer starts

    async def read(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        while True:
            while after < len(self.messages):
                after += 1
                yield after, self.messages[after - 1]
            await asyncio.sleep(0.001)


def versions_of(task: int, sample: int, version: int) -> np.ndarray:
    """A prompt token, then tokens of `version` and, after the third, of the one after it."""
    return np.array([-1, version, version, version, version + 1, version + 1], np.int32)


def tokens_of(task: int, sample: int) -> np.ndarray:
    return np.arange(LENGTH, dtype=np.int32) + 100 * task + 10 * sample


def arrays(task: int, sample: int, version: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    versions = versions_of(task, sample, version)[part]
    turn = np.where(versions >= 0, 0, -1).astype(np.int32)
    return tokens_of(task, sample)[part], turn, versions, np.where(turn >= 0, -1.0, 0.0).astype(np.float32)


def trajectory(task: int, sample: int, version: int) -> Trajectory:
    header = TrajectoryHeader(
        task=task,
        sample=sample,
        attempt=1,
        epoch=1,
        worker="main-0",
        incarnation="a",
        outcome=Outcome.FINISHED,
        turn_rewards=(float(sample),),
        reward=float(sample),
    )
    return Trajectory(header, *arrays(task, sample, version, slice(None)))


def segment(task: int, sample: int, version: int, end: int) -> bytes:
    header = SegmentHeader(task=task, sample=sample, attempt=1, worker="main-0", incarnation="a", start=0)
    return encode_segment(OpenSegment(header, *arrays(task, sample, version, slice(0, end))))


def value(row: Wanted) -> np.ndarray:
    """Values that name their version: -version - position / 100."""
    return (-row.version - np.arange(len(row.tokens)) / 100).astype(np.float32)


class Trainer:
    """Intake and pool on streams in memory, two tasks admitted, version 1 resident."""

    def __init__(self) -> None:
        self.trajectories, self.segments, self.scores = Log(), Log(), Log()
        streams: list[Any] = [self.segments, self.scores, Tasks(), self.trajectories]
        logger = logging.getLogger("test")
        self.pool = ScorePool(1 << 20)
        self.ahead = Ahead(pool=self.pool, segments=streams[0], scores=streams[1], logger=logger)
        self.pool.resident = 1
        self.intake = Intake(
            spec=SPEC,
            epoch=1,
            ledger=admission.on_resume(admission.new_ledger(), 1),
            cursor=0,
            totals=NOTHING,
            tasks=streams[2],
            log=streams[3],
            logger=logger,
            ahead=self.ahead,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Trainer]:
        await self.intake.recover()
        running = asyncio.create_task(self.intake.run())
        try:
            yield self
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def read(self) -> None:
        """Wait until all that is on the two bounded streams was read."""
        assert await self.intake.read_up_to(len(self.trajectories.messages), len(self.segments.messages), 5.0)

    async def score(self, rows: Sequence[Wanted]) -> None:
        await self.ahead.store(rows, [value(row) for row in rows])


async def test_a_batch_comes_with_the_values_that_were_scored_of_it_and_the_pool_forgets_it() -> None:
    async with Trainer().running() as trainer:
        trainer.segments.messages += [segment(0, 0, 1, 4), segment(0, 1, 1, 2)]
        await trainer.read()
        rows = trainer.intake.rows_ahead(1, (), BUDGET)
        assert [row.key for row in rows] == [(0, 0), (0, 1)]
        await trainer.score(rows)
        assert trainer.intake.rows_ahead(1, (), BUDGET) == []
        trainer.pool.resident = None
        trainer.trajectories.messages += [encode_trajectory(trajectory(0, sample, 1)) for sample in (0, 1)]
        taken = await trainer.intake.next_batch(5.0)
        assert taken is not None
        assert trainer.pool.num_bytes == 0
        pool, none = Source.POOL, Source.NONE
        assert taken.ahead[0, 0].known.source.tolist() == [none, pool, pool, pool, none, none]
        assert taken.ahead[0, 1].known.source.tolist() == [none, pool, none, none, none, none]
        assert taken.ahead[0, 0].known.logprobs[1:4].tolist() == np.float32([-1.01, -1.02, -1.03]).tolist()
        assert taken.ahead[0, 1].in_time.tolist() == [False, True, False, False, False, False]

        trainer.segments.messages.append(segment(0, 0, 1, 4))
        await trainer.read()
        assert trainer.pool.num_bytes == 0, "nobody will train that sample again"

        batch = build_batch(
            taken.groups,
            version=3,
            max_versions=2,
            advantage=SPEC.training.advantage,
            known_of=lambda t: taken.ahead[t.header.task, t.header.sample].known,
        )
        report = pool_report(batch, taken.ahead, discarded={"Gap": 3}, num_bytes=0)
        assert (report.stale_tokens, report.pooled_tokens, report.poolable_tokens) == (10, 4, 4)


async def test_groups_of_the_coming_batch_are_left_out_under_the_resident_version_and_not_under_a_stored_one() -> None:
    async with Trainer().running() as trainer:
        # Group 1 is whole, group 0 is not: the batch is not ready, and has group 1's resident tokens for nothing.
        trainer.trajectories.messages += [encode_trajectory(trajectory(1, sample, 1)) for sample in (0, 1)]
        trainer.segments.messages.append(segment(0, 0, 1, 4))
        await trainer.read()
        assert [row.key for row in trainer.intake.rows_ahead(1, (), BUDGET)] == [(0, 0)]
        assert [row.key for row in trainer.intake.rows_ahead(2, (), BUDGET)] == []
        stored = trainer.intake.rows_ahead(2, (1, 2), BUDGET)
        assert [(row.key, row.version) for row in stored] == [((0, 0), 1), ((1, 0), 1), ((1, 1), 1)]
        assert {row.key for row in await trainer.ahead.unscored(1)} == {(0, 0), (1, 0), (1, 1)}


async def test_scores_of_old_policy_workers_come_with_the_batch_whichever_came_first() -> None:
    async with Trainer().running() as trainer:
        for sample in (0, 1):
            header = ScoreHeader(task=0, sample=sample, sequence=1 + sample, worker="o")
            positions, versions = np.array([1, 4], np.int32), np.array([1, 2], np.int32)
            trainer.scores.messages.append(
                encode_scores(Scores(header, positions, versions, np.array([-1.5, -2.5], np.float32)))
            )
        trainer.trajectories.messages.append(encode_trajectory(trajectory(0, 0, 1)))
        await trainer.read()
        await asyncio.sleep(0.05)
        trainer.trajectories.messages.append(encode_trajectory(trajectory(0, 1, 1)))
        taken = await trainer.intake.next_batch(5.0)
        assert taken is not None
        for sample in (0, 1):
            known = taken.ahead[0, sample].known
            assert np.flatnonzero(known.source == Source.DEDICATED).tolist() == [1, 4]
            assert known.logprobs[[1, 4]].tolist() == [-1.5, -2.5]


async def test_broken_messages_and_those_of_finished_tasks_are_passed_over() -> None:
    async with Trainer().running() as trainer:
        trainer.segments.messages += [b"no segment", segment(0, 0, 1, 4)]
        await trainer.read()
        assert [row.key for row in trainer.intake.rows_ahead(1, (), BUDGET)] == [(0, 0)]
        assert await trainer.intake.read_up_to(0, 3, 0.01) is False, "there is no third message"


async def test_after_a_crash_what_was_interrupted_can_be_scored_anew_and_has_no_value_until_then() -> None:
    async with Trainer().running() as first:
        first.segments.messages.append(segment(0, 0, 1, 4))
        await first.read()
        rows = await first.ahead.unscored(1)
        assert len(rows) == 1  # handed over, and the trainer dies before it stores a value
    async with Trainer().running() as second:
        second.segments.messages = first.segments.messages
        second.trajectories.messages += [encode_trajectory(trajectory(0, sample, 1)) for sample in (0, 1)]
        await second.read()
        assert [row.key for row in await second.ahead.unscored(1)] == [(0, 0), (0, 1)]
        taken = await second.intake.next_batch(5.0)
        assert taken is not None
        for ahead in taken.ahead.values():
            assert set(ahead.known.source.tolist()) == {Source.NONE} and not ahead.known.logprobs.any()


async def test_the_wait_for_a_batch_ends_when_there_is_something_to_score() -> None:
    async with Trainer().running() as trainer:
        waiting = asyncio.create_task(
            trainer.intake.next_batch(60.0, lambda: bool(trainer.intake.rows_ahead(1, (), 1)))
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        trainer.segments.messages.append(segment(0, 0, 1, 4))
        async with asyncio.timeout(10):
            assert await waiting is None


def test_a_round_comes_back_as_it_was_also_without_rows() -> None:
    rows = (np.array([3, 1, 2], np.int32), np.array([7, 8], np.int32))
    for chosen in (ScoreRound(5, rows), ScoreRound(5, rows[:1]), ScoreRound(0, ())):
        back = ScoreRound.from_bytes(chosen.to_bytes())
        assert back.version == chosen.version
        assert [row.tolist() for row in back.rows] == [row.tolist() for row in chosen.rows]
