"""What the costs of a replay come to: per way, and against the base. Pure.

The training itself is one function on one batch, whatever the way: where a step's ways differ in it, that is noise, and of
the same size as what is looked for. So all ways of a step are charged the median of what its training took, and what a way
really pays beside it. Ratios are of sums over steps: what a job pays, where a step with much to score and one with nothing
take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure import RESAMPLES
from bench.routes.ways import Cost, Way

BASE = Way.CURRENT


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of sums over steps, and its 90 % bootstrap interval over steps."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Summary:
    """One way over all measured steps: means of CPU seconds a step, but for `training`."""

    way: Way
    over_base: Ratio
    """Of the critical path."""
    compute_over_base: Ratio
    """The same with what is overlapped."""
    old_logprobs: float
    upkeep: float
    overlapped: float
    training: float
    """Mean of what a step is charged: the same for all ways."""
    own_training: float
    """Median over steps of what this way's took."""
    held_bytes: int
    """The largest after a step."""
    exact_fraction: float
    """Mean over steps."""


def summarised(costs: Sequence[Cost]) -> list[Summary]:
    """Each way that was replayed, in the order of `Way`; the base must be among them."""
    steps = {cost.step for cost in costs}
    training = {step: float(np.median([cost.training for cost in costs if cost.step == step])) for step in steps}
    of_ways = {way: [cost for cost in costs if cost.way is way] for way in Way}
    base = [_charged(cost, training) for cost in of_ways[BASE]]
    return [_summary(way, of_way, training, base) for way, of_way in of_ways.items() if of_way]


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """sum(one) / sum(other), where one[i] and other[i] are of the same step and are drawn together."""
    first, second = np.asarray(one), np.asarray(other)
    drawn = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    low, high = np.quantile(first[drawn].sum(axis=1) / second[drawn].sum(axis=1), (0.05, 0.95))
    return Ratio(float(first.sum() / second.sum()), float(low), float(high))


def _charged(cost: Cost, training: dict[int, float]) -> float:
    return cost.old_logprobs + cost.upkeep + training[cost.step]


def _summary(way: Way, costs: Sequence[Cost], training: dict[int, float], base: Sequence[float]) -> Summary:
    critical = [_charged(cost, training) for cost in costs]
    overlapped = [cost.overlapped for cost in costs]
    return Summary(
        way=way,
        over_base=paired_ratio(critical, base),
        compute_over_base=paired_ratio(np.add(critical, overlapped).tolist(), base),
        old_logprobs=float(np.mean([cost.old_logprobs for cost in costs])),
        upkeep=float(np.mean([cost.upkeep for cost in costs])),
        overlapped=float(np.mean(overlapped)),
        training=float(np.mean(list(training.values()))),
        own_training=float(np.median([cost.training for cost in costs])),
        held_bytes=max(cost.held_bytes for cost in costs),
        exact_fraction=float(np.mean([cost.exact_fraction for cost in costs])),
    )
