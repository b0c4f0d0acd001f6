"""Staleness and discrepancy statistics, and the permutation test for a leak of one into the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rljob_api.messages import BucketStats, Distribution, SourceStats
from rljob_runtime.correction.diagnostics import (
    discrepancy_by_source,
    discrepancy_by_staleness,
    flatness_test,
    staleness_distribution,
)


def test_staleness_is_summarised_over_tokens_by_nearest_rank() -> None:
    staleness = [0] * 10 + [1] * 9 + [4]
    expected = Distribution(mean=13 / 20, p50=0, p95=1, max=4, histogram={"0": 10, "1": 9, "4": 1})
    assert staleness_distribution(staleness) == expected
    assert staleness_distribution(torch.tensor(staleness[::-1])) == expected
    assert staleness_distribution([0, 0, 1, 1, 5]).p50 == 1
    assert staleness_distribution([]) == Distribution()


def test_discrepancy_is_reported_per_staleness_and_per_source() -> None:
    log_discrepancy = torch.tensor([3.0, -4.0, 1.0, -2.0], dtype=torch.float64)
    five = {"tokens": 2, "rms_log_discrepancy": math.sqrt(12.5), "max_abs_log_discrepancy": 4.0}
    two = {"tokens": 2, "rms_log_discrepancy": math.sqrt(2.5), "max_abs_log_discrepancy": 2.0}
    assert discrepancy_by_staleness(log_discrepancy, [10, 10, 2, 2]) == {
        "2": BucketStats(**two),
        "10": BucketStats(**five),
    }
    by_source = discrepancy_by_source(log_discrepancy, torch.tensor([2, 2, 0, 0]), ["resident", "pool", "snapshot"])
    assert by_source == {"resident": SourceStats(**two), "snapshot": SourceStats(**five)}
    assert discrepancy_by_staleness([], []) == {}


def test_a_log_ratio_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 log ratios are not finite"):
        discrepancy_by_staleness([0.0, math.nan], [0, 1])


@dataclass(frozen=True)
class Tokens:
    log_discrepancy: NDArray[np.float64]
    staleness: NDArray[np.int64]
    trajectory: NDArray[np.int64]
    strata: NDArray[np.int64]
    """[N, 2]: position bin, phase."""

    def p_value(self, *, seed: int = 0, num_permutations: int = 199) -> float:
        _, p_value = flatness_test(
            self.log_discrepancy,
            self.staleness,
            self.trajectory,
            self.strata,
            num_permutations=num_permutations,
            seed=seed,
        )
        return p_value


def synthetic(seed: int, *, drift: float) -> Tokens:
    """Trajectories of 6 to 24 tokens, most of them interrupted; noise depends on all that must not count as a leak.

    It grows with position and phase, as staleness does, and each trajectory has a noise level of its own.
    """
    generator = np.random.default_rng(seed)
    parts: list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    for trajectory in range(160):
        length = int(generator.integers(6, 25))
        position = np.arange(length)
        phase = trajectory % 2
        first = generator.integers(0, 3) + phase
        staleness = np.where(position < generator.integers(0, length), first + 1, first)
        level = 0.003 * math.exp(0.5 * generator.standard_normal()) * (1 + phase) * (1 + position / 12)
        leak = drift * staleness * generator.standard_normal(length)
        parts.append(
            (
                level * generator.standard_normal(length) + leak,
                staleness.astype(np.int64),
                np.full(length, trajectory),
                np.stack([position // 8, np.full(length, phase)], axis=1),
            )
        )
    return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def test_flat_data_is_rejected_at_the_nominal_rate() -> None:
    p_values = np.array([synthetic(seed, drift=0.0).p_value(seed=seed) for seed in range(100)])
    assert (p_values <= 0.01).sum() <= 4
    assert (p_values <= 0.2).sum() <= 33  # 3.2 standard deviations of the binomial above 20
    assert (p_values <= 0.5).sum() >= 34


def test_the_simulation_notices_a_test_that_forgets_what_tokens_share() -> None:
    """Negative control: shuffling single tokens, blind to trajectory, position and phase, rejects flat data."""
    rejected = 0
    for seed in range(20):
        flat = synthetic(seed, drift=0.0)
        every = np.arange(len(flat.staleness))
        blind = Tokens(flat.log_discrepancy, flat.staleness, every, np.zeros_like(every))
        rejected += blind.p_value(seed=seed) <= 0.01
    assert rejected >= 15


def test_a_leak_of_half_the_noise_per_version_is_found() -> None:
    assert sum(synthetic(seed, drift=0.005).p_value(seed=seed) <= 0.01 for seed in range(20)) >= 18


def test_the_result_depends_on_the_arguments_and_the_seed_alone() -> None:
    data = synthetic(0, drift=0.0005)
    assert data.p_value(seed=1) == data.p_value(seed=1)
    order = np.random.default_rng(0).permutation(len(data.staleness))
    names = 1000 - 3 * data.trajectory[order]
    shuffled = flatness_test(
        torch.from_numpy(data.log_discrepancy[order]),
        torch.from_numpy(data.staleness[order]),
        names,
        data.strata[order],
        num_permutations=9,
        seed=1,
    )
    ordered = flatness_test(
        data.log_discrepancy, data.staleness, data.trajectory, data.strata, num_permutations=9, seed=1
    )
    assert shuffled[0] == pytest.approx(ordered[0], abs=1e-12)


def test_the_statistic_is_the_weighted_spread_of_the_relative_rms() -> None:
    # Two trajectories in one stratum: RMS 1 over one token, RMS 3 over three; the stratum's mean square is 28/4 = 7.
    statistic, p_value = flatness_test(
        [1.0, 3.0, -3.0, 3.0], [0, 2, 2, 2], [5, 9, 9, 9], [0] * 4, num_permutations=7, seed=0
    )
    assert statistic == pytest.approx(math.sqrt(1 / 4 * 3 / 4) * (3 - 1) / math.sqrt(7), abs=1e-12)
    assert p_value > 0.1


def test_trajectories_are_compared_within_their_phase_whatever_its_noise_level() -> None:
    """Ten phases of two trajectories, the staler one twice as noisy, phases a factor of ten apart."""
    phase, staleness = np.repeat(np.arange(10), 2), np.tile([0, 1], 10)
    log_discrepancy = (1.0 + staleness) * 10.0**-phase
    arguments = (log_discrepancy, staleness, np.arange(20), phase)
    statistic, p_value = flatness_test(*arguments, num_permutations=199, seed=0)
    assert statistic == pytest.approx(0.5 / math.sqrt(2.5), abs=1e-12)  # RMS 1 and 2 around 1.5, mean square 2.5
    assert p_value <= 3 / 200  # two of 1024 assignments are as extreme
    assert flatness_test(*arguments, num_permutations=9, seed=0)[1] == 1 / 10  # never 0: the observed one counts


def test_a_cells_label_is_its_mean_staleness_rounded_half_up() -> None:
    def statistic(interrupted: list[int]) -> float:
        return flatness_test(
            [1.0, 1.0, 5.0, 5.0], [*interrupted, 2, 2], [0, 0, 1, 1], [0] * 4, num_permutations=1, seed=0
        )[0]

    assert statistic([2, 1]) == 0.0  # 1.5 is the other's 2: one bucket
    assert statistic([1, 1]) > 0.5


def test_nothing_to_exchange_gives_p_value_one() -> None:
    alone = flatness_test([1.0, 2.0, 3.0], [0, 1, 1], [0, 1, 1], [0, 0, 1], num_permutations=9, seed=0)
    same_label = flatness_test([1.0, 2.0, 3.0], [1, 1, 1], [0, 1, 2], [0, 0, 0], num_permutations=9, seed=0)
    no_discrepancy = flatness_test([0.0] * 3, [0, 1, 2], [0, 1, 2], [0, 0, 0], num_permutations=9, seed=0)
    assert alone[1] == 1.0
    assert same_label == (0.0, 1.0)
    assert no_discrepancy == (0.0, 1.0)


def test_the_flatness_test_refuses_what_it_cannot_test() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        flatness_test([], [], [], [], num_permutations=9, seed=0)
    with pytest.raises(ValueError, match="num_permutations 0 must be >= 1"):
        flatness_test([1.0], [0], [0], [0], num_permutations=0, seed=0)
    with pytest.raises(ValueError, match="lengths differ: log_discrepancy_N 2, staleness_N 1"):
        flatness_test([1.0, 2.0], [0], [0, 0], [0, 0], num_permutations=9, seed=0)
