"""What a batch's staleness and discrepancy look like, and whether staleness has leaked into the discrepancy ratio.

Shapes: N model tokens (inside the mask) of a batch or of many, flat. C cells: the tokens of one trajectory in one
stratum. Arguments may be numpy arrays or CPU tensors without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rljob_api.messages import BucketStats, Distribution, SourceStats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def staleness_distribution(staleness_N: ArrayLike) -> Distribution:
    """Token-weighted mean, nearest-rank median and 95th percentile, maximum and histogram; zeros without tokens."""
    staleness_N = _ints(staleness_N)
    if staleness_N.size == 0:
        return Distribution()
    values, tokens = np.unique(staleness_N, return_counts=True)
    reached = np.cumsum(tokens) / staleness_N.size
    return Distribution(
        mean=float(staleness_N.mean()),
        p50=int(values[np.searchsorted(reached, 0.50)]),
        p95=int(values[np.searchsorted(reached, 0.95)]),
        max=int(values[-1]),
        histogram={str(value): int(count) for value, count in zip(values, tokens, strict=True)},
    )


def discrepancy_by_staleness(log_discrepancy_N: ArrayLike, staleness_N: ArrayLike) -> dict[str, BucketStats]:
    """Statistics of log r_d per staleness (as text, ascending): flat if the old policy is right, rising if not.

    Raises:
        ValueError: the lengths differ, or a log ratio is not finite.
    """
    log_discrepancy_N, staleness_N = _finite(log_discrepancy_N), _ints(staleness_N)
    _same_length(log_discrepancy_N=log_discrepancy_N, staleness_N=staleness_N)
    return {
        str(value): BucketStats(**_moments(log_discrepancy_N[staleness_N == value])) for value in np.unique(staleness_N)
    }


def discrepancy_by_source(
    log_discrepancy_N: ArrayLike, source_N: ArrayLike, source_names: Sequence[str]
) -> dict[str, SourceStats]:
    """Statistics of log r_d per source of the old log-probability; sources without tokens are left out.

    Args:
        log_discrepancy_N: log pi_old - log mu.
        source_N: index into `source_names`.
        source_names: resident, snapshot, current ...

    Raises:
        ValueError: the lengths differ, or a log ratio is not finite.
    """
    log_discrepancy_N, source_N = _finite(log_discrepancy_N), _ints(source_N)
    _same_length(log_discrepancy_N=log_discrepancy_N, source_N=source_N)
    return {
        source_names[code]: SourceStats(**_moments(log_discrepancy_N[source_N == code])) for code in np.unique(source_N)
    }


def flatness_test(
    log_discrepancy_N: ArrayLike,
    staleness_N: ArrayLike,
    trajectory_ids_N: ArrayLike,
    strata: ArrayLike,
    *,
    num_permutations: int,
    seed: int,
) -> tuple[float, float]:
    """Permutation test of "the size of log r_d does not depend on staleness": (statistic, p-value).

    Engine noise differs between positions and between phases of training, and so does staleness; neither may count as
    a leak. And tokens of one trajectory share their noise: shuffling tokens would find significance everywhere. So

    * a cell is the tokens of one trajectory in one stratum. It has a mean square of log r_d, relative to the mean
      square of all tokens of the stratum, and one staleness label, the rounded mean over its tokens;
    * the statistic is the token-weighted standard deviation, over staleness labels, of the relative RMS: 0.1 says that
      buckets differ by about a tenth;
    * a permutation lets whole trajectories exchange their staleness labels, all strata at once, and only trajectories
      that occupy the same set of strata (so: of like length, from the same phase). That keeps the dependence between
      the cells of a trajectory as it was, and makes the p-value exact where trajectories are exchangeable.

    Positions should be cut into few, wide bins: a set of strata that only one trajectory occupies has nothing to be
    exchanged with and adds no power. If nothing can be exchanged, or all labels agree, the p-value is 1.

    Args:
        log_discrepancy_N: log pi_old - log mu.
        staleness_N: integers.
        trajectory_ids_N: integers; equal ids are one trajectory.
        strata: [N] or [N, K] integers; a row, such as (position bin, training phase), names the token's stratum.
        num_permutations: the p-value is a multiple of 1 / (num_permutations + 1) and never below it.
        seed: equal arguments and seeds give equal results.

    Raises:
        ValueError: the lengths differ, there is no token, a log ratio is not finite, or num_permutations < 1.
    """
    log_discrepancy_N, staleness_N, trajectory_ids_N = (
        _finite(log_discrepancy_N),
        _ints(staleness_N),
        _ints(trajectory_ids_N),
    )
    strata_NK = _ints(strata)
    strata_NK = strata_NK.reshape(-1, 1) if strata_NK.ndim == 1 else strata_NK
    _same_length(
        log_discrepancy_N=log_discrepancy_N,
        staleness_N=staleness_N,
        trajectory_ids_N=trajectory_ids_N,
        strata=strata_NK,
    )
    if log_discrepancy_N.size == 0:
        raise ValueError("flatness_test got no tokens: there is nothing to test")
    if num_permutations < 1:
        raise ValueError(f"num_permutations {num_permutations} must be >= 1")

    _, stratum_N = np.unique(strata_NK, axis=0, return_inverse=True)
    _, trajectory_N = np.unique(trajectory_ids_N, return_inverse=True)
    stratum_N = stratum_N.reshape(-1)
    cells, cell_N = np.unique(np.stack([trajectory_N, stratum_N], axis=1), axis=0, return_inverse=True)
    cell_N = cell_N.reshape(-1)
    trajectory_C, stratum_C = cells[:, 0], cells[:, 1]
    tokens_C = np.bincount(cell_N).astype(np.float64)
    square_C = np.bincount(cell_N, weights=log_discrepancy_N**2)
    label_C = np.floor(np.bincount(cell_N, weights=staleness_N) / tokens_C + 0.5).astype(np.int64)
    _, label_C = np.unique(label_C, return_inverse=True)

    stratum_square = (np.bincount(stratum_C, square_C) / np.bincount(stratum_C, tokens_C))[stratum_C]
    relative_C = np.divide(square_C, stratum_square, out=tokens_C.copy(), where=stratum_square > 0)

    blocks = _exchangeable(trajectory_C, stratum_C)
    statistic = _spread(relative_C, tokens_C, label_C)
    generator = np.random.default_rng(seed)
    at_least = 0
    for _ in range(num_permutations):
        shuffled_C = label_C.copy()
        for block in blocks:
            shuffled_C[block] = label_C[block[generator.permutation(len(block))]]
        # Equal labelings must tie although sums in another order round differently, else the test over-rejects.
        at_least += _spread(relative_C, tokens_C, shuffled_C) >= statistic - 1e-12
    return statistic, (1 + at_least) / (1 + num_permutations)


def _exchangeable(trajectory_C: Ints, stratum_C: Ints) -> list[Ints]:
    """Cell indices [trajectories, strata] of each set of two or more trajectories that occupy the same strata."""
    starts = np.flatnonzero(np.diff(trajectory_C, prepend=-1))
    sets: dict[tuple[int, ...], list[Ints]] = {}
    for cells in np.split(np.arange(trajectory_C.size), starts[1:]):
        sets.setdefault(tuple(stratum_C[cells].tolist()), []).append(cells)
    return [np.stack(members) for members in sets.values() if len(members) > 1]


def _spread(relative_C: Floats, tokens_C: Floats, label_C: Ints) -> float:
    tokens = np.bincount(label_C, tokens_C)
    rms = np.sqrt(np.bincount(label_C, relative_C) / tokens)
    mean = np.average(rms, weights=tokens)
    return float(np.sqrt(np.average((rms - mean) ** 2, weights=tokens)))


def _moments(log_discrepancy_N: Floats) -> dict[str, float]:
    return {
        "tokens": log_discrepancy_N.size,
        "rms_log_discrepancy": float(np.sqrt(np.mean(log_discrepancy_N**2))),
        "max_abs_log_discrepancy": float(np.abs(log_discrepancy_N).max()),
    }


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise ValueError(
            f"log_discrepancy_N: {broken} of {array.size} log ratios are not finite: "
            "the old or behavior log-probabilities are broken, or tokens outside the mask were passed"
        )
    return array


def _ints(values: ArrayLike) -> Ints:
    return np.asarray(values, dtype=np.int64)


def _same_length(**arrays: Floats | Ints) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(f"lengths differ: {', '.join(f'{name} {len(array)}' for name, array in arrays.items())}")
