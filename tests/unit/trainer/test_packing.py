"""Plans of rows are partitions, within bounds, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljob_runtime.trainer.packing import micro_batches, mini_batches, pad_rows, rank_shares

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def test_rows_of_like_length_share_a_micro_batch() -> None:
    assert micro_batches([3, 50, 4, 48, 5], 100) == [[1, 3], [4, 2, 0]]


@given(LENGTHS, st.integers(1, 5))
def test_shares_hold_every_row_once_and_differ_by_at_most_one_row_in_tokens(lengths: list[int], ranks: int) -> None:
    shares = rank_shares(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.lists(st.integers(0, 8), max_size=30), st.integers(1, 6))
def test_mini_batches_hold_every_row_once_and_split_no_group(groups: list[int], number: int) -> None:
    batches = mini_batches(groups, number)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    assert len(batches) == min(number, len(set(groups))) and all(batches)
    holders = [{groups[index] for index in batch} for batch in batches]
    assert sum(map(len, holders)) == len(set(groups))


def test_the_oldest_groups_are_spread_over_mini_batches() -> None:
    assert mini_batches([7, 7, 3, 3, 9, 9, 1, 1], 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("rows", "expected"), [([], [[-1, -1]]), ([[1, 2, 3], [4]], [[1, 2, 3], [4, -1, -1]])])
def test_rows_are_padded_on_the_right(rows: list[list[int]], expected: list[list[int]]) -> None:
    padded = pad_rows([np.array(row, np.int32) for row in rows], -1, np.int64)
    assert padded.dtype == np.int64 and padded.tolist() == expected
