"""Where staleness and engine noise end up: in the clip and in the mask, or entangled (tests 8 to 11).

The product of the two ratios is the same for every reference, so only masks and attribution can tell them apart. The
approximate references are written out here once more, apart from the package's own.
"""

from __future__ import annotations

import pytest
import torch
from tests.numerics.toy import DriftingPolicy
from torch import Tensor

from rljob_runtime.correction.diagnostics import discrepancy_by_staleness
from rljob_runtime.correction.objective import LossStats, decoupled_policy_loss

F64 = torch.float64


def interpolated(target_N: Tensor, behavior_N: Tensor, staleness: Tensor | int, *, kind: str) -> Tensor:
    """Reference between behavior and target, with behavior weight 1 / (staleness + 1) (Table 4 of arXiv 2605.12070)."""
    share = 1 / (torch.as_tensor(staleness) + 1.0).double()
    if kind == "log-linear":
        return share * behavior_N + (1 - share) * target_N
    return torch.logaddexp(share.log() + behavior_N, torch.log1p(-share) + target_N)


def intervals(
    staleness: int, *, kind: str, mask: tuple[float, float], clip: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The interpolated reference's mask and clip, as intervals of the importance ratio (Proposition 1)."""
    a = 1 / (staleness + 1)
    if kind == "log-linear":
        return (mask[0] ** (1 / (1 - a)), mask[1] ** (1 / (1 - a))), (clip[0] ** (1 / a), clip[1] ** (1 / a))
    effective_mask = ((mask[0] - a) / (1 - a), (mask[1] - a) / (1 - a))
    return effective_mask, (a * clip[0] / (1 - (1 - a) * clip[0]), a * clip[1] / (1 - (1 - a) * clip[1]))


def stats_of(toy: DriftingPolicy, reference_N: Tensor, *, clip: tuple[float, float], bound: float) -> LossStats:
    _, stats = decoupled_policy_loss(
        target_logprobs_BT=toy.current_N[None],
        old_logprobs_BT=reference_N[None],
        behavior_logprobs_BT=toy.behavior_N[None],
        advantages_BT=toy.advantages_N[None],
        mask_BT=torch.ones(1, len(reference_N), dtype=torch.bool),
        clip_low=clip[0],
        clip_high=clip[1],
        discrepancy_low=1 / bound,
        discrepancy_high=bound,
    )
    return stats


@pytest.mark.parametrize("kind", ["linear", "log-linear"])
@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_an_interpolated_reference_only_moves_the_thresholds_on_the_importance_ratio(staleness: int, kind: str) -> None:
    """Test 8: mask and clip with the reference equal an interval on r alone, over a million ratios."""
    log_r_N = 0.02 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(staleness), dtype=F64)
    behavior_N = torch.full_like(log_r_N, -1.5)
    reference_N = interpolated(behavior_N + log_r_N, behavior_N, staleness, kind=kind)
    positive_N = torch.arange(len(log_r_N)) % 2 == 0
    _, stats = decoupled_policy_loss(
        target_logprobs_BT=(behavior_N + log_r_N)[None],
        old_logprobs_BT=reference_N[None],
        behavior_logprobs_BT=behavior_N[None],
        advantages_BT=torch.where(positive_N, 1.0, -1.0)[None],
        mask_BT=torch.ones(1, len(log_r_N), dtype=torch.bool),
        clip_low=0.003,
        clip_high=0.004,
        discrepancy_low=0.99,
        discrepancy_high=1.01,
    )

    def shares(of: int) -> tuple[float, float, float]:
        mask, clip = intervals(of, kind=kind, mask=(0.99, 1.01), clip=(0.997, 1.004))
        r_N = log_r_N.exp()
        kept_N = (r_N >= mask[0]) & (r_N <= mask[1])
        clipped_N = torch.where(positive_N, r_N > clip[1], r_N < clip[0])
        selected = (kept_N, clipped_N, kept_N & ~clipped_N)
        return tuple(int(s.sum()) / len(r_N) for s in selected)

    ours = tuple(stats[name].item() for name in ("discrepancy_keep_fraction", "clip_fraction", "active_fraction"))
    assert ours == pytest.approx(shares(staleness), abs=1e-12)  # 0 mismatches: one token would show as 1e-6
    assert ours != pytest.approx(shares(staleness + 1), abs=1e-3)


