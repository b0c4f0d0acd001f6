"""Rank 0's side of the sample flow: admits groups, publishes their tasks, takes in trajectories, hands out batches.

The rules are the pure ledger's (`rljob_protocol.admission`); this shell holds the payloads and does the I/O.

    produces    tasks (as the ledger admits), batches (to the trainer's main thread)
    consumes    the trajectory stream, by cursor
    waits for   trajectories; room on the task stream
    unblocked by  a message on the stream, a trained step, or the one-second timer that lets stragglers expire
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from rljob_api.errors import DeadlineExceeded, MalformedMessage
from rljob_api.messages import Outcome, Task
from rljob_api.spec import RLJobSpec, Staleness
from rljob_protocol import admission
from rljob_protocol.admission import AdmissionSettings, BatchGroup, Ledger, SampleSeen, Verdict
from rljob_protocol.streams import TaskQueue, TrajectoryLog
from rljob_runtime.correction.score_pool import Key, Wanted
from rljob_runtime.trainer.ahead import Ahead, TakenAhead
from rljob_runtime.trajectory_codec import Trajectory, decode_trajectory

UNKNOWN_TASK = -1
"""Stands for a message that names no admitted sample, so that the cursor passes it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The groups of one step, taken out of the ledger."""

    groups: tuple[tuple[Trajectory, ...], ...]
    """Scored samples of each group, in sample order."""
    staleness: dict[int, int]
    """Version -> staleness, for all versions in the groups."""
    max_versions: int
    """The bound that they were taken under."""
    sequences: dict[tuple[int, int], int] = field(default_factory=dict)
    """(task, sample) -> sequence of its message on the trajectory stream."""
    ahead: dict[Key, TakenAhead] = field(default_factory=dict)
    """What was scored ahead of the step; empty where the route does not."""


@dataclass(frozen=True, slots=True)
class IntakeTotals:
    """Model tokens by their end, as far as the trainer sees them."""

    received: dict[str, int]
    """By worker incarnation."""
    received_up_to: int
    """Sequence that `received` covers."""
    dropped: dict[str, int]
    pending: int
    """Received and neither trained nor dropped yet."""
    last_sequence: int
    rolled_back: tuple[int, ...] = ()
    """Sequences that may be read again and whose tokens `dropped` counts as RolledBack."""


NOTHING = IntakeTotals(received={}, received_up_to=0, dropped={}, pending=0, last_sequence=0)


def admission_settings(spec: RLJobSpec) -> AdmissionSettings:
    """The ledger's settings as the spec gives them."""
    training = spec.training
    return AdmissionSettings(
        tasks_per_step=training.tasks_per_step,
        samples_per_task=spec.sampling.samples_per_task,
        max_versions=spec.staleness.max_versions,
        on_exceeded=spec.staleness.on_exceeded,
        min_group_size=training.min_group_size or spec.sampling.samples_per_task,
        straggler_timeout_seconds=training.straggler_timeout_seconds,
        steps=training.steps,
    )


