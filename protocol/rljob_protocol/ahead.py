"""The streams that serve scoring ahead of a step: parts of unfinished trajectories, and old-policy workers' values.

Both are bounded, and discard their oldest messages at the bound: what is lost is scored later, by another route, or is
missing and counted. So appending never waits for a reader.
"""

from __future__ import annotations

from rljob_protocol.link import Link
from rljob_protocol.message_log import MessageLog

APPEND_SECONDS = 30.0


class SegmentLog(MessageLog):
    """Parts of unfinished trajectories, from rollout workers to the trainer."""

    def __init__(self, link: Link) -> None:
        super().__init__(link, link.names.segments_stream)

    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float = APPEND_SECONDS) -> int:
        """Store a segment message and return its sequence. Over an outage it may be stored twice: readers pass over that.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """
        return await _store(self._link, self._link.names.segment_subject(task, sample), data, deadline_seconds)


class ScoreLog(MessageLog):
    """Old log-probabilities, from old-policy workers to the trainer."""

    def __init__(self, link: Link) -> None:
        super().__init__(link, link.names.scores_stream)

    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float = APPEND_SECONDS) -> int:
        """Store a score message and return its sequence. Over an outage it may be stored twice: readers pass over that.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """
        return await _store(self._link, self._link.names.score_subject(task, sample), data, deadline_seconds)


async def _store(link: Link, subject: str, data: bytes, deadline_seconds: float) -> int:
    stored = await link.retry(
        f"append to {subject}",
        lambda: link.jetstream.publish(subject, data, timeout=10),
        deadline_seconds=deadline_seconds,
    )
    return stored.seq
