"""The audit of an approximate source: how much staleness it leaves in log r_d, and whether that is what it must leave.

A few whole trajectories are scored again by the versions that sampled them, and by those that came since. The rest is
arithmetic. Shapes: N audited tokens; K versions, the present one first.

What an average of versions must leave follows from the drift. With V(h) the mean square of log pi_t - log pi_(t-h), and
a_k the share of the version k before the present one in the average, a token of staleness n keeps

    sum_k a_k V(|k - n|) - 1/2 sum_jk a_j a_k V(|j - k|),

which is ((n - m) delta)^2 for a policy that moves straight on by delta a version, m the average's centre of mass, and
smaller for one that moves to and fro. V is measured on the tokens themselves up to the lag n; beyond, where the average
has versions older than the token's, it goes on with the exponent with which it grew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rljob_api.diagnostics import AuditBucket, AuditReport

STRAIGHT = 2.0
"""Exponent of a drift that always goes the same way; assumed where only one lag tells of it."""
SMALLEST_EXPONENT = 0.05
Floats = NDArray[np.float64]


def is_audited(task: int, sample: int, *, seed: int, fraction: float) -> bool:
    """Whether a trajectory is audited: always the same answer, on every rank and after every resume.

    Whole trajectories, chosen by hash, so that the expected share of tokens is `fraction` whatever their lengths.
    """
    digest = hashlib.sha256(f"audit/{seed}/{task}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def audit_report(
    *,
    approximate_logprobs_N: ArrayLike,
    behavior_logprobs_N: ArrayLike,
    logprobs_by_age_KN: ArrayLike,
    staleness_N: ArrayLike,
    version_weights: Sequence[float] = (),
) -> AuditReport:
    """One step's audit; zeros without tokens. Tokens that lack a finite value of their own version are left out.

    Args:
        approximate_logprobs_N: of the reference that the loss used.
        behavior_logprobs_N: as the engine recorded them.
        logprobs_by_age_KN: row 0 of the policy as the step found it, row k of the version k before it; row n of a token of
            staleness n is its exact old log-probability. NaN where it is older than the token's, or was not to be had.
        staleness_N: integers below K.
        version_weights: share of each version in the reference, newest first, where it is an average of weights:
            `AveragedPolicy.version_weights`; (1.0,) for the present policy. Without it nothing is predicted.

    Raises:
        ValueError: the lengths differ, or a staleness has no row.
    """
    approximate_N = np.asarray(approximate_logprobs_N, np.float64)
    behavior_N = np.asarray(behavior_logprobs_N, np.float64)
    by_age_KN = np.asarray(logprobs_by_age_KN, np.float64)
    staleness_N = np.asarray(staleness_N, np.int64)
    lengths = {len(array) for array in (approximate_N, behavior_N, staleness_N)} | {by_age_KN.shape[-1]}
    if len(lengths) > 1:
        raise ValueError(f"audited tokens: arrays of lengths {sorted(lengths)}, all must be of one")
    if staleness_N.size and staleness_N.max() >= len(by_age_KN):
        raise ValueError(
            f"audited tokens: staleness {staleness_N.max()}, and log-probabilities of {len(by_age_KN)} versions"
        )
    exact_N = by_age_KN[staleness_N, np.arange(staleness_N.size)] if staleness_N.size else approximate_N
    finite_N = np.isfinite(np.stack([approximate_N, behavior_N, exact_N])).all(axis=0)
    buckets = {}
    for staleness in np.unique(staleness_N[finite_N]).tolist():
        chosen = finite_N & (staleness_N == staleness)
        buckets[str(staleness)] = AuditBucket(
            tokens=int(chosen.sum()),
            leak=_rms((approximate_N - exact_N)[chosen]),
            approximate=_rms((approximate_N - behavior_N)[chosen]),
            exact=_rms((exact_N - behavior_N)[chosen]),
            drift_by_lag=_drift_by_lag(by_age_KN[: staleness + 1, chosen]),
        )
    return pool_audits([AuditReport(by_staleness=buckets, version_weights=tuple(version_weights))])


def pool_audits(audits: Sequence[AuditReport]) -> AuditReport:
    """Several steps' audits as one: every token counts once.

    The prediction is made for each step and staleness with the drift that was measured there and the weights that the
    average had; only the exponent is fitted to all of them.
    """
    by_staleness: dict[str, list[AuditBucket]] = {}
    for audit in audits:
        for staleness, bucket in audit.by_staleness.items():
            by_staleness.setdefault(staleness, []).append(bucket)
    pooled = {staleness: _pool(by_staleness[staleness]) for staleness in sorted(by_staleness, key=int)}
    exponent = fit_exponent([bucket for buckets in by_staleness.values() for bucket in buckets])
    total = _pool(list(pooled.values())) if pooled else AuditBucket(tokens=0, leak=0, approximate=0, exact=0)
    predicted = None
    if total.tokens and exponent is not None and all(audit.version_weights for audit in audits if audit.by_staleness):
        squares, tokens = 0.0, 0
        for audit in audits:
            shared = _pool(list(audit.by_staleness.values())).drift_by_lag if audit.by_staleness else {}
            for staleness, bucket in audit.by_staleness.items():
                drift = {int(lag): rms for lag, rms in (bucket.drift_by_lag or shared).items()}
                if drift:
                    leak = predicted_leak(int(staleness), audit.version_weights, drift, exponent)
                    squares, tokens = squares + bucket.tokens * leak**2, tokens + bucket.tokens
        predicted = math.sqrt(squares / tokens)
    return AuditReport(
        tokens=total.tokens,
        leak_rms=total.leak,
        approximate_rms=total.approximate,
        exact_rms=total.exact,
        by_staleness=pooled,
        version_weights=audits[-1].version_weights if audits else (),
        drift_exponent=exponent,
        predicted_leak_rms=predicted,
    )


def fit_exponent(buckets: Sequence[AuditBucket]) -> float | None:
    """The power of the lag with which the drift's mean square grows, by least squares on logs within each bucket.

    Buckets weigh by their tokens, each with a level of its own: how far a version moves changes over training. Kept within
    (0, 2], where a mean square of increments can lie. None where nothing has drifted.
    """
    moved = [{int(lag): rms for lag, rms in bucket.drift_by_lag.items() if rms > 0} for bucket in buckets]
    if not any(moved):
        return None
    products = squares = 0.0
    for bucket, drift in zip(buckets, moved, strict=True):
        if len(drift) > 1:
            log_lag, log_square = np.log(list(drift)), 2 * np.log(list(drift.values()))
            centered = log_lag - log_lag.mean()
            products += bucket.tokens * float(centered @ log_square)
            squares += bucket.tokens * float(centered @ centered)
    return min(max(products / squares, SMALLEST_EXPONENT), STRAIGHT) if squares else STRAIGHT


def predicted_leak(
    staleness: int, version_weights: Sequence[float], drift_by_lag: Mapping[int, float], exponent: float
) -> float:
    """RMS that an average of versions leaves in log r_d at one staleness; the formula stands at the top.

    Args:
        staleness: of the tokens.
        version_weights: shares, newest first; normalised here.
        drift_by_lag: RMS of the drift over 1, 2, ... versions, as far as measured; at least one.
        exponent: takes it to the lags that were not, from the nearest that was.
    """
    shares = np.asarray(version_weights, np.float64)
    shares = shares / shares.sum()
    place = np.arange(len(shares))
    squares = np.zeros(len(shares) + staleness + 1)
    for lag in range(1, len(squares)):
        nearest = min(drift_by_lag, key=lambda measured: abs(math.log(measured / lag)))
        squares[lag] = drift_by_lag[nearest] ** 2 * (lag / nearest) ** exponent
    to_token = squares[np.abs(place - staleness)]
    within = squares[np.abs(place[:, None] - place[None, :])]
    return math.sqrt(max(0.0, float(shares @ to_token - shares @ within @ shares / 2)))


def _drift_by_lag(by_age_KN: Floats) -> dict[str, float]:
    """Of tokens whose own version is the last row."""
    found = {}
    for lag in range(1, len(by_age_KN)):
        moved = by_age_KN[:-lag] - by_age_KN[lag:]
        if np.isfinite(moved).any():
            found[str(lag)] = _rms(moved[np.isfinite(moved)])
    return found


def _pool(buckets: Sequence[AuditBucket]) -> AuditBucket:
    tokens = [bucket.tokens for bucket in buckets]

    def rms(values: Sequence[float]) -> float:
        return math.sqrt(float(np.average(np.square(values), weights=tokens)))

    def drift(lag: str) -> float:
        known = [bucket for bucket in buckets if lag in bucket.drift_by_lag]
        squares = [bucket.drift_by_lag[lag] ** 2 for bucket in known]
        return math.sqrt(float(np.average(squares, weights=[bucket.tokens for bucket in known])))

    lags = sorted({lag for bucket in buckets for lag in bucket.drift_by_lag}, key=int)
    return AuditBucket(
        tokens=sum(tokens),
        leak=rms([bucket.leak for bucket in buckets]),
        approximate=rms([bucket.approximate for bucket in buckets]),
        exact=rms([bucket.exact for bucket in buckets]),
        drift_by_lag={lag: drift(lag) for lag in lags},
    )


def _rms(values: Floats) -> float:
    return math.sqrt(float(np.mean(values**2)))
