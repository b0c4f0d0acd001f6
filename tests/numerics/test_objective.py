"""Single properties of the decoupled policy loss, each with the defect that its check must notice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.numerics.defective_loss import Loss, defective
from torch import Tensor

from rljob_runtime.correction.objective import decoupled_policy_loss

F64 = torch.float64


def batch(
    *,
    log_s: list[list[float]],
    log_d: list[list[float]] | None = None,
    advantages: list[list[float]] | None = None,
    mask: list[list[int]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of the loss whose log ratios are the given ones; everything is kept and nothing clipped by default."""
    log_s_BT = torch.tensor(log_s, dtype=F64)
    log_d_BT = torch.zeros_like(log_s_BT) if log_d is None else torch.tensor(log_d, dtype=F64)
    old_BT = torch.full_like(log_s_BT, -2.0)
    return {
        "target_logprobs_BT": (old_BT + log_s_BT).requires_grad_(),
        "old_logprobs_BT": old_BT,
        "behavior_logprobs_BT": old_BT - log_d_BT,
        "advantages_BT": torch.ones_like(log_s_BT) if advantages is None else torch.tensor(advantages, dtype=F64),
        "mask_BT": torch.ones_like(log_s_BT, dtype=torch.bool) if mask is None else torch.tensor(mask).bool(),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "discrepancy_low": 0.5,
        "discrepancy_high": 2.0,
        **settings,
    }


def gradient(loss_function: Loss, arguments: dict[str, Any]) -> Tensor:
    loss, _ = loss_function(**arguments)
    (result,) = torch.autograd.grad(loss, arguments["target_logprobs_BT"])
    return result


def holds_but_not_with(defective_loss: Loss, check: Callable[[Loss], None]) -> None:
    check(decoupled_policy_loss)
    with pytest.raises(AssertionError):
        check(defective_loss)


def test_a_batch_worked_by_hand() -> None:
    arguments = batch(
        log_s=[[math.log(1.1), math.log(1.5), math.log(0.5)], [math.log(0.5), math.log(1.5), 0.0]],
        log_d=[[0.0, math.log(1.5), 0.0], [0.0, math.log(3.0), math.log(4.0)]],
        advantages=[[2.0, 2.0, 2.0], [-1.0, -1.0, 5.0]],
        mask=[[1, 1, 1], [1, 1, 0]],
        discrepancy_weight="raw",
    )
    loss, stats = decoupled_policy_loss(**arguments)
    # kept: all but the fifth (3 > 2); clipped: 1.5 with A > 0 and 0.5 with A < 0; the sixth is outside the mask
    # 1.1*2 + 1.5*(1.2*2) + 0.5*2 + 0.8*(-1) = 6.0, over 5 mask tokens
    assert loss.item() == pytest.approx(-6.0 / 5, abs=1e-12)
    (result,) = torch.autograd.grad(loss, arguments["target_logprobs_BT"])
    torch.testing.assert_close(
        result, torch.tensor([[-2.2 / 5, 0.0, -1.0 / 5], [0.0, 0.0, 0.0]], dtype=F64), atol=1e-12, rtol=0
    )
    assert {name: round(value.item(), 12) for name, value in stats.items()} == {
        "active_fraction": 0.4,
        "discrepancy_keep_fraction": 0.8,
        "clip_fraction": 0.4,
        "mask_tokens": 5,
    }


def test_thresholds_themselves_are_inside() -> None:
    edge = torch.tensor([[math.log(2.0), math.log(0.5), 0.0, 0.0]], dtype=F64)
    staleness = torch.tensor([[0.0, 0.0, math.log(1.25), math.log(0.75)]], dtype=F64)
    zeros = torch.zeros_like(edge)
    _, stats = decoupled_policy_loss(
        target_logprobs_BT=staleness,
        old_logprobs_BT=zeros,
        behavior_logprobs_BT=-edge,
        advantages_BT=torch.tensor([[1.0, 1.0, 1.0, -1.0]], dtype=F64),
        mask_BT=torch.ones_like(edge, dtype=torch.bool),
        clip_low=0.25,
        clip_high=0.25,
        discrepancy_low=0.5,
        discrepancy_high=2.0,
    )
    assert stats["discrepancy_keep_fraction"] == 1
    assert stats["clip_fraction"] == 0