@pytest.mark.parametrize(
    ("staleness", "mask", "clip"),
    [
        (1, (0.9800, 1.0200), (0.9940, 1.0080)),
        (2, (0.9850, 1.0150), (0.9911, 1.0121)),
        (3, (0.9867, 1.0133), (0.9881, 1.0162)),
    ],
)
def test_the_effective_thresholds_are_those_of_the_papers_table(
    staleness: int, mask: tuple[float, float], clip: tuple[float, float]
) -> None:
    found_mask, found_clip = intervals(staleness, kind="linear", mask=(0.99, 1.01), clip=(0.997, 1.004))
    assert [round(x, 4) for x in (*found_mask, *found_clip)] == [*mask, *clip]


def test_the_current_policy_as_old_policy_puts_staleness_into_the_mask_and_leaves_the_clip_dead() -> None:
    """Test 9: no engine noise at all, so every token that the discrepancy mask shuts out is shut out wrongly."""
    toy = DriftingPolicy(num_tokens=40_000, versions=8, staleness=3, drift=0.01, noise=0.0)

    def check(reference_N: Tensor) -> None:
        stats = stats_of(toy, reference_N, clip=(0.003, 0.004), bound=1.01)
        assert stats["discrepancy_keep_fraction"].item() == 1.0
        assert stats["clip_fraction"].item() > 0.2

    check(toy.exact_N)
    with pytest.raises(AssertionError):
        check(toy.current_N)
    entangled = stats_of(toy, toy.current_N, clip=(0.003, 0.004), bound=1.01)
    assert entangled["discrepancy_keep_fraction"].item() < 0.75
    assert entangled["clip_fraction"].item() == 0.0


def test_without_drift_only_interpolation_leaks_and_it_accepts_what_the_exact_mask_rejects() -> None:
    """Test 10: engine noise alone."""
    toy = DriftingPolicy(num_tokens=40_000, versions=8, staleness=3, drift=0.0, noise=0.003)

    def leak(reference_N: Tensor) -> float:
        return float((reference_N - toy.exact_N).square().mean().sqrt())

    log_linear_N = interpolated(toy.current_N, toy.behavior_N, toy.staleness_N, kind="log-linear")
    assert leak(toy.exact_N) == 0.0
    assert leak(toy.current_N) <= 1e-12
    assert leak(toy.ewma_logprobs(0.6)) <= 1e-12
    assert leak(log_linear_N) > 1e-3
    fresh_N = toy.staleness_N == 0
    rejected_N = fresh_N & ((toy.exact_N - toy.behavior_N).abs() > 0.005)
    accepted_N = (log_linear_N - toy.behavior_N).abs() <= 0.005
    assert rejected_N.sum() > 500
    assert bool(accepted_N[rejected_N].all())


def test_only_the_exact_old_policy_has_the_same_discrepancy_at_every_staleness() -> None:
    """Test 11: RMS(log r_d) per staleness bucket."""
    toy = DriftingPolicy(num_tokens=200_000, versions=24, staleness=3, drift=0.003, noise=0.003)

    def rms(reference_N: Tensor) -> list[float]:
        buckets = discrepancy_by_staleness(reference_N - toy.behavior_N, toy.staleness_N)
        return [buckets[str(n)].rms_log_discrepancy for n in range(4)]

    exact, current = rms(toy.exact_N), rms(toy.current_N)
    assert exact[3] / exact[0] == pytest.approx(1, abs=0.05)
    assert current[3] / current[0] > 1.5
    for centre_of_mass in (1, 2):
        by_staleness = rms(toy.ewma_logprobs(centre_of_mass / (1 + centre_of_mass)))
        assert by_staleness.index(min(by_staleness)) == centre_of_mass
