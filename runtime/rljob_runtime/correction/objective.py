"""The decoupled policy loss: a mask on the discrepancy ratio, PPO's clip on the staleness ratio.

Shapes: B trajectories (one a row), T tokens. Symbols as in docs/algorithms.md.
"""

from __future__ import annotations

import math
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from rljob_runtime.correction.ratios import (
    Granularity,
    geometric_mean_log_ratio,
    log_discrepancy_ratio,
    log_staleness_ratio,
)

DiscrepancyWeight = Literal["none", "truncated", "raw"]


class LossStats(TypedDict):
    """Detached scalar tensors; fractions are shares of the mask tokens, 0 when there are none."""

    active_fraction: Tensor
    """Kept by the discrepancy mask and not clipped: the tokens that have a gradient."""
    discrepancy_keep_fraction: Tensor
    """Kept by the discrepancy mask."""
    clip_fraction: Tensor
    """Clipped by PPO's clip, whatever the discrepancy mask says."""
    mask_tokens: Tensor
    """Number of mask tokens, to weigh the fractions with when several calls make one mini-batch."""


def decoupled_policy_loss(
    *,
    target_logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    discrepancy_low: float,
    discrepancy_high: float,
    granularity: Granularity = "token",
    discrepancy_weight: DiscrepancyWeight = "none",
    weight_cap: float = 2.0,
    segment_ids_BT: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """Minus the sum over mask tokens of `mask(rho) * w(rho) * min(r_s A, clip(r_s) A)`, divided by the denominator.

    r_s = pi_theta/pi_old always works per token; rho is r_d = pi_old/mu of the token, or its geometric mean over the
    mask tokens of the segment or sequence. Eq. 4 of arXiv 2605.12070, with the optional weight of its Table 5. Only the
    target receives gradient. What stands outside the mask, advantages included, is never looked at, and a token that
    rho or the clip shuts out has gradient exactly 0 even where its ratio overflows. A log rho that is not finite shuts
    its group out.

    Args:
        target_logprobs_BT: log pi_theta of the sampled tokens, float32 or float64, with gradient.
        old_logprobs_BT: log pi of the trainer's forward at the version that sampled the token.
        behavior_logprobs_BT: log mu that the engine recorded.
        advantages_BT: floating point; 0 counts as positive.
        mask_BT: bool (or 0/1): the tokens that enter the loss. A row is one trajectory.
        clip_low: r_s is clipped to [1 - clip_low, 1 + clip_high]; both >= 0.
        clip_high: see clip_low.
        discrepancy_low: tokens with discrepancy_low <= rho <= discrepancy_high are kept; 0 <= low <= high.
        discrepancy_high: see discrepancy_low.
        granularity: what rho is taken over: "token", "segment" or "sequence".
        discrepancy_weight: w(rho) = 1 ("none"), min(rho, weight_cap) ("truncated") or rho ("raw").
        weight_cap: > 0.
        segment_ids_BT: integers, needed for "segment": equal ids within a row are one segment.
        denominator: what the sum is divided by; unset, the number of mask tokens before any masking by ratios. With
            several micro-batches or ranks, the number of model tokens in the whole mini-batch.

    Returns:
        The scalar loss in the log-probabilities' type (0, with gradient 0, for an empty mask), and its statistics.

    Raises:
        ValueError: shapes differ, a type is too narrow, a setting makes no sense, or segment ids are missing.
    """
    _check_tensors(target_logprobs_BT, old_logprobs_BT, behavior_logprobs_BT, advantages_BT, mask_BT)
    _check_settings(clip_low, clip_high, discrepancy_low, discrepancy_high, granularity, discrepancy_weight, weight_cap)
    if granularity == "segment":
        _check_segment_ids(segment_ids_BT, mask_BT)

    if denominator is not None:
        _check_denominator(denominator)

    mask_BT = mask_BT != 0
    log_staleness_BT = log_staleness_ratio(
        target_logprobs_BT=target_logprobs_BT, old_logprobs_BT=old_logprobs_BT, mask_BT=mask_BT
    )
    log_rho_BT = geometric_mean_log_ratio(
        log_discrepancy_ratio(
            old_logprobs_BT=old_logprobs_BT, behavior_logprobs_BT=behavior_logprobs_BT, mask_BT=mask_BT
        ),
        mask_BT,
        granularity=granularity,
        segment_ids_BT=segment_ids_BT,
    )
    advantages_BT = torch.where(mask_BT, advantages_BT.detach().to(log_staleness_BT.dtype), 0.0)

    above_BT = log_staleness_BT.detach() > _log(1 + clip_high)
    below_BT = log_staleness_BT.detach() < _log(1 - clip_low)
    clipped_BT = mask_BT & torch.where(advantages_BT >= 0, above_BT, below_BT)
    kept_BT = discrepancy_mask(log_rho_BT, mask_BT, low=discrepancy_low, high=discrepancy_high)
    active_BT = kept_BT & ~clipped_BT

    # The logarithm is selected before exp, not the ratio after it: an overflowing exp that is selected away or loses
    # the minimum still sends 0 * inf = NaN back to the target.
    ratio_BT = torch.where(active_BT, log_staleness_BT, 0.0).exp()
    clip_bound_BT = log_staleness_BT.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    surrogate_BT = torch.where(active_BT, ratio_BT, clip_bound_BT) * advantages_BT
    weight_BT = _weight(torch.where(kept_BT, log_rho_BT, 0.0), discrepancy_weight, weight_cap)
    total = torch.where(kept_BT, weight_BT * surrogate_BT, 0.0).sum()

    mask_tokens = mask_BT.sum().to(total.dtype)
    divisor = mask_tokens if denominator is None else torch.as_tensor(denominator).detach().to(total)
    # An empty mask is no error: a rank or micro-batch may hold no token, or the whole mini-batch with denominator 0.
    divisor = torch.where(mask_tokens > 0, divisor, 1.0)
    loss = -total / divisor

    def share(selected_BT: Tensor) -> Tensor:
        return selected_BT.sum() / mask_tokens.clamp(min=1)

    return loss, LossStats(
        active_fraction=share(active_BT),
        discrepancy_keep_fraction=share(kept_BT),
        clip_fraction=share(clipped_BT),
        mask_tokens=mask_tokens,
    )


def discrepancy_mask(log_rho_BT: Tensor, mask_BT: Tensor, *, low: float, high: float) -> Tensor:
    """1[low <= rho <= high] on the mask tokens [B, T], bool; a rho that is not finite is outside any interval."""
    return mask_BT & (log_rho_BT >= _log(low)) & (log_rho_BT <= _log(high)) & log_rho_BT.isfinite()


def _weight(log_rho_BT: Tensor, kind: DiscrepancyWeight, cap: float) -> Tensor:
    if kind == "none":
        return torch.ones_like(log_rho_BT)
    if kind == "truncated":
        return log_rho_BT.clamp(max=_log(cap)).exp()
    return log_rho_BT.exp()


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _check_tensors(
    target_BT: Tensor, old_BT: Tensor, behavior_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
) -> None:
    tensors = {
        "target_logprobs_BT": target_BT,
        "old_logprobs_BT": old_BT,
        "behavior_logprobs_BT": behavior_BT,
        "advantages_BT": advantages_BT,
        "mask_BT": mask_BT,
    }
    if target_BT.ndim != 2 or any(tensor.shape != target_BT.shape for tensor in tensors.values()):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must have the same shape [B, T], one trajectory a row; got {shapes}")
    for name, tensor in list(tensors.items())[:3]:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}: a narrower type than float32 rounds a log-probability by up to 2^-8 of its "
                "size, more than the thresholds on the ratios are wide. Compute and store log-probabilities as "
                "float32; casting them up afterwards does not bring the digits back"
            )
    if not advantages_BT.is_floating_point():
        raise ValueError(f"advantages_BT is {advantages_BT.dtype}: it must be floating point")


