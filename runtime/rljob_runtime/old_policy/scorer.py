"""The trainer's policy with other weights: any held version scores rows by the trainer's own forward.

Blocking, and bound to the thread that opened it: process group and CUDA device belong to a thread.

Shapes: T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from rljob_api.errors import EngineError
from rljob_api.spec import RLJobSpec
from rljob_api.weights import Probe
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.rollout.probe_check import check_probe
from rljob_runtime.trainer.distributed import DeviceKind, distributed_world
from rljob_runtime.trainer.model import Policy, build_policy, compute_dtype
from rljob_runtime.trainer.scoring import score

COLLECTIVE_SECONDS = 600.0


class Scorer:
    """A policy in a world of one, and the versions that it can hold."""

    def __init__(self, spec: RLJobSpec, kind: DeviceKind, *, num_threads: int = 1) -> None:
        self._compute_type = spec.training.compute_type
        self._temperature = spec.sampling.temperature
        self._token_budget = spec.training.tokens_per_micro_batch
        self._kind: DeviceKind = kind
        self._num_threads = num_threads
        self._store = SnapshotStore(compute_dtype(self._compute_type))
        self._world = ExitStack()
        self._holding = ExitStack()
        self._visit: Callable[[int], None] | None = None
        self._held: int | None = None
        self._policy: Policy | None = None

    @property
    def is_open(self) -> bool:
        return self._policy is not None

    def open(self, model_directory: Path) -> None:
        """Build the policy as the trainer does; the weights in the directory are those of any version.

        Raises:
            SpecError: the trainer does not support the model.
            AcceleratorMissing: a CUDA device is asked for and there is none.
        """
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(self._num_threads)
        world = self._world.enter_context(distributed_world(self._kind, timeout_seconds=COLLECTIVE_SECONDS))
        self._policy = build_policy(
            model_directory, compute_type=self._compute_type, device=world.device, mesh=world.mesh
        )

    def load(self, version: int, path: Path, probe: Probe) -> None:
        """Take in a version's published file, and prove by its probe that its values are the trainer's.

        Raises:
            BlobCorrupt: the file does not fit the model.
            EngineError: the probe's log-probabilities are not those that the trainer published.
        """
        policy = self._opened()
        self._release()
        self._store.load_full(version, policy, path)
        with self._store.held(version, policy):
            scored = score(
                policy, [np.array(probe.tokens, np.int32)], temperature=1.0, token_budget=self._token_budget
            )[0]
        result = check_probe(probe, scored[1:].tolist(), self._compute_type.value)
        if not result.passed:
            self._store.drop(version)
            raise EngineError(f"version {version} was loaded and is not what the trainer published: {result.reason}")

    def drop(self, version: int) -> None:
        """Forget a version; one that is not held is no error."""
        self._release()
        self._store.drop(version)

    def score(self, version: int, rows: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Log-probability of each token of the rows [T] under a held version, at the sampling temperature; 0 for the first.

        The policy goes on holding the version: the next call with the same one switches nothing, and one with an older
        version writes only what differs.

        Raises:
            KeyError: the version is not held.
        """
        policy = self._opened()
        if self._visit is None or self._held is None or version > self._held:
            self._release()
            self._visit = self._holding.enter_context(self._store.visiting(policy))
        if self._held != version:
            self._held = None
            self._visit(version)
            self._held = version
        return score(policy, rows, temperature=self._temperature, token_budget=self._token_budget)

    def close(self) -> None:
        """Leave the process group."""
        self._release()
        self._policy = None
        self._world.close()

    def _release(self) -> None:
        self._visit, self._held = None, None
        self._holding.close()

    def _opened(self) -> Policy:
        if self._policy is None:
            raise ValueError("the scorer has no policy yet: call open first")
        return self._policy
