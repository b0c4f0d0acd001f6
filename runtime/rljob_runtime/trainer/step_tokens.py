"""A step's batch and what its update recorded, as the flat arrays that diagnostics are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_runtime.correction.step_diagnostics import StepTokens, Thresholds
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.update import TokenRecord, UpdateSettings


def step_tokens(batch: TrainBatch, records: Sequence[TokenRecord]) -> StepTokens:
    """Every token of the batch [N], rows joined in their order.

    Args:
        batch: all rows.
        records: of the update, one a row.
    """
    rows = batch.rows

    def joined(arrays: Sequence[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
        return np.concatenate(arrays) if arrays else np.zeros(0, kind)

    return StepTokens(
        trajectory=np.repeat(np.arange(len(rows)), [row.num_tokens for row in rows]),
        turn=joined([row.turn for row in rows], np.int32),
        weight_version=joined([row.weight_version for row in rows], np.int32),
        staleness=joined([row.staleness for row in rows], np.int32),
        source=joined([record.source for record in records], np.int8),
        behavior_logprobs=joined([row.behavior_logprobs for row in rows], np.float32),
        old_logprobs=joined([record.old_logprobs for record in records], np.float32),
        target_logprobs=joined([record.target_logprobs for record in records], np.float32),
        advantages=joined([row.advantages for row in rows], np.float32),
    )


def thresholds_of(settings: UpdateSettings) -> Thresholds:
    """The thresholds of the loss."""
    return Thresholds(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        discrepancy_low=settings.discrepancy_low,
        discrepancy_high=settings.discrepancy_high,
        granularity=settings.granularity,
    )