def _check_settings(
    clip_low: float,
    clip_high: float,
    discrepancy_low: float,
    discrepancy_high: float,
    granularity: str,
    discrepancy_weight: str,
    weight_cap: float,
) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"clip_low {clip_low} and clip_high {clip_high} must be >= 0: they are distances from 1, "
            "the ratio is kept in [1 - clip_low, 1 + clip_high]"
        )
    if not 0 <= discrepancy_low <= discrepancy_high:
        raise ValueError(
            f"discrepancy_low {discrepancy_low} and discrepancy_high {discrepancy_high} must be 0 <= low <= high: "
            "they bound the ratio itself, for example 0.5 and 2.0"
        )
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity {granularity!r} is not one of {', '.join(get_args(Granularity))}")
    if discrepancy_weight not in get_args(DiscrepancyWeight):
        raise ValueError(
            f"discrepancy_weight {discrepancy_weight!r} is not one of {', '.join(get_args(DiscrepancyWeight))}"
        )
    if not weight_cap > 0:
        raise ValueError(f"weight_cap {weight_cap} must be > 0")


def _check_segment_ids(segment_ids_BT: Tensor | None, mask_BT: Tensor) -> None:
    if segment_ids_BT is None:
        raise ValueError(
            'granularity "segment" needs segment_ids_BT, and got None: '
            "pass ratios.segment_ids(turn_BT, weight_version_BT)"
        )
    if segment_ids_BT.shape != mask_BT.shape:
        raise ValueError(
            f"segment_ids_BT has shape {list(segment_ids_BT.shape)}, must be {list(mask_BT.shape)} as mask_BT"
        )
    if segment_ids_BT.is_floating_point() or segment_ids_BT.is_complex() or segment_ids_BT.dtype == torch.bool:
        raise ValueError(f"segment_ids_BT is {segment_ids_BT.dtype}: it must hold integers")


def _check_denominator(denominator: float | Tensor) -> None:
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(f"denominator has shape {list(denominator.shape)}: it must be a number or a scalar tensor")
    elif not 0 <= denominator < math.inf:
        raise ValueError(f"denominator {denominator} must be a number of tokens")
