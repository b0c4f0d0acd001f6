"""What the costs of a replay come to: per way, and against the base of the same step. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure import RESAMPLES
from bench.routes.ways import Cost, Way

BASE = Way.CURRENT


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over steps of one step's cost over another's, and its 90 % bootstrap interval over steps."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Summary:
    """One way over all measured steps: medians of CPU seconds a step."""

    way: Way
    over_base: Ratio
    """Of the critical path."""
    compute_over_base: Ratio
    """The same with what is overlapped."""
    critical: float
    old_logprobs: float
    upkeep: float
    training: float
    overlapped: float
    held_bytes: int
    """The largest after a step."""
    exact_fraction: float
    """Mean over steps."""


def summarised(costs: Sequence[Cost]) -> list[Summary]:
    """Each way that was replayed, in the order of `Way`; the base must be among them."""
    base = {cost.step: cost.critical for cost in costs if cost.way is BASE}
    return [_summary(way, [cost for cost in costs if cost.way is way], base) for way in Way if _has(costs, way)]


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Median of one[i] / other[i]: of costs of the same step, whose content the ratio then does not depend on."""
    ratios = np.asarray(one) / np.asarray(other)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.05, 0.95))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _has(costs: Sequence[Cost], way: Way) -> bool:
    return any(cost.way is way for cost in costs)


def _summary(way: Way, costs: Sequence[Cost], base: dict[int, float]) -> Summary:
    of_base = [base[cost.step] for cost in costs]

    def median(name: str) -> float:
        return float(np.median([getattr(cost, name) for cost in costs]))

    return Summary(
        way=way,
        over_base=paired_ratio([cost.critical for cost in costs], of_base),
        compute_over_base=paired_ratio([cost.critical + cost.overlapped for cost in costs], of_base),
        critical=median("critical"),
        old_logprobs=median("old_logprobs"),
        upkeep=median("upkeep"),
        training=median("training"),
        overlapped=median("overlapped"),
        held_bytes=max(cost.held_bytes for cost in costs),
        exact_fraction=float(np.mean([cost.exact_fraction for cost in costs])),
    )
