"""What a replay cannot show of a run, from its step reports: idle time, and how long engines stand still at a barrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rljob.run_directory import RunDirectory
from rljob_api.messages import StepReport

STEADY_SHARE = 0.1
"""Steps at the beginning that are left out: engines start, and staleness grows."""


@dataclass(frozen=True, slots=True)
class RealRun:
    """Means over the steps of one run, in seconds of wall-clock."""

    name: str
    route: str
    steps: int
    total: float
    waiting: float
    """For a batch, with what was scored ahead meanwhile."""
    ahead: float
    """Of the waiting: scoring ahead."""
    scoring: float
    """Old log-probabilities in the step."""
    training: float
    """On the interruption route with the barrier."""
    pooled_share: float
    """Of the stale tokens: scored ahead."""
    mean_staleness: float
    spanning_share: float
    """Of the trajectories: of more than one version."""
    barrier: float | None
    """From the order to stop until all had handed over, with the engines standing still; None without a barrier."""


def read_run(root: Path) -> RealRun:
    """The run in a folder, from its step reports."""
    return of_steps(root.name, RunDirectory(root).read_steps())


def of_steps(name: str, steps: Sequence[StepReport]) -> RealRun:
    steady = steps[int(STEADY_SHARE * len(steps)) :]

    def mean(value: Callable[[StepReport], float]) -> float:
        return float(np.mean([value(step) for step in steady]))

    pools = [step.pool for step in steady if step.pool is not None]
    barriers = [step.barrier.seconds for step in steady if step.barrier is not None]
    return RealRun(
        name=name,
        route=steady[0].route,
        steps=len(steady),
        total=mean(lambda step: step.seconds_total),
        waiting=mean(lambda step: step.seconds_waiting),
        ahead=mean(lambda step: step.seconds_eager),
        scoring=mean(lambda step: step.seconds_scoring),
        training=mean(lambda step: step.seconds_training),
        pooled_share=sum(pool.pooled_tokens for pool in pools) / max(1, sum(pool.stale_tokens for pool in pools)),
        mean_staleness=mean(lambda step: step.staleness.mean),
        spanning_share=sum(step.trajectories_spanning_versions for step in steady)
        / max(1, sum(step.trajectories for step in steady)),
        barrier=float(np.mean(barriers)) if barriers else None,
    )
