"""What a step's tokens say about the average that scored some of them: the same on every rank.

Shapes: B rows of the whole batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rljob_runtime.correction.ewma_monitor import StepStatistics
from rljob_runtime.correction.objective import discrepancy_mask
from rljob_runtime.correction.ratios import geometric_mean_log_ratio, log_discrepancy_ratio, segment_ids
from rljob_runtime.correction.sources import EXACT_SOURCES, Source
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.packing import pad_rows
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings


def step_statistics(
    batch: TrainBatch, update: UpdateReport, settings: UpdateSettings, audited: Mapping[int, NDArray[np.float32]]
) -> StepStatistics:
    """Staleness of the tokens in the loss, and which of them the discrepancy mask keeps, by source.

    Whether a token is kept follows from its old and behavior log-probability, so it is the same in every update of the
    step. An audited token counts twice: as the mask saw it, and among the exact ones as the mask would have seen it.

    Args:
        batch: the step's.
        update: what the loss used.
        settings: the loss's.
        audited: row -> exact log-probabilities [T], NaN where none was made.
    """
    source_BT = _padded([record.source for record in update.records], Source.NONE, np.int64)
    old_BT = _padded([record.old_logprobs for record in update.records], 0.0, np.float32)
    none = np.zeros(0, np.float32)
    audited_BT = _padded([audited.get(index, none) for index in range(len(batch.rows))], np.nan, np.float32)
    audited_BT = torch.nn.functional.pad(audited_BT, (0, old_BT.shape[1] - audited_BT.shape[1]), value=np.nan)
    behavior_BT = _padded([row.behavior_logprobs for row in batch.rows], 0.0, np.float32)
    turn_BT = _padded([row.turn for row in batch.rows], -1, np.int64)
    weight_version_BT = _padded([row.weight_version for row in batch.rows], -1, np.int64)
    mask_BT = (source_BT != Source.NONE) & (source_BT != Source.MISSING)
    segment_ids_BT = segment_ids(turn_BT, weight_version_BT)
    ewma_BT = source_BT == Source.EWMA
    is_audited_BT = mask_BT & audited_BT.isfinite()
    exact_BT = is_audited_BT | torch.isin(source_BT, torch.tensor(EXACT_SOURCES))

    def kept_share(of_BT: Tensor, old_BT: Tensor) -> float:
        log_rho_BT = geometric_mean_log_ratio(
            log_discrepancy_ratio(old_logprobs_BT=old_BT, behavior_logprobs_BT=behavior_BT, mask_BT=mask_BT),
            mask_BT,
            granularity=settings.granularity,
            segment_ids_BT=segment_ids_BT,
        )
        kept_BT = discrepancy_mask(log_rho_BT, mask_BT, low=settings.discrepancy_low, high=settings.discrepancy_high)
        return int((kept_BT & of_BT).sum()) / max(1, int(of_BT.sum()))

    return StepStatistics(
        tokens=int(mask_BT.sum()),
        mean_staleness=update.staleness.mean,
        ewma_tokens=int(ewma_BT.sum()),
        ewma_keep_fraction=kept_share(ewma_BT, old_BT),
        exact_tokens=int(exact_BT.sum()),
        exact_keep_fraction=kept_share(exact_BT, torch.where(is_audited_BT, audited_BT, old_BT)),
    )


def _padded(arrays: Sequence[NDArray[np.generic]], fill: float, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(pad_rows(arrays, fill, dtype))
