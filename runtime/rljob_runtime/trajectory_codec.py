"""Trajectories as safetensors bytes with the header as JSON metadata: no pickle on any wire.

Tensors, shapes and invariants: `rljob_api.trajectory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import MalformedMessage
from rljob_api.messages import TrajectoryHeader
from rljob_api.trajectory import TENSOR_TYPES
from rljob_runtime.tensor_message import check_arrays, pack, unpack

LOGPROB_ROUNDING = 1e-4
"""How far above 0 a log-probability may be."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished sample; T = number of tokens."""

    header: TrajectoryHeader
    tokens: NDArray[np.int32]
    """[T]"""
    turn: NDArray[np.int32]
    """[T], -1 for prompt and observation tokens."""
    weight_version: NDArray[np.int32]
    """[T], -1 where turn is -1."""
    behavior_logprobs: NDArray[np.float32]
    """[T], 0 where turn is -1."""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def model_mask(self) -> NDArray[np.bool_]:
        """[T], True for tokens that the model sampled."""
        mask: NDArray[np.bool_] = self.turn >= 0
        return mask

    @property
    def num_model_tokens(self) -> int:
        return int(self.model_mask.sum())

    @property
    def versions(self) -> tuple[int, ...]:
        """Weight versions in it, ascending."""
        return tuple(int(v) for v in np.unique(self.weight_version[self.model_mask]))


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """Bytes of a trajectory message.

    Raises:
        MalformedMessage: the trajectory breaks an invariant; nothing malformed leaves a worker.
    """
    _check(trajectory)
    return pack(trajectory.header, _tensors(trajectory))


def decode_trajectory(data: bytes) -> Trajectory:
    """Trajectory from message bytes.

    Raises:
        MalformedMessage: not safetensors, a tensor or the header is missing or of the wrong type, or an invariant is broken.
    """
    header, tensors = unpack(data, TrajectoryHeader, TENSOR_TYPES, "trajectory")
    trajectory = Trajectory(header=header, **tensors)
    _check(trajectory)
    return trajectory


def check_tokens(label: str, tensors: Mapping[str, NDArray[Any]], *, is_start: bool) -> int:
    """What must hold of any run of a trajectory's tokens; returns their number. `is_start`: the run begins it.

    Raises:
        MalformedMessage: something does not hold; `label` names the message.
    """
    length = check_arrays(label, tensors, TENSOR_TYPES)
    mask = tensors["turn"] >= 0
    if is_start and mask[:1].any():
        raise MalformedMessage(f"{label}: the first token is marked as a model token; nothing could have sampled it")
    if (tensors["tokens"] < 0).any():
        raise MalformedMessage(f"{label}: negative token id")
    logprobs = tensors["behavior_logprobs"][mask]
    if not np.isfinite(logprobs).all():
        raise MalformedMessage(
            f"{label}: {int((~np.isfinite(logprobs)).sum())} behavior log-probabilities are not finite"
        )
    if (logprobs > LOGPROB_ROUNDING).any():
        raise MalformedMessage(f"{label}: behavior log-probability {float(logprobs.max()):.3g} is above 0")
    if (tensors["weight_version"][mask] < 0).any():
        raise MalformedMessage(f"{label}: a model token has no weight version")
    if (np.diff(tensors["turn"][mask]) < 0).any():
        raise MalformedMessage(f"{label}: turns of model tokens must never fall")
    return length


def _tensors(trajectory: Trajectory) -> dict[str, NDArray[Any]]:
    return {name: getattr(trajectory, name) for name in TENSOR_TYPES}


def _check(trajectory: Trajectory) -> None:
    label = f"trajectory {trajectory.header.task}/{trajectory.header.sample}"
    length = check_tokens(label, _tensors(trajectory), is_start=True)
    if length < 2:
        raise MalformedMessage(f"{label}: {length} tokens; a trajectory has a prompt and at least one more token")
