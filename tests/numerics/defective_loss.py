"""The loss written naively with torch's own minimum and clamp, whole or with one defect for the tests to notice.

Without a defect it is right wherever nothing overflows and nothing but finite numbers stands outside the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Loss = Callable[..., tuple[Tensor, Any]]
Defect = Literal[
    "none",
    "old policy is the target",
    "clip on the importance ratio",
    "clip bounds swapped",
    "clip at ratio granularity",
    "zero advantage counts as negative",
    "clip only one sign",
    "mask bounds inverted",
    "arithmetic mean",
    "mean over all tokens",
    "segments shared between rows",
    "gradient through the old policy",
    "gradient through the weight",
    "denominator after masking",
    "mean over the batch's rows",
    "weight not truncated",
    "clip share of kept tokens only",
    "narrow arithmetic",
]


def defective(defect: Defect = "none") -> Loss:
    def loss(
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
        granularity: str = "token",
        discrepancy_weight: str = "none",
        weight_cap: float = 2.0,
        segment_ids_BT: Tensor | None = None,
        denominator: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        target, old, behavior, A = target_logprobs_BT, old_logprobs_BT, behavior_logprobs_BT, advantages_BT.detach()
        if defect == "narrow arithmetic":
            target, old, behavior = target.bfloat16(), old.bfloat16(), behavior.bfloat16()
        if defect == "old policy is the target":
            old = target
        if defect != "gradient through the old policy":
            old = old.detach()
        m = mask_BT.to(A.dtype)
        log_d, log_s = old - behavior.detach(), target - old
        if defect == "clip on the importance ratio":
            log_s = target - behavior.detach()
        if defect == "gradient through the weight":
            log_d = log_d + target - target.detach()

        if granularity == "token":
            log_rho = log_d
        else:
            log_rho = torch.zeros_like(log_d)
            ids = segment_ids_BT if segment_ids_BT is not None and granularity == "segment" else torch.zeros_like(m)
            for b, t in mask_BT.nonzero().tolist():
                rows = range(m.shape[0]) if defect == "segments shared between rows" else [b]
                everywhere = defect == "mean over all tokens"
                members = [
                    log_d[i, j]
                    for i in rows
                    for j in range(m.shape[1])
                    if ids[i, j] == ids[b, t] and (everywhere or mask_BT[i, j])
                ]
                group = torch.stack(members)
                log_rho[b, t] = group.exp().mean().log() if defect == "arithmetic mean" else group.mean()

        rho, ratio = log_rho.exp(), log_s.exp()
        if defect == "clip at ratio granularity" and granularity == "sequence":
            ratio = ((log_s * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)).exp().expand_as(log_s)
        low, high = (clip_high, clip_low) if defect == "clip bounds swapped" else (clip_low, clip_high)
        positive = A > 0 if defect == "zero advantage counts as negative" else A >= 0
        keep = (rho >= discrepancy_low) & (rho <= discrepancy_high)
        if defect == "mask bounds inverted":
            keep = (1 / rho >= discrepancy_low) & (1 / rho <= discrepancy_high)
        keep = keep & mask_BT
        surrogate = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
        if defect == "clip only one sign":
            surrogate = torch.where(positive, surrogate, ratio * A)
        weight = torch.ones_like(rho)
        if discrepancy_weight == "truncated" and defect != "weight not truncated":
            weight = rho.clamp(max=weight_cap)
        elif discrepancy_weight != "none":
            weight = rho
        clipped = mask_BT & torch.where(positive, ratio > 1 + high, ratio < 1 - low)
        divisor = mask_BT.sum() if denominator is None else torch.as_tensor(denominator)
        if defect == "denominator after masking":
            divisor = keep.sum()
        total = (weight * surrogate * keep).sum()
        if defect == "mean over the batch's rows":
            total, divisor = ((weight * surrogate * keep).sum(1) / m.sum(1)).sum(), torch.tensor(m.shape[0])
        shown = clipped & keep if defect == "clip share of kept tokens only" else clipped
        return -total / divisor, {
            "active_fraction": (keep & ~clipped).sum() / m.sum(),
            "discrepancy_keep_fraction": keep.sum() / m.sum(),
            "clip_fraction": shown.sum() / m.sum(),
        }

    return loss
