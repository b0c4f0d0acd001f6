"""The audit: what is selected, what it measures, and the leak that drift and staleness predict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.numerics.toy import DriftingPolicy

from rljob_api.diagnostics import AuditBucket, AuditReport
from rljob_runtime.correction.audit import (
    audit_report,
    fit_exponent,
    is_audited,
    pool_audits,
    predicted_leak,
)


def ewma_version_weights(decay: float, num_versions: int) -> tuple[float, ...]:
    """Share of each version in an average of a fixed decay, newest first (Eq. 20 of arXiv 2605.12070)."""
    powers = decay ** np.arange(num_versions)
    return tuple((powers / powers.sum()).tolist())


def test_the_selection_is_the_same_each_time_and_its_share_is_the_fraction() -> None:
    rows = [(task, sample) for task in range(2500) for sample in range(8)]
    chosen = [is_audited(*row, seed=3, fraction=0.02) for row in rows]
    assert chosen == [is_audited(*row, seed=3, fraction=0.02) for row in rows]
    assert abs(np.mean(chosen) - 0.02) < 4 * math.sqrt(0.02 * 0.98 / len(rows))
    other = [is_audited(*row, seed=4, fraction=0.02) for row in rows]
    assert np.mean([a and b for a, b in zip(chosen, other, strict=True)]) < 0.002, "another seed, other trajectories"
    # What a larger fraction audits includes what a smaller one does.
    assert all(is_audited(*row, seed=3, fraction=0.05) for row, audited in zip(rows, chosen, strict=True) if audited)
    assert not any(is_audited(*row, seed=3, fraction=0.0) for row in rows)
    assert all(is_audited(*row, seed=3, fraction=1.0) for row in rows)


def test_an_audit_worked_by_hand() -> None:
    nan = np.nan
    audit = audit_report(
        approximate_logprobs_N=[-1.0, -1.3, -1.5, -2.0, nan],
        behavior_logprobs_N=[-1.1, -1.0, -1.1, -2.2, -1.0],
        logprobs_by_age_KN=[
            [-1.0, -1.6, -1.9, -2.0, -1.0],
            [nan, -1.2, nan, nan, -1.0],
            [nan, -1.0, -1.1, nan, -1.0],
        ],
        staleness_N=[0, 2, 2, 0, 2],
    )
    rms = {
        "leak": math.sqrt((0.3**2 + 0.4**2) / 2),
        "approximate": math.sqrt((0.3**2 + 0.4**2) / 2),
        "exact": 0.0,
    }
    stale, fresh = (audit.by_staleness[n].model_dump() for n in ("2", "0"))
    # One version apart: 0.4 and 0.2 of the one token whose middle version was to be had; two: 0.6 and 0.8.
    assert stale.pop("drift_by_lag") == pytest.approx({"1": math.sqrt(0.1), "2": math.sqrt(0.5)})
    assert stale == pytest.approx({"tokens": 2, **rms})
    assert fresh.pop("drift_by_lag") == {}
    assert fresh == pytest.approx(
        {"tokens": 2, "leak": 0.0, "approximate": math.sqrt(0.05 / 2), "exact": math.sqrt(0.05 / 2)}
    )
    assert (audit.tokens, audit.leak_rms) == (4, pytest.approx(math.sqrt(0.25 / 4)))
    assert audit.approximate_rms == pytest.approx(math.sqrt((0.25 + 0.05) / 4))
    assert audit.exact_rms == pytest.approx(math.sqrt(0.05 / 4))
    assert audit.predicted_leak_rms is None, "the reference's make-up was not told"


def test_nothing_audited_is_an_empty_report() -> None:
    empty = audit_report(approximate_logprobs_N=[], behavior_logprobs_N=[], logprobs_by_age_KN=[[]], staleness_N=[])
    assert empty == AuditReport() == pool_audits([])
    with pytest.raises(ValueError, match="lengths"):
        audit_report(approximate_logprobs_N=[-1.0], behavior_logprobs_N=[], logprobs_by_age_KN=[[]], staleness_N=[])
    with pytest.raises(ValueError, match="staleness 1, and log-probabilities of 1 versions"):
        audit_report(
            approximate_logprobs_N=[-1.0], behavior_logprobs_N=[-1.0], logprobs_by_age_KN=[[-1.0]], staleness_N=[1]
        )


def test_an_average_of_a_straight_drift_leaves_the_distance_to_its_centre_of_mass() -> None:
    """(n - m) * delta, and the weights' own spread cancels."""
    weights = ewma_version_weights(0.6, 60)
    m = sum(k * share for k, share in enumerate(weights))
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert m == pytest.approx(1.5, abs=0.01)
    for n in range(5):
        assert predicted_leak(n, weights, {1: 0.01}, 2.0) == pytest.approx(abs(n - m) * 0.01, abs=1e-9)
    assert predicted_leak(3, (1.0,), {1: 0.01}, 2.0) == pytest.approx(0.03), (
        "the present policy leaves all of the drift"
    )


def test_a_random_walk_leaves_what_simulating_it_leaves() -> None:
    generator = np.random.default_rng(0)
    walk = np.cumsum(generator.standard_normal((60_000, 31)), axis=1)[:, ::-1]  # column k: k versions back
    weights = ewma_version_weights(0.6, 30)
    average = walk[:, : len(weights)] @ np.array(weights)
    for n in range(4):
        simulated = math.sqrt(float(np.mean((average - walk[:, n]) ** 2)))
        assert predicted_leak(n, weights, {1: 1.0}, 1.0) == pytest.approx(simulated, rel=0.02)
        straight = predicted_leak(n, weights, {1: 1.0}, 2.0)
        assert n == 1 or abs(straight / simulated - 1) > 0.1, "negative control: the wrong kind of drift"


