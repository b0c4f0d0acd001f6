"""What a rollout worker learns from outside, as events of its machine. Level-triggered: a lost message only delays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from rljob_api.errors import ProtocolError
from rljob_api.messages import (
    Barrier,
    BarrierState,
    CoordinatorHeartbeat,
    DesiredVersion,
    JobSettings,
    PublishedVersion,
    TrainerState,
)
from rljob_api.names import (
    KEY_BARRIER,
    KEY_COORDINATOR,
    KEY_DESIRED,
    KEY_PUBLISHED,
    KEY_SETTINGS,
    KEY_TRAINER,
    JobNames,
)
from rljob_protocol.link import Link
from rljob_protocol.logs import fields
from rljob_protocol.worker_events import (
    BarrierSeen,
    CoordinatorBeat,
    DesiredSeen,
    Event,
    PublishedSeen,
    Tick,
    TrainerBeat,
)

TICK_SECONDS = 0.25
BEAT_SECONDS = 1.0
SETTINGS_SECONDS = 5.0
BARRIER_SECONDS = 0.25
"""The trainer stands still until the last worker has seen its barrier, so a lost hint must not cost a second."""
AGAIN_SECONDS = 0.5


class Followers:
    """Loops over one key each; all of them go on over outages, until cancelled.

    Produces: events.
    Consumes: keys of the control and the liveness bucket.
    Waits for: a change. Unblocked by: hints, a reconnect, a timer.
    """

    def __init__(self, link: Link, names: JobNames, post: Callable[[Event], None]) -> None:
        self._link = link
        self._names = names
        self._post = post
        self._logger = logging.getLogger(__name__)

    async def desired(self) -> None:
        """The coordinator's orders."""
        hint = self._names.desired_hint
        async for seen in self._link.follow(KEY_DESIRED, DesiredVersion, hint_subject=hint):
            self._post(DesiredSeen(seen.value))

    async def published(self) -> None:
        """The newest version."""
        hint = self._names.published_hint
        async for seen in self._link.follow(KEY_PUBLISHED, PublishedVersion, hint_subject=hint):
            self._post(PublishedSeen(seen.value))

    async def first_barrier(self) -> None:
        """The barrier that there is at the start: a worker that opened its gate before it knew could break it."""
        while True:
            try:
                seen = await self._link.read(KEY_BARRIER, Barrier)
                if seen is not None:
                    await self._see_barrier(seen.value)
                return
            except ProtocolError as error:
                self._logger.warning("the barrier could not be read", extra=fields(error=str(error)))
                await asyncio.sleep(AGAIN_SECONDS)

    async def barrier(self) -> None:
        """The trainer's barrier."""
        hint = self._names.barrier_hint
        following = self._link.follow(KEY_BARRIER, Barrier, hint_subject=hint, interval_seconds=BARRIER_SECONDS)
        async for seen in following:
            try:
                await self._see_barrier(seen.value)
            except ProtocolError as error:  # what it is released for cannot be read: the gate stays shut meanwhile
                self._logger.warning("the barrier could not be followed", extra=fields(error=str(error)))
                await self.first_barrier()

    async def _see_barrier(self, barrier: Barrier) -> None:
        """A release comes after the publication that it is for: learnt in the other order, it would let tokens of the old
        version pass that nobody can score."""
        if barrier.state is BarrierState.RELEASED:
            published = await self._link.read(KEY_PUBLISHED, PublishedVersion)
            if published is not None:
                self._post(PublishedSeen(published.value))
        self._post(BarrierSeen(barrier))

    async def settings(self, take: Callable[[JobSettings], None]) -> None:
        """Fields of the spec that change while the worker runs."""
        async for seen in self._link.follow(KEY_SETTINGS, JobSettings, interval_seconds=SETTINGS_SECONDS):
            take(seen.value)

    async def coordinator(self, timeout_seconds: float) -> None:
        """The coordinator's heartbeat, several times in its timeout."""
        while True:
            try:
                beat = await self._link.read_live(KEY_COORDINATOR, CoordinatorHeartbeat)
            except ProtocolError as error:  # an outage: the machine's own timer decides what follows from it
                self._logger.warning("the coordinator's heartbeat could not be read", extra=fields(error=str(error)))
            else:
                if beat is not None:
                    self._post(CoordinatorBeat(beat.beat))
            await asyncio.sleep(min(BEAT_SECONDS, timeout_seconds / 4))

    async def trainer(self, timeout_seconds: float) -> None:
        """The trainer's heartbeat, several times in its timeout."""
        while True:
            try:
                state = await self._link.read_live(KEY_TRAINER, TrainerState)
            except ProtocolError as error:
                self._logger.warning("the trainer's heartbeat could not be read", extra=fields(error=str(error)))
            else:
                if state is not None:
                    self._post(TrainerBeat((state.epoch, state.beat)))
            await asyncio.sleep(min(BEAT_SECONDS, timeout_seconds / 4))

    async def tick(self) -> None:
        """Time passes."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._post(Tick())
