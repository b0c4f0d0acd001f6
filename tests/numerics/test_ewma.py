"""The average of weights against its closed form, where it stands between versions, and what it leaks (tests 12 to 15).

Toys of tests/numerics/toy.py: weights drift along a line, tokens are 0 to 3 versions stale, uniformly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from tests.numerics.toy import DriftingPolicy
from torch import Tensor

from rljob_api.correction import Ewma, EwmaReset
from rljob_runtime.correction.ewma import WeightEwma, decay_for_staleness, decay_for_window
from rljob_runtime.correction.ewma_monitor import EwmaMonitor, StepStatistics

F64 = torch.float64
Average = Callable[[list[Tensor], list[float]], Tensor]
"""Weights and the decay of each update (the first is unused) -> average."""


def weights(number: int, *, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=generator, dtype=F64).to(dtype) for _ in range(number)]


def ours(thetas: Iterable[Tensor], decays: list[float]) -> Tensor:
    ewma = WeightEwma(decays[0])
    for theta, decay in zip(thetas, decays, strict=True):
        ewma.decay = decay
        ewma.update({"w": theta})
    return ewma.params["w"]


def closed_form(thetas: list[Tensor], decays: list[float]) -> Tensor:
    """Each θ_k weighs the product of the decays after it (Eq. 20 of arXiv 2605.12070, with a decay that varies)."""
    shares = [math.prod(decays[k + 1 :]) for k in range(len(thetas))]
    return sum(theta * (share / math.fsum(shares)) for theta, share in zip(thetas, shares, strict=True))


def as_ppo_ewma(thetas: list[Tensor], decays: list[float]) -> Tensor:
    """The two-term recursion of arXiv 2110.00641."""
    average, weight = thetas[0], 1.0
    for theta, decay in zip(thetas[1:], decays[1:], strict=True):
        before, weight = weight, decay * weight + 1
        average = decay * before / weight * average + theta / weight
    return average


def without_bias_correction(thetas: list[Tensor], decays: list[float]) -> Tensor:
    average = thetas[0]
    for theta, decay in zip(thetas[1:], decays[1:], strict=True):
        average = decay * average + (1 - decay) * theta
    return average


def with_shares_swapped(thetas: list[Tensor], decays: list[float]) -> Tensor:
    average, weight = thetas[0], 1.0
    for theta, decay in zip(thetas[1:], decays[1:], strict=True):
        before, weight = weight, decay * weight + 1
        average = average / weight + decay * before / weight * theta
    return average


DECAYS = {"fixed": [0.75] * 40, "varying": [0.9 * (0.5 + 0.5 * math.sin(k)) for k in range(40)]}


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS.keys())
def test_the_average_is_the_closed_form_and_that_of_ppo_ewma(decays: list[float]) -> None:
    """Test 12."""
    thetas = weights(40)

    def check(average: Average) -> None:
        for end in (1, 2, 3, 10, 40):
            expected = closed_form(thetas[:end], decays[:end])
            torch.testing.assert_close(average(thetas[:end], decays[:end]), expected, rtol=0, atol=1e-13)

    check(ours)
    check(as_ppo_ewma)
    for wrong in (without_bias_correction, with_shares_swapped):
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_reset_is_bitwise_the_present_weights_with_weight_one(dtype: torch.dtype) -> None:
    """Test 12: before the first weights, and after others."""
    ewma = WeightEwma(0.6)
    first, second, third = weights(3, dtype=dtype)
    for theta in (first, third):
        ewma.reset({"w": theta})
        assert ewma.params["w"].dtype == (F64 if dtype is F64 else torch.float32)
        assert torch.equal(ewma.params["w"], theta.to(ewma.params["w"].dtype))
        assert (ewma.weight, ewma.center_of_mass) == (1.0, 0.0)
        ewma.update({"w": second})
        assert ewma.weight == 1.6
        assert not torch.equal(ewma.params["w"], theta.to(ewma.params["w"].dtype))


def test_the_average_is_its_own_memory_updated_in_place() -> None:
    ewma = WeightEwma(0.6)
    first, second, third = weights(3, dtype=torch.float32)
    kept = first.clone()
    ewma.reset({"w": first})
    memory = ewma.params["w"].data_ptr()
    ewma.update({"w": second})
    ewma.reset({"w": third})
    ewma.update({"w": second})
    assert ewma.params["w"].data_ptr() == memory
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_average_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    """Test 12."""
    thetas = weights(12, dtype=dtype)
    whole, saved, resumed = WeightEwma(0.6), WeightEwma(0.6), WeightEwma(0.1)
    for theta in thetas:
        whole.update({"w": theta})
    for theta in thetas[:7]:
        saved.update({"w": theta})
    resumed.load_state_dict(saved.state_dict())
    saved.reset({"w": thetas[0]})  # a load copies
    for theta in thetas[7:]:
        resumed.update({"w": theta})
    assert torch.equal(resumed.params["w"], whole.params["w"])
    assert (resumed.weight, resumed.center_of_mass, resumed.decay) == (whole.weight, whole.center_of_mass, 0.6)


def test_shards_are_averaged_as_the_whole_is_also_empty_ones() -> None:
    thetas = weights(6, dtype=torch.float32)
    whole = ours(thetas, [0.6] * 6)
    shards = [ours([theta[rows] for theta in thetas], [0.6] * 6) for rows in (slice(0, 3), slice(3, 5), slice(5, 5))]
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS.keys())
def test_under_linear_drift_the_average_lies_its_centre_of_mass_behind(decays: list[float]) -> None:
    """Test 13: θ_t - average = center_of_mass · δ, also while it warms up and when the decay varies."""
    start, drift = weights(2)

    def check(centre_of_mass: Callable[[WeightEwma], float]) -> None:
        ewma = WeightEwma(0.0)
        for t, decay in enumerate(decays):
            theta = start + t * drift
            ewma.decay = decay
            ewma.update({"w": theta})
            torch.testing.assert_close(theta - ewma.params["w"], centre_of_mass(ewma) * drift, rtol=0, atol=1e-12)

    check(lambda ewma: ewma.center_of_mass)
    with pytest.raises(AssertionError):
        check(lambda ewma: ewma.decay / (1 - ewma.decay))


def test_the_centre_of_mass_warms_up_to_its_limit() -> None:
    ewma = WeightEwma(0.75)
    found = []
    for theta in weights(201):
        ewma.update({"w": theta})
        found.append(ewma.center_of_mass)
    assert [found[t] for t in (0, 1, 2, 3, 5, 10)] == pytest.approx([0, 0.43, 0.81, 1.15, 1.70, 2.52], abs=0.006)
    assert found[-1] == pytest.approx(0.75 / 0.25, abs=1e-12)
    assert ewma.weight == pytest.approx(1 / 0.25, abs=1e-12)


def test_steps_that_bfloat16_would_round_away_are_accumulated() -> None:
    """Weights of 1 that move by 1e-5 a version: bfloat16 resolves 8e-3 there."""
    thetas = [torch.full((4,), 1 + 1e-5 * t) for t in range(60)]
    lag = 0.9 / 0.1 * 1e-5

    def check(average: Tensor) -> None:
        assert (thetas[-1] - average).tolist() == pytest.approx([lag] * 4, rel=0.05)

    check(ours(thetas, [0.9] * 60))
    narrow = thetas[0].bfloat16()
    weight = 1.0
    for theta in thetas[1:]:
        weight = 1 + 0.9 * weight
        narrow.lerp_(theta.bfloat16(), 1 / weight)
    with pytest.raises(AssertionError):
        check(narrow)


@pytest.mark.parametrize(("window", "decay"), [(0, 0), (1, 1 / 3), (2, 0.5), (3, 0.6), (4, 2 / 3), (6, 0.75), (8, 0.8)])
def test_the_decay_for_a_window_puts_the_centre_of_mass_at_half_of_it(window: int, decay: float) -> None:
    assert decay_for_window(window) == pytest.approx(decay, abs=1e-15)
    assert decay_for_window(window) == pytest.approx(decay_for_staleness(window / 2, 1), abs=1e-15)
    assert decay / (1 - decay) == pytest.approx(window / 2, abs=1e-12)


def test_the_decay_for_a_staleness_counts_updates_not_versions() -> None:
    assert decay_for_staleness(1.5, 2) == pytest.approx(0.75)
    assert decay_for_staleness(0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightEwma(1.0), r"the decay is 1.0, outside \[0, 1\): .* take decay_for_window"),
        (lambda: WeightEwma(-0.1), r"the decay is -0.1, outside"),
        (lambda: WeightEwma(math.nan), r"the decay is nan, outside"),
        (lambda: setattr(WeightEwma(0.5), "decay", 1.5), r"the decay is 1.5, outside"),
        (lambda: decay_for_window(-1), "W is -1 and cannot be negative: give the largest staleness"),
        (lambda: decay_for_staleness(-0.5), "the mean staleness is -0.5, not a number >= 0: average it over tokens"),
        (lambda: decay_for_staleness(math.inf), "the mean staleness is inf"),
        (lambda: decay_for_staleness(1, 0), "updates per version is 0, not a number > 0: it is 1 for"),
        (lambda: WeightEwma(0.5).reset({"w": torch.ones(2, dtype=torch.int64)}), "w is torch.int64: average weights"),
    ],
)
def test_values_out_of_range_are_refused_with_the_remedy(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("other", [{"v": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.ones(2, dtype=F64)}])
def test_an_update_with_other_weights_is_refused_and_changes_nothing(other: dict[str, Tensor]) -> None:
    ewma = WeightEwma(0.5)
    ewma.update({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="not the weights averaged so far, by name and shape: reset"):
        ewma.update(other)
    assert ewma.params["w"].tolist() == [0, 0] and ewma.weight == 1


def leak_rms(toy: DriftingPolicy, reference_N: Tensor) -> float:
    return float((reference_N - toy.exact_N).square().mean().sqrt())


def averaged(toy: DriftingPolicy, decay: float) -> Tensor:
    return toy.logprobs(ours(toy.weights, [decay] * len(toy.weights)))


@pytest.mark.parametrize("seed", range(4))
def test_at_a_window_of_three_the_leak_is_least_at_a_decay_of_0_6(seed: int) -> None:
    """Test 14. Predicted over the current policy: sqrt((W + 2) / (2 (2W + 1))) = 0.598."""
    toy = DriftingPolicy(num_tokens=40_000, versions=24, staleness=3, drift=0.003, noise=0.003, seed=seed)
    leaks = {decay: leak_rms(toy, averaged(toy, decay)) for decay in (0.333, 0.5, decay_for_window(3), 0.75, 0.9)}
    assert min(leaks, key=leaks.__getitem__) == 0.6
    assert leaks[0.6] / leak_rms(toy, toy.current_N) == pytest.approx(0.60, abs=0.05)
    # The optimum follows the staleness: with tokens of one version back only, a window of three reaches too far.
    fresher = DriftingPolicy(num_tokens=40_000, versions=24, staleness=1, drift=0.003, noise=0.003, seed=seed)
    assert leak_rms(fresher, averaged(fresher, decay_for_window(1))) < leak_rms(fresher, averaged(fresher, 0.6))


@functools.cache
def drifting(drift: float, present: int) -> DriftingPolicy:
    """The same features, directions and staleness at every version: only the present moves."""
    return DriftingPolicy(num_tokens=1500, versions=present, staleness=3, drift=drift, noise=0.003)


def train(settings: Ewma, *, drift: float = 0.003, versions: int = 80) -> tuple[float, int, float]:
    """Mean keep fraction of the mask at 1.01, number of resets, and the last centre of mass, over a run."""
    monitor, ewma, kept = EwmaMonitor(), WeightEwma(0.0), []
    weights_of = drifting(drift, versions).weights
    is_due = False
    for version in range(versions):
        ewma.decay = monitor.decay(settings)
        (ewma.reset if is_due else ewma.update)({"w": weights_of[version]})
        if version < 3:
            continue
        toy = drifting(drift, version)

        def keep(reference_N: Tensor, toy: DriftingPolicy = toy) -> float:
            return float(((reference_N - toy.behavior_N).abs() <= math.log(1.01)).double().mean())

        kept.append(keep(toy.logprobs(ewma.params["w"])))
        statistics = StepStatistics(
            tokens=len(toy.tokens_N),
            mean_staleness=float(toy.staleness_N.double().mean()),
            ewma_tokens=len(toy.tokens_N),
            ewma_keep_fraction=kept[-1],
            exact_tokens=len(toy.tokens_N),
            exact_keep_fraction=keep(toy.exact_N),
        )
        monitor, is_due = monitor.after(statistics, settings)
    return sum(kept) / len(kept), monitor.resets, ewma.center_of_mass


def run_settings(decay: float | None, *, threshold: float = 0.9, patience: int = 1) -> Ewma:
    return Ewma(decay=decay, reset=EwmaReset(threshold=threshold, patience=patience))


def test_resets_bring_the_keep_fraction_of_too_slow_an_average_back() -> None:
    """Test 15."""
    without, none, _ = train(run_settings(0.9, threshold=0.0))
    with_resets, resets, _ = train(run_settings(0.9))
    assert none == 0
    assert without == pytest.approx(0.504, abs=0.06) and with_resets == pytest.approx(0.937, abs=0.02)
    assert 7 <= resets <= 12


def test_an_average_that_keeps_up_is_never_reset() -> None:
    """Test 15."""
    keep, resets, _ = train(run_settings(0.6))
    assert resets == 0 and keep == pytest.approx(0.971, abs=0.015)


def test_frozen_weights_are_never_reset() -> None:
    """Test 15: without drift any decay keeps what the exact policy keeps."""
    keep, resets, _ = train(run_settings(0.9, threshold=1.0), drift=0.0)
    assert resets == 0 and keep > 0.99


def test_the_automatic_decay_finds_the_mean_staleness_by_itself() -> None:
    keep, resets, centre_of_mass = train(run_settings(None))
    assert centre_of_mass == pytest.approx(1.5, abs=0.05)
    assert resets == 0 and keep == pytest.approx(train(run_settings(0.6))[0], abs=0.01)
