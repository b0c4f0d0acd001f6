"""The dedicated route in simulated device time: when does a pool of its own for old log-probabilities pay?

Nothing is measured here. Assumptions, all of them:

* rollouts are never late: a batch is always there;
* *single*: all devices score a batch, then train on it;
* *dedicated*: a pool scores batch after batch while the trainer trains one after the other; a batch is trained once it
  is scored;
* *in step*: both start each step together and wait for each other at its end;
* *queued*: the pool goes on as batches arrive, at most `ahead` scored ones wait (the staleness bound allows no more);
* both stages pay the overhead each step: weights go from one to the other, values come back;
* the size of batches varies: both times of a batch are multiplied by one lognormal factor with mean 1 and the given
  relative spread.

Stage times are those of Table 3(b) of arXiv 2605.12070 for 1 pool device to 2 and to 3 trainer devices; the overhead is
the mean of the 12 s and 11 s by which its two overlapped times exceed the slower of their stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OVERHEAD_SECONDS = 11.5
SPREADS = (0.0, 0.15, 0.3)
STEPS = 4000


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds a step, as the paper gives them."""

    ratio: str
    old: float
    update: float
    single: float
    overlapped: float


PAPER = (Stages("1:2", 243, 272, 305, 284), Stages("1:3", 243, 206, 237, 254))


def in_step_seconds(old: float, update: float, *, overhead: float, spread: float, seed: int = 0) -> float:
    """Mean seconds a step: batch i + 1 is scored while batch i is trained, and the slower one is waited for."""
    size = _sizes(spread, seed)
    return float(np.maximum(old * size[1:], update * size[:-1]).mean() + overhead)


def queued_seconds(
    old: float, update: float, *, overhead: float, spread: float, ahead: int = 1, seed: int = 0
) -> float:
    """Mean seconds a step, after the queue has filled.

    Scoring of batch i starts when batch i - 1 is scored and the trainer has taken batch i - ahead - 1.

    Raises:
        ValueError: ahead is below 1.
    """
    if ahead < 1:
        raise ValueError(f"ahead {ahead} must be >= 1: the pool scores a batch while the trainer trains another")
    size = _sizes(spread, seed)
    scored, taken, trained = np.zeros(STEPS), np.zeros(STEPS), np.zeros(STEPS)
    for i in range(STEPS):
        may_start = max(scored[i - 1] if i else 0.0, taken[i - ahead - 1] if i > ahead else 0.0)
        scored[i] = may_start + old * size[i] + overhead
        taken[i] = max(scored[i], trained[i - 1] if i else 0.0)
        trained[i] = taken[i] + update * size[i] + overhead
    warm_up = STEPS // 10
    return float((trained[-1] - trained[warm_up - 1]) / (STEPS - warm_up))


def table() -> list[list[Any]]:
    """Rows: ratio, spread, then seconds a step: the paper's single and overlapped, in step, queued."""
    return [
        [
            stages.ratio,
            spread,
            stages.single,
            stages.overlapped,
            round(in_step_seconds(stages.old, stages.update, overhead=OVERHEAD_SECONDS, spread=spread), 1),
            round(queued_seconds(stages.old, stages.update, overhead=OVERHEAD_SECONDS, spread=spread), 1),
        ]
        for stages in PAPER
        for spread in SPREADS
    ]


def ideal_table(old_work: float, update_work: float, pools: tuple[tuple[int, int], ...]) -> list[list[Any]]:
    """With perfect scaling, device-seconds divided by devices: what splitting costs before any overhead.

    Rows: ratio, single, dedicated. A split can only lose: it equals single when the stages balance exactly.
    """
    return [
        [
            f"{pool}:{trainer}",
            round((old_work + update_work) / (pool + trainer), 3),
            round(max(old_work / pool, update_work / trainer), 3),
        ]
        for pool, trainer in pools
    ]


def _sizes(spread: float, seed: int) -> NDArray[np.float64]:
    """Relative sizes of batches, mean exactly 1."""
    sigma = np.sqrt(np.log(1 + spread**2))
    size = np.exp(np.random.default_rng(seed).normal(0, sigma, STEPS))
    return np.asarray(size / size.mean())
