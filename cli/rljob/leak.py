"""Has staleness leaked into the discrepancy ratio? A permutation test on the record of a run.

The size of log r_d depends on the position in the trajectory and on how far training has come, and so does staleness.
Neither is a leak, so staleness is permuted over whole trajectories within (position, phase of training) only; see
`rljob_runtime.correction.diagnostics.flatness_test`. Late in training the policy is nearly certain of most tokens and
the rare others dominate every RMS: tokens count that were sampled before the mean reward passed `REWARD_BELOW`.

That no leak is found says something only where one would have been: a leak by which log r_d grows with each version is
planted in the same tokens, and the test must find it before they are called flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rljob.record import Record, RecordedStep
from rljob_api.messages import StepReport
from rljob_runtime.correction.diagnostics import flatness_test
from rljob_runtime.correction.leak import TOLERANCE, LeakVerdict, leak_cells, leak_verdict

POSITION_BINS = 4
PHASE_STEPS = 5
"""Coarser phases hold visible training progress, which then looks like a leak: 20 steps were seen to be too many."""
REWARD_BELOW = 0.8
REWARD_STEPS = 10
"""Steps that the mean reward is taken over."""
PERMUTATIONS = 999
SIGNIFICANCE = 0.01
MAX_TRAJECTORIES = 20_000
"""More are thinned out evenly: the test takes seconds then, and has more power than anyone needs."""


@dataclass(frozen=True, slots=True)
class Leak:
    """Outcome of the test."""

    trajectories: int
    tokens: int
    effect: float
    """Weighted standard deviation of the RMS of log r_d over staleness, relative: 0.1 says buckets differ by a tenth."""
    p_value: float
    verdict: LeakVerdict
    """Whether there is a leak is the test's word, where it can see one; how it goes with staleness is read from the same tokens."""

    @property
    def found(self) -> bool:
        return self.p_value < SIGNIFICANCE


def find_leak(record: Record, rewards: Sequence[float]) -> Leak | None:
    """Test the recorded trained tokens; None where none qualifies or all have one staleness.

    Args:
        record: of the run.
        rewards: mean reward of steps 1, 2, ...

    Raises:
        MalformedMessage: a recorded step cannot be read.
    """
    limit = version_that_passes(rewards)
    parts = [part for step in record.steps() for part in _trajectories(step, limit)]
    parts = parts[:: -(-len(parts) // MAX_TRAJECTORIES) or 1]
    if not parts:
        return None
    log_discrepancy_N, staleness_N, version_N, position_N, phase_N = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    if np.ptp(staleness_N) == 0:
        return None
    trajectory_N = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    edges = np.quantile(position_N, np.linspace(0, 1, POSITION_BINS + 1)[1:-1])
    strata = np.stack([np.searchsorted(edges, position_N), phase_N], axis=1)

    def test(tested_N: NDArray[np.float64]) -> tuple[float, float]:
        return flatness_test(tested_N, staleness_N, trajectory_N, strata, num_permutations=PERMUTATIONS, seed=0)

    effect, p_value = test(log_discrepancy_N)
    differs: bool | None = p_value < SIGNIFICANCE
    if not differs:
        planted_N = log_discrepancy_N * (1 + TOLERANCE) ** (staleness_N - staleness_N.min())
        differs = False if test(planted_N)[1] < SIGNIFICANCE else None
    verdict = leak_verdict(leak_cells(log_discrepancy_N, version_N, staleness_N, position_N), differs=differs)
    return Leak(trajectories=len(parts), tokens=len(staleness_N), effect=effect, p_value=p_value, verdict=verdict)


def reported_leak(steps: Sequence[StepReport], *, last: int | None = None) -> LeakVerdict | None:
    """The verdict from the steps' own reports, over tokens as above; None where they hold no diagnostics.

    Args:
        steps: all of the run.
        last: take the cells of so many steps only, the last ones that have tokens which count.
    """
    if all(step.diagnostics is None for step in steps):
        return None
    limit = version_that_passes([step.reward for step in steps])
    reported = [
        [cell for cell in step.diagnostics.leak_cells if cell.weight_version < limit]
        for step in steps
        if step.diagnostics is not None
    ]
    reported = [cells for cells in reported if cells]
    return leak_verdict([cell for cells in reported[-(last or len(reported)) :] for cell in cells])


def version_that_passes(rewards: Sequence[float]) -> int:
    """First version by which the mean reward of the last steps reached REWARD_BELOW; past the end where none did."""
    for step in range(1, len(rewards) + 1):
        recent = rewards[max(0, step - REWARD_STEPS) : step]
        if sum(recent) >= REWARD_BELOW * len(recent):
            return step
    return len(rewards) + 1


Ints = NDArray[np.int64]
Columns = tuple[NDArray[np.float64], Ints, Ints, Ints, Ints]


def _trajectories(step: RecordedStep, limit: int) -> list[Columns]:
    """(log r_d, staleness, version, position, phase) of the trained tokens of each trajectory that has some from before `limit`."""
    tensors, found = step.tensors, []
    wanted = step.is_trained & (tensors["weight_version"] < limit)
    log_discrepancy = tensors["old_logprobs"].astype(np.float64) - tensors["behavior_logprobs"]
    for index in range(len(step.headers)):
        row = step.row(index)
        places = np.flatnonzero(wanted[row])
        if len(places):
            found.append(
                (
                    log_discrepancy[row][places],
                    step.staleness[row][places].astype(np.int64),
                    tensors["weight_version"][row][places].astype(np.int64),
                    places.astype(np.int64),
                    np.full(len(places), step.step // PHASE_STEPS, np.int64),
                )
            )
    return found
