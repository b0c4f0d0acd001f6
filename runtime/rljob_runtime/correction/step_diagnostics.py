"""All that a step's tokens say about the two ratios, in one pass over flat arrays.

Costs a few passes of numpy over the batch (bench/diagnostics.py); what needs more than a step, such as the verdict on the
leak, is made from the reports (`leak.py`).

Shapes: N tokens of the batch, rows joined end to end; M of them trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rljob_api.diagnostics import Diagnostics
from rljob_runtime.correction.divergence import Floats, Ints, divergence
from rljob_runtime.correction.leak import leak_cells
from rljob_runtime.correction.ratios import Granularity
from rljob_runtime.correction.sources import EXACT_SOURCES, SOURCE_NAMES, Source

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Every token of a step's batch, arrays [N] in row order, any integer or floating type.

    Which tokens are trained is told by `source`; nothing else of the others is looked at.
    """

    trajectory: NDArray[np.integer]
    """Number of the row, ascending from 0."""
    turn: NDArray[np.integer]
    """-1 where the token is not the model's."""
    weight_version: NDArray[np.integer]
    staleness: NDArray[np.integer]
    source: NDArray[np.integer]
    """Codes of `Source`."""
    behavior_logprobs: NDArray[np.floating]
    old_logprobs: NDArray[np.floating]
    target_logprobs: NDArray[np.floating]
    """Of the policy as the step found it."""
    advantages: NDArray[np.floating]

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lengths differ: {', '.join(f'{name} {length}' for name, length in lengths.items())}")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Those of the loss (`objective.decoupled_policy_loss`)."""

    clip_low: float
    clip_high: float
    discrepancy_low: float
    discrepancy_high: float
    granularity: Granularity = "token"


def step_diagnostics(tokens: StepTokens, thresholds: Thresholds) -> Diagnostics:
    """Diagnostics of one step; zeros and None where there is no token.

    A discrepancy is measured on tokens of exact sources alone: against any other reference, log r_d holds staleness as
    well. Shares of mask and clip are those of the loss at the policy that the step found, up to rounding at a threshold.

    Args:
        tokens: the batch, all ranks' rows.
        thresholds: of the loss.
    """
    source_N = np.asarray(tokens.source)
    trainable_N = source_N != Source.NONE
    wanted_N = trainable_N & (source_N != Source.MISSING)
    finite_N = (
        np.isfinite(tokens.behavior_logprobs) & np.isfinite(tokens.old_logprobs) & np.isfinite(tokens.target_logprobs)
    )
    trained_N = wanted_N & finite_N
    num_trainable, num_trained = int(trainable_N.sum()), int(trained_N.sum())
    counted = {
        "tokens": num_trained,
        "tokens_not_finite": int(wanted_N.sum()) - num_trained,
        "missing_share": int((source_N == Source.MISSING).sum()) / num_trainable if num_trainable else 0.0,
    }
    if num_trained == 0:
        return Diagnostics(**counted)

    def ints(values: NDArray[np.integer]) -> Ints:
        return np.asarray(values[trained_N], np.int64)

    def floats(values: NDArray[np.floating]) -> Floats:
        return np.asarray(values[trained_N], np.float64)

    source_M, trajectory_M, version_M = ints(source_N), ints(tokens.trajectory), ints(tokens.weight_version)
    staleness_M = ints(tokens.staleness)
    old_M, behavior_M, target_M = (
        floats(values) for values in (tokens.old_logprobs, tokens.behavior_logprobs, tokens.target_logprobs)
    )
    log_discrepancy_M, log_staleness_M, log_importance_M = old_M - behavior_M, target_M - old_M, target_M - behavior_M
    exact_M = np.isin(source_M, EXACT_SOURCES)
    kept_M = _kept(log_discrepancy_M, trajectory_M, _segments(tokens)[trained_N], thresholds)
    positive_M = floats(tokens.advantages) >= 0
    high_M = positive_M & (log_staleness_M > math.log1p(thresholds.clip_high))
    low_M = ~positive_M & (
        log_staleness_M < (math.log1p(-thresholds.clip_low) if thresholds.clip_low < 1 else -math.inf)
    )
    versions_R = _distinct_per_trajectory(trajectory_M, version_M)
    return Diagnostics(
        **counted,
        versions_per_trajectory=float(versions_R.mean()),
        versions_per_trajectory_max=int(versions_R.max()),
        discrepancy=divergence(log_discrepancy_M[exact_M], trajectory_M[exact_M]),
        importance=divergence(log_importance_M, trajectory_M),
        mean_square_importance=float((log_importance_M**2).mean()),
        keep_share=_share_by_source(kept_M, source_M, SOURCE_NAMES),
        clip_high_share=float(high_M.mean()),
        clip_low_share=float(low_M.mean()),
        clip_and_reject_share=float(((high_M | low_M) & ~kept_M).mean()),
        leak_cells=leak_cells(log_discrepancy_M, version_M, staleness_M, _position(tokens.trajectory)[trained_N]),
    )


def _kept(log_discrepancy_M: Floats, trajectory_M: Ints, segment_M: Ints, thresholds: Thresholds) -> Bools:
    match thresholds.granularity:
        case "token":
            log_rho_M = log_discrepancy_M
        case "segment":
            log_rho_M = _group_mean(log_discrepancy_M, segment_M)
        case "sequence":
            log_rho_M = _group_mean(log_discrepancy_M, trajectory_M)
    return np.asarray(
        (log_rho_M >= _log(thresholds.discrepancy_low)) & (log_rho_M <= _log(thresholds.discrepancy_high))
    )


def _group_mean(value_M: Floats, group_M: Ints) -> Floats:
    counts = np.bincount(group_M)
    return np.asarray((np.bincount(group_M, weights=value_M) / np.maximum(counts, 1))[group_M])


def _segments(tokens: StepTokens) -> Ints:
    """Number of each model token's segment [N]: as `ratios.segment_ids`, counted through the whole batch."""
    starts_N = np.ones(len(tokens.source), np.bool_)
    changes = [np.diff(np.asarray(values)) != 0 for values in (tokens.trajectory, tokens.turn, tokens.weight_version)]
    starts_N[1:] = np.logical_or.reduce(changes)
    return np.cumsum(starts_N) - 1


def _position(trajectory_N: NDArray[np.integer]) -> Ints:
    """Place of each token in its row [N]."""
    place_N = np.arange(len(trajectory_N))
    starts_N = np.concatenate([[True], np.diff(trajectory_N) != 0])
    return np.asarray(place_N - place_N[starts_N][np.cumsum(starts_N) - 1], np.int64)


def _distinct_per_trajectory(trajectory_M: Ints, version_M: Ints) -> Ints:
    """Number of different versions of each trajectory that has a token."""
    span = int(version_M.max()) - int(version_M.min()) + 1
    pairs = np.unique(trajectory_M * span + version_M - version_M.min())
    return np.unique(pairs // span, return_counts=True)[1]


def _share_by_source(selected_M: Bools, source_M: Ints, names: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(source_M)
    selected = np.bincount(source_M, weights=selected_M)
    return {names[code]: float(selected[code] / counts[code]) for code in np.flatnonzero(counts).tolist()}


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
