"""The rollout worker: leases samples, plays episodes, and carries out its version machine's effects.

produces    trajectories, the worker's own state, acks and releases of leases
consumes    tasks; desired and published versions; coordinator heartbeats; weight blobs
waits for   room for another episode, a leased task, the machine's next event
unblocked by  finished episodes, hints and timers; SIGTERM drains; a poisoned engine ends the process
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rljob_api.errors import (
    BlobCorrupt,
    DeadlineExceeded,
    EngineError,
    EnginePoisoned,
    EnvironmentFailure,
    MalformedMessage,
    ProtocolError,
    StorageError,
)
from rljob_api.messages import (
    CoordinatorHeartbeat,
    DesiredVersion,
    PublishedVersion,
    WorkerCounters,
    WorkerPhase,
    WorkerState,
)
from rljob_api.names import KEY_COORDINATOR, KEY_DESIRED, KEY_PUBLISHED, worker_key
from rljob_api.spec import RLJobSpec
from rljob_api.weights import WeightManifest
from rljob_protocol import worker as machine
from rljob_protocol.link import Link
from rljob_protocol.streams import ClaimedTask, TaskQueue, TrajectoryLog
from rljob_runtime.rollout.engine import InferenceEngine
from rljob_runtime.rollout.episode import Episode
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.probe_check import check_probe
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.trajectory_codec import Trajectory, encode_trajectory
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.fetch import drop_cached_versions, fetch_manifest, fetch_weights

REPORT_SECONDS = 1.0
EXTEND_SECONDS = 4.0
CLAIM_WAIT_SECONDS = 1.0
NOT_YET_SECONDS = 0.2
"""How long a task waits whose minVersion is not served yet."""
RETRY_ENVIRONMENT_SECONDS = 2.0
DRAIN_SECONDS = 20.0
SEND_SECONDS = 5.0
"""How long a drain waits for trajectories that are on their way to the stream."""
CANCEL_ROUNDS = 10
MAX_PAUSES = 64
MAX_ENVIRONMENT_THREADS = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is."""

    worker: str
    pool: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A fetched version: verified bytes and what they are."""

    manifest: WeightManifest
    weights: Path


@dataclass(slots=True)
class Tally:
    """Counters that the gate does not know."""

    delivered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    continued: int = 0
    trajectories: int = 0
    environment_failures: int = 0
    swaps_failed: int = 0

    def drop(self, tokens: int, reason: str) -> None:
        if tokens:
            self.dropped[reason] = self.dropped.get(reason, 0) + tokens


class RolloutWorker:
    """One engine, many episodes. `run` ends when drained; it raises `EnginePoisoned` when the engine must be restarted."""

    def __init__(
        self,
        *,
        identity: Identity,
        spec: RLJobSpec,
        max_concurrent: int,
        link: Link,
        store: BlobStore,
        engine: InferenceEngine,
        engine_compute_type: str,
        renderer: Renderer,
        cache: Path,
        logger: logging.Logger,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._spec = spec
        self._max_concurrent = max_concurrent
        self._link = link
        self._store = store
        self._engine = engine
        self._engine_compute_type = engine_compute_type
        self._renderer = renderer
        self._cache = cache
        self._logger = logger
        self._wall_clock = wall_clock
        self._gate = Gate(engine)
        self._queue = TaskQueue(link)
        self._log = TrajectoryLog(link)
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_ENVIRONMENT_THREADS, "environment")
        settings = machine.WorkerSettings(coordinator_timeout_seconds=spec.weight_sync.coordinator_timeout_seconds)
        self._state = machine.new_state(settings, time.monotonic())
        self._events: asyncio.Queue[machine.Event] = asyncio.Queue(maxsize=1024)
        self._ready: Ready | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._episodes: dict[asyncio.Task[None], Episode] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._stored: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._freed = asyncio.Event()
        self._tally = Tally()
        self._pauses: deque[float] = deque(maxlen=MAX_PAUSES)
        self._shut_at = 0.0
        self._interruptions = 0
        self._revision = 0
        self._started_at = time.monotonic()
        self._last_rate: tuple[float, int] = (self._started_at, 0)
        self._rate = 0.0
        self._report_lock = asyncio.Lock()
        self._stop = asyncio.Event()
        self._phase = WorkerPhase.STARTING

    def request_stop(self) -> None:
        """Drain and end: what SIGTERM asks for."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until asked to stop.

        Raises:
            EnginePoisoned: the engine can no longer be trusted; the process must be restarted.
            EngineError: the engine died.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(loop)
                    for loop in (
                        self._follow_desired(),
                        self._follow_published(),
                        self._watch_coordinator(),
                        self._drive(tasks),
                        self._claim(tasks),
                        self._report_for_ever(),
                    )
                ]
                await self._stop.wait()
                # Ended, not only told to: a claim that comes back after the drain has looked would start episodes that wait
                # at the shut gate for ever.
                await _ended(loops)
                if self._fetching is not None:
                    self._fetching.cancel()
                await self._drain()
        except ExceptionGroup as group:
            error = _first(group)
            if isinstance(error, EngineError):
                await self._last_words(WorkerPhase.POISONED, str(error))
            raise error from None
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------ version machine

    async def _follow_desired(self) -> None:
        names = self._link.names
        async for seen in self._link.follow(KEY_DESIRED, DesiredVersion, hint_subject=names.desired_hint):
            await self._events.put(machine.DesiredSeen(seen.value))

    async def _follow_published(self) -> None:
        async for seen in self._link.follow(KEY_PUBLISHED, PublishedVersion):
            await self._events.put(machine.PublishedSeen(seen.value))

    async def _watch_coordinator(self) -> None:
        while True:
            try:
                beat = await self._link.read_live(KEY_COORDINATOR, CoordinatorHeartbeat)
            except (DeadlineExceeded, MalformedMessage) as error:
                self._logger.warning("coordinator heartbeat was not read", extra={"error": str(error)})
            else:
                if beat is not None:
                    await self._events.put(machine.CoordinatorBeat(beat.beat))
            await self._events.put(machine.Tick())
            await asyncio.sleep(1.0)

    async def _drive(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            # Results of effects are handled at once, never through the bounded queue that only this loop empties.
            pending: deque[machine.Event] = deque([await self._events.get()])
            while pending:
                self._state, effects = machine.step(self._state, pending.popleft(), time.monotonic())
                for effect in effects:
                    result = await self._perform(effect, tasks)
                    if result is not None:
                        pending.append(result)

    async def _perform(self, effect: machine.Effect, tasks: asyncio.TaskGroup) -> machine.Event | None:
        match effect:
            case machine.Fetch(published):
                if self._fetching is not None:
                    self._fetching.cancel()
                self._fetching = tasks.create_task(self._fetch(published))
            case machine.ShutGate():
                return await self._shut()
            case machine.Apply(published):
                return await self._apply(published)
            case machine.Probe(published):
                return await self._probe(published)
            case machine.OpenGate():
                self._gate.open()
                self._phase = WorkerPhase.SERVING
                if self._shut_at:
                    self._interruptions += 1
                    self._pauses.append(time.monotonic() - self._shut_at)
                self._logger.info("weight version served", extra={"weight_version": self._serving_version()})
            case machine.Report():
                tasks.create_task(self._report())
            case machine.Poison(reason):
                self._tally.swaps_failed += 1
                raise EnginePoisoned(reason)
        return None

    async def _fetch(self, published: PublishedVersion) -> None:
        """Bytes are brought and verified while generation goes on."""
        try:
            manifest = await fetch_manifest(self._store, published.manifest, self._cache)
            weights = await fetch_weights(self._store, manifest, self._cache)
        except (StorageError, ProtocolError) as error:
            self._logger.warning(
                "weight version could not be fetched", extra={"weight_version": published.version, "error": str(error)}
            )
            await self._events.put(machine.FetchFailed(published, str(error), isinstance(error, BlobCorrupt)))
            return
        self._ready = Ready(manifest, weights)
        await self._events.put(machine.Fetched(published))

    async def _shut(self) -> machine.Event:
        first = self._serving_version() is None
        self._shut_at = 0.0 if first else time.monotonic()
        self._phase = WorkerPhase.STARTING if first else WorkerPhase.SWAPPING
        try:
            await self._gate.shut(deadline_seconds=self._state.settings.gate_timeout_seconds)
        except DeadlineExceeded as error:
            return machine.GateStuck(str(error))
        return machine.GateShut()

    async def _apply(self, published: PublishedVersion) -> machine.Event:
        ready = self._ready
        if ready is None or ready.manifest.version != published.version:
            return machine.ApplyFailed(published, "its bytes are not here")
        try:
            await self._engine.apply(ready.manifest, ready.weights)
            await self._engine.resume()
        except EngineError as error:
            return machine.ApplyFailed(published, str(error))
        return machine.Applied(published)

    async def _probe(self, published: PublishedVersion) -> machine.Event:
        ready = self._ready
        if ready is None:
            return machine.ProbeFailed(published, "its manifest is not here")
        try:
            scored = await self._engine.score(ready.manifest.probe.tokens)
        except EngineError as error:
            return machine.ProbeFailed(published, str(error))
        result = check_probe(ready.manifest.probe, scored, self._engine_compute_type)
        if not result.passed:
            return machine.ProbeFailed(published, result.reason)
        drop_cached_versions(self._cache, {ready.weights})
        return machine.ProbePassed(published)

    def _serving_version(self) -> int | None:
        return None if self._state.serving is None else self._state.serving.version

    # ------------------------------------------------------------------------------------------------------ episodes

    async def _claim(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            serving = self._serving_version()
            if serving is None:
                await asyncio.sleep(0.05)
                continue
            room = self._max_concurrent - len(self._episodes)
            if room <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            for claimed in await self._queue.claim(room, CLAIM_WAIT_SECONDS):
                if claimed.task.min_version > (self._serving_version() or 0):
                    # Too old to start it; the new version is on its way.
                    await claimed.release(NOT_YET_SECONDS)
                    continue
                self._start(claimed, tasks)

    def _start(self, claimed: ClaimedTask, tasks: asyncio.TaskGroup) -> None:
        episode = Episode(
            task=claimed.task,
            attempt=claimed.attempt,
            worker=self._identity.worker,
            incarnation=self._identity.incarnation,
            spec=self._spec,
            gate=self._gate,
            renderer=self._renderer,
            threads=self._threads,
            clock=self._wall_clock,
        )
        task = tasks.create_task(self._play(episode, claimed))
        self._episodes[task] = episode

    async def _play(self, episode: Episode, claimed: ClaimedTask) -> None:
        current = asyncio.current_task()
        extending = asyncio.create_task(self._extend(claimed))
        try:
            await self._play_and_deliver(episode, claimed)
        finally:
            extending.cancel()
            if current is not None:
                self._episodes.pop(current, None)
            self._freed.set()

    async def _play_and_deliver(self, episode: Episode, claimed: ClaimedTask) -> None:
        try:
            trajectory = await episode.run()
        except EnvironmentFailure as error:
            self._tally.environment_failures += 1
            self._logger.warning(
                "environment failed",
                extra={
                    "task": claimed.task.task,
                    "sample": claimed.task.sample,
                    "attempt": claimed.attempt,
                    "error": str(error),
                },
            )
            if claimed.attempt < self._spec.environment.max_attempts:
                self._tally.drop(episode.num_model_tokens, "EnvironmentFailed")
                await claimed.release(RETRY_ENVIRONMENT_SECONDS)
                return
            trajectory = episode.failed(str(error))
        await self._deliver(trajectory, claimed)

    async def _deliver(self, trajectory: Trajectory, claimed: ClaimedTask) -> None:
        """Store, then ack: a crash in between repeats the sample, and the first one counts."""
        header = trajectory.header
        try:
            data = encode_trajectory(trajectory)
        except MalformedMessage as error:
            self._logger.error("trajectory refused before it was sent", extra={"error": str(error)})
            self._tally.drop(trajectory.num_model_tokens, "Malformed")
            await claimed.release(RETRY_ENVIRONMENT_SECONDS)
            return
        current = asyncio.current_task()
        assert current is not None
        self._sending.add(current)
        try:
            await self._log.append(header.task, header.sample, data)
            # Before the ack: what the stream has taken is delivered, whatever becomes of the lease.
            self._stored.add(current)
            self._tally.delivered += trajectory.num_model_tokens
            self._tally.trajectories += 1
            self._tally.continued += header.interruptions
            await claimed.ack()
        finally:
            self._sending.discard(current)

    async def _extend(self, claimed: ClaimedTask) -> None:
        while True:
            await asyncio.sleep(EXTEND_SECONDS)
            await claimed.extend()

    # ----------------------------------------------------------------------------------------------- drain and report

    async def _drain(self) -> None:
        """Stop generation, count what is held, and say goodbye; leases that are not acked come back by themselves."""
        self._phase = WorkerPhase.DRAINING
        try:
            await self._gate.shut(deadline_seconds=DRAIN_SECONDS)
        except DeadlineExceeded as error:
            self._logger.warning("drain was not clean", extra={"error": str(error)})
        held = dict(self._episodes)
        for task in held.keys() - self._sending:
            task.cancel()
        if self._sending:
            # Cut off between the stream's answer and the tally, a trajectory would be delivered and not counted so.
            await asyncio.wait(self._sending, timeout=SEND_SECONDS)
        await _ended(list(held))
        in_flight = sum(
            episode.num_model_tokens for task, episode in held.items() if task.cancelled() and task not in self._stored
        )
        await self._last_words(WorkerPhase.STOPPED, "", in_flight=in_flight)

    async def _last_words(self, phase: WorkerPhase, message: str, *, in_flight: int | None = None) -> None:
        self._phase = phase
        await self._report(message=message, in_flight=in_flight)

    async def _report_for_ever(self) -> None:
        while True:
            await self._report()
            await asyncio.sleep(REPORT_SECONDS)

    async def _report(self, *, message: str = "", in_flight: int | None = None) -> None:
        async with self._report_lock:
            now = time.monotonic()
            self._revision += 1
            generated = self._gate.counters.tokens_generated
            since, before = self._last_rate
            if now - since >= 2 * REPORT_SECONDS:
                self._rate = (generated - before) / (now - since)
                self._last_rate = (now, generated)
            held = (
                sum(e.num_model_tokens for task, e in self._episodes.items() if task not in self._stored)
                if in_flight is None
                else in_flight
            )
            alive = max(now - self._started_at, 1e-9)
            state = WorkerState(
                worker=self._identity.worker,
                pool=self._identity.pool,
                incarnation=self._identity.incarnation,
                revision=self._revision,
                phase=self._phase,
                epoch=0 if self._state.serving is None else self._state.serving.epoch,
                serving_version=self._serving_version(),
                order=self._state.order,
                degraded=self._state.degraded,
                in_flight=len(self._episodes),
                counters=WorkerCounters(
                    tokens_generated=generated,
                    tokens_delivered=self._tally.delivered,
                    tokens_dropped=dict(self._tally.dropped),
                    tokens_in_flight=held,
                    tokens_salvaged=self._gate.counters.tokens_salvaged,
                    interruptions=self._interruptions,
                    partials_continued=self._tally.continued,
                    trajectories=self._tally.trajectories,
                    environment_failures=self._tally.environment_failures,
                    swaps_failed=self._tally.swaps_failed,
                ),
                tokens_per_second=self._rate,
                idle_share=min(1.0, max(0.0, 1.0 - self._gate.busy_seconds(now) / alive)),
                pause_seconds=tuple(self._pauses),
                message=message,
            )
            try:
                await self._link.beat(worker_key(self._identity.worker), state)
            except DeadlineExceeded as error:
                self._logger.warning("state was not written", extra={"error": str(error)})


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    Once is not always enough: Python 3.11's `wait_for` forgets a cancellation that meets an answer, and a retry over an
    outage then goes on for its whole deadline, which for a trajectory is an hour.
    """
    pending = {task for task in tasks if not task.done()}
    for _ in range(CANCEL_ROUNDS):
        for task in pending:
            task.cancel()
        if not pending:
            return
        _, pending = await asyncio.wait(pending, timeout=1.0)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """The first single error in a group."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
