"""Old log-probabilities of one trajectory on the wire, as an old-policy worker sends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import MalformedMessage
from rljob_api.messages import ScoreHeader
from rljob_api.trajectory import SCORE_TENSOR_TYPES
from rljob_runtime.tensor_message import check_arrays, pack, unpack
from rljob_runtime.trajectory_codec import LOGPROB_ROUNDING


@dataclass(frozen=True, slots=True)
class Scores:
    """Values of N tokens of one trajectory; any number, also none."""

    header: ScoreHeader
    positions: NDArray[np.int32]
    """[N], places of the tokens in the trajectory: ascending, never the first."""
    weight_version: NDArray[np.int32]
    """[N], the version that each was scored with."""
    logprobs: NDArray[np.float32]
    """[N], at the sampling temperature."""


def encode_scores(scores: Scores) -> bytes:
    """Bytes of a score message.

    Raises:
        MalformedMessage: the scores break an invariant; nothing malformed leaves a worker.
    """
    _check(scores)
    return pack(scores.header, _tensors(scores))


def decode_scores(data: bytes) -> Scores:
    """Scores from message bytes.

    Raises:
        MalformedMessage: not safetensors, a tensor or the header is missing or of the wrong type, or an invariant is broken.
    """
    header, tensors = unpack(data, ScoreHeader, SCORE_TENSOR_TYPES, "scores")
    scores = Scores(header=header, **tensors)
    _check(scores)
    return scores


def _tensors(scores: Scores) -> dict[str, NDArray[Any]]:
    return {name: getattr(scores, name) for name in SCORE_TENSOR_TYPES}


def _check(scores: Scores) -> None:
    header = scores.header
    label = f"scores of {header.task}/{header.sample} (message {header.sequence})"
    check_arrays(label, _tensors(scores), SCORE_TENSOR_TYPES)
    if (scores.positions[:1] < 1).any() or (np.diff(scores.positions) <= 0).any():
        raise MalformedMessage(f"{label}: positions must ascend from 1 or later, each once")
    if (scores.weight_version < 0).any():
        raise MalformedMessage(f"{label}: negative weight version")
    if not np.isfinite(scores.logprobs).all():
        raise MalformedMessage(f"{label}: {int((~np.isfinite(scores.logprobs)).sum())} values are not finite")
    if (scores.logprobs > LOGPROB_ROUNDING).any():
        raise MalformedMessage(f"{label}: log-probability {float(scores.logprobs.max()):.3g} is above 0")
