"""`rljob run`: a whole job on one machine, as the same processes that pods run.

produces    processes (nats-server, trainer, rollout workers), steps.jsonl, workers.jsonl, summary.json, report.html
consumes    step reports and worker states from NATS, exits of processes, signals
waits for   the trainer's end, polled five times a second
unblocked by  the last step, a failed trainer, a spent restart budget, Ctrl-C
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import textwrap
import time
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from rljob import processes
from rljob.live import LiveView, plain_line, render
from rljob.run_directory import RunDirectory, RunInfo
from rljob.summary import Summary, as_text, summarise
from rljob.tended_server import TendedServer
from rljob.worker_slots import Slot, WorkerSlots
from rljob_api import names
from rljob_api.errors import DeadlineExceeded, RljobError, SpecError, StorageFull
from rljob_api.messages import PublishedVersion, StepReport, WorkerState
from rljob_api.spec import RLJob
from rljob_api.validate import ignored_locally
from rljob_protocol.coordination import CoordinatorHost, ManifestCheck
from rljob_protocol.coordinator import CoordinatorSettings
from rljob_protocol.deadlines import end, within
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.server import free_port
from rljob_protocol.streams import StepLog, TrajectoryLog

POLL_SECONDS = 0.2
TRAINER_GRACE_SECONDS = 60.0
WORKER_GRACE_SECONDS = 30.0
MIN_FREE_BYTES = 512 << 20
SAVE_WORKERS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Command-line options of `rljob run`."""

    nats_port: int | None = None
    record_bytes: int = 1 << 30
    plain: bool = False


