"""The leader's side of NATS: one coordinator a running job, and what its training reports.

Per job, while it is wanted:

    produces    the coordinator's orders; `Progress` for the next pass
    consumes    the job's control and liveness keys, its step reports
    waits for   NATS; a connection that fails is tried again after a pause
    unblocked by  hints and timers inside the coordinator
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import nats.errors
import nats.js.errors

from rljob_api.errors import Fenced, RljobError
from rljob_api.messages import CheckpointPointer, JobSettings, PublishedVersion, StepReport, TrainerState
from rljob_api.names import KEY_CHECKPOINT, KEY_PUBLISHED, KEY_SETTINGS, KEY_TRAINER, JobNames
from rljob_api.spec import RLJobSpec
from rljob_api.status import CheckpointStatus, FinalModelStatus
from rljob_operator.core.observed import Identity, Progress
from rljob_protocol.coordination import CoordinatorHost
from rljob_protocol.coordinator import CoordinatorSettings
from rljob_protocol.deadlines import end, within
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.streams import StepLog

LOOK_SECONDS = 1.0
RECONNECT_SECONDS = 5.0
CONNECT_SECONDS = 10.0
CHECK_SECONDS = 10.0

RestartPod = Callable[[str, str, str], Awaitable[None]]
"""(namespace, pod, reason)"""


@dataclass
class _Job:
    identity: Identity
    spec: RLJobSpec
    url: str
    task: asyncio.Task[None] | None = None
    progress: Progress = field(default_factory=Progress)
    beat: tuple[int, int] | None = None
    """(epoch, beat) of the trainer's heartbeat."""


