"""The audit of an approximate source: how much staleness it leaves in log r_d, and whether that is what it must leave.

A few whole trajectories are scored again by the versions that sampled them. The rest is arithmetic on four
log-probabilities a token. Shapes: N audited tokens.

What an average of versions must leave follows from the drift. With V(h) the mean square of log pi_t - log pi_(t-h), and
a_k the share of the version k before the present one in the average, a token of staleness n keeps

    sum_k a_k V(|k - n|) - 1/2 sum_jk a_j a_k V(|j - k|),

which is ((n - m) delta)^2 for a policy that moves straight on by delta a version, m the average's centre of mass, and
smaller for one that moves to and fro. V is fitted to the audited tokens' own log pi_theta - log pi_old.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rljob_api.diagnostics import AuditBucket, AuditReport

STRAIGHT = 2.0
"""Exponent of a drift that always goes the same way; assumed where only one staleness tells of it."""
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
    exact_logprobs_N: ArrayLike,
    behavior_logprobs_N: ArrayLike,
    target_logprobs_N: ArrayLike,
    staleness_N: ArrayLike,
    version_weights: Sequence[float] = (),
) -> AuditReport:
    """One step's audit; zeros without tokens. Tokens with a value that is not finite are left out.

    Args:
        approximate_logprobs_N: of the reference that the loss used.
        exact_logprobs_N: of the versions that sampled the tokens.
        behavior_logprobs_N: as the engine recorded them.
        target_logprobs_N: of the policy as the step found it.
        staleness_N: integers.
        version_weights: share of each version in the reference, newest first, where it is an average of weights:
            `AveragedPolicy.version_weights`; (1.0,) for the present policy. Without it nothing is predicted.

    Raises:
        ValueError: the lengths differ.
    """
    approximate_N, exact_N, behavior_N, target_N = (
        np.asarray(values, np.float64)
        for values in (approximate_logprobs_N, exact_logprobs_N, behavior_logprobs_N, target_logprobs_N)
    )
    staleness_N = np.asarray(staleness_N, np.int64)
    lengths = {len(array) for array in (approximate_N, exact_N, behavior_N, target_N, staleness_N)}
    if len(lengths) > 1:
        raise ValueError(f"audited tokens: arrays of lengths {sorted(lengths)}, all must be of one")
    finite_N = np.isfinite(np.stack([approximate_N, exact_N, behavior_N, target_N])).all(axis=0)
    buckets = {}
    for staleness in np.unique(staleness_N[finite_N]).tolist():
        chosen = finite_N & (staleness_N == staleness)
        buckets[str(staleness)] = AuditBucket(
            tokens=int(chosen.sum()),
            leak=_rms((approximate_N - exact_N)[chosen]),
            approximate=_rms((approximate_N - behavior_N)[chosen]),
            exact=_rms((exact_N - behavior_N)[chosen]),
            drift=_rms((target_N - exact_N)[chosen]),
        )
    return pool_audits([AuditReport(by_staleness=buckets, version_weights=tuple(version_weights))])


def pool_audits(audits: Sequence[AuditReport]) -> AuditReport:
    """Several steps' audits as one: every token counts once.

    A single step audits few tokens: the drift is fitted to all of them, and the prediction is made for each step with
    the weights that its average had.
    """
    by_staleness: dict[str, list[AuditBucket]] = {}
    for audit in audits:
        for staleness, bucket in audit.by_staleness.items():
            by_staleness.setdefault(staleness, []).append(bucket)
    pooled = {staleness: _pool(by_staleness[staleness]) for staleness in sorted(by_staleness, key=int)}
    drift = fit_drift(pooled)
    total = _pool(list(pooled.values())) if pooled else AuditBucket(tokens=0, leak=0, approximate=0, exact=0, drift=0)
    predicted = None
    if total.tokens and drift is not None and all(audit.version_weights for audit in audits if audit.by_staleness):
        squares = sum(
            bucket.tokens * predicted_leak(int(staleness), audit.version_weights, *drift) ** 2
            for audit in audits
            for staleness, bucket in audit.by_staleness.items()
        )
        predicted = math.sqrt(squares / total.tokens)
    return AuditReport(
        tokens=total.tokens,
        leak_rms=total.leak,
        approximate_rms=total.approximate,
        exact_rms=total.exact,
        by_staleness=pooled,
        version_weights=audits[-1].version_weights if audits else (),
        drift_exponent=None if drift is None else drift[1],
        predicted_leak_rms=predicted,
    )


def fit_drift(by_staleness: Mapping[str, AuditBucket]) -> tuple[float, float] | None:
    """(RMS drift over one version, exponent): mean square = (rms^2) * staleness^exponent, by least squares on logs.

    Buckets weigh by their tokens. The exponent is kept within (0, 2], where a mean square of increments can lie. None
    without a stale token that has drifted.
    """
    moved = [(int(n), bucket) for n, bucket in by_staleness.items() if int(n) > 0 and bucket.drift > 0]
    if not moved:
        return None
    log_n = np.log([n for n, _ in moved])
    log_square = 2 * np.log([bucket.drift for _, bucket in moved])
    tokens = np.array([bucket.tokens for _, bucket in moved], np.float64)
    exponent = STRAIGHT
    if len(moved) > 1:
        centered = log_n - np.average(log_n, weights=tokens)
        exponent = float((tokens * centered * log_square).sum() / (tokens * centered**2).sum())
        exponent = min(max(exponent, SMALLEST_EXPONENT), STRAIGHT)
    return math.exp(float(np.average(log_square - exponent * log_n, weights=tokens)) / 2), exponent


def predicted_leak(staleness: int, version_weights: Sequence[float], drift_rms: float, exponent: float) -> float:
    """RMS that an average of versions leaves in log r_d at one staleness; the formula stands at the top."""
    shares = np.asarray(version_weights, np.float64)
    shares = shares / shares.sum()
    place = np.arange(len(shares), dtype=np.float64)
    to_token = np.abs(place - staleness) ** exponent
    within = np.abs(place[:, None] - place[None, :]) ** exponent
    return drift_rms * math.sqrt(max(0.0, float(shares @ to_token - shares @ within @ shares / 2)))


def _pool(buckets: Sequence[AuditBucket]) -> AuditBucket:
    tokens = [bucket.tokens for bucket in buckets]

    def rms(values: Sequence[float]) -> float:
        return math.sqrt(float(np.average(np.square(values), weights=tokens)))

    return AuditBucket(
        tokens=sum(tokens),
        leak=rms([bucket.leak for bucket in buckets]),
        approximate=rms([bucket.approximate for bucket in buckets]),
        exact=rms([bucket.exact for bucket in buckets]),
        drift=rms([bucket.drift for bucket in buckets]),
    )


def _rms(values: Floats) -> float:
    return math.sqrt(float(np.mean(values**2)))