def bucket(drift_by_lag: dict[str, float], tokens: int = 10) -> AuditBucket:
    return AuditBucket(tokens=tokens, leak=0, approximate=0, exact=0, drift_by_lag=drift_by_lag)


def test_the_exponent_is_that_of_the_drift_however_far_a_version_moves() -> None:
    def buckets(exponent: float) -> list[AuditBucket]:
        return [
            bucket({str(h): size * h ** (exponent / 2) for h in range(1, n + 1)}, tokens=10 * n)
            for n, size in ((4, 0.02), (3, 0.2), (1, 5.0))
        ]

    for exponent in (1.0, 1.5, 2.0):
        assert fit_exponent(buckets(exponent)) == pytest.approx(exponent)
    assert fit_exponent(buckets(5.0)) == 2.0
    assert fit_exponent([bucket({"1": 0.1})]) == 2.0, "one lag: taken as straight"
    assert fit_exponent([bucket({}), bucket({"1": 0.0})]) is None


def test_a_measured_lag_is_used_as_it_is_and_takes_others_along() -> None:
    weights = (0.5, 0.3, 0.2)
    drift = {1: 0.1, 2: 0.3}
    straight = {0: 0.0, 1: 0.01, 2: 0.09}
    for n in range(3):
        expected = sum(a * straight[abs(k - n)] for k, a in enumerate(weights))
        expected -= sum(a * b * straight[abs(j - k)] for j, a in enumerate(weights) for k, b in enumerate(weights)) / 2
        assert predicted_leak(n, weights, drift, 1.0) == pytest.approx(math.sqrt(max(expected, 0)))
    assert predicted_leak(3, (1.0,), drift, 1.0) == pytest.approx(0.3 * math.sqrt(1.5)), "from the nearest lag"


def toy_audit(toy: DriftingPolicy, decay: float) -> AuditReport:
    ages = range(int(toy.staleness_N.max()) + 1)
    by_age_KN = torch.stack([toy.logprobs(toy.weights[toy.present - age]) for age in ages])
    by_age_KN[torch.tensor(ages)[:, None] > toy.staleness_N] = torch.nan
    return audit_report(
        approximate_logprobs_N=toy.ewma_logprobs(decay),
        behavior_logprobs_N=toy.behavior_N,
        logprobs_by_age_KN=by_age_KN,
        staleness_N=toy.staleness_N,
        version_weights=ewma_version_weights(decay, toy.present + 1),
    )


def test_where_all_tokens_are_of_one_staleness_the_leak_is_predicted_as_well() -> None:
    """As in a run whose trainer is the slower part: the drift over each lag is measured, and not only that over the bound."""
    toy = DriftingPolicy(num_tokens=20_000, versions=24, staleness=3, drift=0.003, noise=0.003)
    oldest = toy.staleness_N == 3
    for name in ("features_NF", "tokens_N", "exact_N", "behavior_N", "staleness_N"):
        setattr(toy, name, getattr(toy, name)[oldest])
    audit = toy_audit(toy, 0.75)
    assert list(audit.by_staleness) == ["3"]
    assert audit.predicted_leak_rms == pytest.approx(audit.leak_rms, rel=0.1, abs=2e-5)


@pytest.mark.parametrize("decay", [1 / 3, 0.6, 0.75])
def test_the_measured_leak_of_an_average_of_weights_is_the_predicted_one(decay: float) -> None:
    toy = DriftingPolicy(num_tokens=20_000, versions=24, staleness=3, drift=0.003, noise=0.003)
    audit = toy_audit(toy, decay)
    assert audit.drift_exponent == pytest.approx(2.0, abs=0.1)
    assert audit.predicted_leak_rms == pytest.approx(audit.leak_rms, rel=0.05)
    wrong = audit.model_copy(update={"version_weights": ewma_version_weights(min(decay + 0.1, 0.9), 25)})
    assert pool_audits([wrong]).predicted_leak_rms != pytest.approx(audit.leak_rms, rel=0.05)


def test_the_measured_leak_is_predicted_where_the_policy_moves_at_random_too() -> None:
    audits = []
    for seed in range(12):
        toy = DriftingPolicy(num_tokens=4000, versions=24, staleness=3, drift=0.0, noise=0.003, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        steps = [0.01 * torch.randn(toy.weights[0].shape, generator=generator, dtype=torch.float64) for _ in range(24)]
        for version in range(1, 25):
            toy.weights[version] = toy.weights[version - 1] + steps[version - 1]
        tables = torch.stack([toy.logprobs(weights) for weights in toy.weights[21:]])
        toy.exact_N = tables[3 - toy.staleness_N, torch.arange(4000)]
        toy.current_N = toy.logprobs(toy.weights[-1])
        audits.append(toy_audit(toy, 0.6))
    pooled = pool_audits(audits)
    assert pooled.tokens == 48_000
    assert pooled.drift_exponent == pytest.approx(1.0, abs=0.2)
    assert pooled.predicted_leak_rms == pytest.approx(pooled.leak_rms, rel=0.1)
    assert pooled.leak_rms == pytest.approx(math.sqrt(np.mean([audit.leak_rms**2 for audit in audits])), rel=1e-3)