class Coordination:
    """All jobs of this operator.

    `changed(namespace, name)` asks for a pass; `owner()` names this installation on what it creates in NATS.
    """

    def __init__(
        self,
        *,
        default_url: str,
        credentials: Path | None,
        restart_pod: RestartPod,
        changed: Callable[[str, str], None],
        owner: Callable[[], str],
        wall_clock: Callable[[], datetime],
        logger: logging.Logger,
    ) -> None:
        self._default_url = default_url
        self._credentials = credentials
        self._restart_pod = restart_pod
        self._changed = changed
        self._owner = owner
        self._wall_clock = wall_clock
        self._logger = logger
        self._jobs: dict[str, _Job] = {}
        self._gone: dict[str, float] = {}
        """uid of jobs whose state was deleted -> when."""
        self._orphans: set[str] = set()
        """uids that the last sweep found without an RLJob."""

    @property
    def running(self) -> int:
        """Coordinators that run."""
        return sum(job.task is not None and not job.task.done() for job in self._jobs.values())

    def progress(self, uid: str) -> Progress:
        """What is known of a job."""
        if uid in self._gone:
            return Progress(state_is_gone=True)
        job = self._jobs.get(uid)
        return Progress() if job is None else job.progress

    async def want(self, identity: Identity, spec: RLJobSpec) -> None:
        """Run a coordinator for the job, with the settings of this spec."""
        self._gone.pop(identity.uid, None)
        job = self._jobs.get(identity.uid)
        if job is not None and job.task is not None and not job.task.done():
            if (job.spec.weight_sync, job.spec.staleness) == (spec.weight_sync, spec.staleness):
                job.spec = spec
                return
            await end(job.task)  # the new one claims the next term, and tells the pods what changed
        job = job or _Job(identity, spec, spec.messaging.url or self._default_url)
        job.identity, job.spec = identity, spec
        job.task = asyncio.create_task(self._run(job), name=f"coordinate {identity.namespace}/{identity.name}")
        self._jobs[identity.uid] = job

    async def unwant(self, uid: str) -> None:
        """Stop the job's coordinator; what it last reported stays known until `forget`."""
        job = self._jobs.get(uid)
        if job is not None and job.task is not None:
            await end(job.task)
            job.task = None
            job.progress = replace(job.progress, coordination=None)

    async def forget(self, uid: str) -> None:
        """The RLJob is gone."""
        await self.unwant(uid)
        self._jobs.pop(uid, None)
        self._gone.pop(uid, None)

    async def delete_state(self, identity: Identity, url: str | None) -> None:
        """Delete the job's streams and buckets. Where NATS does not answer, `progress` says so."""
        await self.unwant(identity.uid)
        where = url or self._default_url
        job = self._jobs.setdefault(identity.uid, _Job(identity, spec=None, url=where))  # type: ignore[arg-type]
        try:
            link = await self._connect(JobNames(identity.uid), where)
            try:
                await link.delete_state(deadline_seconds=CHECK_SECONDS)
            finally:
                await link.close()
        except RljobError as error:
            self._unreachable(job, str(error))
            return
        self._jobs.pop(identity.uid, None)
        self._gone[identity.uid] = time.monotonic()
        self._logger.info("NATS state deleted", extra={"rljob": f"{identity.namespace}/{identity.name}"})

    async def sweep(self, known: Callable[[], frozenset[str]]) -> int:
        """Delete what is left on the operator's server of jobs that are gone: those whose deletion NATS did not see.

        Only state that this installation created, and that two looks a while apart found without an RLJob: `known()`
        gives the uids that there are. Returns how many jobs it removed.

        Raises:
            RljobError: NATS does not answer.
        """
        link = await self._connect(JobNames("sweep"), self._default_url)
        try:
            owned = {names.uid for names in await link.jobs_of(self._owner(), deadline_seconds=CHECK_SECONDS)}
        finally:
            await link.close()
        orphans = owned - known()
        doomed, self._orphans = orphans & self._orphans, orphans
        for uid in doomed:
            link = await self._connect(JobNames(uid), self._default_url)
            try:
                await link.delete_state(deadline_seconds=CHECK_SECONDS)
            finally:
                await link.close()
            self._logger.warning("NATS state of a job that is gone was removed", extra={"uid": uid})
        return len(doomed)

    async def stop(self) -> None:
        """Stop all coordinators."""
        for uid in list(self._jobs):
            await self.unwant(uid)

    # ---------------------------------------------------------------------------------------------------------- one job

    async def _run(self, job: _Job) -> None:
        while True:
            try:
                link = await self._connect(JobNames(job.identity.uid), job.url)
                try:
                    await link.ensure_state(
                        StateLimits.of(job.spec), owner=self._owner(), deadline_seconds=CHECK_SECONDS
                    )
                    await _tell_settings(link, job)
                    await self._coordinate(job, link)
                finally:
                    await link.close()
            except (RljobError, ExceptionGroup, nats.errors.Error, OSError) as error:
                cause: BaseException = error
                while isinstance(cause, BaseExceptionGroup):
                    cause = cause.exceptions[0]
                if isinstance(cause, Fenced):
                    self._logger.warning("coordinator fenced", extra=self._fields(job, error=str(cause)))
                else:
                    self._unreachable(job, str(cause) or type(cause).__name__)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _coordinate(self, job: _Job, link: Link) -> None:
        async def restart(worker: str, _incarnation: str, reason: str) -> None:
            self._logger.warning("worker restart", extra=self._fields(job, worker=worker, reason=reason))
            await self._restart_pod(job.identity.namespace, worker, reason)

        async def check(published: PublishedVersion) -> str | None:
            if job.spec.storage.weights.persistent_volume_claim is not None:
                return None  # a volume of the pods' own: workers look for themselves
            return await _manifest_is_missing(link, published)

        host = CoordinatorHost(
            link,
            settings=CoordinatorSettings(timeout_seconds=job.spec.weight_sync.timeout_seconds),
            check_manifest=check,
            restart_worker=restart,
            logger=self._logger,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(host.run())
            tasks.create_task(self._follow_steps(job, link))
            tasks.create_task(self._look(job, link, host))

    async def _follow_steps(self, job: _Job, link: Link) -> None:
        async for report in StepLog(link).follow():
            self._stepped(job, report)

    def _stepped(self, job: _Job, report: StepReport) -> None:
        before = job.progress.step
        if before is None or (report.epoch, report.step) >= (before.epoch, before.step):
            job.progress = replace(job.progress, step=report)

    async def _look(self, job: _Job, link: Link, host: CoordinatorHost) -> None:
        while True:
            began = self._wall_clock()
            state = await link.read_live(KEY_TRAINER, TrainerState)
            checkpoint = await link.read(KEY_CHECKPOINT, CheckpointPointer)
            published = await link.read(KEY_PUBLISHED, PublishedVersion)
            was_away, had_final = not job.progress.reachable, job.progress.final_model is not None
            if state is not None and (state.epoch, state.beat) != job.beat:
                job.beat = (state.epoch, state.beat)
                job.progress = replace(job.progress, heartbeat_at=self._wall_clock())
            final = published is not None and published.value.final
            job.progress = replace(
                job.progress,
                known_since=job.progress.known_since or began,
                read_at=began,
                reachable=True,
                unreachable_since=None,
                unreachable_because="",
                coordination=host.summary(),
                checkpoint=None if checkpoint is None else _checkpoint(job, checkpoint.value),
                final_model=_final(job, published.value.version) if published is not None and final else None,
            )
            if was_away or (final and not had_final):
                self._changed(job.identity.namespace, job.identity.name)
            await asyncio.sleep(LOOK_SECONDS)

    async def _connect(self, names: JobNames, url: str) -> Link:
        return await Link.connect(
            names,
            url,
            client_name="rljob-operator",
            credentials=self._credentials,
            deadline_seconds=CONNECT_SECONDS,
            logger=self._logger,
        )

    def _unreachable(self, job: _Job, because: str) -> None:
        since = job.progress.unreachable_since or self._wall_clock()
        was_reachable = job.progress.reachable
        job.progress = replace(job.progress, reachable=False, unreachable_since=since, unreachable_because=because)
        self._logger.warning("NATS not reached", extra=self._fields(job, error=because))
        if was_reachable:
            self._changed(job.identity.namespace, job.identity.name)

    def _fields(self, job: _Job, **more: object) -> dict[str, object]:
        return {"rljob": f"{job.identity.namespace}/{job.identity.name}", **more}


async def _tell_settings(link: Link, job: _Job) -> None:
    """The live fields of the spec, to trainer and workers; an older generation never replaces a newer one."""
    wanted = JobSettings(
        generation=job.identity.generation,
        staleness=job.spec.staleness,
        coordinator_timeout_seconds=job.spec.weight_sync.coordinator_timeout_seconds,
    )
    held = await link.read(KEY_SETTINGS, JobSettings, deadline_seconds=CHECK_SECONDS)
    if held is not None and held.value.generation >= wanted.generation:
        return
    await link.write(
        KEY_SETTINGS,
        wanted,
        expected_revision=None if held is None else held.revision,
        deadline_seconds=CHECK_SECONDS,
    )


def _folder(job: _Job) -> str:
    claim = job.spec.storage.checkpoint.persistent_volume_claim
    return f"pvc://{claim.claim_name}/{job.identity.name}" if claim is not None else f"emptydir://{job.identity.name}"


def _checkpoint(job: _Job, pointer: CheckpointPointer) -> CheckpointStatus:
    return CheckpointStatus(version=pointer.version, step=pointer.step, uri=f"{_folder(job)}/{pointer.directory}")


def _final(job: _Job, version: int) -> FinalModelStatus:
    return FinalModelStatus(version=version, uri=f"{_folder(job)}/final")


async def _manifest_is_missing(link: Link, published: PublishedVersion) -> str | None:
    """None where the manifest is there."""
    try:
        store = await within(CHECK_SECONDS, link.jetstream.object_store(link.names.blob_bucket))
        await within(CHECK_SECONDS, store.get_info(published.manifest.name))
    except (nats.js.errors.NotFoundError, nats.js.errors.ObjectNotFoundError):
        return f"the manifest {published.manifest.name} of version {published.version} is not in the blob store"
    except (nats.errors.Error, TimeoutError, OSError) as error:
        return f"the manifest of version {published.version} could not be looked for: {error or type(error).__name__}"
    return None
