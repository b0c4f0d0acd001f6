"""Divergence of two policies against closed forms and a plain loop, and a step's diagnostics against the loss itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rljob_api.diagnostics import Diagnostics, Divergence
from rljob_runtime.correction.divergence import divergence
from rljob_runtime.correction.objective import decoupled_policy_loss
from rljob_runtime.correction.ratios import Granularity, segment_ids
from rljob_runtime.correction.sources import SOURCE_NAMES, Source
from rljob_runtime.correction.step_diagnostics import StepTokens, Thresholds, step_diagnostics

SIGMA = 0.3


def slow_divergence(x: list[float], trajectory: list[int]) -> dict[str, float]:
    """The formulas one by one, in loops."""
    weights = [math.exp(value) for value in x]
    n = len(x)
    rows = {name: [v for v, t in zip(x, trajectory, strict=True) if t == name] for name in trajectory}
    mean, weight_mean = sum(x) / n, sum(weights) / n
    ordered = sorted(abs(v) for v in x)
    place = 0.99 * (n - 1)
    low = int(place)
    gap = -sum(sum(row) / len(row) for row in rows.values()) / len(rows)
    return {
        "tokens": n,
        "trajectories": len(rows),
        "mean": mean,
        "std": math.sqrt(sum((v - mean) ** 2 for v in x) / n),
        "p99_abs": ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low]),
        "kl_k1": -mean,
        "kl_k2": sum(v * v for v in x) / n / 2,
        "kl_k3": sum(w - 1 - v for w, v in zip(weights, x, strict=True)) / n,
        "chi2_token": sum(w * w for w in weights) / n - 1,
        "chi2_trajectory": sum(math.exp(2 * sum(row)) for row in rows.values()) / len(rows) - 1,
        "effective_sample_share": 1 / (sum((w / weight_mean) ** 2 for w in weights) / n),
        "perplexity_gap": gap,
        "perplexity_ratio": math.exp(gap),
        "weight_mean": weight_mean,
        "weight_std": math.sqrt(sum((w - weight_mean) ** 2 for w in weights) / n),
        "weight_max": max(weights),
        "weight_high_share": sum(w > 2 for w in weights) / n,
        "weight_low_share": sum(w < 0.5 for w in weights) / n,
        "mean_probability_error": sum(math.exp(abs(v)) for v in x) / n,
        "veto_share": sum(any(math.exp(v) < 1e-4 for v in row) for row in rows.values()) / len(rows),
    }


def of(x: list[float] | NDArray[np.float64], trajectory: list[int] | NDArray[np.int64]) -> Divergence:
    found = divergence(np.asarray(x, np.float64), np.asarray(trajectory, np.int64))
    assert found is not None
    return found


def test_every_statistic_is_that_of_the_plain_loops() -> None:
    generator = np.random.default_rng(0)
    trajectory = np.sort(generator.choice([0, 2, 3, 7], 200))
    x = generator.normal(0, 0.6, 200)
    x[17] = -9.5  # a veto
    found = of(x, trajectory).model_dump()
    expected = slow_divergence(x.tolist(), trajectory.tolist())
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found["veto_share"] == 0.25 and found["weight_high_share"] > 0.05


def test_equal_policies_have_no_divergence() -> None:
    found = of([0.0] * 6, [0, 0, 1, 1, 1, 5])
    assert {name for name, value in found.model_dump().items() if value != 0} == {
        "tokens", "trajectories", "effective_sample_share", "perplexity_ratio", "weight_mean", "weight_max",
        "mean_probability_error",
    }  # fmt: skip
    assert (found.effective_sample_share, found.weight_mean, found.mean_probability_error) == (1, 1, 1)


def test_gaussian_log_ratios_have_the_divergence_of_their_closed_form() -> None:
    """x ~ N(-s^2/2, s^2): then w has mean 1, KL(mu, pi) = s^2/2, chi^2 = exp(s^2) - 1, and ESS its inverse."""
    generator = np.random.default_rng(1)
    x = generator.normal(-(SIGMA**2) / 2, SIGMA, 400_000)
    found = of(x, np.arange(400_000) // 2)
    assert found.weight_mean == pytest.approx(1, abs=0.003)
    assert found.kl_k1 == pytest.approx(SIGMA**2 / 2, abs=0.003)
    assert found.kl_k3 == pytest.approx(SIGMA**2 / 2, abs=0.003)
    assert found.kl_k2 == pytest.approx((SIGMA**2 + SIGMA**4 / 4) / 2, abs=0.003)
    assert found.chi2_token == pytest.approx(math.exp(SIGMA**2) - 1, abs=0.003)
    assert found.chi2_trajectory == pytest.approx(math.exp(2 * SIGMA**2) - 1, abs=0.01)
    assert found.effective_sample_share == pytest.approx(math.exp(-(SIGMA**2)), abs=0.003)
    assert found.perplexity_gap == pytest.approx(SIGMA**2 / 2, abs=0.003)
    # Negative control: x with mean 0 is no log ratio of two policies, and the mean weight says so.
    assert of(x + SIGMA**2 / 2, np.zeros(400_000, np.int64)).weight_mean == pytest.approx(
        math.exp(SIGMA**2 / 2), abs=0.003
    )


def test_the_third_estimator_keeps_its_digits_where_the_policies_nearly_agree() -> None:
    x = np.array([1e-9, -3e-9])
    half_square = float((x**2).mean()) / 2
    assert of(x, [0, 0]).kl_k3 == pytest.approx(half_square, rel=1e-5, abs=0)
    assert float((np.exp(x) - 1 - x).mean()) != pytest.approx(half_square, rel=0.1, abs=0), "the plain way loses them"


def test_a_ratio_that_would_overflow_is_bounded() -> None:
    found = of([800.0, -800.0, 0.0], [0, 0, 1])
    assert found.weight_max == pytest.approx(math.exp(20))
    assert found.veto_share == 0.5
    assert all(math.isfinite(value) for value in found.model_dump().values())


def test_nothing_measured_is_none() -> None:
    assert divergence(np.zeros(0), np.zeros(0, np.int64)) is None


# ----------------------------------------------------------------------------------------------------------------- step


THRESHOLDS = Thresholds(clip_low=0.1, clip_high=0.15, discrepancy_low=0.93, discrepancy_high=1.06)


def batch(seed: int = 0, *, rows: int = 12, length: int = 24) -> StepTokens:
    """Rows of prompt, turn, observation, turn; versions rise within a row; sources of every kind."""
    generator = np.random.default_rng(seed)
    turn = np.tile(np.array([-1] * 3 + [0] * 9 + [-1] * 2 + [1] * (length - 14)), (rows, 1))
    version = np.sort(generator.integers(5, 9, turn.shape), axis=1)
    source = np.where(version == 8, Source.RESIDENT, Source.SNAPSHOT)
    source = np.where(generator.random(turn.shape) < 0.2, Source.CURRENT, source)
    source = np.where(generator.random(turn.shape) < 0.1, Source.MISSING, source)
    is_model = turn >= 0
    behavior = generator.normal(-2, 0.5, turn.shape)
    old = behavior + generator.normal(0, 0.05, turn.shape)
    target = old + generator.normal(0, 0.1, turn.shape)
    return StepTokens(
        trajectory=np.repeat(np.arange(rows), length),
        turn=turn.reshape(-1),
        weight_version=np.where(is_model, version, -1).reshape(-1),
        staleness=np.where(is_model, 8 - version, -1).reshape(-1),
        source=np.where(is_model, source, Source.NONE).reshape(-1),
        behavior_logprobs=np.where(is_model, behavior, 0).reshape(-1),
        old_logprobs=np.where(is_model, old, np.nan).reshape(-1),
        target_logprobs=target.reshape(-1),
        advantages=np.where(is_model, np.repeat(generator.standard_normal((rows, 1)), length, axis=1), 0).reshape(-1),
    )


@pytest.mark.parametrize("granularity", ["token", "segment", "sequence"])
def test_shares_of_mask_and_clip_are_those_of_the_loss(granularity: Granularity) -> None:
    tokens = batch()
    thresholds = replace(THRESHOLDS, granularity=granularity)
    if granularity != "token":
        thresholds = replace(thresholds, discrepancy_low=0.99, discrepancy_high=1.01)
    found = step_diagnostics(tokens, thresholds)

    def rows(values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values).reshape(12, 24))

    mask_BT = rows((tokens.source != Source.NONE) & (tokens.source != Source.MISSING))
    _, stats = decoupled_policy_loss(
        target_logprobs_BT=rows(tokens.target_logprobs),
        old_logprobs_BT=rows(tokens.old_logprobs),
        behavior_logprobs_BT=rows(tokens.behavior_logprobs),
        advantages_BT=rows(tokens.advantages),
        mask_BT=mask_BT,
        clip_low=thresholds.clip_low,
        clip_high=thresholds.clip_high,
        discrepancy_low=thresholds.discrepancy_low,
        discrepancy_high=thresholds.discrepancy_high,
        granularity=granularity,
        segment_ids_BT=segment_ids(rows(tokens.turn), rows(tokens.weight_version)),
    )
    counts = {source.name.lower(): int((tokens.source == source).sum()) for source in Source}
    kept = sum(share * counts[name] for name, share in found.keep_share.items()) / found.tokens
    assert found.tokens == int(stats["mask_tokens"])
    assert set(found.keep_share) == {"resident", "snapshot", "current"}
    assert kept == pytest.approx(float(stats["discrepancy_keep_fraction"]), abs=1e-12)
    assert 0.1 < kept < 0.9
    assert found.clip_high_share + found.clip_low_share == pytest.approx(float(stats["clip_fraction"]), abs=1e-12)
    assert found.clip_high_share > 0 and found.clip_low_share > 0
    # P(clipped or rejected) = 1 - P(active).
    both = float(stats["clip_fraction"]) + (1 - kept) - (1 - float(stats["active_fraction"]))
    assert found.clip_and_reject_share == pytest.approx(both, abs=1e-12)
    assert both > 0


def test_a_discrepancy_is_measured_on_exact_sources_alone() -> None:
    tokens = batch()
    approximate = tokens.source == Source.CURRENT
    found = step_diagnostics(tokens, THRESHOLDS)
    moved = step_diagnostics(
        replace(tokens, old_logprobs=np.where(approximate, tokens.old_logprobs + 3.0, tokens.old_logprobs)), THRESHOLDS
    )
    exact = np.isin(tokens.source, (Source.RESIDENT, Source.SNAPSHOT))
    assert found.discrepancy is not None and found.discrepancy.tokens == int(exact.sum())
    assert (
        found.discrepancy
        == moved.discrepancy
        == divergence((tokens.old_logprobs - tokens.behavior_logprobs)[exact], tokens.trajectory[exact])
    )
    assert moved.keep_share["current"] == 0.0 and found.keep_share["current"] > 0.5
    assert moved.keep_share["snapshot"] == found.keep_share["snapshot"]
    # Target against behavior: the same for every source.
    assert found.importance == moved.importance
    assert found.importance is not None
    assert found.mean_square_importance == pytest.approx(2 * found.importance.kl_k2)
    only_approximate = replace(tokens, source=np.where(exact, Source.ENGINE, tokens.source))
    assert step_diagnostics(only_approximate, THRESHOLDS).discrepancy is None


def test_missing_tokens_and_versions_are_counted() -> None:
    tokens = batch()
    found = step_diagnostics(tokens, THRESHOLDS)
    trainable = tokens.source != Source.NONE
    trained = trainable & (tokens.source != Source.MISSING)
    assert found.missing_share == pytest.approx(float((tokens.source[trainable] == Source.MISSING).mean()))
    distinct = [len(set(tokens.weight_version[trained & (tokens.trajectory == row)])) for row in range(12)]
    assert (found.versions_per_trajectory, found.versions_per_trajectory_max) == (np.mean(distinct), max(distinct))
    assert sum(cell.tokens for cell in found.leak_cells) == found.tokens


def test_a_broken_log_probability_is_counted_and_enters_nothing() -> None:
    tokens = batch()
    broken = np.flatnonzero(tokens.source == Source.SNAPSHOT)[:3]
    for name, value in (("behavior_logprobs", -math.inf), ("old_logprobs", math.nan), ("target_logprobs", math.inf)):
        values = getattr(tokens, name).copy()
        values[broken] = value
        found = step_diagnostics(replace(tokens, **{name: values}), THRESHOLDS)
        without = tokens.source.copy()
        without[broken] = Source.NONE
        clean = step_diagnostics(replace(tokens, source=without), THRESHOLDS)
        assert found.tokens_not_finite == 3
        same = {"tokens_not_finite": 0, "missing_share": clean.missing_share}
        assert found.model_copy(update=same) == clean, name


def test_a_step_without_trained_tokens_is_zeros() -> None:
    tokens = batch()
    assert step_diagnostics(replace(tokens, source=np.zeros_like(tokens.source)), THRESHOLDS) == Diagnostics()
    empty = StepTokens(*[np.zeros(0)] * 9)  # type: ignore[arg-type]
    assert step_diagnostics(empty, THRESHOLDS) == Diagnostics()
    missing = step_diagnostics(replace(tokens, source=np.full_like(tokens.source, Source.MISSING)), THRESHOLDS)
    assert missing == Diagnostics(missing_share=1.0)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths differ: trajectory 288, turn 287"):
        replace(batch(), turn=batch().turn[1:])


def test_names_of_sources_are_those_of_the_report() -> None:
    assert set(step_diagnostics(batch(), THRESHOLDS).keep_share) <= set(SOURCE_NAMES)


def test_diagnostics_survive_the_wire() -> None:
    found = step_diagnostics(batch(), THRESHOLDS)
    assert Diagnostics.model_validate_json(found.model_dump_json(by_alias=True)) == found
