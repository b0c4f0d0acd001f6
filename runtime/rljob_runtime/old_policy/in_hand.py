"""A trajectory that an old-policy worker has leased, and what is scored of it so far.

Shapes: T tokens of the trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rljob_api.messages import ScoreHeader
from rljob_protocol.claims import ClaimedTrajectory
from rljob_runtime.old_policy.plan import Part, parts_of
from rljob_runtime.score_codec import Scores
from rljob_runtime.trajectory_codec import Trajectory


@dataclass(slots=True)
class InHand:
    """Make it with `take`."""

    claimed: ClaimedTrajectory
    trajectory: Trajectory
    since: float
    """When it was leased, on the worker's clock."""
    open: dict[int, Part]
    """Parts that are neither scored nor given up, by version."""
    logprobs: NDArray[np.float32] = field(repr=False)
    """[T], NaN where there is no value (yet)."""

    @classmethod
    def take(cls, claimed: ClaimedTrajectory, trajectory: Trajectory, now: float) -> InHand:
        parts = parts_of(trajectory, claimed.sequence)
        empty = np.full(trajectory.tokens.shape, np.nan, np.float32)
        return cls(claimed, trajectory, now, {part.version: part for part in parts}, empty)

    def row(self, part: Part) -> NDArray[np.int32]:
        """The tokens that the part's forward sees."""
        return self.trajectory.tokens[: part.length]

    def fill(self, part: Part, logprobs: NDArray[np.float32]) -> int:
        """Take the part's values out of its row's; how many tokens got one. A value that is not finite is none."""
        places = self._places(part)
        self.logprobs[places] = logprobs[places]
        self.open.pop(part.version, None)
        return int(np.isfinite(self.logprobs[places]).sum())

    def give_up(self, part: Part) -> int:
        """The part is not going to be scored; how many tokens that leaves without a value."""
        self.open.pop(part.version, None)
        return int(self._places(part).size)

    def scores(self, worker: str) -> Scores:
        """What there is, as it goes to the trainer: under the version that is in the trajectory."""
        places = np.flatnonzero(np.isfinite(self.logprobs)).astype(np.int32)
        header = self.trajectory.header
        return Scores(
            header=ScoreHeader(task=header.task, sample=header.sample, sequence=self.claimed.sequence, worker=worker),
            positions=places,
            weight_version=self.trajectory.weight_version[places],
            logprobs=self.logprobs[places],
        )

    def _places(self, part: Part) -> NDArray[np.int64]:
        made = self.trajectory.model_mask & (self.trajectory.weight_version == part.version)
        return np.flatnonzero(made)
