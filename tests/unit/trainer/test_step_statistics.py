"""Which tokens the discrepancy mask keeps, by the source of their old log-probability, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rljob_api.correction import Fallback, OldLogprobs
from rljob_api.messages import Distribution
from rljob_runtime.correction.ewma_monitor import StepStatistics
from rljob_runtime.correction.sources import Source
from rljob_runtime.trainer.batch import TrainBatch, TrainRow
from rljob_runtime.trainer.step_statistics import step_statistics
from rljob_runtime.trainer.update import TokenRecord, UpdateReport, UpdateSettings

N, R, E, S, M = Source.NONE, Source.RESIDENT, Source.EWMA, Source.SNAPSHOT, Source.MISSING


def settings(**changes: Any) -> UpdateSettings:
    fields: dict[str, Any] = {
        "route": OldLogprobs.EWMA,
        "fallback": Fallback.DROP,
        "temperature": 1.0,
        "token_budget": 64,
        "mini_batches": 1,
        "epochs": 1,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "discrepancy_low": 0.5,
        "discrepancy_high": 2.0,
        "granularity": "token",
        "discrepancy_weight": "none",
        "weight_cap": 2.0,
        "entropy_coefficient": 0.0,
        "gradient_clip": 1.0,
    }
    return UpdateSettings(**fields | changes)


def row(sources: list[Source], versions: list[int], log_discrepancy: list[float]) -> tuple[TrainRow, TokenRecord]:
    """A prompt token and then model tokens; those without a source are over the bound."""
    number = len(sources)
    turn = np.array([-1] + [0] * (number - 1), np.int32)
    behavior = np.where(turn >= 0, -3.0, 0.0).astype(np.float32)
    made = TrainRow(
        task=0,
        sample=0,
        tokens=np.zeros(number, np.int32),
        turn=turn,
        weight_version=np.array(versions, np.int32),
        behavior_logprobs=behavior,
        advantages=np.zeros(number, np.float32),
        staleness=np.zeros(number, np.int32),
        trainable=np.array(sources) != N,
        known_logprobs=np.zeros(number, np.float32),
        known_source=np.zeros(number, np.int8),
    )
    old = (behavior + np.array(log_discrepancy, np.float32)).astype(np.float32)
    return made, TokenRecord(old, old, np.array(sources, np.int8))


IN, OUT = 0.1, 2.0
"""log r_d inside and outside [1/2, 2]; the mean of an OUT and two INs is just outside, of an OUT and three INs inside."""
ROWS = (
    row([N, E, E, E, R, R], [-1, 4, 4, 4, 5, 5], [0.0, IN, OUT, IN, IN, IN]),
    row([N, R, S, M, N], [-1, 5, 4, 3, 1], [0.0, OUT, IN, OUT, OUT]),
)


def statistics(audited: Mapping[int, NDArray[np.float32]] | None = None, **changes: Any) -> StepStatistics:
    batch = TrainBatch(5, tuple(made for made, _ in ROWS), groups_without_variance=0)
    update = UpdateReport(
        num_updates=1,
        loss=0.0,
        entropy=0.0,
        gradient_norm=0.0,
        keep_fraction=0.0,
        clip_fraction=0.0,
        active_fraction=0.0,
        tokens_trained=7,
        tokens_over_bound=1,
        tokens_missing=1,
        exact_fraction=0.5,
        sources={},
        discrepancy_by_staleness={},
        staleness=Distribution(mean=0.7),
        records=tuple(record for _, record in ROWS),
    )
    return step_statistics(batch, update, settings(**changes), audited or {})


@pytest.mark.parametrize(
    ("changes", "ewma_kept", "exact_kept"),
    [
        ({}, 2, 3),
        ({"granularity": "segment"}, 0, 3),  # the average's three tokens are one segment: mean 2.2 / 3 > log 2
        ({"granularity": "sequence"}, 3, 2),  # 2.4 / 5 < log 2, and 2.1 / 2 > log 2
        ({"discrepancy_low": 0.0, "discrepancy_high": math.inf}, 3, 4),
    ],
)
def test_kept_shares_are_those_of_the_mask_by_source(changes: dict[str, Any], ewma_kept: int, exact_kept: int) -> None:
    found = statistics(**changes)
    assert (found.tokens, found.ewma_tokens, found.exact_tokens, found.mean_staleness) == (7, 3, 4, 0.7)
    assert found.ewma_keep_fraction == pytest.approx(ewma_kept / 3)
    assert found.exact_keep_fraction == pytest.approx(exact_kept / 4)


def test_audited_tokens_are_exact_ones_as_the_mask_would_have_seen_them() -> None:
    """Two of the average's three tokens, one kept and one not, are both inside under their exact value."""
    audited = np.full(6, np.nan, np.float32)
    audited[[1, 2]] = -3.0 + IN
    found = statistics({0: audited})
    assert (found.ewma_tokens, found.ewma_keep_fraction) == (3, pytest.approx(2 / 3))
    assert (found.exact_tokens, found.exact_keep_fraction) == (6, pytest.approx(5 / 6))
    over_the_bound = np.full(5, -3.0 + IN, np.float32)  # the prompt, missing and over the bound are not in the loss
    assert statistics({1: over_the_bound}).exact_tokens == 4
