"""Loss, gradient and statistics against an independent calculation in Python floats, over random batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis.errors import NoSuchExample
from numpy.typing import NDArray
from tests.numerics.defective_loss import Defect, Loss, defective
from tests.numerics.slow_reference import Expected, expected_loss

from rljob_runtime.correction.objective import decoupled_policy_loss

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@dataclass(frozen=True)
class Case:
    target: NDArray[np.float64]
    old: NDArray[np.float64]
    behavior: NDArray[np.float64]
    advantages: NDArray[np.float64]
    mask: NDArray[np.bool_]
    segment_ids: NDArray[np.int64]
    clip_low: float
    clip_high: float
    discrepancy_low: float
    discrepancy_high: float
    granularity: str
    weight: str
    weight_cap: float
    denominator: float | None


@st.composite
def cases(draw: st.DrawFn, *, extremes: bool) -> Case:
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    ordinary = st.floats(-1.5, 1.5)
    ratios = st.one_of(ordinary, st.sampled_from([-2000.0, -800.0, 800.0, 2000.0])) if extremes else ordinary
    old = draw(hnp.arrays(np.float64, shape, elements=st.floats(-5, 0)))
    case = Case(
        old=old,
        target=old + draw(hnp.arrays(np.float64, shape, elements=ratios)),
        behavior=old - draw(hnp.arrays(np.float64, shape, elements=ratios)),
        advantages=draw(hnp.arrays(np.float64, shape, elements=st.one_of(st.just(0.0), st.floats(-3, 3)))),
        mask=draw(hnp.arrays(np.bool_, shape)),
        segment_ids=draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([-7, 0, 1, 2**40]))),
        clip_low=draw(st.floats(0.01, 0.9)),
        clip_high=draw(st.floats(0.01, 2)),
        discrepancy_low=draw(st.floats(0.2, 0.99)),
        discrepancy_high=draw(st.floats(1.01, 4)),
        granularity=draw(st.sampled_from(["token", "segment", "sequence"])),
        weight=draw(st.sampled_from(["none", "truncated", "raw"])),
        weight_cap=draw(st.floats(0.5, 3)),
        denominator=draw(st.one_of(st.none(), st.floats(0.5, 50))),
    )
    assume(expected(case).distance_to_kink > 1e-6)
    return case


def expected(case: Case) -> Expected:
    return expected_loss(
        target=case.target.tolist(),
        old=case.old.tolist(),
        behavior=case.behavior.tolist(),
        advantages=case.advantages.tolist(),
        mask=case.mask.tolist(),
        clip_low=case.clip_low,
        clip_high=case.clip_high,
        discrepancy_low=case.discrepancy_low,
        discrepancy_high=case.discrepancy_high,
        granularity=case.granularity,
        weight=case.weight,
        weight_cap=case.weight_cap,
        segment_ids=case.segment_ids.tolist(),
        denominator=case.denominator,
    )


def evaluate(loss_function: Loss, case: Case, target: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return loss_function(
        target_logprobs_BT=target,
        old_logprobs_BT=torch.from_numpy(case.old),
        behavior_logprobs_BT=torch.from_numpy(case.behavior),
        advantages_BT=torch.from_numpy(case.advantages),
        mask_BT=torch.from_numpy(case.mask),
        clip_low=case.clip_low,
        clip_high=case.clip_high,
        discrepancy_low=case.discrepancy_low,
        discrepancy_high=case.discrepancy_high,
        granularity=case.granularity,
        discrepancy_weight=case.weight,
        weight_cap=case.weight_cap,
        segment_ids_BT=torch.from_numpy(case.segment_ids),
        denominator=case.denominator,
    )


def agrees(loss_function: Loss, case: Case, reference: Expected) -> bool:
    target = torch.from_numpy(case.target.copy()).requires_grad_()
    loss, stats = evaluate(loss_function, case, target)
    (gradient,) = torch.autograd.grad(loss, target)
    pairs = [
        (loss.item(), reference.loss),
        (stats["discrepancy_keep_fraction"].item(), reference.keep_fraction),
        (stats["clip_fraction"].item(), reference.clip_fraction),
        (stats["active_fraction"].item(), reference.active_fraction),
        *zip(gradient.flatten().tolist(), np.array(reference.gradient).flatten().tolist(), strict=True),
    ]
    return all(math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-10) for ours, theirs in pairs)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(cases(extremes=True))
def test_loss_gradient_and_statistics_are_those_of_the_reference_even_where_ratios_overflow(case: Case) -> None:
    assert agrees(decoupled_policy_loss, case, expected(case))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(cases(extremes=True), st.data())
def test_nothing_outside_the_mask_changes_loss_gradient_or_statistics(case: Case, data: st.DataObject) -> None:
    garbage = hnp.arrays(
        np.float64, case.mask.shape, elements=st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 3])
    )
    spoiled = replace(
        case,
        **{
            name: np.where(case.mask, getattr(case, name), data.draw(garbage))
            for name in ("target", "old", "behavior", "advantages")
        },
    )
    assert agrees(decoupled_policy_loss, spoiled, expected(case))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(cases(extremes=False))
def test_the_naive_loss_without_a_defect_agrees_where_nothing_overflows(case: Case) -> None:
    assume(case.mask.any())
    assert agrees(defective("none"), case, expected(case))


# A gradient to the old policy does not show in the target's; test_objective.py looks for it.
@pytest.mark.parametrize("defect", sorted(set(get_args(Defect)) - {"none", "gradient through the old policy"}))
def test_the_comparison_detects_the_defect(defect: Defect) -> None:
    def detected(case: Case) -> bool:
        return bool(case.mask.any()) and not agrees(defective(defect), case, expected(case))

    quick = settings(
        max_examples=500,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=SLOW,
    )
    try:
        find(cases(extremes=False), detected, settings=quick)
    except NoSuchExample:
        pytest.fail(f"500 random batches did not tell the loss from one with the defect {defect!r}")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(cases(extremes=False))
def test_the_gradient_is_that_of_finite_differences_away_from_kinks(case: Case) -> None:
    assume(expected(case).distance_to_kink > 1e-4)
    target = torch.from_numpy(case.target.copy()).requires_grad_()
    loss, _ = evaluate(decoupled_policy_loss, case, target)
    (gradient,) = torch.autograd.grad(loss, target)
    step = 1e-5
    for b, t in np.ndindex(*case.target.shape):
        shift = torch.zeros_like(target)
        shift[b, t] = step
        above, _ = evaluate(decoupled_policy_loss, case, target.detach() + shift)
        below, _ = evaluate(decoupled_policy_loss, case, target.detach() - shift)
        assert float(above - below) / (2 * step) == pytest.approx(float(gradient[b, t]), abs=1e-7)
