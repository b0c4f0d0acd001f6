"""The loss of docs/design.md section 6 and its gradient, token by token in Python floats: slow, and plain to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Expected:
    loss: float
    gradient: list[list[float]]
    """With respect to the target log-probabilities."""
    keep_fraction: float
    clip_fraction: float
    active_fraction: float
    distance_to_kink: float
    """Smallest distance, in log space, of any mask token's ratio to a threshold: 0 is on one."""


def expected_loss(
    *,
    target: Rows,
    old: Rows,
    behavior: Rows,
    advantages: Rows,
    mask: Sequence[Sequence[bool]],
    clip_low: float,
    clip_high: float,
    discrepancy_low: float,
    discrepancy_high: float,
    granularity: str,
    weight: str,
    weight_cap: float,
    segment_ids: Sequence[Sequence[int]],
    denominator: float | None,
) -> Expected:
    tokens = [(b, t) for b, row in enumerate(mask) for t, inside in enumerate(row) if inside]
    divisor = denominator if denominator is not None else float(len(tokens))

    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    group_of: dict[tuple[int, int], tuple[int, ...]] = {}
    for b, t in tokens:
        key = {"token": (b, t), "segment": (b, segment_ids[b][t]), "sequence": (b,)}[granularity]
        group_of[b, t] = key
        groups.setdefault(key, []).append((b, t))
    log_rho = {
        key: math.fsum(old[b][t] - behavior[b][t] for b, t in members) / len(members) for key, members in groups.items()
    }

    total = 0.0
    gradient = [[0.0] * len(row) for row in target]
    kept_tokens = clipped_tokens = active_tokens = 0
    nearest = math.inf
    for b, t in tokens:
        advantage = advantages[b][t]
        log_ratio = target[b][t] - old[b][t]
        ratio = _exp(log_ratio)
        rho = _exp(log_rho[group_of[b, t]])
        kept = discrepancy_low <= rho <= discrepancy_high
        clipped = ratio > 1 + clip_high if advantage >= 0 else ratio < 1 - clip_low
        kept_tokens += kept
        clipped_tokens += clipped
        active_tokens += kept and not clipped
        for bound in (1 + clip_high, 1 - clip_low):
            nearest = min(nearest, abs(log_ratio - math.log(bound)))
        for bound in (discrepancy_low, discrepancy_high):
            nearest = min(nearest, abs(log_rho[group_of[b, t]] - math.log(bound)))
        if not kept:
            continue
        w = {"none": 1.0, "truncated": min(rho, weight_cap), "raw": rho}[weight]
        clip = max(1 - clip_low, min(1 + clip_high, ratio))
        unclipped = ratio * advantage if advantage else 0.0  # 0 also where the ratio overflows
        total += w * min(unclipped, clip * advantage)
        if not clipped:
            gradient[b][t] = -w * ratio * advantage / divisor
    return Expected(
        loss=-total / divisor if tokens else 0.0,
        gradient=gradient,
        keep_fraction=kept_tokens / max(len(tokens), 1),
        clip_fraction=clipped_tokens / max(len(tokens), 1),
        active_fraction=active_tokens / max(len(tokens), 1),
        distance_to_kink=nearest,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
