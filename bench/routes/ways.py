"""One way to old log-probabilities, replaying a stream with the trainer's own functions and the clock in hand.

A replayed step begins with a version just published. What a trainer of this way does until its batch is there runs first
and counts as *overlapped*: scoring ahead, or a dedicated process at work. Then come the old log-probabilities, the
training with what must happen before its first update, and what the way keeps of the version that comes of it: these are
on the step's *critical path*. All else of a step (waiting, the publication) is the same for all ways and left out.

Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from bench.routes.second_policy import SecondPolicy
from bench.routes.stream import Key, Step, Stream
from rljob_api.correction import OldLogprobs
from rljob_runtime.correction.averaged_policy import AveragedPolicy
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Known, OldRow, Source
from rljob_runtime.trainer.batch import TrainBatch, build_batch
from rljob_runtime.trainer.distributed import World
from rljob_runtime.trainer.eager import ScoreRound, score_round
from rljob_runtime.trainer.model import build_policy, compute_dtype, full_state
from rljob_runtime.trainer.old_versions import make_room
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.packing import micro_batches
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.step_statistics import step_statistics
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings, resolve_batch, train_on
from rljob_runtime.trajectory_codec import Trajectory


class Way(StrEnum):
    """The ways compared, by the names in the tables."""

    CURRENT = "current"
    RECOMPUTE = "current, forward of its own"
    SNAPSHOT = "snapshot, as the run scored ahead"
    SNAPSHOT_NONE = "snapshot, nothing ahead"
    SNAPSHOT_ALL = "snapshot, all ahead"
    DEDICATED = "dedicated"
    INTERRUPTION = "interruption, all at the barrier"
    EWMA = "ewma"
    LOG_LINEAR = "log-linear"
    ENGINE = "engine"


_ROUTES = {
    Way.CURRENT: OldLogprobs.CURRENT,
    Way.RECOMPUTE: OldLogprobs.CURRENT,
    Way.DEDICATED: OldLogprobs.DEDICATED,
    Way.INTERRUPTION: OldLogprobs.INTERRUPTION,
    Way.EWMA: OldLogprobs.EWMA,
    Way.LOG_LINEAR: OldLogprobs.LOG_LINEAR,
    Way.ENGINE: OldLogprobs.ENGINE,
}


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one step by one way, and what it held and gave."""

    step: int
    way: Way
    old_logprobs: float
    upkeep: float
    """Saving the snapshot; bringing the average up to date."""
    training: float
    overlapped: float
    held_bytes: int
    """For the way alone: old versions, the average, a second model."""
    exact_fraction: float


