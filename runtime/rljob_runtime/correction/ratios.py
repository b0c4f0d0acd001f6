"""Log ratios between behavior, old and target policy, and their geometric means over segments and sequences.

Everything stays in log space: a ratio itself can overflow, its logarithm cannot, and thresholds compare as well there.
Shapes: B trajectories (one a row), T tokens, N tokens inside the mask. Symbols as in docs/algorithms.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["token", "segment", "sequence"]


def log_discrepancy_ratio(*, old_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log r_d = log pi_old - log mu [B, T], detached, 0 outside the bool mask whatever stands there.

    Trainer's forward against inference engine, both at the version that sampled the token (Eq. 1 of arXiv 2605.12070).
    """
    return torch.where(mask_BT, old_logprobs_BT.detach() - behavior_logprobs_BT.detach(), 0.0)


def log_staleness_ratio(*, target_logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log r_s = log pi_theta - log pi_old [B, T], 0 outside the bool mask; gradient flows to the target alone.

    The policy's own movement since the version that sampled the token (Eq. 1 of arXiv 2605.12070).
    """
    return torch.where(mask_BT, target_logprobs_BT - old_logprobs_BT.detach(), 0.0)


def log_importance_ratio(*, target_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log r = log pi_theta - log mu = log r_d + log r_s [B, T], 0 outside the bool mask.

    The same for every choice of old policy: nothing computed from it can tell whether the old policy was the right one.
    """
    return torch.where(mask_BT, target_logprobs_BT - behavior_logprobs_BT.detach(), 0.0)


def geometric_mean_log_ratio(
    log_ratio_BT: Tensor,
    mask_BT: Tensor,
    *,
    granularity: Granularity,
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """Log ratio at a granularity [B, T]: each mask token carries the value of its token, segment or sequence.

    The log of a geometric mean is the mean of the logs, taken over the mask tokens of the group only. A group with a
    non-finite member has a non-finite mean. Outside the mask the result is 0.

    Args:
        log_ratio_BT: log ratios; values outside the mask are ignored.
        mask_BT: bool.
        granularity: "token" returns the values themselves, "sequence" averages a row, "segment" the tokens of a row
            with equal ids.
        segment_ids_BT: integers, any values; equal ids in different rows are different segments.

    Raises:
        ValueError: granularity "segment" without segment ids.
    """
    if granularity == "token":
        return torch.where(mask_BT, log_ratio_BT, 0.0)
    rows, _ = mask_BT.shape
    row_N = torch.arange(rows, device=mask_BT.device).unsqueeze(1).expand_as(mask_BT)[mask_BT]
    if granularity == "segment":
        if segment_ids_BT is None:
            raise ValueError(
                'granularity "segment" needs segment_ids_BT, and got None: pass segment_ids(turn_BT, weight_version_BT)'
            )
        distinct, id_N = torch.unique(segment_ids_BT[mask_BT], return_inverse=True)
        # Ids are ranked first so that the key cannot overflow, whatever integers the caller numbers segments with.
        groups, group_N = torch.unique(row_N * distinct.numel() + id_N, return_inverse=True)
        num_groups = groups.numel()
    else:
        group_N, num_groups = row_N, rows
    # Thresholds at this granularity are 1e-3 wide: float64 sums keep rounding over long rows far below them.
    value_N = log_ratio_BT[mask_BT].double()
    total_G = value_N.new_zeros(num_groups).index_add(0, group_N, value_N)
    mean_G = total_G / torch.bincount(group_N, minlength=num_groups).clamp(min=1)
    mean_BT = torch.zeros_like(log_ratio_BT)
    mean_BT[mask_BT] = mean_G[group_N].to(log_ratio_BT.dtype)
    return mean_BT


def segment_ids(turn_BT: Tensor, weight_version_BT: Tensor) -> Tensor:
    """Segment number of each model token [B, T] int64, from 0 in each row; -1 for prompt, observation and padding.

    The same segments as `rljob_api.trajectory.segments`: an observation token, a new turn or a version change ends one.

    Example: turn [-1 0 0 0 -1 1], version [-1 4 4 5 -1 5] -> [-1 0 0 1 -1 2].

    Args:
        turn_BT: turn of a model token, -1 elsewhere (padding included).
        weight_version_BT: version that sampled the token.

    Raises:
        ValueError: the shapes differ or are not [B, T].
    """
    if turn_BT.ndim != 2 or turn_BT.shape != weight_version_BT.shape:
        raise ValueError(
            f"turn_BT has shape {list(turn_BT.shape)} and weight_version_BT {list(weight_version_BT.shape)}: "
            "both must be the same [B, T]"
        )
    is_model_BT = turn_BT >= 0
    starts_BT = is_model_BT.clone()
    starts_BT[:, 1:] &= (turn_BT[:, 1:] != turn_BT[:, :-1]) | (weight_version_BT[:, 1:] != weight_version_BT[:, :-1])
    return torch.where(is_model_BT, starts_BT.cumsum(dim=1) - 1, -1)
