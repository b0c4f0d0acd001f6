"""What a step's report says about its log ratios: how far policies are apart, and whether staleness has leaked.

Definitions, sources and alarms: docs/algorithms.md, section Diagnostics. Everything is over the trained tokens of one
step. Exponents are bounded by 20 before exp, so that no value overflows.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from rljob_api.base import FrozenModel


class Divergence(FrozenModel):
    """How far a policy pi is from the behavior policy mu; x = log pi - log mu of a token, w = exp x its weight."""

    tokens: int
    trajectories: int
    mean: float
    """Of x; the others of x as well: the standard deviation is the population's."""
    std: float
    p99_abs: float
    kl_k1: float
    """-mean x: unbiased for KL(mu, pi), and may be negative."""
    kl_k2: float
    """mean x^2 / 2."""
    kl_k3: float
    """mean(w - 1 - x): never negative."""
    chi2_token: float
    """mean w^2 - 1."""
    chi2_trajectory: float
    """The same with w of whole trajectories: the product over their tokens."""
    effective_sample_share: float
    """(mean w)^2 / mean w^2: 1 where all weights are equal."""
    perplexity_gap: float
    """Mean over trajectories of their mean of -x: log perplexity of pi less that of mu."""
    perplexity_ratio: float
    weight_mean: float
    weight_std: float
    weight_max: float
    weight_high_share: float
    """Share of tokens with w > 2."""
    weight_low_share: float
    """Share of tokens with w < 1/2."""
    mean_probability_error: float
    """mean exp |x|: 1 where the two agree."""
    veto_share: float
    """Share of trajectories with a token of w < 1e-4."""


class LeakCell(NamedTuple):
    """Tokens of one weight version, trained at one staleness, in one stretch of their trajectories."""

    weight_version: int
    staleness: int
    position: int
    """Stretch of positions in the trajectory: the n-th, from 0, begins at position 2^n - 1."""
    tokens: int
    rms: float
    """Root mean square of log r_d, against whatever stood in for the old policy."""


class Diagnostics(FrozenModel):
    """One step."""

    tokens: int = 0
    """In the loss. Shares are of these unless they say otherwise."""
    tokens_not_finite: int = 0
    """Tokens with a log-probability that is no finite number: counted here, and left out everywhere else."""
    missing_share: float = 0.0
    """Of the trainable tokens: their old log-probability was not to be had."""
    versions_per_trajectory: float = 0.0
    versions_per_trajectory_max: int = 0
    discrepancy: Divergence | None = None
    """pi = the old policy, over tokens with an exact source alone; None where there is none."""
    importance: Divergence | None = None
    """pi = the policy as the step found it: staleness and discrepancy together, the same for every source."""
    mean_square_importance: float = 0.0
    """M2 of M2PO (arXiv 2510.01161) over all tokens: mean (log pi_theta - log mu)^2."""
    keep_share: dict[str, float] = Field(default_factory=dict)
    """Share kept by the discrepancy mask, of the tokens of each source."""
    clip_high_share: float = 0.0
    """A >= 0 and r_s > 1 + clip.high."""
    clip_low_share: float = 0.0
    """A < 0 and r_s < 1 - clip.low."""
    clip_and_reject_share: float = 0.0
    """Clipped, and shut out by the discrepancy mask as well."""
    leak_cells: tuple[LeakCell, ...] = ()


class AuditBucket(FrozenModel):
    """Audited tokens of one staleness; each value is a root mean square over them."""

    tokens: int
    leak: float
    """log pi_reference - log pi_old: what the approximation adds to log r_d."""
    approximate: float
    """log pi_reference - log mu: the discrepancy as the mask saw it."""
    exact: float
    """log pi_old - log mu: the discrepancy as it is."""
    drift_by_lag: dict[str, float] = Field(default_factory=dict)
    """log pi_u - log pi_w of any two versions u and w, so many versions apart and neither older than the token's."""


class AuditReport(FrozenModel):
    """Trained tokens that were scored again by the version that sampled them, against the approximate source."""

    tokens: int = 0
    leak_rms: float = 0.0
    approximate_rms: float = 0.0
    exact_rms: float = 0.0
    by_staleness: dict[str, AuditBucket] = Field(default_factory=dict)
    version_weights: tuple[float, ...] = ()
    """Share of each version in the averaged weights, newest first; (1,) for the present policy; () if not an average."""
    drift_exponent: float | None = None
    """The drift's mean square grows with that power of the lag: 2 moves straight on, 1 at random."""
    predicted_leak_rms: float | None = None
    """From the measured drift and staleness alone; None without drift or weights."""
