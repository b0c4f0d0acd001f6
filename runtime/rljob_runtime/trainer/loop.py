"""The trainer's loop: wait, score, step, publish, checkpoint. Every process of the trainer runs it in step with rank 0.

    produces    weight versions, checkpoints, step reports, the record
    consumes    batches of finished groups; while there is none, rows to score ahead
    waits for   a batch (rank 0 on its intake, the others on rank 0's next order)
    unblocked by  finished groups, at the latest after one round of scoring; an idle order every few seconds keeps each collective short; SIGTERM

One step is one batch, one or more optimizer updates and exactly one published version (docs/design.md, section 3).
"""

from __future__ import annotations

import json
import time
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from rljob_api.correction import OldLogprobs
from rljob_api.messages import TrainerPhase
from rljob_api.spec import RLJobSpec
from rljob_runtime.correction.averaged_policy import AveragedPolicy
from rljob_runtime.correction.score_pool import Wanted
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Source
from rljob_runtime.correction.step_diagnostics import step_diagnostics
from rljob_runtime.trainer.audit import Auditor
from rljob_runtime.trainer.batch import TrainBatch, broadcast_batch
from rljob_runtime.trainer.checkpoint import CheckpointState, save_checkpoint
from rljob_runtime.trainer.distributed import World, broadcast_bytes
from rljob_runtime.trainer.eager import ScoreRound, broadcast_round, score_round
from rljob_runtime.trainer.leader import Leader
from rljob_runtime.trainer.model import Policy, full_state
from rljob_runtime.trainer.old_versions import make_room
from rljob_runtime.trainer.optimizer import learning_rate
from rljob_runtime.trainer.probe import make_probe
from rljob_runtime.trainer.reporting import Seconds
from rljob_runtime.trainer.shared_file import on_every_node
from rljob_runtime.trainer.step_statistics import step_statistics
from rljob_runtime.trainer.step_tokens import step_tokens, thresholds_of
from rljob_runtime.trainer.update import UpdateSettings, resolve_batch, train_on

IDLE_SECONDS = 5.0


