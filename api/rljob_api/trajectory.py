"""A trajectory: one finished sample, as tensors beside its header.

Shapes: T = all tokens of the trajectory (prompt, observations, model turns), in order.

| tensor            | type    | meaning                                                                         |
| ----------------- | ------- | ------------------------------------------------------------------------------- |
| tokens            | int32   | token ids                                                                       |
| turn              | int32   | turn that the token belongs to as a *model* token, -1 for prompt and observation |
| weight_version    | int32   | version that sampled the token, -1 where turn is -1                             |
| behavior_logprobs | float32 | log mu at the sampling temperature, 0 where turn is -1                          |

Invariants, checked when bytes are decoded: equal lengths; T >= 2; the first token is never a model token;
behavior_logprobs finite and <= 0 (+1e-4 for rounding) on model tokens; versions non-negative on model tokens (they may
fall: going back to a good lower version is legal); turns non-decreasing. The codec (safetensors with the header as JSON metadata) is `rljob_runtime.trajectory_codec`.
"""

from __future__ import annotations

from dataclasses import dataclass

TENSOR_TYPES = {"tokens": "int32", "turn": "int32", "weight_version": "int32", "behavior_logprobs": "float32"}
SCORE_TENSOR_TYPES = {"positions": "int32", "weight_version": "int32", "logprobs": "float32"}
"""Of a score message, [N] each: tokens of one trajectory, the version that each was scored with, log pi_v."""
HEADER_KEY = "rljob"
"""Key of the header in the safetensors metadata."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Maximal run [start, end) of adjacent model tokens with one weight version."""

    start: int
    end: int
    weight_version: int


def segments(turn: list[int], weight_version: list[int]) -> tuple[Segment, ...]:
    """Segments of a trajectory: an observation token, a new turn or a version change ends one.

    Example: turn [-1 0 0 0 -1 1], version [-1 4 4 5 -1 5] -> (1,3,v4) (3,4,v5) (5,6,v5).
    """
    found: list[Segment] = []
    start = 0
    for i in range(len(turn) + 1):
        inside = i < len(turn) and turn[i] >= 0
        boundary = i == len(turn) or i == 0 or turn[i] != turn[i - 1] or weight_version[i] != weight_version[i - 1]
        if not boundary:
            continue
        if i > 0 and turn[i - 1] >= 0:
            found.append(Segment(start, i, weight_version[i - 1]))
        if inside:
            start = i
    return tuple(found)
