"""Rank 0's dealings with the rest of the job, as plain blocking calls for the trainer's loop.

Everything asynchronous (NATS, blobs, the intake) lives on one background loop; each call here has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rljob_api.errors import DeadlineExceeded
from rljob_api.messages import CheckpointPointer, PublishedVersion, StepReport, TrainerPhase, TrainerState
from rljob_api.names import KEY_TRAINER
from rljob_api.spec import RLJobSpec
from rljob_api.weights import ModelFile, Probe
from rljob_protocol.link import Link
from rljob_protocol.streams import StepLog, TrajectoryLog
from rljob_runtime.trainer.background import Background
from rljob_runtime.trainer.intake import Group, Intake, IntakeTotals
from rljob_runtime.trainer.publisher import Publisher, oldest_version_needed
from rljob_runtime.trainer.record import RecordedRow, Recorder
from rljob_runtime.weights.encode import encode_version

T = TypeVar("T")

OUTAGE_SECONDS = 300.0
"""How long a call may take: NATS may be away for a while and come back."""
HEARTBEAT_SECONDS = 2.0
STREAM_FULL_SHARE = 0.7
STREAM_CHECK_SECONDS = 5.0


class Leader:
    """What the loop needs of NATS and the blob store, on rank 0."""

    def __init__(
        self,
        *,
        background: Background,
        link: Link,
        publisher: Publisher,
        intake: Intake,
        spec: RLJobSpec,
        model_files: Sequence[ModelFile],
        recorder: Recorder | None,
        logger: logging.Logger,
    ) -> None:
        self._background = background
        self._link = link
        self._publisher = publisher
        self._intake = intake
        self._spec = spec
        self._model_files = tuple(model_files)
        self._recorder = recorder
        self._logger = logger
        self._steps = StepLog(link)
        self._log = TrajectoryLog(link)
        self._beat = 0
        self._state = TrainerState(
            epoch=publisher.epoch, beat=0, phase=TrainerPhase.STARTING, step=0, steps=spec.training.steps, version=0
        )
        self._stream_share = 0.0
        self._stream_checked = float("-inf")
        self.stop_requested = False
        """Set by the signal handler; the loop stops at the next order."""

    @property
    def epoch(self) -> int:
        return self._publisher.epoch

    def start(self) -> None:
        """Begin to take in trajectories, admit groups and send heartbeats."""
        self._background.start(self._intake.run())
        self._background.start(self._heartbeats())

    def phase(self, phase: TrainerPhase, step: int, version: int) -> None:
        """What the next heartbeats say."""
        self._background.check()
        self._state = self._state.model_copy(update={"phase": phase, "step": step, "version": version})

    def next_batch(self, wait_seconds: float) -> tuple[Group, ...] | None:
        """Groups of the next step, or None when they are not there in time."""
        return self._background.call(
            self._intake.next_batch(wait_seconds), deadline_seconds=wait_seconds + OUTAGE_SECONDS
        )

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
        self._logger.info(
            "weight version published",
            extra={"weight_version": version, "epoch": self.epoch, "payload_bytes": encoded.manifest.num_bytes},
        )
        return published

    def step_trained(self, version: int) -> None:
        """Let the intake admit the groups that the trained step makes room for."""
        self._call(self._intake.step_trained(version))

    def count_dropped(self, tokens: int, reason: str) -> None:
        """Count model tokens that left a batch untrained."""
        self._call(self._intake.drop(tokens, reason))

    def totals(self) -> IntakeTotals:
        """Where the model tokens are."""
        return self._call(self._intake.totals())

    def queue_depths(self) -> tuple[int, int]:
        """(tasks waiting or leased, trajectories received and not yet trained); (-1, n) while NATS is away."""
        try:
            return self._call(self._intake.queue_depths())
        except DeadlineExceeded:
            return -1, 0

    def append_report(self, report: StepReport) -> None:
        """Put the step's report on the steps stream."""
        self._call(self._steps.append(report))

    def record_step(
        self, *, step: int, version_start: int, rows: Sequence[RecordedRow], source_names: Mapping[int, str]
    ) -> None:
        """Keep the step for `rljob verify`, if a record is wanted."""
        if self._recorder is not None:
            self._recorder.add_step(
                step=step, epoch=self.epoch, version_start=version_start, rows=rows, source_names=source_names
            )

    @property
    def keeps_record(self) -> bool:
        return self._recorder is not None

    def stream_is_filling(self) -> bool:
        """True at 70 % of the trajectory stream's bound: a checkpoint cuts it before it blocks the workers."""
        now = time.monotonic()
        if now - self._stream_checked >= STREAM_CHECK_SECONDS:
            self._stream_checked = now
            self._stream_share = self._call(self._intake.stream_share())
        return self._stream_share >= STREAM_FULL_SHARE

    def ledger(self) -> tuple[dict[str, object], int]:
        """The admission ledger for a checkpoint, and the cursor below which the stream may be cut."""
        return self._call(self._intake.snapshot())

    def checkpointed(self, directory: Path, *, version: int, step: int, cursor: int) -> None:
        """Point to a finished checkpoint, then let go of what no replay from it needs."""
        pointer = CheckpointPointer(
            epoch=self.epoch, version=version, step=step, directory=directory.name, cursor=cursor
        )
        self._call(self._publisher.point_to_checkpoint(pointer))
        self._call(self._log.cut(cursor))
        oldest = oldest_version_needed(
            version=version, step=step, checkpoint_step=step, max_versions=self._spec.staleness.max_versions
        )
        deleted = self._call(self._publisher.keep_versions_from(oldest))
        self._stream_checked = float("-inf")
        self._logger.info("checkpoint written", extra={"step": step, "cursor": cursor, "blobs_deleted": deleted})

    def finish(self, *, step: int, version: int) -> None:
        """Say that nothing more will be trained."""
        self.phase(TrainerPhase.FINISHED, step, version)
        self._call(self._send_heartbeat())

    def close(self) -> None:
        """Stop the background loop and leave NATS."""
        self._background.cancel_tasks()
        try:
            self._background.call(self._link.close(), deadline_seconds=10.0)
        finally:
            self._background.stop()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._background.call(coroutine, deadline_seconds=OUTAGE_SECONDS)

    async def _send_heartbeat(self) -> None:
        self._beat += 1
        await self._link.beat(KEY_TRAINER, self._state.model_copy(update={"beat": self._beat}))

    async def _heartbeats(self) -> None:
        while True:
            try:
                await self._send_heartbeat()
            except DeadlineExceeded as error:
                self._logger.warning("heartbeat was not written", extra={"error": str(error)})
            await asyncio.sleep(HEARTBEAT_SECONDS)
