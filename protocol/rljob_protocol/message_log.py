"""A stream of messages that is read by cursor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import nats.errors
import nats.js
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from rljob_protocol.deadlines import within
from rljob_protocol.link import ATTEMPT_SECONDS, REQUEST_SECONDS, TRANSIENT, Link

BACK_PRESSURE_SECONDS = 0.5
READ_BATCH = 64
READ_WAIT_SECONDS = 1.0


class MessageLog:
    """One stream of a job; who appends to it and when it is cut is the business of the subclass."""

    def __init__(self, link: Link, stream: str) -> None:
        self._link = link
        self._stream = stream

    async def read(self, after_sequence: int) -> AsyncIterator[tuple[int, bytes]]:
        """(sequence, bytes) of each message after the cursor, in order, for ever: no gap, no repeat, over outages."""
        cursor = after_sequence
        while True:
            try:
                info = await within(ATTEMPT_SECONDS, self._link.jetstream.stream_info(self._stream))
                last = int(info.state.last_seq)
                if last <= cursor:
                    # A push consumer would cost a heartbeat protocol; one cheap look a fifth of a second does not.
                    await asyncio.sleep(0.2)
                    continue
                subscribing = self._link.jetstream.pull_subscribe(
                    "",
                    stream=self._stream,
                    config=ConsumerConfig(
                        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                        opt_start_seq=cursor + 1,
                        ack_policy=AckPolicy.NONE,
                        inactive_threshold=60.0,
                        mem_storage=True,
                    ),
                )
                subscription = await within(ATTEMPT_SECONDS, subscribing)
            except (*TRANSIENT, nats.js.errors.APIError):
                await asyncio.sleep(BACK_PRESSURE_SECONDS)
                continue
            try:
                while True:
                    try:
                        fetching = subscription.fetch(READ_BATCH, timeout=READ_WAIT_SECONDS)
                        messages = await within(READ_WAIT_SECONDS + REQUEST_SECONDS, fetching)
                    except nats.errors.TimeoutError:
                        if not await self._consumer_lives(subscription):
                            break
                        continue
                    for message in messages:
                        sequence = message.metadata.sequence.stream
                        if sequence <= cursor:
                            continue
                        cursor = sequence
                        yield sequence, message.data
            except (*TRANSIENT, nats.js.errors.APIError):
                await asyncio.sleep(BACK_PRESSURE_SECONDS)

    async def _consumer_lives(self, subscription: nats.js.JetStreamContext.PullSubscription) -> bool:
        try:
            await within(ATTEMPT_SECONDS, subscription.consumer_info())
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def cut(self, up_to_sequence: int) -> None:
        """Delete everything up to and including a sequence."""
        if up_to_sequence > 0:
            await self._link.retry(
                f"cut {self._stream}", lambda: self._link.jetstream.purge_stream(self._stream, seq=up_to_sequence + 1)
            )

    async def usage(self) -> tuple[int, int]:
        """(bytes used, bytes allowed)."""
        info = await self._link.retry(
            f"usage of {self._stream}", lambda: self._link.jetstream.stream_info(self._stream)
        )
        return int(info.state.bytes), int(info.config.max_bytes or 0)

    async def last_sequence(self) -> int:
        """Sequence of the newest message ever stored, 0 for none."""
        info = await self._link.retry(
            f"last sequence of {self._stream}", lambda: self._link.jetstream.stream_info(self._stream)
        )
        return int(info.state.last_seq)