def test_a_zero_advantage_counts_as_positive_in_the_clip_fraction() -> None:
    def check(loss_function: Loss) -> None:
        _, stats = loss_function(**batch(log_s=[[1.0, 1.0, -1.0]], advantages=[[0.0, -0.0, 0.0]]))
        assert stats["clip_fraction"].item() == pytest.approx(2 / 3)

    holds_but_not_with(defective("zero advantage counts as negative"), check)


def test_clip_fraction_counts_tokens_that_the_discrepancy_mask_shut_out() -> None:
    def check(loss_function: Loss) -> None:
        _, stats = loss_function(**batch(log_s=[[1.0, 1.0]], log_d=[[0.0, 5.0]]))
        assert stats["clip_fraction"].item() == 1.0
        assert stats["discrepancy_keep_fraction"].item() == 0.5
        assert stats["active_fraction"].item() == 0.0

    holds_but_not_with(defective("clip share of kept tokens only"), check)


def test_a_ratio_that_overflows_under_a_closed_mask_has_gradient_zero() -> None:
    def check(loss_function: Loss) -> None:
        result = gradient(loss_function, batch(log_s=[[5000.0, 0.1]], log_d=[[-5000.0, 0.0]], advantages=[[-1.0, 1.0]]))
        assert result[0, 0] == 0.0
        assert result[0, 1] == pytest.approx(-math.exp(0.1) / 2)

    holds_but_not_with(defective("none"), check)


def test_a_ratio_that_overflows_above_the_clip_has_gradient_zero() -> None:
    def check(loss_function: Loss) -> None:
        arguments = batch(log_s=[[5000.0, 5000.0]], advantages=[[1.0, 0.0]])
        loss, _ = loss_function(**arguments)
        assert loss.item() == pytest.approx(-1.2 / 2)
        assert gradient(loss_function, arguments).tolist() == [[0.0, 0.0]]

    holds_but_not_with(defective("none"), check)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e308])
def test_garbage_outside_the_mask_has_gradient_zero(garbage: float) -> None:
    def check(loss_function: Loss) -> None:
        arguments = batch(log_s=[[0.1, 0.0]], mask=[[1, 0]])
        for name in ("target_logprobs_BT", "old_logprobs_BT", "behavior_logprobs_BT", "advantages_BT"):
            arguments[name] = arguments[name].detach().clone()
            arguments[name][0, 1] = -garbage if name == "old_logprobs_BT" else garbage
        arguments["target_logprobs_BT"].requires_grad_()
        result = gradient(loss_function, arguments)
        assert result[0, 1] == 0.0
        assert result[0, 0] == pytest.approx(-math.exp(0.1))

    holds_but_not_with(defective("none"), check)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", ["none", "truncated", "raw"])
def test_a_discrepancy_that_is_not_finite_shuts_the_token_out_even_with_no_bounds(broken: float, weight: str) -> None:
    arguments = batch(log_s=[[0.1, 0.1]], discrepancy_low=0.0, discrepancy_high=math.inf, discrepancy_weight=weight)
    arguments["behavior_logprobs_BT"][0, 0] = broken
    loss, stats = decoupled_policy_loss(**arguments)
    assert loss.item() == pytest.approx(-math.exp(0.1) / 2)
    assert stats["discrepancy_keep_fraction"].item() == 0.5
    assert gradient(decoupled_policy_loss, arguments)[0, 0] == 0.0


def test_a_broken_token_shuts_its_segment_out_and_no_other() -> None:
    ids = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    arguments = batch(log_s=[[0.1] * 4] * 2, granularity="segment", segment_ids_BT=ids)
    arguments["old_logprobs_BT"][0, 2] = math.nan
    assert (gradient(decoupled_policy_loss, arguments) == 0).tolist() == [[False, False, True, True], [False] * 4]


def test_a_target_that_is_not_a_number_is_not_hidden() -> None:
    arguments = batch(log_s=[[math.nan, 0.1]])
    loss, _ = decoupled_policy_loss(**arguments)
    assert math.isnan(loss.item())