class Replay:
    """The stream trained by one way: policy, optimizer and stores of its own."""

    def __init__(self, way: Way, stream: Stream, model: Path, world: World, scratch: Path) -> None:
        training = stream.spec.training
        self.way = way
        self._stream = stream
        self._world = world
        self._published = scratch / "published.safetensors"
        self._training = training
        self._settings = replace(UpdateSettings.of(stream.spec), route=_ROUTES.get(way, OldLogprobs.SNAPSHOT))
        self._policy = build_policy(model, compute_type=training.compute_type, device=world.device, mesh=world.mesh)
        self._optimizer = build_optimizer(self._policy, training)
        self._snapshots = SnapshotStore(compute_dtype(training.compute_type))
        self._snapshots.watch(self._optimizer)
        self._average = AveragedPolicy(stream.spec.correction.ewma) if way is Way.EWMA else None
        if self._average is not None:
            self._average.start(self._policy)
        self._second = None
        if way is Way.DEDICATED:
            policy = build_policy(model, compute_type=training.compute_type, device=world.device, mesh=world.mesh)
            self._second = SecondPolicy(policy, self._settings, max_versions=stream.lead)
        # Until their version is replayed, and for good where it is before the stream: costs are those of any value.
        self._known = {key_of(row): self._placeholder(step, row) for step in stream.steps for row in step.trajectories}
        if self._settings.route is OldLogprobs.SNAPSHOT:
            self._save(0)

    def train(self, index: int, *, num_groups: int | None = None) -> Cost:
        """Replay a step: the one after the step before. With a number of groups: only those, and nothing is scored ahead."""
        step = self._stream.steps[index]
        overlapped = self._overlap(index, is_whole=num_groups is None)
        batch = build_batch(
            step.groups[:num_groups],
            version=step.version,
            max_versions=self._stream.lead,
            advantage=self._training.advantage,
            known_of=lambda row: self._known[key_of(row)],
        )
        barrier_seconds = 0.0
        wanted = self._wanted(index) if self.way is Way.INTERRUPTION else []

        def behind_barrier() -> None:
            nonlocal barrier_seconds
            if self.way is Way.INTERRUPTION:
                barrier_seconds = _seconds(lambda: self._score(step.version, wanted, at_once=True))

        started = time.process_time()
        old = self._resolve(batch)
        resolved = time.process_time()
        update = train_on(
            self._policy,
            self._optimizer,
            batch,
            old,
            self._settings,
            self._world,
            rate=self._training.learning_rate,
            before_first_update=behind_barrier,
        )
        trained = time.process_time()
        self._keep(index, batch, update)
        return Cost(
            step=step.version + 1,
            way=self.way,
            old_logprobs=resolved - started + barrier_seconds,
            training=trained - resolved - barrier_seconds,
            upkeep=time.process_time() - trained,
            overlapped=overlapped,
            held_bytes=self._held_bytes(),
            exact_fraction=update.exact_fraction,
        )

    def _resolve(self, batch: TrainBatch) -> dict[int, OldRow]:
        old = resolve_batch(self._policy, batch, self._snapshots, self._settings, self._world, self._average)
        if self.way is Way.RECOMPUTE:
            rows = [row.tokens for row in batch.rows]
            scored = score(
                self._policy, rows, temperature=self._settings.temperature, token_budget=self._settings.token_budget
            )
            for number, logprobs in enumerate(scored):
                unstepped = np.isnan(old[number].logprobs)
                old[number].logprobs[unstepped] = logprobs[unstepped]
        return old

    def _keep(self, index: int, batch: TrainBatch, update: UpdateReport) -> None:
        """What the way keeps of the weights that the step made."""
        if self._average is not None:
            self._average.observe(step_statistics(batch, update, self._settings, {}))
            self._average.published(self._policy)
        if self._settings.route is OldLogprobs.SNAPSHOT:
            self._save(index + 1)

    def _save(self, index: int) -> None:
        version, bound = self._stream.steps[0].version + index, self._stream.lead
        make_room(self._snapshots, version, max_versions=bound, waiting={}, capacity=None)
        self._snapshots.save(version, self._policy)

    def _overlap(self, index: int, *, is_whole: bool) -> float:
        """Work beside the critical path, between a publication and the batch; its CPU seconds."""
        step = self._stream.steps[index]
        if self._second is not None:
            save_file(full_state(self._policy), self._published)  # the publication, which all ways make
            started = time.process_time()
            self._second.load(step.version, self._published)
            if is_whole:
                self._known |= self._second.score(step.trajectories)
            return time.process_time() - started
        if is_whole and self.way in (Way.SNAPSHOT, Way.SNAPSHOT_ALL):
            wanted = self._wanted(index)
            return _seconds(lambda: self._score(step.version, wanted, at_once=False))
        return 0.0

    def _wanted(self, index: int) -> list[tuple[Trajectory, NDArray[np.int64]]]:
        """Later batches' rows with tokens of a step's version that the way scores ahead, and where these are."""
        version = self._stream.steps[index].version
        found = []
        for step in self._stream.steps[index + 1 :]:
            for row in step.trajectories:
                is_wanted = (row.weight_version == version) & (self._known[key_of(row)].source == Source.POOL)
                if is_wanted.any():
                    found.append((row, np.flatnonzero(is_wanted)))
        return found

    def _score(self, version: int, wanted: Sequence[tuple[Trajectory, NDArray[np.int64]]], *, at_once: bool) -> None:
        """Have the resident version score rows: in one round, or one micro-batch a round."""
        tokens = [row.tokens[: places[-1] + 1] for row, places in wanted]
        lengths = [len(of_row) for of_row in tokens]
        rounds = [list(range(len(wanted)))] if at_once else micro_batches(lengths, self._settings.token_budget)
        for members in rounds:
            chosen = ScoreRound(version, tuple(tokens[member] for member in members))
            values = score_round(self._policy, chosen, self._snapshots, self._settings, self._world, resident=version)
            for member, logprobs in zip(members, values, strict=True):
                row, places = wanted[member]
                self._known[key_of(row)].logprobs[places] = logprobs[places]

    def _placeholder(self, step: Step, row: Trajectory) -> Known:
        """Where the way's values come with the batch, the engine's own stand there first."""
        stale = row.model_mask & (row.weight_version < step.version)
        match self.way:
            case Way.SNAPSHOT:
                source = np.where(stale & step.ahead[key_of(row)], Source.POOL, Source.NONE)
            case Way.SNAPSHOT_ALL | Way.INTERRUPTION:
                source = np.where(stale, Source.POOL, Source.NONE)
            case _:
                source = np.full(row.tokens.shape, Source.NONE)
        return Known(row.behavior_logprobs.copy(), source.astype(np.int8))

    def _held_bytes(self) -> int:
        held = self._snapshots.num_bytes
        if self._average is not None:
            held += sum(tensor.nbytes for tensor in self._average.tensors(self._policy).values())
        return held if self._second is None else held + self._second.num_bytes


def key_of(trajectory: Trajectory) -> Key:
    return trajectory.header.task, trajectory.header.sample


def _seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
