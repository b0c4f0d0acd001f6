"""One step's batch: trajectories with advantages and staleness, the same on every rank.

Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rljob_api.errors import MalformedMessage
from rljob_api.spec import Advantage
from rljob_runtime.correction.sources import Known, Source
from rljob_runtime.trainer.advantages import token_advantages
from rljob_runtime.trainer.distributed import broadcast_bytes
from rljob_runtime.trajectory_codec import Trajectory


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One trajectory of a batch."""

    task: int
    """Its group."""
    sample: int
    tokens: NDArray[np.int32]
    """[T]"""
    turn: NDArray[np.int32]
    """[T], -1 for prompt and observation tokens."""
    weight_version: NDArray[np.int32]
    """[T], -1 where turn is -1."""
    behavior_logprobs: NDArray[np.float32]
    """[T], 0 where turn is -1."""
    advantages: NDArray[np.float32]
    """[T], 0 where turn is -1."""
    staleness: NDArray[np.int32]
    """[T], steps since the token's version, 0 for the batch's version only, -1 where turn is -1."""
    trainable: NDArray[np.bool_]
    """[T], True for model tokens within the staleness bound."""
    known_logprobs: NDArray[np.float32]
    """[T], old log-probabilities that were scored ahead of the step; 0 where there is none."""
    known_source: NDArray[np.int8]
    """[T], their `Source`; NONE where there is none."""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_model_tokens(self) -> int:
        return int((self.turn >= 0).sum())


_ROW_TYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "turn": np.int32,
    "weight_version": np.int32,
    "behavior_logprobs": np.float32,
    "advantages": np.float32,
    "staleness": np.int32,
    "trainable": np.bool_,
    "known_logprobs": np.float32,
    "known_source": np.int8,
}


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one step trains on; rows of one group are neighbours."""

    version: int
    """Weight version at the start of the step: the resident one."""
    rows: tuple[TrainRow, ...]
    groups_without_variance: int
    max_versions: int = 0
    """Bound on the staleness of a trained token that it was made under."""

    @property
    def num_model_tokens(self) -> int:
        return sum(row.num_model_tokens for row in self.rows)

    def to_bytes(self) -> bytes:
        """A safetensors file: the rows' arrays one after another, and their lengths."""
        tensors: dict[str, NDArray[np.generic]] = {
            name: np.concatenate([getattr(row, name) for row in self.rows] or [np.zeros(0, kind)])
            for name, kind in _ROW_TYPES.items()
        }
        shape = [(row.task, row.sample, row.num_tokens) for row in self.rows]
        tensors["rows"] = np.array(shape, dtype=np.int64).reshape(-1, 3)
        tensors["batch"] = np.array([self.version, self.groups_without_variance, self.max_versions], dtype=np.int64)
        return save_tensors(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainBatch:
        """Inverse of `to_bytes`.

        Raises:
            MalformedMessage: the bytes are not such a batch.
        """
        try:
            tensors = load_tensors(data)
            shape = tensors["rows"]
            ends = np.cumsum(shape[:, 2])[:-1]
            columns = [np.split(tensors[name], ends) if len(shape) else [] for name in _ROW_TYPES]
            version, groups_without_variance, max_versions = tensors["batch"].tolist()
        except (SafetensorError, KeyError, ValueError, IndexError) as error:
            raise MalformedMessage(f"training batch: {len(data)} bytes do not decode: {error}") from error
        rows = tuple(
            TrainRow(int(task), int(sample), *arrays)
            for (task, sample, _), *arrays in zip(shape, *columns, strict=True)
        )
        return cls(version, rows, groups_without_variance, max_versions)


def build_batch(
    groups: Sequence[Sequence[Trajectory]],
    *,
    version: int,
    max_versions: int,
    advantage: Advantage,
    staleness_of: Callable[[int], int] | None = None,
    known_of: Callable[[Trajectory], Known | None] | None = None,
) -> TrainBatch:
    """The batch of one step from its groups, in their order.

    Tokens older than `max_versions` stay in the batch as context and in its denominators, and are not trainable.

    Args:
        groups: the finished samples of each group.
        version: weight version at the start of the step.
        max_versions: bound on the staleness of a trained token.
        advantage: how rewards become advantages.
        staleness_of: staleness of a version, 0 for `version` only; unset is the difference of the numbers. After a
            resume numbers and steps differ (docs/design.md, section 3).
        known_of: old log-probabilities of a trajectory that were scored ahead of the step.

    Raises:
        ValueError: a token is newer than `version`.
        MalformedMessage: a turn has no reward where turns are compared.
    """
    estimate = token_advantages(groups, advantage)
    rows = tuple(
        _row(
            trajectory,
            advantages,
            version,
            max_versions,
            staleness_of or (lambda made: version - made),
            None if known_of is None else known_of(trajectory),
        )
        for group, of_group in zip(groups, estimate.advantages, strict=True)
        for trajectory, advantages in zip(group, of_group, strict=True)
    )
    return TrainBatch(version, rows, estimate.groups_without_variance, max_versions)


def _row(
    trajectory: Trajectory,
    advantages: NDArray[np.float32],
    version: int,
    max_versions: int,
    staleness_of: Callable[[int], int],
    known: Known | None,
) -> TrainRow:
    is_model = trajectory.model_mask
    newest = max(trajectory.versions, default=version)
    if newest > version:
        raise ValueError(
            f"trajectory {trajectory.header.task}/{trajectory.header.sample} has tokens of version {newest}, and the "
            f"step starts at version {version}: the batch was built before that version was published"
        )
    staleness = np.full(trajectory.tokens.shape, -1, np.int32)
    for made in trajectory.versions:
        staleness[is_model & (trajectory.weight_version == made)] = staleness_of(made)
    return TrainRow(
        task=trajectory.header.task,
        sample=trajectory.header.sample,
        tokens=trajectory.tokens,
        turn=trajectory.turn,
        weight_version=trajectory.weight_version,
        behavior_logprobs=trajectory.behavior_logprobs,
        advantages=advantages,
        staleness=staleness,
        trainable=is_model & (staleness <= max_versions),
        known_logprobs=np.zeros(is_model.shape, np.float32) if known is None else known.logprobs,
        known_source=np.full(is_model.shape, Source.NONE, np.int8) if known is None else known.source,
    )


def broadcast_batch(batch: TrainBatch | None, device: torch.device) -> TrainBatch:
    """Rank 0's batch on every rank; the others pass None. Collective."""
    return TrainBatch.from_bytes(broadcast_bytes(None if batch is None else batch.to_bytes(), device))
