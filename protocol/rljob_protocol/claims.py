"""Trajectories as work: each is leased to one old-policy worker, until its scores are stored.

The stream stays the trainer's log: a lease takes nothing off it, and what the trainer cuts off is delivered no more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from rljob_protocol.deadlines import within
from rljob_protocol.link import ATTEMPT_SECONDS, REQUEST_SECONDS, TRANSIENT, Link

ACKNOWLEDGE_SECONDS = 10.0
BACK_PRESSURE_SECONDS = 0.5
UNCLAIMED_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ClaimedTrajectory:
    """A leased trajectory: extend it while it waits, then ack or release it."""

    sequence: int
    """Of its message on the stream."""
    data: bytes
    attempt: int
    """1 for the first delivery."""
    _message: Msg
    _link: Link

    async def ack(self) -> None:
        """Its scores are stored: deliver it no more.

        Raises:
            DeadlineExceeded: the server does not confirm it. It is delivered again then, and scored twice.
        """
        await self._link.retry(
            "ack trajectory", lambda: self._message.ack_sync(timeout=3), deadline_seconds=ACKNOWLEDGE_SECONDS
        )

    async def extend(self) -> None:
        """Keep the lease; losing one call is harmless."""
        try:
            await within(REQUEST_SECONDS, self._message.in_progress())
        except TRANSIENT:
            return

    async def release(self) -> None:
        """Give it back, to be delivered again at once."""
        try:
            await within(REQUEST_SECONDS, self._message.nak())
        except TRANSIENT:
            return  # the lease expires by itself


class TrajectoryClaims:
    """The one durable consumer of the trajectory stream that all old-policy workers share."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def claim(self, max_trajectories: int, wait_seconds: float) -> list[ClaimedTrajectory]:
        """Lease up to `max_trajectories`, oldest first; empty when none came within `wait_seconds` or NATS is away."""
        names = self._link.names
        try:
            if self._subscription is None:
                binding = self._link.jetstream.pull_subscribe_bind(
                    consumer=names.old_policy_consumer, stream=names.trajectories_stream
                )
                self._subscription = await within(ATTEMPT_SECONDS, binding)
            fetching = self._subscription.fetch(max_trajectories, timeout=wait_seconds)
            messages = await within(wait_seconds + REQUEST_SECONDS, fetching)
        except nats.errors.TimeoutError:
            return []
        except (*TRANSIENT, nats.js.errors.APIError):
            await asyncio.sleep(BACK_PRESSURE_SECONDS)  # away, or coming back and without the consumer yet
            return []
        return [
            ClaimedTrajectory(
                message.metadata.sequence.stream, message.data, message.metadata.num_delivered, message, self._link
            )
            for message in messages
        ]

    async def release_unclaimed(self) -> None:
        """Give back what the server sent after its claim had ended: else it waits for its lease to run out.

        For the end of a worker, when it claims no more.
        """
        while self._subscription is not None and self._subscription.pending_msgs:
            for claimed in await self.claim(1, UNCLAIMED_SECONDS):
                await claimed.release()

    async def backlog(self) -> int:
        """Trajectories that no worker has scored yet, leased ones included; 0 where the job has no old-policy pool.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """
        names = self._link.names
        try:
            info = await self._link.retry(
                "old-policy backlog",
                lambda: self._link.jetstream.consumer_info(names.trajectories_stream, names.old_policy_consumer),
                deadline_seconds=REQUEST_SECONDS,
            )
        except nats.js.errors.NotFoundError:
            return 0
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)
