"""What a dedicated process does, in this one: a policy of its own, and the published versions that it can hold.

`rljob_runtime.old_policy` with the same plan and the same order of loads, switches and forwards; what it leaves out is
its process group, of which a process has one, and the messages.

Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.routes.stream import Key
from rljob_runtime.correction.published import local_shard
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Known, Source
from rljob_runtime.old_policy.plan import Turn, next_pass, parts_of
from rljob_runtime.old_policy.worker import MICRO_BATCHES_A_PASS
from rljob_runtime.trainer.model import Policy, compute_dtype
from rljob_runtime.trainer.probe import make_probe, probe_tokens
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.update import UpdateSettings
from rljob_runtime.trajectory_codec import Trajectory


class SecondPolicy:
    """Scores whole trajectories, each token by the version that sampled it."""

    def __init__(self, policy: Policy, settings: UpdateSettings, *, max_versions: int) -> None:
        self._policy = policy
        self._settings = settings
        self._max_versions = max_versions
        self._store = SnapshotStore(compute_dtype(policy.compute_type))
        self._holding = ExitStack()
        self._turn: Turn | None = None
        self._probe = probe_tokens(policy.vocab_size, 0)

    @property
    def num_bytes(self) -> int:
        """Of the second model and its versions."""
        model = sum(local_shard(parameter).nbytes for _, parameter in self._policy.published_parameters())
        return model + self._store.num_bytes

    def load(self, version: int, path: Path) -> None:
        """Take a published version in, score its probe, and forget versions that nothing may name any more."""
        self._release()
        self._store.load_full(version, self._policy, path)
        with self._store.held(version, self._policy):
            make_probe(self._policy, self._probe)
        self._store.evict(version - self._max_versions)

    def score(self, trajectories: Sequence[Trajectory]) -> dict[Key, Known]:
        """Values of all tokens whose version is here, by turns of the versions as a worker takes them."""
        found = {
            (row.header.task, row.header.sample): Known(
                row.behavior_logprobs.copy(), np.where(row.model_mask, Source.DEDICATED, Source.NONE).astype(np.int8)
            )
            for row in trajectories
        }
        waiting = [part for number, row in enumerate(trajectories) for part in parts_of(row, number)]
        budget = MICRO_BATCHES_A_PASS * self._settings.token_budget
        while planned := next_pass(waiting, self._turn, ready=self._store.versions, max_tokens=budget):
            turn, parts = planned
            if self._turn is None or turn.version != self._turn.version:
                self._release()
                self._holding.enter_context(self._store.held(turn.version, self._policy))
            self._turn = turn
            scored = score(
                self._policy,
                [trajectories[part.sequence].tokens[: part.length] for part in parts],
                temperature=self._settings.temperature,
                token_budget=self._settings.token_budget,
            )
            for part, logprobs in zip(parts, scored, strict=True):
                row = trajectories[part.sequence]
                places = np.flatnonzero(row.model_mask & (row.weight_version == part.version))
                found[row.header.task, row.header.sample].logprobs[places] = logprobs[places]
            done = set(parts)
            waiting = [part for part in waiting if part not in done]
        return found

    def _release(self) -> None:
        self._holding.close()
        self._turn = None