@pytest.mark.parametrize("denominator", [None, 0.0, 7.0, torch.tensor(0)])
@pytest.mark.parametrize("granularity", ["token", "segment", "sequence"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_an_empty_mask_gives_loss_gradient_and_shares_zero(
    denominator: float | Tensor | None, granularity: str, shape: tuple[int, int]
) -> None:
    target = torch.full(shape, math.nan, requires_grad=True)
    loss, stats = decoupled_policy_loss(
        target_logprobs_BT=target,
        old_logprobs_BT=target.detach(),
        behavior_logprobs_BT=target.detach(),
        advantages_BT=target.detach(),
        mask_BT=torch.zeros(shape, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.2,
        discrepancy_low=0.5,
        discrepancy_high=2.0,
        granularity=granularity,
        segment_ids_BT=torch.zeros(shape, dtype=torch.int64),
        denominator=denominator,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert target.grad is not None and (target.grad == 0).all()
    assert all(value.item() == 0.0 for value in stats.values())


def test_the_denominator_is_the_number_of_mask_tokens_however_many_the_ratios_shut_out() -> None:  # test 23
    def check(loss_function: Loss) -> None:
        whole, _ = loss_function(**batch(log_s=[[0.0, 0.0, 0.0, 0.0]], log_d=[[0.0, 0.0, 0.0, 0.0]]))
        half, _ = loss_function(**batch(log_s=[[0.0, 0.0, 0.0, 0.0]], log_d=[[0.0, 5.0, -5.0, 0.0]]))
        assert whole.item() == -1.0
        assert half.item() == -0.5

    holds_but_not_with(defective("denominator after masking"), check)


def test_micro_batches_with_the_mini_batch_denominator_add_up_to_the_mini_batch() -> None:
    def check(loss_function: Loss) -> None:
        log_s, log_d = [[0.3, -0.1, 0.2], [0.0, 0.1, -0.4]], [[0.0, 0.9, 0.1], [0.2, 0.0, 0.0]]
        advantages, mask = [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]], [[1, 1, 0], [1, 1, 1]]
        whole = gradient(loss_function, batch(log_s=log_s, log_d=log_d, advantages=advantages, mask=mask))
        rows = [
            gradient(
                loss_function,
                batch(log_s=[log_s[b]], log_d=[log_d[b]], advantages=[advantages[b]], mask=[mask[b]], denominator=5),
            )
            for b in range(2)
        ]
        torch.testing.assert_close(torch.cat(rows), whole, atol=1e-14, rtol=0)

    holds_but_not_with(defective("mean over the batch's rows"), check)


def test_no_gradient_reaches_old_and_behavior_log_probabilities_or_advantages() -> None:  # test 24
    def check(loss_function: Loss) -> None:
        arguments = batch(log_s=[[0.1, -0.1]], log_d=[[0.2, 0.1]], discrepancy_weight="raw")
        references = ("old_logprobs_BT", "behavior_logprobs_BT", "advantages_BT")
        for name in references:
            arguments[name] = arguments[name].clone().requires_grad_()
        loss, _ = loss_function(**arguments)
        loss.backward()
        assert all(arguments[name].grad is None for name in references)

    holds_but_not_with(defective("gradient through the old policy"), check)


@pytest.mark.parametrize("name", ["target_logprobs_BT", "old_logprobs_BT", "behavior_logprobs_BT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_narrower_than_float32_are_refused(name: str, dtype: torch.dtype) -> None:  # test 25
    arguments = batch(log_s=[[0.1, -0.1]])
    arguments[name] = arguments[name].detach().to(dtype)
    with pytest.raises(ValueError, match=rf"{name} is {dtype}: a narrower type .* Compute and store .* as float32"):
        decoupled_policy_loss(**arguments)


def test_bfloat16_storage_would_decide_the_mask() -> None:
    """Why the narrow types are refused: rounding alone moves an exact ratio of 1 across a threshold of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    old_BT = -5 * torch.rand(1, 2000, generator=generator, dtype=F64)

    def check(round_trip: torch.dtype) -> None:
        _, stats = decoupled_policy_loss(
            target_logprobs_BT=old_BT,
            old_logprobs_BT=old_BT,
            behavior_logprobs_BT=old_BT.to(round_trip).double(),
            advantages_BT=torch.ones_like(old_BT),
            mask_BT=torch.ones_like(old_BT, dtype=torch.bool),
            clip_low=0.2,
            clip_high=0.2,
            discrepancy_low=0.999,
            discrepancy_high=1.001,
        )
        assert stats["discrepancy_keep_fraction"] == 1

    check(torch.float32)
    with pytest.raises(AssertionError):
        check(torch.bfloat16)


def test_float32_inputs_give_a_float32_loss_close_to_the_float64_one() -> None:
    arguments = batch(log_s=[[0.1, -0.1, 0.7]], log_d=[[0.2, 0.1, 0.0]], discrepancy_weight="raw")
    wide, _ = decoupled_policy_loss(**arguments)
    narrow, _ = decoupled_policy_loss(
        **{
            key: value.float() if isinstance(value, Tensor) and value.dtype == F64 else value
            for key, value in arguments.items()
        }
    )
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), abs=1e-6)


def test_integer_and_float_masks_select_the_same_tokens_as_bool() -> None:
    arguments = batch(log_s=[[0.1, -0.1]], mask=[[1, 0]])
    expected, _ = decoupled_policy_loss(**arguments)
    for dtype in (torch.int32, torch.float32):
        loss, _ = decoupled_policy_loss(**{**arguments, "mask_BT": arguments["mask_BT"].to(dtype)})
        assert loss.item() == expected.item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_BT": torch.ones(1, 3)}, r"same shape \[B, T\].*advantages_BT \[1, 3\]"),
        ({"mask_BT": torch.ones(2, dtype=torch.bool)}, r"same shape \[B, T\].*mask_BT \[2\]"),
        ({"advantages_BT": torch.ones(1, 2, dtype=torch.int64)}, "advantages_BT is torch.int64"),
        ({"clip_low": -0.1}, "clip_low -0.1 and clip_high 0.2 must be >= 0"),
        ({"clip_high": math.nan}, "clip_high nan must be >= 0"),
        ({"discrepancy_low": 2.0, "discrepancy_high": 0.5}, "must be 0 <= low <= high"),
        ({"discrepancy_low": -0.5}, "must be 0 <= low <= high"),
        ({"discrepancy_high": math.nan}, "must be 0 <= low <= high"),
        ({"granularity": "Token"}, "granularity 'Token' is not one of token, segment, sequence"),
        ({"discrepancy_weight": "capped"}, "discrepancy_weight 'capped' is not one of none, truncated, raw"),
        ({"weight_cap": 0.0}, "weight_cap 0.0 must be > 0"),
        ({"granularity": "segment"}, 'granularity "segment" needs segment_ids_BT'),
        ({"granularity": "segment", "segment_ids_BT": torch.zeros(1, 3, dtype=torch.int64)}, r"must be \[1, 2\]"),
        ({"granularity": "segment", "segment_ids_BT": torch.zeros(1, 2)}, "it must hold integers"),
        ({"denominator": -1.0}, "denominator -1.0 must be a number of tokens"),
        ({"denominator": math.nan}, "denominator nan must be a number of tokens"),
        ({"denominator": torch.ones(2)}, r"denominator has shape \[2\]"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_the_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoupled_policy_loss(**{**batch(log_s=[[0.1, -0.1]]), **change})


def test_the_signature_is_frozen() -> None:
    parameters = inspect.signature(decoupled_policy_loss).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        **dict.fromkeys(
            [
                "target_logprobs_BT",
                "old_logprobs_BT",
                "behavior_logprobs_BT",
                "advantages_BT",
                "mask_BT",
                "clip_low",
                "clip_high",
                "discrepancy_low",
                "discrepancy_high",
            ],
            inspect.Parameter.empty,
        ),
        "granularity": "token",
        "discrepancy_weight": "none",
        "weight_cap": 2.0,
        "segment_ids_BT": None,
        "denominator": None,
    }
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
