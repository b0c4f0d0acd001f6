"""Has staleness leaked into the discrepancy ratio? A verdict in words from the RMS of log r_d per staleness.

log r_d of an exact old policy depends on the version that sampled the token and on the place in the trajectory, never on
when the token is trained. So tokens of one version and stretch of positions are compared with each other only, and the
unit of chance is the version: tokens share their noise within it, and a t-test over tokens finds significance everywhere.

Shapes: N tokens; C cells (`LeakCell`) of any number of steps; K stalenesses; V versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from rljob_api.diagnostics import LeakCell

TOLERANCE = 0.1
"""An RMS that differs by less from that of the freshest tokens is flat."""
STANDARD_ERRORS = 3.3
"""A difference counts from here on. With the few versions asked for below, chance gets there in about 1 of 100."""
MIN_VERSIONS = 10
"""A staleness counts that was seen together with the freshest one in so many versions."""
MAX_ERROR = 0.05
"""Flatness is claimed from this standard error of the relative RMS on."""
RMS_FLOOR = 1e-7
"""Added to every RMS, in squares: below a float32 log-probability's resolution all sizes are one. It keeps 0 from being
infinitely smaller than the rest where engine and trainer agree to the bit."""
ROUNDS = 30
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Shape(StrEnum):
    """How the size of log r_d goes with staleness."""

    FLAT = "flat"
    RISING = "rising"
    VALLEY = "valley"
    CHANGING = "changing"  # a test says so; which way is not to be seen
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class LeakVerdict:
    """RMS of log r_d per staleness, relative to that of the freshest tokens of the same versions and positions."""

    shape: Shape
    relative_rms: dict[int, float]
    """By staleness, ascending; only what was seen in enough versions. The freshest has 1."""
    error: dict[int, float]
    """Standard error of the logarithm of the same; 0 for the freshest."""
    minimum: float | None = None
    """Staleness at which the RMS is smallest: the centre of mass of an average. Only of a valley."""

    def __str__(self) -> str:
        """The verdict in words."""
        match self.shape:
            case Shape.FLAT:
                return "flat: clean"
            case Shape.RISING:
                return "rises with staleness: staleness leaks into the discrepancy mask"
            case Shape.VALLEY:
                return f"V-shaped around {self.minimum:.1f}: EWMA"
            case Shape.CHANGING:
                return "changes with staleness: staleness leaks into the discrepancy mask"
            case Shape.UNKNOWN:
                return "too few tokens to say"


def leak_cells(
    log_discrepancy_N: Floats, weight_version_N: Ints, staleness_N: Ints, position_N: Ints
) -> tuple[LeakCell, ...]:
    """Tokens and RMS of each version, staleness and stretch of positions, in that order."""
    if log_discrepancy_N.size == 0:
        return ()
    stretch_N = np.asarray(np.log2(position_N + 1.0), np.int64)
    keys = np.stack([weight_version_N, staleness_N, stretch_N])
    low = keys.min(axis=1, keepdims=True)
    spans = keys.max(axis=1) - low[:, 0] + 1
    distinct, cell_N = np.unique(np.ravel_multi_index(tuple(keys - low), tuple(spans)), return_inverse=True)
    tokens = np.bincount(cell_N)
    rms = np.sqrt(np.bincount(cell_N, weights=log_discrepancy_N**2) / tokens)
    version, staleness, stretch = np.stack(np.unravel_index(distinct, tuple(spans))) + low
    return tuple(
        map(LeakCell._make, zip(*(a.tolist() for a in (version, staleness, stretch, tokens, rms)), strict=True))
    )


def leak_verdict(cells: Sequence[LeakCell], *, differs: bool | None = None) -> LeakVerdict:
    """The verdict from the cells of many steps, in any order.

    The mean square of a cell is fitted as (level of its version and stretch) * (factor of its staleness), every token
    with the same relative weight: levels that grow over training, or with position, don't count, however staleness goes
    with them. The factor's error is from its spread over versions.

    Args:
        cells: of the reports of a run.
        differs: what a test with more to go on found (`diagnostics.flatness_test` on a record), False only where it would
            have found a leak; unset, the cells decide.
    """
    version_C, staleness_C, position_C, count_C = (
        np.array([cell[field] for cell in cells], np.int64) for field in range(4)
    )
    tokens_C: Floats = count_C.astype(np.float64)
    rms_C = np.array([cell.rms for cell in cells], np.float64)
    square_C = tokens_C * (rms_C**2 + RMS_FLOOR**2)
    stratum_C = _numbered(np.stack([version_C, position_C], axis=1))
    useful_C = _mixed(stratum_C, staleness_C)
    if not useful_C.any():
        return LeakVerdict(_unseen(differs), {}, {})
    staleness_K, label_C = np.unique(staleness_C[useful_C], return_inverse=True)
    _, version_C = np.unique(version_C[useful_C], return_inverse=True)
    stratum_C = np.unique(stratum_C[useful_C], return_inverse=True)[1]
    tokens_C, square_C = tokens_C[useful_C], square_C[useful_C]

    factor_K, level_C = _fit(tokens_C, square_C, stratum_C, label_C)
    residual_C = square_C / level_C - factor_K[label_C] * tokens_C
    shape_VK = (int(version_C.max()) + 1, len(staleness_K))
    residual_VK, tokens_VK = np.zeros(shape_VK), np.zeros(shape_VK)
    np.add.at(residual_VK, (version_C, label_C), residual_C)
    np.add.at(tokens_VK, (version_C, label_C), tokens_C)
    total_K = tokens_VK.sum(axis=0)
    influence_VK = residual_VK / (factor_K * total_K)
    together_K = (tokens_VK > 0).T.astype(np.int64) @ (tokens_VK[:, 0] > 0)
    contrast_VK = influence_VK - influence_VK[:, :1]
    error_K = np.sqrt((contrast_VK**2).sum(axis=0) * together_K / np.maximum(together_K - 1, 1)) / 2
    counts_K = together_K >= MIN_VERSIONS
    relative_K = np.sqrt(factor_K / factor_K[0])
    return _judge(staleness_K[counts_K], relative_K[counts_K], error_K[counts_K], total_K[counts_K], differs)


def _judge(
    staleness_K: Ints, relative_K: Floats, error_K: Floats, tokens_K: Floats, differs: bool | None
) -> LeakVerdict:
    of = [int(staleness) for staleness in staleness_K]
    relative_rms, error = dict(zip(of, relative_K.tolist(), strict=True)), dict(zip(of, error_K.tolist(), strict=True))
    if len(of) < 2:
        return LeakVerdict(_unseen(differs), relative_rms, error)
    log_K = np.log(relative_K)
    clear_K = (np.abs(log_K) > math.log1p(TOLERANCE)) & (np.abs(log_K) > STANDARD_ERRORS * error_K)
    if differs is None:
        below, above = bool((clear_K & (log_K < 0)).any()), bool((clear_K & (log_K > 0)).any())
        known = float(error_K[1:].min()) <= MAX_ERROR
    else:
        below = differs and (bool((clear_K & (log_K < 0)).any()) or float(log_K[-1]) < 0)
        above, known = differs, True
    if below:
        return LeakVerdict(Shape.VALLEY, relative_rms, error, _minimum(staleness_K, relative_K, tokens_K))
    if above:
        return LeakVerdict(Shape.RISING, relative_rms, error)
    return LeakVerdict(Shape.FLAT if known else Shape.UNKNOWN, relative_rms, error)


def _unseen(differs: bool | None) -> Shape:
    """Where too few versions were trained at several stalenesses: a test that permutes trajectories may know all the same."""
    return Shape.UNKNOWN if differs is None else Shape.CHANGING if differs else Shape.FLAT


def _fit(tokens_C: Floats, square_C: Floats, stratum_C: Ints, label_C: Ints) -> tuple[Floats, Floats]:
    """Factor of each staleness [K], 1 for the first, and level of each cell [C], by alternating relative means.

    Relative, not absolute: a phase with ten times the noise would decide alone.
    """
    factor_K = np.ones(int(label_C.max()) + 1)
    level_C = np.ones_like(tokens_C)
    for _ in range(ROUNDS):
        level_C = (np.bincount(stratum_C, square_C / factor_K[label_C]) / np.bincount(stratum_C, tokens_C))[stratum_C]
        factor_K = np.bincount(label_C, square_C / level_C) / np.bincount(label_C, tokens_C)
        factor_K /= factor_K[0]
    return factor_K, level_C


def _minimum(staleness_K: Ints, relative_K: Floats, tokens_K: Floats) -> float:
    """Vertex of the parabola through the mean squares: residuals (n - m) * drift have their least at m."""
    lowest = float(staleness_K[np.argmin(relative_K)])
    if len(staleness_K) < 3:
        return lowest
    square, slope, _ = np.polyfit(staleness_K, relative_K**2, 2, w=np.sqrt(tokens_K))
    if square <= 0:
        return lowest
    return float(np.clip(-slope / (2 * square), staleness_K[0], staleness_K[-1]))


def _numbered(rows: Ints) -> Ints:
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _mixed(stratum_C: Ints, staleness_C: Ints) -> NDArray[np.bool_]:
    """Cells of strata that hold more than one staleness: the others compare nothing."""
    if stratum_C.size == 0:
        return np.zeros(0, np.bool_)
    pairs = np.unique(np.stack([stratum_C, staleness_C], axis=1), axis=0)
    return (np.bincount(pairs[:, 0]) > 1)[stratum_C]
