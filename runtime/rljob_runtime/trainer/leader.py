"""Rank 0's dealings with the rest of the job, as plain blocking calls for the trainer's loop.

Everything asynchronous (NATS, blobs, the intake) lives on one background loop; each call here has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from rljob_api.correction import OldLogprobs
from rljob_api.diagnostics import AuditReport, Diagnostics
from rljob_api.errors import DeadlineExceeded, StorageError
from rljob_api.messages import (
    CheckpointPointer,
    EwmaReport,
    JobSettings,
    PoolReport,
    PublishedVersion,
    TrainerPhase,
    TrainerState,
)
from rljob_api.names import KEY_SETTINGS, KEY_TRAINER
from rljob_api.spec import RLJobSpec
from rljob_api.weights import ModelFile, Probe
from rljob_protocol.admission import DropReason
from rljob_protocol.link import Link
from rljob_protocol.streams import StepLog, TrajectoryLog
from rljob_runtime.correction.score_pool import Wanted
from rljob_runtime.correction.sources import Known
from rljob_runtime.trainer.ahead import Ahead
from rljob_runtime.trainer.background import Background
from rljob_runtime.trainer.barrier import BarrierKeeper
from rljob_runtime.trainer.batch import TrainBatch, build_batch
from rljob_runtime.trainer.checkpoint import CheckpointState, prune
from rljob_runtime.trainer.damage import DamageWatch
from rljob_runtime.trainer.dedicated import DedicatedWait
from rljob_runtime.trainer.eager import pool_report
from rljob_runtime.trainer.intake import Intake, Taken
from rljob_runtime.trainer.publisher import Publisher, oldest_version_needed
from rljob_runtime.trainer.record import RecordedRow, Recorder
from rljob_runtime.trainer.reporting import Seconds, step_report
from rljob_runtime.trainer.update import UpdateReport
from rljob_runtime.trajectory_codec import Trajectory
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.encode import encode_version
from rljob_runtime.weights.fetch import fetch_manifest, fetch_weights

T = TypeVar("T")

OUTAGE_SECONDS = 300.0
"""How long a call may take: NATS may be away for a while and come back."""
HEARTBEAT_SECONDS = 2.0
SETTINGS_SECONDS = 2.0
STREAM_FULL_SHARE = 0.7
STREAM_CHECK_SECONDS = 5.0
EAGER_ROUTES = (OldLogprobs.SNAPSHOT, OldLogprobs.INTERRUPTION)
GATHER_SECONDS = 0.1
"""How long a few tokens wait for more at most before they are scored ahead; less where a round takes less."""


class Leader:
    """What the loop needs of NATS and the blob store, on rank 0."""

    def __init__(
        self,
        *,
        background: Background,
        link: Link,
        publisher: Publisher,
        intake: Intake,
        store: BlobStore,
        cache: Path,
        tokens_trained: int,
        spec: RLJobSpec,
        model_files: Sequence[ModelFile],
        recorder: Recorder | None,
        logger: logging.Logger,
        world_size: int = 1,
        ahead: Ahead | None = None,
        barrier: BarrierKeeper | None = None,
        dedicated: DedicatedWait | None = None,
    ) -> None:
        self._background = background
        self._link = link
        self._publisher = publisher
        self._intake = intake
        self._store = store
        self._cache = cache
        self._tokens_trained = tokens_trained
        self._taken: Taken | None = None
        self._cursor = 0
        self._spec = spec
        self._model_files = tuple(model_files)
        self._recorder = recorder
        self._world_size = world_size
        self._ahead = ahead
        self._barrier = barrier
        self._dedicated = dedicated
        self._logger = logger
        self._steps = StepLog(link)
        self._log = TrajectoryLog(link)
        self._beat = 0
        self._state = TrainerState(
            epoch=publisher.epoch, beat=0, phase=TrainerPhase.STARTING, step=0, steps=spec.training.steps, version=0
        )
        self._max_versions = spec.staleness.max_versions
        self._round_began = self._round_seconds = 0.0
        self._stream_share = 0.0
        self._stream_checked = float("-inf")
        self._damage = DamageWatch(link, publisher.epoch, self._waits_with, logger)
        self.stop_requested = False
        """Set by the signal handler; the loop stops at the next order."""

    @property
    def epoch(self) -> int:
        return self._publisher.epoch

    def start(self) -> None:
        """Begin to take in trajectories, admit groups and send heartbeats."""
        self._background.call(self._intake.recover(), deadline_seconds=OUTAGE_SECONDS)
        if self._barrier is not None:
            self._call(self._barrier.recover())
        self._background.start(self._intake.run())
        self._background.start(self._heartbeats())
        self._background.start(self._follow_settings())
        self._background.start(self._damage.run())
        if self._dedicated is not None:
            self._background.start(self._dedicated.run())

    def phase(self, phase: TrainerPhase, step: int, version: int) -> None:
        """What the next heartbeats say."""
        self._background.check()
        self._state = self._state.model_copy(update={"phase": phase, "step": step, "version": version})

    def next_work(
        self, version: int, stored: Sequence[int], wait_seconds: float
    ) -> tuple[TrainBatch | None, list[Wanted]]:
        """The next step's batch; or, while it is not there, rows to score ahead; neither when there is none in time.

        Args:
            version: that the policy holds.
            stored: versions that it could be switched to.
            wait_seconds: how long to wait for either.
        """
        correction = self._spec.correction
        if not correction.eager.enabled or correction.old_logprobs not in EAGER_ROUTES:
            return self.next_batch(version, wait_seconds), []

        async def rows() -> list[Wanted]:
            return self._intake.rows_ahead(version, stored, budget)

        budget = self._spec.training.tokens_per_micro_batch * self._world_size
        batch = self.next_batch(version, wait_seconds, lambda: bool(self._intake.rows_ahead(version, stored, 1)))
        if batch is not None:
            return batch, []
        found = self._call(rows())
        if found and sum(row.tokens.shape[0] for row in found) < budget // 2:
            # A forward for each message that comes would score the same prefixes again and again.
            batch = self.next_batch(version, min(GATHER_SECONDS, self._round_seconds))
            found = [] if batch is not None else self._call(rows())
        self._round_began = time.monotonic()
        return batch, found

    def next_batch(
        self, version: int, wait_seconds: float, unless: Callable[[], bool] = lambda: False
    ) -> TrainBatch | None:
        """The next step's batch, or None when its groups are not there in time, or once `unless` holds."""
        taken = self._background.call(
            self._intake.next_batch(wait_seconds, unless), deadline_seconds=wait_seconds + OUTAGE_SECONDS
        )
        if taken is None:
            return None
        self._taken = taken

        def known_of(trajectory: Trajectory) -> Known | None:
            ahead = taken.ahead.get((trajectory.header.task, trajectory.header.sample))
            return None if ahead is None else ahead.known

        self._max_versions = taken.max_versions
        return build_batch(
            taken.groups,
            version=version,
            max_versions=taken.max_versions,
            advantage=self._spec.training.advantage,
            staleness_of=taken.staleness.__getitem__,
            known_of=known_of,
        )

    def scored(self, rows: Sequence[Wanted], logprobs: Sequence[NDArray[np.float32]]) -> None:
        """Values of rows that were scored ahead."""
        self._round_seconds = time.monotonic() - self._round_began
        if self._ahead is not None:
            self._call(self._ahead.store(rows, logprobs))

    def quiesce(self, version: int) -> None:
        """Begin the barrier before an update of the resident version."""
        if self._barrier is not None:
            self._call(self._barrier.quiesce(version))

    def barrier_is_over(self, wait_seconds: float) -> bool:
        """Whether the workers have handed over, or the barrier's time is up; waits for it a while."""
        return self._barrier is None or self._call(self._barrier.is_over(wait_seconds, give_up=self.stop_requested))

    def unscored(self, version: int) -> list[Wanted]:
        """All tokens of the resident version that have no value, for the scoring behind the barrier."""
        return [] if self._ahead is None else self._call(self._ahead.unscored(version))

    def update_begins(self, scored_behind_barrier: int) -> None:
        """The resident version is about to be gone."""
        if self._ahead is not None:
            self._call(self._ahead.hold(None))
        if self._barrier is not None and self._barrier.report is not None:
            self._barrier.report = self._barrier.report.model_copy(update={"tokens_scored": scored_behind_barrier})

    def waiting_tokens(self, version: int) -> dict[int, int]:
        """Tokens that wait for a step and may still train once `version` is published, by their weight version."""
        return self._call(self._intake.waiting_tokens(version))

    def fetch_version(self, version: int) -> Path | None:
        """The published bytes of a retained version, for a snapshot that memory no longer holds; None when gone."""
        published = self._publisher.retained.get(version)
        if published is None:
            return None
        return self._call(self._fetch(published))

    async def _fetch(self, published: PublishedVersion) -> Path | None:
        try:
            manifest = await fetch_manifest(self._store, published.manifest, self._cache)
            return await fetch_weights(self._store, manifest, self._cache)
        except StorageError as error:
            self._logger.warning(
                "retained version could not be fetched",
                extra={"weight_version": published.version, "error": str(error)},
            )
            return None

    def publish(
        self, state: Mapping[str, Tensor], probe: Probe, *, version: int, step: int, final: bool
    ) -> PublishedVersion:
        """Make a version's bytes durable and announce it."""
        encoded = encode_version(
            state,
            epoch=self.epoch,
            version=version,
            compute_type=self._spec.training.compute_type.value,
            model_files=self._model_files,
            probe=probe,
        )
        if self._recorder is not None:
            self._recorder.add_version(encoded, step=step)
        published = self._background.call(
            self._publisher.publish(encoded, step=step, final=final), deadline_seconds=OUTAGE_SECONDS
        )
        if self._ahead is not None:
            self._call(self._ahead.hold(version))
        if self._barrier is not None:
            self._call(self._barrier.release())
        self._logger.info(
            "weight version published",
            extra={"weight_version": version, "epoch": self.epoch, "payload_bytes": encoded.manifest.num_bytes},
        )
        return published

    def is_damaged(self, version: int) -> bool:
        """Whether workers find the stored bytes of this version, the newest, damaged while the trainer waits for them."""
        return bool(self._damage.workers_without(version))

    def restore(self, state: Mapping[str, Tensor], *, version: int) -> None:
        """Store the bytes of the version published last again.

        Raises:
            StorageError: `state` is not what was published.
        """
        self._logger.warning(
            "stored weight version is damaged; it is stored again",
            extra={"weight_version": version, "workers": list(self._damage.workers_without(version))},
        )
        self._call(self._publisher.restore(state))
        self._damage.restored(version)

    def step_trained(self, version: int, update: UpdateReport) -> None:
        """Count the step's tokens, and let the intake admit the groups that the step makes room for."""
        self._tokens_trained += update.tokens_trained
        self._call(self._intake.drop(update.tokens_over_bound, str(DropReason.STALE)))
        missed = self._spec.correction.old_logprobs is OldLogprobs.INTERRUPTION
        reason = "MissedBarrier" if missed else "MissingOldLogprob"
        self._call(self._intake.drop(update.tokens_missing, reason))
        self._call(self._intake.step_trained(version))

    def report(
        self,
        *,
        step: int,
        version: int,
        batch: TrainBatch,
        update: UpdateReport,
        ewma: EwmaReport | None,
        audit: AuditReport | None,
        diagnostics: Diagnostics,
        rate: float,
        seconds: Seconds,
    ) -> None:
        """Put the step's report on the steps stream and the step into the record."""
        taken = self._taken
        if taken is None:
            raise ValueError("a step is reported that had no batch")
        report = step_report(
            epoch=self.epoch,
            step=step,
            version=version,
            route=self._spec.correction.old_logprobs.value,
            rate=rate,
            taken=taken,
            update=update,
            ewma=ewma,
            audit=audit,
            diagnostics=diagnostics,
            groups_without_variance=batch.groups_without_variance,
            tokens_trained=self._tokens_trained,
            totals=self._call(self._intake.totals()),
            queues=self._call(self._intake.queue_depths()),
            seconds=seconds,
            pool=self._pool_report(batch, taken),
            barrier=None if self._barrier is None else self._barrier.report,
            now=time.time(),
            dedicated=None if self._dedicated is None else self._dedicated.report,
        )
        if self._recorder is not None:
            self._recorder.add_step(
                step=step, epoch=self.epoch, version_start=batch.version, rows=_recorded(taken, batch, update)
            )
        self._call(self._steps.append(report))
        self._logger.info(
            "step trained",
            extra={"step": step, "reward": round(report.reward, 4), "staleness_p95": report.staleness.p95},
        )

    def _pool_report(self, batch: TrainBatch, taken: Taken) -> PoolReport | None:
        if self._ahead is None or self._dedicated is not None:  # the latter has a report of its own
            return None
        discarded, num_bytes = self._call(self._ahead.totals())
        return pool_report(batch, taken.ahead, discarded=discarded, num_bytes=num_bytes)

    def stream_is_filling(self) -> bool:
        """True at 70 % of the trajectory stream's bound: a checkpoint cuts it before it blocks the workers."""
        now = time.monotonic()
        if now - self._stream_checked >= STREAM_CHECK_SECONDS:
            self._stream_checked = now
            self._stream_share = self._call(self._intake.stream_share())
        return self._stream_share >= STREAM_FULL_SHARE

    def checkpoint_state(self, *, version: int, step: int) -> CheckpointState:
        """What goes into a checkpoint besides weights and optimizer."""
        ledger, self._cursor = self._call(self._intake.snapshot())
        totals = self._call(self._intake.totals())
        counters: dict[str, JsonValue] = {
            "tokensTrained": self._tokens_trained,
            "tokensDropped": dict(totals.dropped),
            "tokensReceived": dict(totals.received),
            "receivedUpTo": totals.received_up_to,
            "rolledBack": list(totals.rolled_back),
        }
        return CheckpointState(epoch=self.epoch, version=version, step=step, ledger=ledger, counters=counters)

    def checkpointed(self, root: Path, name: str, *, version: int, step: int) -> None:
        """Point to a finished checkpoint, then let go of what no replay from it needs."""
        pointer = CheckpointPointer(epoch=self.epoch, version=version, step=step, directory=name, cursor=self._cursor)
        self._call(self._publisher.point_to_checkpoint(pointer))
        prune(root, keep=self._spec.storage.checkpoint.keep, current=name)
        self._call(self._log.cut(self._cursor))
        if self._dedicated is not None:
            self._call(self._dedicated.forget(self._cursor))
        oldest = oldest_version_needed(self._publisher.retained, checkpoint_step=step, max_versions=self._max_versions)
        deleted = self._call(self._publisher.keep_versions_from(oldest))
        self._stream_checked = float("-inf")
        self._logger.info("checkpoint written", extra={"step": step, "cursor": self._cursor, "blobs_deleted": deleted})

    def finish(self, *, finished: bool) -> None:
        """Say that this trainer trains nothing more."""
        self._state = self._state.model_copy(
            update={"phase": TrainerPhase.FINISHED, "message": "" if finished else "stopped in order"}
        )
        self._call(self._send_heartbeat())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._background.call(coroutine, deadline_seconds=OUTAGE_SECONDS)

    async def _send_heartbeat(self) -> None:
        self._beat += 1
        said: dict[str, object] = {"beat": self._beat}
        if self._dedicated is not None and self._dedicated.message:
            said["message"] = self._dedicated.message
        await self._link.beat(KEY_TRAINER, self._state.model_copy(update=said))

    async def _follow_settings(self) -> None:
        """Live fields of the spec, as the operator writes them."""
        async for seen in self._link.follow(KEY_SETTINGS, JobSettings, interval_seconds=SETTINGS_SECONDS):
            await self._intake.use(seen.value.staleness)

    def _waits_with(self) -> int | None:
        return self._state.version if self._state.phase is TrainerPhase.WAITING else None

    async def _heartbeats(self) -> None:
        while True:
            try:
                await self._send_heartbeat()
            except DeadlineExceeded as error:
                self._logger.warning("heartbeat was not written", extra={"error": str(error)})
            await asyncio.sleep(HEARTBEAT_SECONDS)


def _recorded(taken: Taken, batch: TrainBatch, update: UpdateReport) -> list[RecordedRow]:
    trajectories = [trajectory for group in taken.groups for trajectory in group]
    return [
        RecordedRow(
            trajectory=trajectory,
            old_logprobs=values.old_logprobs,
            old_source=values.source,
            target_logprobs=values.target_logprobs,
            advantages=row.advantages,
            loss_mask=row.trainable,
        )
        for trajectory, row, values in zip(trajectories, batch.rows, update.records, strict=True)
    ]
