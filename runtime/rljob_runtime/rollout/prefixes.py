"""Sends what unfinished trajectories hold, so that the trainer can score it while the version that made it is resident.

One in-order sequence of messages an attempt: each begins where the one before ended, with all tokens since, observations
too. A message that was not taken is sent again as it was: stored twice it says nothing new, and there is never a gap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rljob_api.errors import DeadlineExceeded, MalformedMessage, RljobError
from rljob_api.messages import SegmentHeader, Task
from rljob_protocol.logs import fields
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.segment_codec import encode_segment

SEND_SECONDS = 5.0
HAND_OVER_SECONDS = 20.0
HAND_OVER_AT_ONCE = 16
PAUSE_AFTER_FAILURE_SECONDS = 1.0


class SegmentLog(Protocol):
    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float) -> int:
        """Store a message; its sequence."""


class _Open:
    """An unfinished trajectory, and what the trainer was sent of it."""

    def __init__(self, header: SegmentHeader, partial: PartialRollout) -> None:
        self.header = header
        self.partial = partial
        self.sent_tokens = 0
        self.sent_model_tokens = 0
        self.tried_tokens: int | None = None
        """End of the message that was not taken, or not surely."""
        self.is_malformed = False
        self.lock = asyncio.Lock()

    @property
    def unsent_model_tokens(self) -> int:
        return 0 if self.is_malformed else self.partial.num_model_tokens - self.sent_model_tokens


class PrefixSender:
    """Follows the open trajectories of a worker.

    Produces: segment messages, each acknowledged by the stream.
    Consumes: partial rollouts, as they grow.
    Waits for: `every_tokens` new model tokens in one of them, or a new version: no more of the old one's will come, and at the
    end of its trajectory it may be too late to score them ahead. With 0 it sends nothing by itself, only at a hand-over.
    Unblocked by: growth; a new version; the server's acknowledgement, or its deadline. Generation never waits for it, and what
    waits to be sent is at most one entry an open trajectory: while the server is slow, messages get longer.
    """

    def __init__(self, log: SegmentLog, tally: Tally, *, worker: str, incarnation: str, every_tokens: int) -> None:
        self._log = log
        self._tally = tally
        self._worker = worker
        self._incarnation = incarnation
        self._every_tokens = every_tokens
        self._open: set[_Open] = set()
        self._due: dict[_Open, None] = {}
        self._is_due = asyncio.Event()
        self._logger = logging.getLogger(__name__)
        self.last_sequence = 0
        """Of the newest message of this worker on the stream."""

    @contextmanager
    def following(self, task: Task, attempt: int, partial: PartialRollout) -> Iterator[None]:
        """The trajectory is unfinished, or not yet on its own stream, until the block ends."""
        header = SegmentHeader(
            task=task.task,
            sample=task.sample,
            attempt=attempt,
            worker=self._worker,
            incarnation=self._incarnation,
            start=0,
        )
        followed = _Open(header, partial)
        self._open.add(followed)
        if self._every_tokens:
            partial.on_growth = lambda: self._grown(followed)
        try:
            yield
        finally:
            partial.on_growth = None
            self._open.discard(followed)
            self._due.pop(followed, None)

    def version_changed(self) -> None:
        """The engine serves another version: whatever is unsent is due, however little it is."""
        if self._every_tokens:
            self._due |= dict.fromkeys(followed for followed in self._open if followed.unsent_model_tokens > 0)
            self._is_due.set()

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            await self._is_due.wait()
            while self._due:
                followed = next(iter(self._due))
                del self._due[followed]
                try:
                    await self._send(followed, SEND_SECONDS)
                except RljobError as error:
                    self._logger.warning("a part of a trajectory was not sent", extra=fields(error=str(error)))
                    await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
            self._is_due.clear()

    async def hand_over(self) -> None:
        """Send all that is unsent. Whole only while nothing is generated.

        Raises:
            RljobError: the stream did not take all of it; call it again.
        """
        limit = asyncio.Semaphore(HAND_OVER_AT_ONCE)

        async def send(followed: _Open) -> None:
            async with limit:
                await self._send(followed, HAND_OVER_SECONDS)

        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                ended = await asyncio.gather(
                    *(send(followed) for followed in tuple(self._open)), return_exceptions=True
                )
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the segment stream did not take {len(self._open)} open trajectories within {HAND_OVER_SECONDS:g} s"
            ) from error
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure

    def _grown(self, followed: _Open) -> None:
        if followed.unsent_model_tokens >= self._every_tokens:
            self._due[followed] = None
            self._is_due.set()

    async def _send(self, followed: _Open, deadline_seconds: float) -> None:
        """Send until nothing of now is left: a message that was tried before goes first, as it was."""
        async with followed.lock:
            while followed.unsent_model_tokens > 0:
                whole = len(followed.partial)
                end = whole if followed.tried_tokens is None else followed.tried_tokens
                header = followed.header.model_copy(update={"start": followed.sent_tokens})
                segment = followed.partial.segment(header, end)
                try:
                    data = encode_segment(segment)
                except MalformedMessage as error:  # the trajectory will be refused for the same reason
                    followed.is_malformed = True
                    self._logger.warning("a part of a trajectory is malformed", extra=fields(error=str(error)))
                    return
                followed.tried_tokens = end
                try:
                    sequence = await self._log.append(
                        header.task, header.sample, data, deadline_seconds=deadline_seconds
                    )
                except RljobError:
                    self._tally.segments_failed += 1
                    raise
                self._tally.segments_sent += 1
                self.last_sequence = max(self.last_sequence, sequence)
                followed.tried_tokens = None
                followed.sent_tokens = end
                followed.sent_model_tokens += int((segment.turn >= 0).sum())
                if end == whole:
                    return
