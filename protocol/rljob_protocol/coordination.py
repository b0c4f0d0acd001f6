"""Hosts one job's coordinator: feeds the pure machine from NATS and carries out its effects.

Its host is the operator's leader on a cluster and `rljob run` on one machine; both pass in what only they can do: check
a manifest in the blob store and restart a worker.

    produces    desired (compare-and-set), coordinator heartbeats, restarts of workers
    consumes    published (followed), worker states (read on a timer)
    waits for   a new published version, a timer tick; the term claim at the start, with a deadline
    unblocked by  the hint that goes with a published version, else the timer
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from rljob_api.errors import DeadlineExceeded, Fenced
from rljob_api.messages import CoordinatorHeartbeat, DesiredVersion, PublishedVersion, TermClaim, WorkerState
from rljob_api.names import KEY_COORDINATOR, KEY_DESIRED, KEY_PUBLISHED, KEY_TERM
from rljob_protocol import coordinator
from rljob_protocol.link import Link

ManifestCheck = Callable[[PublishedVersion], Awaitable[str | None]]
"""None when the manifest is readable, else why not."""
RestartWorker = Callable[[str, str, str], Awaitable[None]]
"""(worker, incarnation, reason)"""

CLAIM_ATTEMPTS = 20


async def claim_term(link: Link) -> int:
    """Become the coordinator: raise the term by compare-and-set.

    Raises:
        Fenced: other claimants won every attempt.
    """
    for _ in range(CLAIM_ATTEMPTS):
        held = await link.read(KEY_TERM, TermClaim)
        term = 1 if held is None else held.value.term + 1
        try:
            await link.write(KEY_TERM, TermClaim(term=term), expected_revision=None if held is None else held.revision)
        except Fenced:
            continue
        return term
    raise Fenced(
        f"the coordinator's term could not be claimed in {CLAIM_ATTEMPTS} attempts: another one keeps claiming it"
    )


class CoordinatorHost:
    """The shell around `coordinator.step` for one job."""

    def __init__(
        self,
        link: Link,
        *,
        settings: coordinator.CoordinatorSettings,
        check_manifest: ManifestCheck,
        restart_worker: RestartWorker,
        logger: logging.Logger,
        tick_seconds: float = 0.5,
        on_workers: Callable[[tuple[WorkerState, ...]], None] | None = None,
    ) -> None:
        self._link = link
        self._state = coordinator.new_state(settings)
        self._check_manifest = check_manifest
        self._restart_worker = restart_worker
        self._logger = logger
        self._tick_seconds = tick_seconds
        self._on_workers = on_workers
        self._desired_revision: int | None = None
        self._queue: asyncio.Queue[coordinator.Event] = asyncio.Queue(maxsize=256)
        self._beat = 0

    def summary(self) -> coordinator.CoordinationSummary:
        """What the live view and the status show."""
        return coordinator.summary(self._state, time.monotonic())

    async def run(self) -> None:
        """Claim the term and coordinate until cancelled.

        Raises:
            Fenced: a newer coordinator exists; this one has stopped writing.
        """
        term = await claim_term(self._link)
        held = await self._link.read(KEY_DESIRED, DesiredVersion)
        self._desired_revision = None if held is None else held.revision
        await self._queue.put(coordinator.TermClaimed(term, None if held is None else held.value))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_published())
            tasks.create_task(self._observe_workers())
            tasks.create_task(self._drive(tasks))

    async def _follow_published(self) -> None:
        names = self._link.names
        async for seen in self._link.follow(KEY_PUBLISHED, PublishedVersion, hint_subject=names.published_hint):
            await self._queue.put(coordinator.PublishedSeen(seen.value))

    async def _observe_workers(self) -> None:
        while True:
            try:
                workers = await self._link.live_workers()
            except DeadlineExceeded as error:
                self._logger.warning("worker states could not be read", extra={"error": str(error)})
            else:
                if self._on_workers is not None:
                    self._on_workers(workers)
                await self._queue.put(coordinator.WorkersSeen(workers))
            await self._queue.put(coordinator.Tick())
            await asyncio.sleep(self._tick_seconds)

    async def _drive(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            # Results of effects go first and never through the bounded queue, whose only consumer this loop is.
            pending = [await self._queue.get()]
            while pending:
                self._state, effects = coordinator.step(self._state, pending.pop(0), time.monotonic())
                for effect in effects:
                    result = await self._perform(effect, tasks)
                    if result is not None:
                        pending.append(result)

    async def _perform(self, effect: coordinator.Effect, tasks: asyncio.TaskGroup) -> coordinator.Event | None:
        match effect:
            case coordinator.CheckManifest(published):
                tasks.create_task(self._check(published))
            case coordinator.WriteDesired(desired):
                return await self._write(desired)
            case coordinator.Beat():
                await self._heartbeat()
            case coordinator.RestartWorker(worker, incarnation, reason):
                self._logger.warning("worker restart ordered", extra={"worker": worker, "reason": reason})
                await self._restart_worker(worker, incarnation, reason)
            case coordinator.Stop(reason):
                raise Fenced(reason)
        return None

    async def _check(self, published: PublishedVersion) -> None:
        error = await self._check_manifest(published)
        await self._queue.put(coordinator.ManifestChecked(published, error))

    async def _write(self, desired: DesiredVersion) -> coordinator.Event:
        revision = self._desired_revision
        try:
            self._desired_revision = await self._link.write(KEY_DESIRED, desired, expected_revision=revision)
        except Fenced:
            held = await self._link.read(KEY_DESIRED, DesiredVersion)
            if held is None or held.value != desired:
                return coordinator.Fenced()
            # The write had landed and only its answer was lost: a retry over an outage meets its own revision.
            self._desired_revision = held.revision
        await self._link.hint(self._link.names.desired_hint)
        self._logger.info(
            "weight version ordered",
            extra={
                "weight_version": desired.published.version,
                "epoch": desired.published.epoch,
                "generation": desired.generation,
            },
        )
        return coordinator.DesiredWritten(desired)

    async def _heartbeat(self) -> None:
        self._beat += 1
        term, generation = coordinator.order_of(self._state)
        beat = CoordinatorHeartbeat(term=term, generation=generation, beat=self._beat)
        try:
            await self._link.beat(KEY_COORDINATOR, beat)
        except DeadlineExceeded as error:
            self._logger.warning("coordinator heartbeat was not written", extra={"error": str(error)})
