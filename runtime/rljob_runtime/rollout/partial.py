"""A partial rollout: the tokens of one unfinished trajectory, with everything needed to go on after an interruption.

Model tokens enter only by `take`, each with the version and log-probability that the engine reported for it; nothing is
ever taken back, so an interruption can neither lose nor repeat one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import EngineError
from rljob_api.messages import SegmentHeader, TrajectoryHeader
from rljob_runtime.rollout.engine import Sampled
from rljob_runtime.segment_codec import OpenSegment
from rljob_runtime.trajectory_codec import Trajectory

OBSERVED = -1


class PartialRollout:
    """Grows by observations and model turns; becomes a trajectory when the episode ends."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.interruptions = 0
        """Interruptions that it lived through with at least one model token."""
        self.num_model_tokens = 0
        self._turn: list[int] = []
        self._weight_version: list[int] = []
        self._behavior_logprobs: list[float] = []
        self._current_turn = OBSERVED
        self._turn_start = 0
        self._last_version: int | None = None
        self.on_growth: Callable[[], None] | None = None
        """Called after each `take`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def observe(self, tokens: tuple[int, ...]) -> None:
        """Append tokens that the model did not sample: prompt, observations."""
        self.tokens += tokens
        self._turn += [OBSERVED] * len(tokens)
        self._weight_version += [-1] * len(tokens)
        self._behavior_logprobs += [0.0] * len(tokens)

    def begin_turn(self) -> None:
        """The tokens taken from here on are the next model turn."""
        self._current_turn += 1
        self._turn_start = len(self.tokens)

    @property
    def turn_tokens(self) -> tuple[int, ...]:
        """Model tokens of the current turn so far."""
        return tuple(self.tokens[self._turn_start :])

    def take(self, sampled: Sampled) -> int:
        """Append what the engine sampled for the current turn; the number of version changes that it went on across.

        Raises:
            EngineError: log-probabilities or spans do not cover the tokens: their versions would be a guess.
        """
        count = len(sampled.tokens)
        versions = [span.version for span in sampled.spans for _ in range(span.start, span.end)]
        contiguous = all(a.end == b.start for a, b in zip(sampled.spans, sampled.spans[1:], strict=False))
        starts_at_zero = not sampled.spans or sampled.spans[0].start == 0
        if len(versions) != count or len(sampled.logprobs) != count or not contiguous or not starts_at_zero:
            raise EngineError(
                f"the engine returned {count} tokens, {len(sampled.logprobs)} log-probabilities and version spans "
                f"{[(s.version, s.start, s.end) for s in sampled.spans]}; they must cover the tokens in order"
            )
        changes = 0
        for version in versions:
            changes += self._last_version is not None and version != self._last_version
            self._last_version = version
        self.tokens += sampled.tokens
        self._turn += [self._current_turn] * count
        self._weight_version += versions
        self._behavior_logprobs += sampled.logprobs
        self.num_model_tokens += count
        if count and self.on_growth is not None:
            self.on_growth()
        return changes

    def trajectory(self, header: TrajectoryHeader) -> Trajectory:
        """The finished trajectory."""
        return Trajectory(header, *self._tensors(0, len(self)))

    def segment(self, header: SegmentHeader, end: int) -> OpenSegment:
        """Its tokens from `header.start` to `end`."""
        return OpenSegment(header, *self._tensors(header.start, end))

    def _tensors(
        self, start: int, end: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        return (
            np.asarray(self.tokens[start:end], np.int32),
            np.asarray(self._turn[start:end], np.int32),
            np.asarray(self._weight_version[start:end], np.int32),
            np.asarray(self._behavior_logprobs[start:end], np.float32),
        )