class LocalRun:
    """One run from start to report."""

    def __init__(self, job: RLJob, directory: RunDirectory, info: RunInfo, options: RunOptions, out: TextIO) -> None:
        self._job = job
        self._directory = directory
        self._info = info
        self._options = options
        self._out = out
        self._names = names.JobNames(info.uid)
        self._logger = logging.getLogger("rljob.run")
        self._server = TendedServer(
            directory.nats,
            port=options.nats_port,
            max_payload_bytes=job.spec.messaging.max_payload_bytes,
            say=self._say,
        )
        self._trainer: processes.Child | None = None
        self._slots = WorkerSlots(
            "rollout worker",
            {pool.name: 1 if pool.replicas is None else pool.replicas for pool in job.spec.rollout_pools},
            max_restarts=job.spec.failure_policy.max_restarts,
            start=partial(self._start_worker, module="rljob_runtime.rollout"),
            say=self._say,
        )
        old_policy = job.spec.old_policy_pool
        self._old_policy_slots = WorkerSlots(
            "old-policy worker",
            {} if old_policy is None else {names.OLD_POLICY_POOL: old_policy.replicas},
            max_restarts=job.spec.failure_policy.max_restarts,
            start=partial(self._start_worker, module="rljob_runtime.old_policy"),
            say=self._say,
        )
        self._steps: list[StepReport] = directory.read_steps()
        self._workers: dict[tuple[str, str], WorkerState] = {
            (state.worker, state.incarnation): state for state in directory.read_workers()
        }
        self._workers_saved_at = 0.0
        self._unread: dict[str, int] = {}
        self._stop_signals = 0
        self._started_at = time.monotonic()
        self._live: Live | None = None

    async def run(self) -> tuple[int, Summary]:
        """(exit code, summary): 0 finished, 1 failed, 130 interrupted. Leaves no process behind.

        Raises:
            RljobError: the run could not be started.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        failure: str | None = None
        finished = False
        try:
            self._server.start()
            link = await Link.connect(self._names, self._server.url, client_name="rljob-run", logger=self._logger)
            try:
                await link.ensure_state(StateLimits.of(self._job.spec))
                finished, failure = await self._supervised(link)
                await self._collect_last_words(link)
            finally:
                await link.close()
        finally:
            self._stop_children()
            self._server.stop()
        summary = self._write_results(finished)
        if failure is not None:
            self._say(f"rljob: the run failed: {failure}")
            return 1, summary
        return (0 if finished else 130), summary

    # -------------------------------------------------------------------------------------------------------- running

    async def _supervised(self, link: Link) -> tuple[bool, str | None]:
        """(all steps are trained, why the run failed)."""
        sync = self._job.spec.weight_sync
        host = CoordinatorHost(
            link,
            settings=CoordinatorSettings(timeout_seconds=sync.timeout_seconds),
            check_manifest=self._manifest_check(link),
            restart_worker=self._restart_worker,
            logger=self._logger,
            on_workers=self._note_workers,
        )
        coordinating = asyncio.create_task(host.run())
        following = asyncio.create_task(self._follow_steps(link, host))
        self._trainer = self._start_trainer()
        try:
            with self._live_view(host):
                failure = await self._supervise(coordinating, following)
            if failure is None and self._stop_signals == 0:
                await self._catch_up(link)
            final = None if failure is not None else await link.read(names.KEY_PUBLISHED, PublishedVersion)
            await asyncio.to_thread(self._stop_children)
            await asyncio.sleep(0.2)
            # Without a server there are no last words to read, and the failure must not be hidden by that.
            with contextlib.suppress(DeadlineExceeded):
                self._note_workers(await link.live_workers())
            return failure is None and final is not None and final.value.final, failure
        finally:
            await end(coordinating, following)
            await asyncio.gather(coordinating, following, return_exceptions=True)

    async def _supervise(self, *own: asyncio.Task[None]) -> str | None:
        """Until the trainer ends or the run is told to stop; the reason when it failed."""
        while True:
            for task in own:
                if not task.done():
                    continue
                error = None if task.cancelled() else task.exception()
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                return f"{type(error).__name__}: {error}" if error else "a task of the run ended, and nobody ended it"
            if self._stop_signals:
                self._say("stopping: the trainer checkpoints, the workers hand over (Ctrl-C again kills)")
                await self._stop_trainer()
                return None
            if (failure := await self._server.tend(f"rljob run --resume {self._directory.root}")) is not None:
                return failure
            trainer = self._trainer
            if trainer is not None and (code := trainer.exit_code()) is not None:
                if code == 0:
                    return None
                reason = trainer.last_said("trainer failed")
                if reason is not None:
                    return f"the trainer ended with {code}: {reason} (see {trainer.log})"
                return f"the trainer ended with {code}; the end of {trainer.log}:\n{textwrap.indent(trainer.tail(), '    ')}"
            for slots in (self._slots, self._old_policy_slots):
                if (failure := slots.tend()) is not None:
                    return failure
            await asyncio.sleep(POLL_SECONDS)

    async def _restart_worker(self, worker: str, incarnation: str, reason: str) -> None:
        self._slots.kill(worker, incarnation, reason)

    async def _stop_trainer(self) -> None:
        if self._trainer is None:
            return
        self._trainer.signal(signal.SIGTERM)
        deadline = time.monotonic() + TRAINER_GRACE_SECONDS
        while self._trainer.exit_code() is None and time.monotonic() < deadline and self._stop_signals < 2:
            await asyncio.sleep(POLL_SECONDS)

    def _stop_children(self) -> None:
        def in_a_hurry() -> bool:
            return self._stop_signals > 1

        workers = [*self._slots.children, *self._old_policy_slots.children]
        processes.stop_all(workers, grace_seconds=WORKER_GRACE_SECONDS, in_a_hurry=in_a_hurry)
        if self._trainer is not None:
            processes.stop_all([self._trainer], grace_seconds=WORKER_GRACE_SECONDS, in_a_hurry=in_a_hurry)
        # torchrun gives each rank a session of its own: when it was killed its ranks are still there.
        processes.kill_marked(names.ENV_UID, self._info.uid)
        self._slots.forget()
        self._old_policy_slots.forget()

    def _on_signal(self) -> None:
        self._stop_signals += 1

    # ------------------------------------------------------------------------------------------------------ processes

    def _start_trainer(self) -> processes.Child:
        trainer = self._job.spec.trainer
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=static"),
            f"--nproc-per-node={trainer.replicas * trainer.processes_per_replica}",
            *("--master-addr=127.0.0.1", f"--master-port={free_port()}", "--max-restarts=0"),
            f"--shutdown-timeout={TRAINER_GRACE_SECONDS:.0f}",
            f"--log-dir={self._directory.logs / 'torchrun'}",  # else it leaves a folder in the system's temporary one
            *("-m", "rljob_runtime.trainer.main"),
        ]
        environment = self._environment("trainer") | {
            names.ENV_CHECKPOINT_DIR: str(self._directory.checkpoints),
            names.ENV_RECORD_BYTES: str(self._options.record_bytes),
        }
        if self._options.record_bytes > 0:
            environment[names.ENV_RECORD_DIR] = str(self._directory.record)
        return processes.start("trainer", command, environment, self._directory.logs / "trainer.log")

    def _start_worker(self, slot: Slot, *, module: str) -> processes.Child:
        environment = self._environment(slot.worker) | {
            names.ENV_WORKER: slot.worker,
            names.ENV_POOL: slot.pool,
            names.ENV_INCARNATION: slot.incarnation,
        }
        command = [sys.executable, "-m", module]
        return processes.start(slot.worker, command, environment, self._directory.logs / f"{slot.worker}.log")

    def _environment(self, process: str) -> dict[str, str]:
        cache = self._directory.cache(process)
        cache.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONUNBUFFERED": "1",
            names.ENV_CONFIG: str(self._directory.job_file.resolve()),
            names.ENV_UID: self._info.uid,
            names.ENV_NATS_URL: self._server.url,
            names.ENV_CACHE_DIR: str(cache.resolve()),
            names.ENV_ATTEMPT: str(self._info.attempts),
        }
        if self._job.spec.storage.weights.persistent_volume_claim is not None:
            environment[names.ENV_WEIGHTS_DIR] = str(self._directory.weights.resolve())
        return environment

    def _manifest_check(self, link: Link) -> ManifestCheck:
        from rljob_runtime.weights.choose import blob_store
        from rljob_runtime.weights.fetch import fetch_manifest

        volume = self._job.spec.storage.weights.persistent_volume_claim is not None
        store = blob_store(link, self._directory.weights if volume else None)

        async def check(published: PublishedVersion) -> str | None:
            try:
                await fetch_manifest(store, published.manifest, self._directory.cache("coordinator"))
            except RljobError as error:
                return str(error)
            return None

        return check

    # -------------------------------------------------------------------------------------------- what the run reports

    async def _follow_steps(self, link: Link, host: CoordinatorHost) -> None:
        known = {(step.epoch, step.step) for step in self._steps}
        async for report in StepLog(link).follow():
            if (report.epoch, report.step) in known:
                continue
            known.add((report.epoch, report.step))
            self._add_step(report)
            if self._live is None:
                self._say(plain_line(report, host.summary(), self._job.spec.training.steps))

    def _add_step(self, report: StepReport) -> None:
        self._steps = [step for step in self._steps if step.step < report.step]
        self._steps.append(report)
        with self._directory.steps_file.open("ab") as file:
            file.write(report.to_bytes() + b"\n")

    async def _catch_up(self, link: Link) -> None:
        """The last reports may still be on the stream when the trainer has ended."""
        try:
            reports = await StepLog(link).read_all()
        except DeadlineExceeded:
            return
        deadline = time.monotonic() + 5.0
        wanted = max((report.step for report in reports), default=0)
        while time.monotonic() < deadline and (not self._steps or self._steps[-1].step < wanted):
            await asyncio.sleep(0.05)

    def _note_workers(self, workers: tuple[WorkerState, ...]) -> None:
        known = len(self._workers)
        for state in workers:
            key = (state.worker, state.incarnation)
            held = self._workers.get(key)
            if held is None or state.revision > held.revision:
                self._workers[key] = state
        # Not only at the end: after a kill -9 of this process a resume still knows who generated what.
        if len(self._workers) > known or time.monotonic() - self._workers_saved_at >= SAVE_WORKERS_SECONDS:
            self._workers_saved_at = time.monotonic()
            self._directory.write_workers(list(self._workers.values()))

    async def _collect_last_words(self, link: Link) -> None:
        """Trajectories that the trainer never read: they are in flight at the end."""
        from rljob_runtime.trajectory_codec import decode_trajectory

        if not self._server.is_running():
            return
        log = TrajectoryLog(link)
        read = self._steps[-1].last_sequence if self._steps else 0
        last = await log.last_sequence()
        unread: Counter[str] = Counter()
        if last > read:

            async def collect() -> None:
                async for sequence, data in log.read(read):
                    with contextlib.suppress(RljobError):
                        trajectory = decode_trajectory(data)
                        header = trajectory.header
                        unread[f"{header.worker}/{header.incarnation}"] += trajectory.num_model_tokens
                    if sequence >= last:
                        break

            with contextlib.suppress(TimeoutError):
                await within(10, collect())
        self._unread = dict(unread)

    def _write_results(self, finished: bool) -> Summary:
        self._directory.write_workers(list(self._workers.values()))
        summary = summarise(
            self._info.name,
            finished=finished,
            steps=self._steps,
            workers=list(self._workers.values()),
            unread=self._unread,
            seconds=time.monotonic() - self._started_at,
            worker_restarts=self._slots.restarts + self._old_policy_slots.restarts,
        )
        self._directory.summary_file.write_text(summary.model_dump_json(by_alias=True, indent=2) + "\n")
        return summary

    def _live_view(self, host: CoordinatorHost) -> contextlib.AbstractContextManager[object]:
        console = Console(file=self._out)
        if self._options.plain or not console.is_terminal:
            return contextlib.nullcontext()

        def picture() -> object:
            return render(
                LiveView(
                    name=self._info.name,
                    total_steps=self._job.spec.training.steps,
                    steps=self._steps,
                    coordination=host.summary(),
                    seconds=time.monotonic() - self._started_at,
                )
            )

        self._live = Live(console=console, get_renderable=picture, refresh_per_second=4)  # type: ignore[arg-type]
        return self._live

    def _say(self, text: str) -> None:
        if self._live is not None and self._live.is_started:
            # As it is: a log's `[rank0]` is no markup.
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)


def new_run(job: RLJob, root: Path | None, options: RunOptions, out: TextIO) -> int:
    """Start a new run; returns the exit code.

    Raises:
        RljobError: it cannot be started.
    """
    _check_environment(job)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = RunDirectory(root or Path("runs") / f"{job.metadata.name}-{stamp}")
    _check_room(directory.root)
    with directory.locked():
        info = directory.create(job, uuid.uuid4().hex[:12])
        return _run(job, directory, info, options, out)


def resume_run(root: Path, options: RunOptions, out: TextIO) -> int:
    """Go on with a run from its last checkpoint; returns the exit code.

    Raises:
        RljobError: this is not the folder of a run.
    """
    directory = RunDirectory(root)
    directory.read_info()
    _check_room(root)
    with directory.locked():
        held = directory.read_info()
        info = replace(held, attempts=held.attempts + 1)
        directory.write_info(info)
        # A run that was killed may have left processes that are still ending.
        processes.kill_marked(names.ENV_UID, info.uid)
        return _run(directory.read_job(), directory, info, options, out)


def _run(job: RLJob, directory: RunDirectory, info: RunInfo, options: RunOptions, out: TextIO) -> int:
    # The saved job has every default written out, and would name fields that nobody set.
    ignored = ignored_locally(job) if info.attempts == 1 else ()
    if ignored:
        print(f"rljob run ignores: {', '.join(ignored)}", file=out)
    if any(pool.engine.simulated is not None for pool in job.spec.rollout_pools):
        print("note: a SIMULATED engine is used; this is a test of the protocol, not of inference", file=out)
    print(f"run: {directory.root} (logs in {directory.logs})", file=out, flush=True)
    from rljob_protocol import logs

    logs.configure("run", directory.logs / "run.log")
    run = LocalRun(job, directory, info, options, out)
    code, summary = asyncio.run(run.run())
    print(as_text(summary), file=out)
    if summary.steps:
        from rljob.report import write_report

        write_report([directory], directory.report_file)
        print(f"  report         {directory.report_file}", file=out)
    if code != 0 and summary.steps:
        print(f"  go on with     rljob run --resume {directory.root}", file=out, flush=True)
    return code


def _check_environment(job: RLJob) -> None:
    from rljob_runtime.environments.factory import check_environment

    environment = job.spec.environment
    violations = check_environment(environment.name, environment.parameters)
    path = job.spec.model.path
    if path is not None:
        from rljob_runtime.model_source import check_model_path

        check_model_path(Path(path))
    if violations:
        raise SpecError(violations)


def _check_room(root: Path) -> None:
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < MIN_FREE_BYTES:
        raise StorageFull(
            f"{place} has {free >> 20} MiB free, a run needs at least {MIN_FREE_BYTES >> 20}: choose another --run-dir"
        )
