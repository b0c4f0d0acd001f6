"""A batch and its update's records become the flat arrays of the diagnostics."""

from __future__ import annotations

import numpy as np
from tests.unit.trainer.test_batch import batch

from rljob_runtime.correction.sources import Source
from rljob_runtime.correction.step_diagnostics import Thresholds, step_diagnostics
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.step_tokens import step_tokens
from rljob_runtime.trainer.update import TokenRecord


def test_every_token_keeps_its_row_and_its_values() -> None:
    made = batch()
    records = [
        TokenRecord(
            target_logprobs=row.behavior_logprobs - np.float32(0.5),
            old_logprobs=row.behavior_logprobs - np.float32(0.25),
            source=np.where(row.trainable, Source.RESIDENT, Source.NONE).astype(np.int8),
        )
        for row in made.rows
    ]
    tokens = step_tokens(made, records)
    start = 0
    for number, row in enumerate(made.rows):
        place = slice(start, start + row.num_tokens)
        start += row.num_tokens
        assert (tokens.trajectory[place] == number).all()
        for name in ("turn", "weight_version", "staleness", "behavior_logprobs", "advantages"):
            assert np.array_equal(getattr(tokens, name)[place], getattr(row, name)), name
        for name in ("target_logprobs", "old_logprobs", "source"):
            assert np.array_equal(getattr(tokens, name)[place], getattr(records[number], name)), name
    assert start == len(tokens.source)

    found = step_diagnostics(tokens, Thresholds(0.2, 0.2, 0.5, 2.0))
    assert found.tokens == sum(int(row.trainable.sum()) for row in made.rows)
    assert found.discrepancy is not None and found.discrepancy.mean == -0.25
    assert found.importance is not None and found.importance.mean == -0.5


def test_a_batch_without_rows_has_no_tokens() -> None:
    tokens = step_tokens(TrainBatch(3, (), 0), [])
    assert len(tokens.source) == 0
    assert step_diagnostics(tokens, Thresholds(0.2, 0.2, 0.5, 2.0)).tokens == 0
