"""How far two policies are apart, from the log ratios of sampled tokens: KL, chi^2, effective sample size, weights.

Shapes: N tokens, flat. Sources of the formulas: docs/algorithms.md, section Diagnostics.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rljob_api.diagnostics import Divergence

MAX_EXPONENT = 20.0
"""Exponents are cut off here before exp: one broken token must not turn every mean into infinity."""
HIGH_WEIGHT, LOW_WEIGHT = 2.0, 0.5
VETO_WEIGHT = 1e-4
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def divergence(log_ratio_N: Floats, trajectory_N: Ints) -> Divergence | None:
    """Statistics of x = log pi - log mu over tokens that mu sampled; None without tokens.

    Args:
        log_ratio_N: x, finite. Tokens of one reference only, or the result means nothing.
        trajectory_N: equal values are one trajectory; small integers >= 0. Sums and means of a trajectory are over the
            tokens given here.
    """
    if log_ratio_N.size == 0:
        return None
    counts = np.bincount(trajectory_N)
    present = counts > 0
    sum_R: Floats = np.bincount(trajectory_N, weights=log_ratio_N)[present].astype(np.float64)
    mean_R = sum_R / counts[present]
    vetoed_R = np.bincount(trajectory_N, weights=log_ratio_N < np.log(VETO_WEIGHT))[present] > 0
    weight_N = _exp(log_ratio_N)
    mean, weight_mean = float(log_ratio_N.mean()), float(weight_N.mean())
    square_mean = float((weight_N**2).mean())
    gap = -float(mean_R.mean())
    return Divergence(
        tokens=log_ratio_N.size,
        trajectories=int(present.sum()),
        mean=mean,
        std=float(log_ratio_N.std()),
        p99_abs=float(np.quantile(np.abs(log_ratio_N), 0.99)),
        kl_k1=-mean,
        kl_k2=float((log_ratio_N**2).mean()) / 2,
        # expm1: near 0 the three terms cancel to x^2 / 2, which is below the rounding of exp.
        kl_k3=float((np.expm1(_bounded(log_ratio_N)) - log_ratio_N).mean()),
        chi2_token=float(np.expm1(_bounded(2 * log_ratio_N)).mean()),
        chi2_trajectory=float(np.expm1(_bounded(2 * sum_R)).mean()),
        effective_sample_share=weight_mean**2 / square_mean,
        perplexity_gap=gap,
        perplexity_ratio=math.exp(max(-MAX_EXPONENT, min(gap, MAX_EXPONENT))),
        weight_mean=weight_mean,
        weight_std=float(weight_N.std()),
        weight_max=float(weight_N.max()),
        weight_high_share=float((weight_N > HIGH_WEIGHT).mean()),
        weight_low_share=float((weight_N < LOW_WEIGHT).mean()),
        mean_probability_error=float(_exp(np.abs(log_ratio_N)).mean()),
        veto_share=float(vetoed_R.mean()),
    )


def _bounded(exponent: Floats) -> Floats:
    return np.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT)


def _exp(exponent: Floats) -> Floats:
    return np.asarray(np.exp(_bounded(exponent)))
