"""Headers of trajectories that nobody sampled."""

from __future__ import annotations

from typing import Any

from rljob_api.messages import Outcome, TrajectoryHeader


def finished(task: int, sample: int, **changes: Any) -> TrajectoryHeader:
    """The header of a finished trajectory; `changes` replace fields."""
    fields: dict[str, Any] = {
        "attempt": 1,
        "epoch": 1,
        "worker": "w",
        "incarnation": "i",
        "outcome": Outcome.FINISHED,
    }
    return TrajectoryHeader(task=task, sample=sample, **(fields | changes))
