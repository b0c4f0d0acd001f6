"""Leases on samples, and the episodes that work them off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext

from rljob_api.errors import EngineError, EnvironmentFailure, MalformedMessage, ProtocolError, RljobError
from rljob_api.messages import Task
from rljob_protocol.logs import fields
from rljob_protocol.streams import ClaimedTask, TaskQueue, TrajectoryLog
from rljob_runtime.rollout.episode import EpisodeParts, EpisodeSettings, failed_trajectory, run_episode
from rljob_runtime.rollout.prefixes import PrefixSender
from rljob_runtime.rollout.tally import Reason, Tally
from rljob_runtime.trajectory_codec import encode_trajectory

CLAIM_AT_ONCE = 8
"""Leases asked for in one go: few enough that one worker does not take what its neighbours wait for."""
CLAIM_WAIT_SECONDS = 0.5
HOLD_SECONDS = 15.0
"""How long a lease is kept for the version it needs, before another worker may have it."""
RELEASE_SECONDS = 0.5
"""Delay of a lease given back because this worker serves too old a version."""
APPEND_DEADLINE_SECONDS = 30.0
RELEASE_DEADLINE_SECONDS = 5.0


class SampleRunner:
    """Runs as many episodes at once as the pool allows.

    Produces: trajectories, each appended to the log before its task is acknowledged.
    Consumes: tasks, one lease a sample, extended while the episode runs.
    Waits for: room for an episode; the version that a task needs; room in the trajectory log.
    Unblocked by: the end of an episode; `version_changed`; the trainer cutting the log off; `stop_claiming`.
    """

    def __init__(
        self,
        queue: TaskQueue,
        log: TrajectoryLog,
        parts: EpisodeParts,
        settings: EpisodeSettings,
        tally: Tally,
        serving_version: Callable[[], int | None],
        fail: Callable[[str], None],
        *,
        max_concurrent: int,
        max_attempts: int,
        extend_seconds: float,
        prefixes: PrefixSender | None = None,
    ) -> None:
        self._queue = queue
        self._log = log
        self._parts = parts
        self._settings = settings
        self._tally = tally
        self._serving_version = serving_version
        self._fail = fail
        self._max_concurrent = max_concurrent
        self._max_attempts = max_attempts
        self._extend_seconds = extend_seconds
        self._prefixes = prefixes
        self._leases: dict[asyncio.Task[None], ClaimedTask] = {}
        self._delivering: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._extending: asyncio.Task[None] | None = None
        self._is_claiming = True
        self._claims_ended = asyncio.Event()
        self._end_reason = Reason.DRAINED
        self._logger = logging.getLogger(__name__)
        self.last_error = ""
        self.last_sequence = 0
        """Of the newest trajectory of this worker on the log."""

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """What runs for it, episodes and all."""
        return (*self._leases, *(() if self._extending is None else (self._extending,)))

    @property
    def running(self) -> int:
        """Samples held: episodes that run or wait for their version."""
        return len(self._leases)

    def version_changed(self) -> None:
        """Another version is served: leases that wait for it may start."""
        self._notify()

    async def run(self) -> None:
        """Until cancelled; `release_all` gives the leases back then.

        Calls `fail` when an episode finds the engine dead, or every environment thread hanging.
        """
        async with asyncio.TaskGroup() as group:
            self._extending = group.create_task(self._extend_leases())
            await self._claim(group)

    async def stop_claiming(self, grace_seconds: float) -> None:
        """Take no new lease, and let trajectories that are finished already reach the log."""
        self._is_claiming = False
        self._notify()
        await self._claims_ended.wait()
        if self._delivering:
            await asyncio.wait(self._delivering, timeout=grace_seconds)

    def engine_failed(self) -> None:
        """From here on, tokens of unfinished episodes end because of the engine."""
        self._end_reason = Reason.ENGINE_FAILED

    async def release_all(self) -> None:
        """Give back what is unfinished, within a deadline; leases that it misses run out by themselves."""
        releases = [asyncio.create_task(self._release(lease, 0.0)) for lease in self._leases.values()]
        releases.append(asyncio.create_task(self._queue.release_unclaimed()))
        self._leases.clear()
        _, late = await asyncio.wait(releases, timeout=RELEASE_DEADLINE_SECONDS)
        for release in late:
            release.cancel()

    async def _claim(self, group: asyncio.TaskGroup) -> None:
        while self._is_claiming:
            room = self._max_concurrent - len(self._leases)
            if room <= 0 or self._serving_version() is None:
                await self._change(1.0)
                continue
            try:
                claimed = await self._queue.claim(min(room, CLAIM_AT_ONCE), CLAIM_WAIT_SECONDS)
            except ProtocolError as error:  # an outage: episodes in hand go on meanwhile
                self._logger.warning("tasks could not be claimed", extra=fields(error=str(error)))
                await self._change(1.0)
                continue
            for lease in claimed:
                task = group.create_task(self._work(lease), name=f"sample {lease.task.task}/{lease.task.sample}")
                self._leases[task] = lease
                task.add_done_callback(self._ended)
        self._claims_ended.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._delivering.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._leases.pop(task, None)  # else it is given back with the others, at the end
        self._notify()

    async def _work(self, lease: ClaimedTask) -> None:
        try:
            if not await self._version_served(lease.task.min_version):
                await self._release(lease, RELEASE_SECONDS)
            elif await self._play(lease):
                await self._acknowledge(lease)
        except RljobError as error:
            self._fail(str(error))
            await self._release(lease, 0.0)

    async def _play(self, lease: ClaimedTask) -> bool:
        """One attempt at a sample; whether it has ended for good, so that the task can be acknowledged."""
        prefixes = self._prefixes
        with (
            self._parts.gate.partial() as partial,
            nullcontext() if prefixes is None else prefixes.following(lease.task, lease.attempt, partial),
        ):
            try:
                trajectory = await run_episode(lease.task, lease.attempt, partial, self._parts, self._settings)
                data = encode_trajectory(trajectory)
                await self._append(lease.task, data)
            except EnvironmentFailure as error:
                self._tally.environment_failures += 1
                self._tally.drop(Reason.ENVIRONMENT_FAILED, partial.num_model_tokens)
                failure = str(error)
            except MalformedMessage as error:
                self._tally.malformed += 1
                self._tally.drop(Reason.MALFORMED, partial.num_model_tokens)
                failure = str(error)
            except asyncio.CancelledError:
                self._tally.drop(self._end_reason, partial.num_model_tokens)
                raise
            except EngineError:
                self._tally.drop(Reason.ENGINE_FAILED, partial.num_model_tokens)
                self.engine_failed()  # the other episodes are about to be cancelled for the same reason
                raise
            except RljobError:  # every environment thread hangs
                self._tally.drop(Reason.ENVIRONMENT_FAILED, partial.num_model_tokens)
                raise
            else:
                self._tally.tokens_delivered += trajectory.num_model_tokens
                self._tally.trajectories += 1
                return True
        return await self._after_failure(lease, failure)

    async def _after_failure(self, lease: ClaimedTask, failure: str) -> bool:
        task = lease.task
        self.last_error = failure
        self._logger.warning(
            "an episode failed",
            extra=fields(task=task.task, sample=task.sample, attempt=lease.attempt, error=failure),
        )
        if lease.attempt < self._max_attempts:
            await self._release(lease, min(30.0, 0.5 * 2.0**lease.attempt))
            return False
        now = self._parts.wall_clock()
        trajectory = failed_trajectory(task, lease.attempt, self._settings, failure, now)
        await self._append(task, encode_trajectory(trajectory))
        return True

    async def _append(self, task: Task, data: bytes) -> None:
        current = asyncio.current_task()
        assert current is not None
        self._delivering.add(current)
        while True:
            try:
                sequence = await self._log.append(
                    task.task, task.sample, data, deadline_seconds=APPEND_DEADLINE_SECONDS
                )
                self.last_sequence = max(self.last_sequence, sequence)
                return
            except ProtocolError as error:  # an outage, or a full log: the lease is extended while we wait
                self._logger.warning(
                    "a trajectory waits for the log", extra=fields(task=task.task, sample=task.sample, error=str(error))
                )
                await asyncio.sleep(1.0)

    async def _acknowledge(self, lease: ClaimedTask) -> None:
        try:
            await lease.ack()
        except ProtocolError as error:  # the trajectory is stored: a second one would count as its duplicate
            self._logger.warning(
                "a task could not be acknowledged", extra=fields(task=lease.task.task, error=str(error))
            )

    async def _release(self, lease: ClaimedTask, delay_seconds: float) -> None:
        try:
            await lease.release(delay_seconds)
        except ProtocolError as error:  # it runs out by itself
            self._logger.warning(
                "a lease could not be given back", extra=fields(task=lease.task.task, error=str(error))
            )

    async def _extend_leases(self) -> None:
        while True:
            await asyncio.sleep(self._extend_seconds)
            for lease in list(self._leases.values()):
                try:
                    await lease.extend()
                except ProtocolError as error:
                    self._logger.warning("leases could not be extended", extra=fields(error=str(error)))
                    break

    async def _version_served(self, min_version: int) -> bool:
        """Wait a while for the version; False if it did not come."""
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                while (version := self._serving_version()) is None or version < min_version:
                    await self._change(HOLD_SECONDS)
        except TimeoutError:
            return False
        return True

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _change(self, timeout_seconds: float) -> None:
        """Something changed, or the time is up."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return
