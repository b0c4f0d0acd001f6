"""Trajectories as safetensors bytes with the header as JSON metadata: no pickle on any wire.

Tensors, shapes and invariants: `rljob_api.trajectory`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rljob_api.errors import MalformedMessage
from rljob_api.messages import TrajectoryHeader
from rljob_api.trajectory import HEADER_KEY, TENSOR_TYPES


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
    tensors = {name: np.ascontiguousarray(getattr(trajectory, name)) for name in TENSOR_TYPES}
    return save_tensors(tensors, {HEADER_KEY: trajectory.header.to_bytes().decode()})


def decode_trajectory(data: bytes) -> Trajectory:
    """Trajectory from message bytes.

    Raises:
        MalformedMessage: not safetensors, a tensor or the header is missing or of the wrong type, or an invariant is broken.
    """
    try:
        tensors = load_tensors(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise MalformedMessage(f"trajectory: not a safetensors message ({len(data)} bytes): {error}") from error
    if set(tensors) != set(TENSOR_TYPES):
        raise MalformedMessage(f"trajectory: tensors {sorted(tensors)} instead of {sorted(TENSOR_TYPES)}")
    if HEADER_KEY not in metadata:
        raise MalformedMessage(f"trajectory: metadata key {HEADER_KEY!r} is missing")
    try:
        header = TrajectoryHeader.from_bytes(metadata[HEADER_KEY].encode())
    except ValidationError as error:
        raise MalformedMessage(f"trajectory: header: {error}") from error
    trajectory = Trajectory(header=header, **tensors)
    _check(trajectory)
    return trajectory


def _check(trajectory: Trajectory) -> None:
    label = f"trajectory {trajectory.header.task}/{trajectory.header.sample}"
    length = trajectory.tokens.shape[0] if trajectory.tokens.ndim == 1 else -1
    for name, kind in TENSOR_TYPES.items():
        tensor = getattr(trajectory, name)
        if tensor.dtype != np.dtype(kind):
            # bf16 or fp16 log-probabilities would swamp the discrepancy thresholds (docs/algorithms.md, test 25).
            raise MalformedMessage(f"{label}: {name} has type {tensor.dtype}, must be {kind}")
        if tensor.ndim != 1 or tensor.shape[0] != length:
            raise MalformedMessage(f"{label}: {name} has shape {tensor.shape}, must be [{length}] as tokens")
    if length < 2:
        raise MalformedMessage(f"{label}: {length} tokens; a trajectory has a prompt and at least one more token")
    mask = trajectory.turn >= 0
    if mask[0]:
        raise MalformedMessage(f"{label}: the first token is marked as a model token; nothing could have sampled it")
    if (trajectory.tokens < 0).any():
        raise MalformedMessage(f"{label}: negative token id")
    logprobs = trajectory.behavior_logprobs[mask]
    if not np.isfinite(logprobs).all():
        raise MalformedMessage(
            f"{label}: {int((~np.isfinite(logprobs)).sum())} behavior log-probabilities are not finite"
        )
    if (logprobs > 1e-4).any():
        raise MalformedMessage(f"{label}: behavior log-probability {float(logprobs.max()):.3g} is above 0")
    versions = trajectory.weight_version[mask]
    if (versions < 0).any():
        raise MalformedMessage(f"{label}: a model token has no weight version")
    if (np.diff(trajectory.turn[mask]) < 0).any():
        raise MalformedMessage(f"{label}: turns of model tokens must never fall")