class Order(IntEnum):
    """What rank 0 tells the others to do next."""

    IDLE = 0
    TRAIN = 1
    STOP = 2
    SCORE = 3
    RESTORE = 4


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
        average: AveragedPolicy | None,
        capacity: int | None,
        auditor: Auditor,
        leader: Leader | None,
        checkpoint_root: Path,
        scratch: Path,
        probe_tokens: tuple[int, ...],
        epoch: int,
        version: int,
        step: int,
    ) -> None:
        self._spec = spec
        self._settings = UpdateSettings.of(spec)
        self._world = world
        self._policy = policy
        self._optimizer = optimizer
        self._snapshots = snapshots
        self._average = average
        snapshots.watch(optimizer)
        self._capacity = capacity
        self._auditor = auditor
        self._leader = leader
        self._checkpoint_root = checkpoint_root
        self._scratch = scratch
        self._probe_tokens = probe_tokens
        self._epoch = epoch
        self._version = version
        self._step = step
        self._max_versions = spec.staleness.max_versions
        self._checkpointed_step: int | None = None

    def run(self) -> bool:
        """Train until the last step or a stop order; True when all steps are trained."""
        self._publish()
        self._checkpoint()
        if self._leader is not None:
            self._leader.start()
        while self._step < self._spec.training.steps:
            seconds = Seconds()
            order, batch = self._wait(seconds)
            if order is Order.STOP or batch is None:
                self._checkpoint()
                return False
            self._train(batch, seconds)
        if self._checkpointed_step != self._step:
            self._checkpoint()
        return True

    def _wait(self, seconds: Seconds) -> tuple[Order, TrainBatch | None]:
        """Rank 0's next order, on every rank, and its batch."""
        started = time.monotonic()
        self._say(TrainerPhase.WAITING)
        while True:
            order, batch, rows = Order.IDLE, None, list[Wanted]()
            if self._leader is not None:
                if self._leader.stop_requested:
                    order = Order.STOP
                else:
                    batch, rows = self._leader.next_work(self._version, self._snapshots.versions, IDLE_SECONDS)
                    order = Order.TRAIN if batch is not None else Order.SCORE if rows else Order.IDLE
                    if order is Order.IDLE and self._leader.is_damaged(self._version):
                        order = Order.RESTORE
            # Each idle round is a collective of its own: no process waits in one for longer than IDLE_SECONDS.
            order = Order(self._from_leader(bytes([order]))[0])
            if order is Order.IDLE:
                continue
            if order is Order.RESTORE:
                self._restore()
                continue
            if order is Order.SCORE:
                begun = time.monotonic()
                self._score_ahead(rows)
                seconds.eager += time.monotonic() - begun
                continue
            seconds.waiting = time.monotonic() - started
            return order, broadcast_batch(batch, self._world.device) if order is Order.TRAIN else None

    def _train(self, batch: TrainBatch, seconds: Seconds) -> None:
        self._say(TrainerPhase.TRAINING)
        started = time.monotonic()
        self._max_versions = batch.max_versions
        self._reload_snapshots(batch)
        old = resolve_batch(self._policy, batch, self._snapshots, self._settings, self._world, self._average)
        scored = time.monotonic()
        found = self._auditor.score(batch, self._step)
        audited = time.monotonic()
        average = () if self._average is None else self._average.version_weights()
        rate = learning_rate(self._spec.training, self._step)
        update = train_on(
            self._policy,
            self._optimizer,
            batch,
            old,
            self._settings,
            self._world,
            rate=rate,
            before_first_update=self._leave_version,
        )
        if self._average is not None:
            self._average.observe(step_statistics(batch, update, self._settings, found.exact))
        trained = time.monotonic()
        self._step += 1
        self._version += 1
        self._publish()
        if self._average is not None:
            self._average.published(self._policy)
        if self._leader is not None:
            self._leader.step_trained(self._version, update)
        published = time.monotonic()
        if self._checkpoint_due():
            self._checkpoint()
        seconds.scoring, seconds.auditing, seconds.training = scored - started, audited - scored, trained - audited
        seconds.publishing, seconds.checkpointing = published - trained, time.monotonic() - published
        if self._leader is not None:
            self._leader.report(
                step=self._step,
                version=self._version,
                batch=batch,
                update=update,
                ewma=None if self._average is None else self._average.report(),
                audit=self._auditor.report(batch, update, found, average),
                diagnostics=step_diagnostics(step_tokens(batch, update.records), thresholds_of(self._settings)),
                rate=rate,
                seconds=seconds,
            )

    def _score_ahead(self, rows: list[Wanted]) -> None:
        """Score what rank 0 chose, all of one version, and hand it the values. Collective; the others pass no rows."""
        chosen = None
        if self._leader is not None:
            version = rows[0].version if rows else self._version
            chosen = ScoreRound(version, tuple(row.tokens for row in rows))
        chosen = broadcast_round(chosen, self._world.device)
        logprobs = score_round(
            self._policy, chosen, self._snapshots, self._settings, self._world, resident=self._version
        )
        if self._leader is not None:
            self._leader.scored(rows, logprobs)

    def _leave_version(self) -> None:
        """Before a step's first update: on the interruption route, have the resident version score all its tokens."""
        rows = list[Wanted]()
        if self._spec.correction.old_logprobs is OldLogprobs.INTERRUPTION:
            if self._leader is not None:
                self._leader.quiesce(self._version)
            is_over = False
            while not is_over:  # each round is a collective of its own, as in _wait
                said = self._leader is not None and self._leader.barrier_is_over(IDLE_SECONDS)
                is_over = bool(self._from_leader(bytes([said]))[0])
            rows = self._leader.unscored(self._version) if self._leader is not None else []
            self._score_ahead(rows)
        if self._leader is not None:
            self._leader.update_begins(sum(row.positions.shape[0] for row in rows))

    def _reload_snapshots(self, batch: TrainBatch) -> None:
        """Bring back versions that the batch names and memory does not hold: a resume starts with an empty store."""
        if self._spec.correction.old_logprobs is not OldLogprobs.SNAPSHOT:
            return
        named, tokens = np.unique(
            np.concatenate(
                [row.weight_version[row.trainable & (row.known_source == Source.NONE)] for row in batch.rows]
            ),
            return_counts=True,
        )
        self._snapshots.retain(dict(zip(named.tolist(), tokens.tolist(), strict=True)))
        for version in sorted({int(v) for v in named} - set(self._snapshots.versions) - {batch.version}):
            if self._capacity is not None and len(self._snapshots.versions) >= self._capacity:
                return  # tokens of the others leave the loss, and are counted
            found = self._leader.fetch_version(version) if self._leader is not None else None
            with on_every_node(found, self._scratch, self._world) as path:
                if path is not None:
                    self._snapshots.load_full(version, self._policy, path)

    def _publish(self) -> None:
        """Announce the policy as it is now as the current version, and keep what scores its tokens later."""
        self._say(TrainerPhase.PUBLISHING)
        state = full_state(self._policy)
        probe = make_probe(self._policy, self._probe_tokens)
        if self._leader is not None:
            final = self._step >= self._spec.training.steps
            self._leader.publish(state, probe, version=self._version, step=self._step, final=final)
        if self._spec.correction.old_logprobs is OldLogprobs.SNAPSHOT:
            make_room(
                self._snapshots,
                self._version,
                max_versions=self._max_versions,
                waiting=self._waiting_tokens(),
                capacity=self._capacity,
            )
            self._snapshots.save(self._version, self._policy)

    def _restore(self) -> None:
        """Store the resident version's bytes again: nobody can load them, and no next version comes without that."""
        state = full_state(self._policy)
        if self._leader is not None:
            self._leader.restore(state, version=self._version)

    def _waiting_tokens(self) -> dict[int, int]:
        """Tokens of trajectories that wait for a step after this version, by weight version. Collective."""
        waiting = self._leader.waiting_tokens(self._version) if self._leader is not None else {}
        pairs = json.loads(self._from_leader(json.dumps(list(waiting.items())).encode()))
        return dict(pairs)

    def _checkpoint_due(self) -> bool:
        filling = self._leader is not None and self._leader.stream_is_filling()
        due = filling or self._step % self._spec.storage.checkpoint.every_steps == 0
        return bool(self._from_leader(bytes([due]))[0])

    def _checkpoint(self) -> None:
        self._say(TrainerPhase.CHECKPOINTING)
        if self._leader is not None:
            state = self._leader.checkpoint_state(version=self._version, step=self._step)
        else:
            state = CheckpointState(epoch=self._epoch, version=self._version, step=self._step, ledger={})
        name = save_checkpoint(self._checkpoint_root, self._policy, self._optimizer, state, self._world, self._average)
        if self._leader is not None:
            self._leader.checkpointed(self._checkpoint_root, name, version=self._version, step=self._step)
        self._checkpointed_step = self._step

    def _from_leader(self, data: bytes) -> bytes:
        """Rank 0's bytes on every rank."""
        return broadcast_bytes(data if self._leader is not None else None, self._world.device)

    def _say(self, phase: TrainerPhase) -> None:
        if self._leader is not None:
            self._leader.phase(phase, self._step, self._version)
