"""Rank 0's intake of what can be scored ahead of a step: segments and old-policy workers' values, into the score pool.

Lives on the background loop, as the intake does; the main thread reaches it through `Background.call` only.

    produces    rows to score, values for batches
    consumes    the segment stream, the score stream
    waits for   messages
    unblocked by  a message
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rljob_api.correction import OldLogprobs
from rljob_api.errors import MalformedMessage
from rljob_api.spec import RLJobSpec
from rljob_protocol.ahead import ScoreLog, SegmentLog
from rljob_protocol.link import Link
from rljob_runtime.correction.score_pool import Key, ScorePool, Wanted
from rljob_runtime.correction.sources import Known
from rljob_runtime.score_codec import Scores, decode_scores
from rljob_runtime.segment_codec import decode_segment
from rljob_runtime.trajectory_codec import Trajectory

POOL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TakenAhead:
    """What the pool had of a trajectory when its batch was taken."""

    known: Known
    in_time: NDArray[np.bool_]
    """[T], tokens that arrived while their version was resident."""


class Ahead:
    """The pool and the streams that feed it."""

    def __init__(
        self, *, pool: ScorePool, segments: SegmentLog | None, scores: ScoreLog | None, logger: logging.Logger
    ) -> None:
        self.pool = pool
        self._segments = segments
        self._scores = scores
        self._logger = logger
        self.last_segment = 0
        """Sequence on the segment stream up to which everything was read."""
        self.on_scores: Callable[[int, Scores], None] = lambda _place, _scores: None
        """Told of each score message and its sequence, also of one that the pool does not take."""

    @classmethod
    def of(cls, spec: RLJobSpec, link: Link, logger: logging.Logger) -> Ahead | None:
        """What the job's route needs; None where nothing is ever scored ahead."""
        route = spec.correction.old_logprobs
        is_eager = spec.correction.eager.enabled and route is OldLogprobs.SNAPSHOT
        segments = SegmentLog(link) if is_eager or route is OldLogprobs.INTERRUPTION else None
        scores = ScoreLog(link) if route is OldLogprobs.DEDICATED else None
        if segments is None and scores is None:
            return None
        return cls(pool=ScorePool(POOL_BYTES), segments=segments, scores=scores, logger=logger)

    async def run(self, is_open: Callable[[int], bool], notify: Callable[[], Awaitable[None]]) -> None:
        """Take in until cancelled.

        Both streams are read from their beginning: after a resume the pool is empty, and trajectories that are under way
        began before it.

        Args:
            is_open: whether a task may still be trained; anything about another one is passed over.
            notify: awaited after each message.
        """
        async with asyncio.TaskGroup() as tasks:
            if self._segments is not None:
                tasks.create_task(self._read_segments(self._segments, is_open, notify))
            if self._scores is not None:
                tasks.create_task(self._read_scores(self._scores, is_open, notify))

    async def _read_segments(
        self, log: SegmentLog, is_open: Callable[[int], bool], notify: Callable[[], Awaitable[None]]
    ) -> None:
        async for sequence, data in log.read(0):
            try:
                segment = decode_segment(data)
            except MalformedMessage as error:
                self._logger.warning("segment refused", extra={"sequence": sequence, "error": str(error)})
            else:
                if is_open(segment.header.task):
                    self.pool.extend(segment)
            self.last_segment = sequence
            await notify()

    async def _read_scores(
        self, log: ScoreLog, is_open: Callable[[int], bool], notify: Callable[[], Awaitable[None]]
    ) -> None:
        async for sequence, data in log.read(0):
            try:
                scores = decode_scores(data)
            except MalformedMessage as error:
                self._logger.warning("scores refused", extra={"sequence": sequence, "error": str(error)})
            else:
                if is_open(scores.header.task):
                    self.pool.accept(scores)
                self.on_scores(sequence, scores)
            await notify()

    def take(self, trajectories: Iterable[Trajectory]) -> dict[Key, TakenAhead]:
        """What is known of a batch's trajectories."""
        return {
            (trajectory.header.task, trajectory.header.sample): TakenAhead(
                self.pool.known(trajectory), self.pool.in_time(trajectory)
            )
            for trajectory in trajectories
        }

    def rows(
        self, resident: int, stored: Collection[int], token_budget: int, *, without: Collection[int]
    ) -> list[Wanted]:
        """Rows of one version to score in idle time: of the resident one while there are any, then of a stored one.

        `without` are tasks of the coming batch: it trains their resident tokens at staleness 0, where values cost nothing.
        """
        rows = self.pool.wanted(resident, token_budget, without=without)
        if rows:
            return rows
        versions = self.pool.versions_wanted([version for version in stored if version != resident])
        return self.pool.wanted(versions[0], token_budget) if versions else []

    # For the main thread, through `Background.call`.

    async def hold(self, version: int | None) -> None:
        """The version that the trainer holds from now on; None when an update begins."""
        self.pool.resident = version

    async def unscored(self, version: int) -> list[Wanted]:
        """Everything of a version that has no value."""
        return self.pool.wanted(version)

    async def store(self, rows: Sequence[Wanted], logprobs: Sequence[NDArray[np.float32]]) -> None:
        """Values of rows."""
        for row, values in zip(rows, logprobs, strict=True):
            self.pool.store(row, values)

    async def totals(self) -> tuple[Counter[str], int]:
        """(tokens discarded by reason, bytes kept)."""
        return self.pool.discarded.copy(), self.pool.num_bytes
