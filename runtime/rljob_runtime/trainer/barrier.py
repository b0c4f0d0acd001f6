"""The barrier of the interruption route, rank 0's side (docs/design.md, section 5, item 7).

Before a step's first update the workers stop and hand over what they made, the resident version scores it, and the
publication of the next version lets them go on. The decision who is awaited, and whether it is over, is pure; the shell
below feeds it from the liveness bucket.

    produces    the barrier key (compare-and-set)
    consumes    worker states, read on a timer
    waits for   every live worker's word that it keeps the barrier
    unblocked by  the words, a worker's death by this reader's clock, or `correction.barrierTimeoutSeconds`
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rljob_api.errors import DeadlineExceeded, Fenced
from rljob_api.messages import Barrier, BarrierReport, BarrierState, WorkerPhase, WorkerState
from rljob_api.names import KEY_BARRIER
from rljob_protocol.link import Link

LIVENESS_SECONDS = 30.0
POLL_SECONDS = 0.1
READ_SECONDS = 10.0
"""How long the streams may take to bring what workers say is on them."""
WITHOUT_TOKENS = (WorkerPhase.STARTING, WorkerPhase.POISONED, WorkerPhase.DRAINING, WorkerPhase.STOPPED)
"""Phases in which a worker neither has tokens to hand over nor gets any, or sends what it has as it goes."""


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as this reader knows it."""

    state: WorkerState
    changed_at: float
    """When its revision was seen to rise."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One barrier, and the workers as seen up to now."""

    epoch: int
    version: int
    since: float
    timeout_seconds: float
    workers: Mapping[str, SeenWorker] = field(default_factory=lambda: MappingProxyType({}))
    has_looked: bool = False
    """Whether the workers were seen since the barrier began."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How a barrier stands."""

    awaited: tuple[str, ...]
    """Live workers that generate, by name."""
    missing: tuple[str, ...]
    """Those of them that do not keep the barrier."""
    is_over: bool
    """Nobody is missing, or the time is up."""
    segments_sequence: int
    trajectories_sequence: int
    """Up to which the streams hold what the workers handed over."""


def begin(watch: Watch | None, *, epoch: int, version: int, timeout_seconds: float, now: float) -> Watch:
    """A new barrier; what an earlier watch knows of the workers' life is kept."""
    workers = watch.workers if watch is not None else MappingProxyType({})
    return Watch(epoch=epoch, version=version, since=now, timeout_seconds=timeout_seconds, workers=workers)


def observe(watch: Watch, states: tuple[WorkerState, ...], now: float) -> Watch:
    """Worker states as the liveness bucket holds them; one that is not there any more is dead."""
    seen = {}
    for state in states:
        before = watch.workers.get(state.worker)
        is_same = before is not None and before.state.incarnation == state.incarnation
        if before is not None and is_same and before.state.revision >= state.revision:
            seen[state.worker] = before
        else:
            seen[state.worker] = SeenWorker(state, now)
    return replace(watch, workers=MappingProxyType(seen), has_looked=True)


def judge(watch: Watch, now: float) -> Finding:
    """Who is awaited, who is missing, and whether the trainer may go on."""
    awaited = {
        name: seen.state
        for name, seen in sorted(watch.workers.items())
        if seen.state.phase not in WITHOUT_TOKENS and now - seen.changed_at < LIVENESS_SECONDS
    }
    missing = tuple(name for name, state in awaited.items() if state.barrier != (watch.epoch, watch.version))
    states = [seen.state for seen in watch.workers.values()]
    return Finding(
        awaited=tuple(awaited),
        missing=missing,
        is_over=(watch.has_looked and not missing) or now - watch.since >= watch.timeout_seconds,
        segments_sequence=max((state.segments_sequence for state in states), default=0),
        trajectories_sequence=max((state.trajectories_sequence for state in states), default=0),
    )


ReadUpTo = Callable[[int, int, float], Awaitable[bool]]
"""(trajectory sequence, segment sequence, seconds) -> whether both streams were read that far in time."""


class BarrierKeeper:
    """Writes the barrier and waits for the workers; lives on the background loop."""

    def __init__(
        self, *, link: Link, epoch: int, timeout_seconds: float, read_up_to: ReadUpTo, logger: logging.Logger
    ) -> None:
        self._link = link
        self._epoch = epoch
        self._timeout_seconds = timeout_seconds
        self._read_up_to = read_up_to
        self._logger = logger
        self._revision: int | None = None
        self._held: Barrier | None = None
        self._watch: Watch | None = None
        self.report: BarrierReport | None = None
        """Of the last barrier, from when it is over."""

    async def recover(self) -> None:
        """Release what a trainer that died behind its barrier left: its workers wait."""
        held = await self._link.read(KEY_BARRIER, Barrier)
        if held is not None:
            self._revision, self._held = held.revision, held.value
        await self.release()

    async def quiesce(self, version: int) -> None:
        """Tell the workers to stop and to hand over what they made with the resident version.

        Raises:
            Fenced: a newer trainer writes the barrier.
        """
        await self._write(Barrier(epoch=self._epoch, version=version, state=BarrierState.QUIESCE))
        self._watch = begin(
            self._watch,
            epoch=self._epoch,
            version=version,
            timeout_seconds=self._timeout_seconds,
            now=time.monotonic(),
        )
        self.report = None

    async def is_over(self, wait_seconds: float, *, give_up: bool = False) -> bool:
        """Whether all have handed over, and it was read, or their time is up; waits for it a while.

        `give_up` ends the barrier as if its time were up: the trainer was told to stop.
        """
        if self._watch is None:
            raise ValueError("no barrier was begun")
        until = time.monotonic() + wait_seconds
        while True:
            try:
                self._watch = observe(self._watch, await self._link.live_workers(), time.monotonic())
            except DeadlineExceeded as error:
                self._logger.warning("worker states could not be read", extra={"error": str(error)})
            found = judge(self._watch, time.monotonic())
            if found.is_over or give_up:
                await self._end(self._watch, found)
                return True
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(POLL_SECONDS)

    async def _end(self, watch: Watch, found: Finding) -> None:
        waited = time.monotonic() - watch.since
        if not await self._read_up_to(found.trajectories_sequence, found.segments_sequence, READ_SECONDS):
            self._logger.warning("streams were not read up to the barrier", extra={"weight_version": watch.version})
        if found.missing:
            self._logger.warning(
                "workers missed the barrier",
                extra={"weight_version": watch.version, "workers": list(found.missing), "seconds": round(waited, 1)},
            )
        self.report = BarrierReport(
            workers=len(found.awaited), missing=len(found.missing), seconds=time.monotonic() - watch.since
        )

    async def release(self) -> None:
        """Let the workers go on; without a barrier that holds them nothing is written."""
        if self._held is not None and self._held.state is BarrierState.QUIESCE:
            await self._write(self._held.model_copy(update={"state": BarrierState.RELEASED}))

    async def _write(self, barrier: Barrier) -> None:
        try:
            self._revision = await self._link.write(KEY_BARRIER, barrier, expected_revision=self._revision)
        except Fenced:
            held = await self._link.read(KEY_BARRIER, Barrier)
            if held is None or held.value != barrier:
                raise
            self._revision = held.revision  # the write had landed and only its answer was lost over an outage
        self._held = barrier
        await self._link.hint(self._link.names.barrier_hint)