def task_seed(job_seed: int, task: int) -> int:
    """Seed of a task's environment instance: a pure function of (job seed, admission number), below 2**31."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{task}".encode()).digest()[:4], "big") >> 1


class Intake:
    """Lives on the background loop; the main thread reaches it through `Background.call` only."""

    def __init__(
        self,
        *,
        spec: RLJobSpec,
        epoch: int,
        ledger: Ledger,
        cursor: int,
        totals: IntakeTotals,
        tasks: TaskQueue,
        log: TrajectoryLog,
        logger: logging.Logger,
        ahead: Ahead | None = None,
        may_train: Callable[[Taken], bool] = lambda _: True,
    ) -> None:
        """`ledger`, `cursor` and `totals` are those of the checkpoint: the stream is read from behind the cursor.

        A batch that is ready is asked about by `may_train`, again and again until it may go.
        """
        self._settings = admission_settings(spec)
        self._seed = spec.training.seed
        self._epoch = epoch
        self._ledger = ledger
        self._tasks = tasks
        self._log = log
        self._logger = logger
        self._ahead = ahead
        self._may_train = may_train
        self._payloads: dict[tuple[int, int], Trajectory] = {}
        self._early: dict[tuple[int, int], tuple[int, Trajectory]] = {}
        self._dropped: Counter[str] = Counter(totals.dropped)
        self._received: Counter[str] = Counter(totals.received)
        self._received_up_to = totals.received_up_to
        self._rolled_back = set(totals.rolled_back)
        self._last_sequence = cursor
        self._changed = asyncio.Condition()

    async def recover(self) -> None:
        """After a resume: take in what the stream holds beyond the checkpoint, then re-publish only what is missing.

        A sample whose trajectory is on the stream is not rolled out again; one whose task is still queued or leased is
        refused as a duplicate by the task stream. Samples that are queued and not admitted any more are withdrawn: their
        numbers come again, with another version that they need.
        """
        withdrawn = await self._tasks.withdraw(self._ledger.next_task)
        if withdrawn:
            self._logger.info("tasks of an earlier attempt withdrawn", extra={"tasks": withdrawn})
        last = await self._log.last_sequence()
        if last > self._last_sequence:
            async for sequence, data in self._log.read(self._last_sequence):
                self._take_in(sequence, data)
                if sequence >= last:
                    break
        for task, sample in admission.outstanding(self._ledger, self._settings):
            await self._publish(task, sample)

    async def run(self) -> None:
        """Take in and pace until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ingest())
            group.create_task(self._pace())
            if self._ahead is not None:
                group.create_task(self._ahead.run(self._is_open, self._notify))

    async def next_batch(self, wait_seconds: float, unless: Callable[[], bool] = lambda: False) -> Taken | None:
        """Groups of the next step, oldest first; None when they are not there within `wait_seconds`, or once `unless` holds."""
        deadline = time.monotonic() + wait_seconds
        while True:
            ledger, batch = admission.take_batch(self._ledger, self._settings, time.monotonic())
            if batch is not None:
                taken = self._taken(batch)
                # Until it may go it stays in the ledger: a stop in between puts it into the checkpoint, untrained.
                if self._may_train(taken):
                    self._ledger = ledger
                    return self._take_out(taken)
            remaining = deadline - time.monotonic()
            if remaining <= 0 or unless():
                return None
            await self._change(min(remaining, 1.0))

    def _taken(self, batch: Sequence[BatchGroup]) -> Taken:
        groups = tuple(tuple(self._payloads[(group.task, sample)] for sample in group.samples) for group in batch)
        versions = {version for group in groups for trajectory in group for version in trajectory.versions}
        return Taken(
            groups,
            {v: admission.staleness_of(self._ledger, v) for v in sorted(versions)},
            self._settings.max_versions,
            {
                (group.task, sample): self._ledger.groups[group.task].samples[sample].sequence
                for group in batch
                for sample in group.samples
            },
        )

    def _take_out(self, taken: Taken) -> Taken:
        """A batch that goes, with what was scored ahead of it."""
        for key in taken.sequences:
            del self._payloads[key]
        if self._ahead is None:
            return taken
        ahead = self._ahead.take(trajectory for group in taken.groups for trajectory in group)
        self._forget(task for task, _ in taken.sequences)
        return replace(taken, ahead=ahead)

    def rows_ahead(self, resident: int, stored: Collection[int], token_budget: int) -> list[Wanted]:
        """What is best scored while no batch is ready; on the background loop only."""
        if self._ahead is None:
            return []
        whole = {
            task for task, group in self._ledger.groups.items() if len(group.samples) >= self._settings.samples_per_task
        }
        return self._ahead.rows(resident, stored, token_budget, without=whole)

    async def read_up_to(self, trajectory: int, segment: int, wait_seconds: float) -> bool:
        """Wait until both streams were read up to these messages; False when they were not in time."""
        deadline = time.monotonic() + wait_seconds
        while self._last_sequence < trajectory or (self._ahead is not None and self._ahead.last_segment < segment):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            await self._change(remaining)
        return True

    async def use(self, staleness: Staleness) -> None:
        """A bound and a rule that changed while the job runs; they hold from the next batch on."""
        settings = replace(self._settings, max_versions=staleness.max_versions, on_exceeded=staleness.on_exceeded)
        if settings != self._settings:
            self._logger.info(
                "staleness settings changed",
                extra={"max_versions": staleness.max_versions, "on_exceeded": staleness.on_exceeded.value},
            )
            self._settings = settings
            await self._notify()

    async def step_trained(self, version: int) -> None:
        """A step was trained and published as `version`: later groups may be admitted."""
        self._ledger = admission.on_step_trained(self._ledger, self._settings, version)
        await self._notify()

    async def drop(self, tokens: int, reason: str) -> None:
        """Count model tokens that left a batch untrained."""
        if tokens:
            self._dropped[reason] += tokens

    async def totals(self) -> IntakeTotals:
        """Where the tokens are, for the step report."""
        pending = sum(t.num_model_tokens for t in self._payloads.values())
        pending += sum(t.num_model_tokens for _, t in self._early.values())
        return IntakeTotals(
            received=dict(self._received),
            received_up_to=self._received_up_to,
            dropped=dict(self._dropped),
            pending=pending,
            last_sequence=self._last_sequence,
            rolled_back=tuple(sorted(self._rolled_back)),
        )

    async def waiting_tokens(self, version: int) -> dict[int, int]:
        """Received tokens that may still train once the present step is published as `version`, by weight version."""
        coming = self._ledger
        if version != coming.version:
            coming = admission.on_step_trained(coming, self._settings, version)
        counted: Counter[int] = Counter()
        for trajectory in (*self._payloads.values(), *(early for _, early in self._early.values())):
            counted.update(trajectory.weight_version[trajectory.turn >= 0].tolist())
        bound = self._settings.max_versions
        return {made: tokens for made, tokens in counted.items() if admission.staleness_of(coming, made) <= bound}

    async def snapshot(self) -> tuple[dict[str, object], int]:
        """The ledger for a checkpoint, and the cursor below which the stream may be cut."""
        cursor = min((admission.cursor(self._ledger), *(sequence - 1 for sequence, _ in self._early.values())))
        self._rolled_back = {sequence for sequence in self._rolled_back if sequence > cursor}
        return admission.ledger_to_json(self._ledger), cursor

    async def queue_depths(self) -> tuple[int, int]:
        """(tasks waiting or leased, trajectories received and not yet trained)."""
        return await self._tasks.depth(), len(self._payloads)

    async def stream_share(self) -> float:
        """Used share of the trajectory stream's bound."""
        used, limit = await self._log.usage()
        return used / limit if limit else 0.0

    async def _ingest(self) -> None:
        async for sequence, data in self._log.read(self._last_sequence):
            self._take_in(sequence, data)
            await self._notify()

    async def _pace(self) -> None:
        while True:
            await self._expire()
            await self._admit()
            await self._change(1.0)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _change(self, timeout_seconds: float) -> None:
        """Something changed, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait()

    async def _admit(self) -> None:
        self._ledger, admitted = admission.admit(self._ledger, self._settings)
        for group in admitted:
            for sample in range(self._settings.samples_per_task):
                early = self._early.pop((group.task, sample), None)
                if early is not None and self._fits(early[1]):
                    self._accept(*early)
                    continue
                if early is not None:
                    self._roll_back(*early)
                await self._publish(group.task, sample)

    def _roll_back(self, sequence: int, trajectory: Trajectory) -> None:
        self._dropped["RolledBack"] += trajectory.num_model_tokens
        self._rolled_back.add(sequence)

    def _fits(self, trajectory: Trajectory) -> bool:
        """Whether a sample that was finished before its admission is fresh enough; else it is rolled out again."""
        versions, task = trajectory.versions, trajectory.header.task
        return not versions or admission.fits_slot(self._ledger, self._settings, task, versions[0])

    async def _publish(self, task: int, sample: int) -> None:
        message = Task(
            task=task,
            sample=sample,
            epoch=self._epoch,
            min_version=admission.min_version_of(self._ledger, self._settings, task),
            seed=task_seed(self._seed, task),
        )
        while True:
            try:
                await self._tasks.publish(message)
            except DeadlineExceeded as error:
                # The messaging server is away: an admitted sample is never forgotten, so this waits for its return.
                self._logger.warning("task was not published", extra={"task": task, "error": str(error)})
            else:
                return

    async def _expire(self) -> None:
        self._ledger, dropped = admission.expire(self._ledger, self._settings, time.monotonic())
        for group in dropped:
            tokens = 0
            for sample in group.samples:
                payload = self._payloads.pop((group.task, sample), None)
                tokens += payload.num_model_tokens if payload is not None else 0
            self._forget((group.task,))
            self._dropped[str(group.reason)] += tokens
            self._logger.info(
                "group dropped", extra={"task": group.task, "reason": str(group.reason), "tokens": tokens}
            )

    def _take_in(self, sequence: int, data: bytes) -> None:
        self._last_sequence = sequence
        try:
            trajectory = decode_trajectory(data)
            _check_rewards(trajectory)
        except MalformedMessage as error:
            self._dropped["Malformed"] += 0
            self._logger.warning("trajectory refused", extra={"sequence": sequence, "error": str(error)})
            self._pass(sequence)
            return
        if sequence in self._rolled_back:
            self._pass(sequence)
            return
        header = trajectory.header
        again = sequence <= self._received_up_to
        if not again:
            self._received_up_to = sequence
            self._received[f"{header.worker}/{header.incarnation}"] += trajectory.num_model_tokens
        if header.task >= self._ledger.next_task:
            # Finished under a trainer that died after its last checkpoint: its number will be admitted again. Of two,
            # the first was rolled back by that trainer, and rolled out anew.
            first = self._early.pop((header.task, header.sample), None)
            if first is not None:
                self._roll_back(*first)
            self._early[(header.task, header.sample)] = (sequence, trajectory)
            return
        self._accept(sequence, trajectory, again=again)

    def _accept(self, sequence: int, trajectory: Trajectory, *, again: bool = False) -> None:
        """Hand a trajectory to the ledger.

        Args:
            sequence: its place on the stream.
            trajectory: what was read.
            again: read by an earlier epoch, before its checkpoint: its tokens were counted then, trained or dropped.
        """
        header = trajectory.header
        scored = header.outcome is not Outcome.ENVIRONMENT_FAILED
        versions = trajectory.versions
        self._ledger, verdict = admission.on_sample(
            self._ledger,
            self._settings,
            SampleSeen(
                task=header.task,
                sample=header.sample,
                sequence=sequence,
                oldest_version=versions[0] if versions else None,
                scored=scored,
                model_tokens=trajectory.num_model_tokens,
            ),
            time.monotonic(),
        )
        if verdict is Verdict.ACCEPTED and scored:
            self._payloads[(header.task, header.sample)] = trajectory
            if self._ahead is not None:
                self._ahead.pool.complete(trajectory, sequence)
        elif not again:
            reason = "EnvironmentFailed" if verdict is Verdict.ACCEPTED else str(verdict)
            self._dropped[reason] += trajectory.num_model_tokens

    def _is_open(self, task: int) -> bool:
        """Whether a task's tokens may still be trained: admitted and not taken or dropped, or to be admitted again."""
        return task in self._ledger.groups or task >= self._ledger.next_task

    def _forget(self, tasks: Iterable[int]) -> None:
        if self._ahead is not None:
            samples = range(self._settings.samples_per_task)
            self._ahead.pool.forget((task, sample) for task in tasks for sample in samples)

    def _pass(self, sequence: int) -> None:
        seen = SampleSeen(
            task=UNKNOWN_TASK, sample=0, sequence=sequence, oldest_version=None, scored=False, model_tokens=0
        )
        self._ledger, _ = admission.on_sample(self._ledger, self._settings, seen, time.monotonic())


def _check_rewards(trajectory: Trajectory) -> None:
    """Each model turn of a scored trajectory has a finite reward.

    Raises:
        MalformedMessage: one has not.
    """
    header = trajectory.header
    if header.outcome is Outcome.ENVIRONMENT_FAILED:
        return
    turns = int(trajectory.turn.max()) + 1
    if len(header.turn_rewards) < turns:
        raise MalformedMessage(
            f"trajectory {header.task}/{header.sample}: {len(header.turn_rewards)} turn rewards for {turns} turns"
        )
