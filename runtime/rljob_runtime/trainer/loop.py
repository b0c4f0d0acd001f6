"""The trainer's loop: wait, score, step, publish, checkpoint. Every process of the trainer runs it in step with rank 0.

    produces    weight versions, checkpoints, step reports, the record
    consumes    batches of finished groups
    waits for   a batch (rank 0 on its intake, the others on rank 0's next order)
    unblocked by  finished groups; an idle order every few seconds keeps each collective short; SIGTERM

One step is one batch, one or more optimizer updates and exactly one published version (docs/design.md, section 3).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch

from rljob_api.messages import TrainerPhase
from rljob_api.spec import RLJobSpec
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import resolve
from rljob_runtime.trainer.batch import TrainBatch, broadcast_batch
from rljob_runtime.trainer.checkpoint import Counters, save_checkpoint
from rljob_runtime.trainer.distributed import World, broadcast_bytes
from rljob_runtime.trainer.leader import Leader
from rljob_runtime.trainer.model import Policy, full_state
from rljob_runtime.trainer.optimizer import learning_rate
from rljob_runtime.trainer.probe import make_probe
from rljob_runtime.trainer.update import train_batch

IDLE_SECONDS = 5.0


class Order(IntEnum):
    """What rank 0 tells the others to do next."""

    IDLE = 0
    TRAIN = 1
    STOP = 2


@dataclass(slots=True)
class Seconds:
    """Where a step's wall time went."""

    waiting: float = 0.0
    scoring: float = 0.0
    training: float = 0.0
    publishing: float = 0.0
    checkpointing: float = 0.0


class Trainer:
    """State that lives from step to step on one process; `leader` is there on rank 0 only."""

    def __init__(
        self,
        *,
        spec: RLJobSpec,
        world: World,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        snapshots: SnapshotStore,
        leader: Leader | None,
        checkpoint_root: Path,
        probe_tokens: tuple[int, ...],
        step: int,
        version: int,
        epoch: int,
        logger: logging.Logger,
    ) -> None:
        self._spec = spec
        self._world = world
        self._policy = policy
        self._optimizer = optimizer
        self._snapshots = snapshots
        self._leader = leader
        self._checkpoint_root = checkpoint_root
        self._probe_tokens = probe_tokens
        self._logger = logger
        self._epoch = epoch
        self._version = version
        self._step = step
        self._checkpoint_step = -1

    def run(self) -> bool:
        """Train until the last step or a stop order; True when all steps are trained."""
        self._publish(final=self._step >= self._spec.training.steps)
        if self._step == 0:
            self._checkpoint()
        while self._step < self._spec.training.steps:
            seconds = Seconds()
            order, batch = self._wait(seconds)
            if order is Order.STOP or batch is None:
                self._checkpoint()
                return False
            self._train(batch, seconds)
        if self._checkpoint_step != self._step:
            self._checkpoint()
        return True

    def _wait(self, seconds: Seconds) -> tuple[Order, TrainBatch | None]:
        """Rank 0's next order, on every rank, and its batch."""
        started = time.monotonic()
        while True:
            order, batch = Order.IDLE, None
            if self._leader is not None:
                self._leader.phase(TrainerPhase.WAITING, self._step, self._version)
                if self._leader.stop_requested:
                    order = Order.STOP
                else:
                    batch = self._leader.next_batch(self._version, IDLE_SECONDS)
                    order = Order.IDLE if batch is None else Order.TRAIN
            # Each idle round is a collective of its own: no process waits in one for longer than IDLE_SECONDS.
            sent = bytes([order]) if self._leader is not None else None
            order = Order(broadcast_bytes(sent, self._world.device)[0])
            if order is Order.IDLE:
                continue
            seconds.waiting = time.monotonic() - started
            return order, broadcast_batch(batch, self._world.device) if order is Order.TRAIN else None

    def _train(self, batch: TrainBatch, seconds: Seconds) -> None:
        if self._leader is not None:
            self._leader.phase(TrainerPhase.TRAINING, self._step, self._version)
        started = time.monotonic()
        resolved = resolve(batch, self._policy, self._snapshots, self._spec)
        scored = time.monotonic()
        seconds.scoring = scored - started
        rate = learning_rate(self._spec.training, self._step)
        result = train_batch(batch, resolved, self._policy, self._optimizer, self._spec, rate=rate)
        seconds.training = time.monotonic() - scored
        self._step += 1
        self._version += 1
        started = time.monotonic()
        self._publish(final=self._step >= self._spec.training.steps)
        if self._leader is not None:
            self._leader.step_trained(self._version)
        seconds.publishing = time.monotonic() - started
        started = time.monotonic()
        if self._checkpoint_due():
            self._checkpoint()
        seconds.checkpointing = time.monotonic() - started
        if self._leader is not None:
            self._leader.report(
                step=self._step, version=self._version, batch=batch, result=result, rate=rate, seconds=seconds
            )

    def _publish(self, *, final: bool) -> None:
        """Announce the policy as it is now as the current version, and keep what scores its tokens later."""
        if self._leader is not None:
            self._leader.phase(TrainerPhase.PUBLISHING, self._step, self._version)
        state = full_state(self._policy)
        probe = make_probe(self._policy, self._probe_tokens)
        if self._leader is not None:
            self._leader.publish(state, probe, version=self._version, step=self._step, final=final)
        self._snapshots.save(self._version, self._policy)
        for version in self._snapshots.versions:
            if version < self._version - self._spec.staleness.max_versions:
                self._snapshots.drop(version)

    def _checkpoint_due(self) -> bool:
        every = self._spec.storage.checkpoint.every_steps
        due = self._step % every == 0 or (self._leader is not None and self._leader.stream_is_filling())
        sent = bytes([due]) if self._leader is not None else None
        return bool(broadcast_bytes(sent, self._world.device)[0])

    def _checkpoint(self) -> None:
        if self._leader is not None:
            self._leader.phase(TrainerPhase.CHECKPOINTING, self._step, self._version)
        ledger = self._leader.ledger() if self._leader is not None else None
        directory = save_checkpoint(
            self._checkpoint_root,
            policy=self._policy,
            optimizer=self._optimizer,
            counters=Counters(epoch=self._epoch, version=self._version, step=self._step),
            ledger=ledger,
            keep=self._spec.storage.checkpoint.keep,
        )
        if self._leader is not None:
            self._leader.checkpointed(directory, version=self._version, step=self._step)
        self._checkpoint_step = self._step
