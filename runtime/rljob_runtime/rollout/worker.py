"""The shell of a rollout worker: the worker's machine, the engine behind its gate, and the episodes in front of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

from rljob_api.correction import OldLogprobs
from rljob_api.errors import DeadlineExceeded, EngineError, ProtocolError, RljobError, SpecError, StorageError
from rljob_api.messages import JobSettings, PublishedVersion, WorkerCounters, WorkerPhase, WorkerState
from rljob_api.names import KEY_PUBLISHED, worker_key
from rljob_api.spec import RLJobSpec
from rljob_protocol import worker as machine
from rljob_protocol.link import Link
from rljob_protocol.logs import fields
from rljob_protocol.streams import TaskQueue, TrajectoryLog
from rljob_protocol.worker import WorkerSettings
from rljob_protocol.worker_events import (
    Apply,
    DrainRequested,
    Event,
    Fetch,
    FetchFailed,
    HandedOver,
    HandOver,
    HandOverFailed,
    OpenGate,
    Poison,
    Probe,
    Report,
    Resume,
    ShutGate,
)
from rljob_runtime.environments.factory import check_environment, make_environment
from rljob_runtime.rollout.engine import InferenceEngine
from rljob_runtime.rollout.environment_threads import EnvironmentThreads
from rljob_runtime.rollout.episode import EpisodeParts, EpisodeSettings
from rljob_runtime.rollout.followers import BEAT_SECONDS, Followers
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.prefixes import PrefixSender, SegmentLog
from rljob_runtime.rollout.readiness import Readiness
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.rollout.samples import SampleRunner
from rljob_runtime.rollout.swapper import Swapper
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.fetch import fetch_manifest, fetch_model_files

EXIT_STOPPED = 0
EXIT_RESTART = 70
"""The engine cannot be trusted or the worker broke: the host starts a new incarnation."""
EXIT_CONFIGURATION = 78
"""The job is wrong for this worker: another incarnation would end the same way."""
RATE_WINDOW_SECONDS = 10.0
FIRST_VERSION_SECONDS = 0.5
FIRST_VERSION_DEADLINE_SECONDS = 1800.0
CANCEL_AGAIN_SECONDS = 0.5
DRAIN_SHUT_SECONDS = 10.0
DRAIN_GRACE_SECONDS = 5.0
LAST_REPORT_SECONDS = 5.0
SHUTDOWN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _End:
    """Why the worker stops."""

    code: int
    reason: str


class RolloutWorker:
    """One incarnation of one worker, from its start to its exit code.

    Produces: trajectories, and parts of unfinished ones; its own state, once a second and at every transition.
    Consumes: tasks; the keys `desired`, `published` and `barrier`; heartbeats of coordinator and trainer; weight blobs.
    Waits for: the first published version; then whatever its machine, its gate and its samples wait for.
    Unblocked by: the trainer, the coordinator, hints and timers; ended by `request_drain` or a poisoned engine.
    """

    def __init__(
        self,
        settings: RuntimeSettings,
        link: Link,
        queue: TaskQueue,
        log: TrajectoryLog,
        store: BlobStore,
        make_engine: Callable[[Path], InferenceEngine],
        segments: SegmentLog,
        *,
        engine_compute_type: str,
        lease_seconds: float = 30.0,
    ) -> None:
        self._settings = settings
        self._spec: RLJobSpec = settings.job.spec
        self._pool = settings.rollout_pool()
        self._link = link
        self._queue = queue
        self._log = log
        self._store = store
        self._make_engine = make_engine
        self._engine_compute_type = engine_compute_type
        self._lease_seconds = lease_seconds
        self._tally = Tally()
        correction = self._spec.correction
        follows_barrier = correction.old_logprobs is OldLogprobs.INTERRUPTION
        self._machine: machine.WorkerState = machine.new_state(
            WorkerSettings(
                coordinator_timeout_seconds=self._spec.weight_sync.coordinator_timeout_seconds,
                barrier_timeout_seconds=correction.barrier_timeout_seconds if follows_barrier else None,
            ),
            time.monotonic(),
        )
        self._prefix_tokens = 0
        if correction.eager.enabled and (follows_barrier or correction.old_logprobs is OldLogprobs.SNAPSHOT):
            self._prefix_tokens = correction.eager.prefix_tokens
        self._prefixes: PrefixSender | None = None
        if self._prefix_tokens or follows_barrier:
            self._prefixes = PrefixSender(
                segments,
                self._tally,
                worker=settings.worker,
                incarnation=settings.incarnation,
                every_tokens=self._prefix_tokens,
            )
        self._readiness = Readiness(settings.ready_file, self._spec.staleness.max_versions)
        self._is_draining = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._report_now = asyncio.Event()
        self._drain = asyncio.Event()
        self._end: asyncio.Future[_End] | None = None
        self._engine: InferenceEngine | None = None
        self._gate: Gate | None = None
        self._samples: SampleRunner | None = None
        self._threads: EnvironmentThreads | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._rates: deque[tuple[float, int]] = deque()
        self._serving_since: float | None = None
        self._opened_version: tuple[int, int] | None = None
        self._revision = 0
        self._message = "waiting for the first published version"
        self.end_reason = ""
        """Why `run` returned."""
        self._logger = logging.getLogger(__name__)

    def request_drain(self) -> None:
        """Stop cleanly: what SIGTERM asks for. Safe to call from a signal handler of the loop, and more than once."""
        self._drain.set()

    async def run(self) -> int:
        """Work until drained or poisoned; the process's exit code. The last state is written before it returns."""
        try:
            end = await self._run_until_ended()
            self.end_reason = end.reason
            self._is_draining = True
            self._readiness.end()
            if self._samples is not None:
                await self._samples.release_all()
            await self._report_end(end)
            return end.code
        finally:
            if self._threads is not None:
                self._threads.close()
            await self._shut_engine_down()

    async def _run_until_ended(self) -> _End:
        self._end = asyncio.get_running_loop().create_future()
        work = asyncio.create_task(self._work())
        try:
            return await self._end
        finally:
            await self._cancel(work)

    async def _report_end(self, end: _End) -> None:
        phase = WorkerPhase.STOPPED if end.code == EXIT_STOPPED else WorkerPhase.POISONED
        self._logger.log(
            logging.INFO if end.code == EXIT_STOPPED else logging.ERROR,
            "stopped",
            extra=fields(exit_code=end.code, reason=end.reason, tokens_generated=self._tally.tokens_generated),
        )
        try:
            async with asyncio.timeout(LAST_REPORT_SECONDS):
                state = self._state().model_copy(update={"phase": phase, "message": end.reason})
                await self._link.beat(worker_key(self._settings.worker), state)
        except (ProtocolError, TimeoutError) as error:
            self._logger.warning("the last state could not be written", extra=fields(error=str(error)))

    # -------------------------------------------------------------------------------------------------- start-up

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._spawn(group, self._report_loop())
            self._spawn(group, self._drain_loop())
            self._spawn(group, self._start(group))

    async def _start(self, group: asyncio.TaskGroup) -> None:
        spec = self._spec
        violations = await asyncio.to_thread(check_environment, spec.environment.name, spec.environment.parameters)
        if violations:
            raise SpecError(violations)
        model_dir = await self._fetch_model_files()
        renderer = await asyncio.to_thread(Renderer, model_dir)  # importing its library takes seconds
        self._message = "starting the engine"
        self._engine = engine = self._make_engine(model_dir)
        await engine.start()
        self._logger.info("engine started", extra=fields(model_directory=str(model_dir)))
        self._message = "loading the first version"

        self._gate = gate = Gate(engine, self._tally, time.monotonic, progress_tokens=self._prefix_tokens)
        swapper = Swapper(
            self._store, engine, gate, self._settings.cache_dir, engine_compute_type=self._engine_compute_type
        )
        self._threads = EnvironmentThreads(self._pool.max_concurrent_trajectories, spec.environment.timeout_seconds)
        self._samples = SampleRunner(
            self._queue,
            self._log,
            EpisodeParts(
                lambda seed: make_environment(spec.environment.name, spec.environment.parameters, seed),
                renderer,
                gate,
                self._threads,
                time.time,
            ),
            EpisodeSettings(
                spec.sampling.temperature,
                spec.sampling.max_tokens,
                spec.sampling.max_trajectory_tokens,
                self._settings.worker,
                self._settings.incarnation,
            ),
            self._tally,
            self._serving_version,
            lambda reason: self._stop(EXIT_RESTART, reason),
            max_concurrent=self._pool.max_concurrent_trajectories,
            max_attempts=spec.environment.max_attempts,
            extend_seconds=self._lease_seconds / 3,
            prefixes=self._prefixes,
        )
        followers = Followers(self._link, self._settings.job_names, self._events.put_nowait)
        barrier_timeout = self._machine.settings.barrier_timeout_seconds
        if barrier_timeout is not None:
            await followers.first_barrier()
            self._spawn(group, followers.barrier())
            self._spawn(group, followers.trainer(barrier_timeout))
        self._spawn(group, self._drive(swapper, group))
        self._spawn(group, followers.desired())
        self._spawn(group, followers.published())
        self._spawn(group, followers.settings(self._settings_changed))
        self._spawn(group, followers.coordinator(self._machine.settings.coordinator_timeout_seconds))
        self._spawn(group, followers.tick())
        self._spawn(group, self._samples.run())
        if self._prefixes is not None:
            self._spawn(group, self._prefixes.run())

    async def _fetch_model_files(self) -> Path:
        """Config and tokenizer of the newest published version, as soon as there is one.

        Waits for: the trainer's first version, and a store that has it. Unblocked by: a timer that looks again.
        """
        directory = self._settings.cache_dir / "model"
        directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + FIRST_VERSION_DEADLINE_SECONDS
        while time.monotonic() < deadline:
            try:
                seen = await self._link.read(KEY_PUBLISHED, PublishedVersion)
                if seen is not None:
                    manifest = await fetch_manifest(self._store, seen.value.manifest, self._settings.cache_dir)
                    await fetch_model_files(self._store, manifest, directory)
                    return directory
            except (StorageError, ProtocolError) as error:
                self._logger.warning("the model files could not be fetched", extra=fields(error=str(error)))
            await asyncio.sleep(FIRST_VERSION_SECONDS)
        raise DeadlineExceeded(
            f"the trainer published no version within {FIRST_VERSION_DEADLINE_SECONDS:g} s: look at its log"
        )

    def _serving_version(self) -> int | None:
        serving = self._machine.serving
        return None if serving is None else serving.version

    # --------------------------------------------------------------------------------- the machine and its effects

    async def _drive(self, swapper: Swapper, group: asyncio.TaskGroup) -> None:
        """Feed the machine, one event at a time, and start what it orders.

        Produces: effects.
        Consumes: events.
        Waits for: the next event.
        Unblocked by: followers of keys, ticks, the results of effects.
        """
        gate = self._gate
        assert gate is not None
        while True:
            event = await self._events.get()
            if isinstance(event, FetchFailed):
                self._logger.warning(
                    "version refused" if event.corrupt else "version could not be fetched",
                    extra=fields(weight_version=event.published.version, corrupt=event.corrupt, error=event.error),
                )
            if isinstance(event, HandOverFailed):
                self._logger.warning("open trajectories were not handed over", extra=fields(error=event.error))
            self._machine, effects = machine.step(self._machine, event, time.monotonic())
            gate.hold(self._machine.is_held)
            for effect in effects:
                match effect:
                    case Fetch(published):
                        self._answer(group, swapper.fetch(published))
                    case ShutGate():
                        self._answer(group, swapper.shut(self._machine.settings.gate_timeout_seconds * 0.9))
                    case HandOver():
                        self._answer(group, self._hand_over())
                    case Resume():
                        self._answer(group, swapper.resume())
                    case Apply(published):
                        self._answer(group, swapper.apply(published))
                    case Probe(published):
                        self._answer(group, swapper.probe(published))
                    case OpenGate():
                        self._opened()
                    case Poison(reason):
                        self._stop(EXIT_RESTART, reason)
                    case Report():
                        self._report_now.set()

    async def _hand_over(self) -> HandedOver | HandOverFailed:
        assert self._prefixes is not None
        try:
            await self._prefixes.hand_over()
        except (ProtocolError, StorageError) as error:
            return HandOverFailed(str(error))
        self._logger.info("open trajectories handed over", extra=fields(segments=self._tally.segments_sent))
        return HandedOver()

    def _answer(self, group: asyncio.TaskGroup, effect: Coroutine[object, object, Event]) -> None:
        async def run() -> None:
            self._events.put_nowait(await effect)

        self._spawn(group, run())

    def _spawn(self, group: asyncio.TaskGroup, work: Coroutine[object, object, None]) -> None:
        task = group.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        """Let a failure end the worker in order; raised in the group, it would cancel the others once, see `_cancel`."""
        try:
            await work
        except SpecError as error:
            self._stop(EXIT_CONFIGURATION, str(error))
        except RljobError as error:
            self._stop(EXIT_RESTART, str(error))
        except Exception as error:  # the top of every task: a defect ends the worker with a last state, and restarts it
            self._logger.exception("a task of the worker failed")
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            self._stop(EXIT_RESTART, f"{type(error).__name__}: {error}")

    def _opened(self) -> None:
        assert self._gate is not None
        assert self._samples is not None
        assert self._machine.serving is not None
        version = machine.identity(self._machine.serving)
        is_new = version != self._opened_version
        self._opened_version = version
        self._gate.open(is_interruption=is_new)
        if self._serving_since is None:
            self._serving_since = time.monotonic()
        self._message = ""
        self._samples.version_changed()
        if is_new and self._prefixes is not None:
            self._prefixes.version_changed()
        pauses = self._gate.pause_seconds
        self._logger.info(
            "version served" if is_new else "generation went on",
            extra=fields(
                weight_version=self._serving_version(),
                tokens_in_flight=self._gate.tokens_in_flight,
                pause_seconds=round(pauses[-1], 4) if pauses else None,
            ),
        )

    def _settings_changed(self, changed: JobSettings) -> None:
        self._readiness.max_versions = changed.staleness.max_versions
        settings = replace(self._machine.settings, coordinator_timeout_seconds=changed.coordinator_timeout_seconds)
        self._machine = replace(self._machine, settings=settings)

    # --------------------------------------------------------------------------------------------------- the end

    async def _drain_loop(self) -> None:
        """Produces: the end of the process. Consumes: a drain request. Waits for: that. Unblocked by: SIGTERM."""
        await self._drain.wait()
        self._logger.info("draining", extra=fields(episodes=self._samples.running if self._samples else 0))
        self._events.put_nowait(DrainRequested())
        self._is_draining = True
        self._readiness.end()
        self._report_now.set()
        if self._samples is not None and self._gate is not None:
            if not self._machine.is_gate_shut:  # else the engine may be busy with a swap
                try:
                    await self._gate.shut(DRAIN_SHUT_SECONDS)
                except (ProtocolError, EngineError) as error:
                    self._logger.warning("the engine did not pause for the drain", extra=fields(error=str(error)))
            await self._hand_over_last()
            await self._samples.stop_claiming(DRAIN_GRACE_SECONDS)
        self._stop(EXIT_STOPPED, "drained")

    async def _hand_over_last(self) -> None:
        """On the interruption route what a drained worker began can still be scored, whoever goes on with it."""
        if self._prefixes is None or self._machine.trainer is None:
            return
        try:
            async with asyncio.timeout(DRAIN_GRACE_SECONDS):
                await self._prefixes.hand_over()
        except (ProtocolError, StorageError, TimeoutError) as error:
            self._logger.warning("open trajectories were not handed over", extra=fields(error=str(error)))

    async def _cancel(self, work: asyncio.Task[None]) -> None:
        """Cancel until it is gone: in Python 3.11's wait_for, which the NATS client uses, a cancellation can get lost.

        Measured: a worker poisoned within milliseconds of its first version hung in its report of that moment.
        """
        work.cancel()
        while not (await asyncio.wait({work}, timeout=CANCEL_AGAIN_SECONDS))[0]:
            for task in (*self._tasks, *(self._samples.tasks if self._samples else ())):
                task.cancel()

    def _stop(self, code: int, reason: str) -> None:
        assert self._end is not None
        if code != EXIT_STOPPED and self._samples is not None:
            self._samples.engine_failed()
        if not self._end.done():
            self._end.set_result(_End(code, reason))

    async def _shut_engine_down(self) -> None:
        if self._engine is None:
            return
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await self._engine.shutdown()
        except (EngineError, TimeoutError) as error:
            self._logger.warning("the engine did not shut down", extra=fields(error=str(error)))

    # ---------------------------------------------------------------------------------------------------- reports

    async def _report_loop(self) -> None:
        """Produces: the worker's state. Consumes: counters. Waits for: a second. Unblocked by: a transition, too."""
        while True:
            self._report_now.clear()
            if not self._is_draining:
                self._readiness.update(self._machine.serving, self._machine.published)
            try:
                await self._link.beat(worker_key(self._settings.worker), self._state())
            except ProtocolError as error:  # an outage; the next report carries all that happened meanwhile
                self._logger.warning("the state could not be written", extra=fields(error=str(error)))
            try:
                async with asyncio.timeout(BEAT_SECONDS):  # wait_for of Python 3.11 can swallow a cancellation
                    await self._report_now.wait()
            except TimeoutError:
                continue

    def _state(self) -> WorkerState:
        now = time.monotonic()
        worker, gate, samples = self._machine, self._gate, self._samples
        self._tally.swaps_failed = int(worker.poisoned is not None)
        self._revision += 1
        self._rates.append((now, self._tally.tokens_generated))
        while now - self._rates[0][0] > RATE_WINDOW_SECONDS and len(self._rates) > 2:
            self._rates.popleft()
        (then, before), (_, after) = self._rates[0], self._rates[-1]
        serving = None if worker.poisoned is not None else worker.serving
        problems = (
            worker.poisoned or worker.last_error,
            samples.last_error if samples else "",
            self._message or machine.held_reason(worker, now),
        )
        return WorkerState(
            worker=self._settings.worker,
            pool=self._settings.pool,
            incarnation=self._settings.incarnation,
            revision=self._revision,
            phase=worker.phase,
            epoch=serving.epoch if serving else 0,
            serving_version=serving.version if serving else None,
            failed_version=worker.failed_version,
            unreadable=None if worker.unreadable is None else machine.identity(worker.unreadable),
            order=worker.order if serving else None,
            degraded=worker.degraded,
            in_flight=samples.running if samples else 0,
            counters=self._tally.counters(gate.tokens_in_flight, gate.held_seconds) if gate else WorkerCounters(),
            tokens_per_second=(after - before) / (now - then) if now > then else 0.0,
            idle_share=self._idle_share(now),
            pause_seconds=gate.pause_seconds if gate else (),
            barrier=worker.kept,
            segments_sequence=self._prefixes.last_sequence if self._prefixes else 0,
            trajectories_sequence=samples.last_sequence if samples else 0,
            message=next((problem for problem in problems if problem), ""),
        )

    def _idle_share(self, now: float) -> float:
        """Share of the time since the first version was served in which no request was in the engine."""
        if self._gate is None or self._serving_since is None or now <= self._serving_since:
            return 0.0
        return min(1.0, max(0.0, 1.0 - self._gate.busy_seconds / (now - self._serving_since)))
