"""The dedicated route in simulated device time: when does a pool of its own for old log-probabilities pay?

Nothing is measured here. Assumptions, all of them:

* rollouts are never late: a batch is always there;
* *single*: all devices score a batch, then train on it: `single` seconds;
* *dedicated*: a pool scores batch after batch in `old` seconds each while the trainer updates in `update` seconds each;
  a batch is trained once it is scored; at most `ahead` scored batches wait (the staleness bound allows no more);
* each step of the dedicated route pays `overhead` seconds on the trainer: weights to the pool, values from it;
* the token count of a batch varies: both of its times are multiplied by one lognormal factor with mean 1 and the given
  relative spread.

Stage times are those of Table 3(b) of arXiv 2605.12070 for 1 pool device to 2 and to 3 trainer devices; the overhead is
the 11.5 s by which its two overlapped times exceed the slower of their stages (12 and 11).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OVERHEAD_SECONDS = 11.5
SPREADS = (0.0, 0.15, 0.3)
AHEAD = (1, 4)


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds a step, as the paper gives them."""

    ratio: str
    old: float
    update: float
    single: float
    overlapped: float


PAPER = (Stages("1:2", 243, 272, 305, 284), Stages("1:3", 243, 206, 237, 254))


def dedicated_seconds(
    old: float, update: float, *, overhead: float, spread: float, ahead: int, steps: int = 4000, seed: int = 0
) -> float:
    """Mean seconds a step of the two stages side by side, after they have filled.

    Scoring of batch i starts when batch i - 1 is scored and batch i - ahead - 1 has been taken by the trainer.
    """
    if ahead < 1:
        raise ValueError(f"ahead {ahead} must be >= 1: the pool scores a batch while the trainer trains another")
    sigma = np.sqrt(np.log(1 + spread**2))
    factors = np.exp(np.random.default_rng(seed).normal(-(sigma**2) / 2, sigma, steps))
    scored, taken, free = np.zeros(steps), np.zeros(steps), 0.0
    for i, factor in enumerate(factors):
        may_start = max(scored[i - 1] if i else 0.0, taken[i - ahead - 1] if i > ahead else 0.0)
        scored[i] = may_start + old * factor
        taken[i] = max(scored[i], free)
        free = taken[i] + update * factor + overhead
    warm_up = steps // 10
    return float((free - taken[warm_up]) / (steps - warm_up))


def table() -> list[list[float | str]]:
    """Rows: ratio, spread, batches ahead, seconds of single, seconds of dedicated, relative gain."""
    rows: list[list[float | str]] = []
    for stages in PAPER:
        for spread in SPREADS:
            for ahead in AHEAD:
                found = dedicated_seconds(
                    stages.old, stages.update, overhead=OVERHEAD_SECONDS, spread=spread, ahead=ahead
                )
                rows.append([stages.ratio, spread, ahead, stages.single, round(found, 1), round(found / stages.single - 1, 4)])
    return rows


def ideal_table(old_work: float, update_work: float, pools: tuple[tuple[int, int], ...]) -> list[list[float | str]]:
    """With perfect scaling, device-seconds divided by devices: what splitting costs before any overhead.

    Rows: ratio, single, dedicated. The split can only lose: it equals single when the stages balance exactly.
    """
    rows: list[list[float | str]] = []
    for pool, trainer in pools:
        single = (old_work + update_work) / (pool + trainer)
        dedicated = max(old_work / pool, update_work / trainer)
        rows.append([f"{pool}:{trainer}", round(single, 3), round(dedicated, 3)])
    return rows
