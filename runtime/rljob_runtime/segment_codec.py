"""Parts of unfinished trajectories on the wire: the tensors of a trajectory, and where they stand in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import MalformedMessage
from rljob_api.messages import SegmentHeader
from rljob_api.trajectory import TENSOR_TYPES
from rljob_runtime.tensor_message import pack, unpack
from rljob_runtime.trajectory_codec import check_tokens


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """Tokens [start, start + N) of one attempt at an unfinished trajectory; `header.start` says where they begin."""

    header: SegmentHeader
    tokens: NDArray[np.int32]
    """[N]"""
    turn: NDArray[np.int32]
    """[N], -1 for prompt and observation tokens."""
    weight_version: NDArray[np.int32]
    """[N], -1 where turn is -1."""
    behavior_logprobs: NDArray[np.float32]
    """[N], 0 where turn is -1."""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])


def encode_segment(segment: OpenSegment) -> bytes:
    """Bytes of a segment message.

    Raises:
        MalformedMessage: the segment breaks an invariant; nothing malformed leaves a worker.
    """
    _check(segment)
    return pack(segment.header, _tensors(segment))


def decode_segment(data: bytes) -> OpenSegment:
    """Segment from message bytes.

    Raises:
        MalformedMessage: not safetensors, a tensor or the header is missing or of the wrong type, or an invariant is broken.
    """
    header, tensors = unpack(data, SegmentHeader, TENSOR_TYPES, "segment")
    segment = OpenSegment(header=header, **tensors)
    _check(segment)
    return segment


def _tensors(segment: OpenSegment) -> dict[str, NDArray[Any]]:
    return {name: getattr(segment, name) for name in TENSOR_TYPES}


def _check(segment: OpenSegment) -> None:
    header = segment.header
    label = f"segment {header.task}/{header.sample} from token {header.start}"
    if check_tokens(label, _tensors(segment), is_start=header.start == 0) < 1:
        raise MalformedMessage(f"{label}: no tokens")
