"""Which rows go together: mini-batches of whole groups, shares of ranks, micro-batches under a token budget.

All of it is a pure function of lengths, so that every rank, each holding the whole batch, comes to the same plan
without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of rows that share a forward: of like length, at most `token_budget` padded tokens.

    A row longer than the budget is alone. Longest first, so that a batch that does not fit in memory fails at once.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def rank_shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of the rows of each rank, ascending: the next longest row always goes to the rank with fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]


def mini_batches(groups: Sequence[int], num_mini_batches: int) -> list[list[int]]:
    """Indices of the rows of each mini-batch; `groups[i]` names the group of row i, and a group is never split.

    Groups are dealt out in turn, so that each mini-batch has its part of the oldest, which come first in a batch. With
    fewer groups than mini-batches there are only as many mini-batches as groups.
    """
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    batches: list[list[int]] = [[] for _ in range(min(num_mini_batches, len(order)))]
    for index, group in enumerate(groups):
        batches[order[group] % num_mini_batches].append(index)
    return batches


def pad_rows(rows: Sequence[NDArray[np.generic]], fill: float, dtype: type[np.generic]) -> NDArray[np.generic]:
    """[B, T] with each row at the left and `fill` to its right; [1, 2] of `fill` for no rows.

    The empty batch is what a rank without rows runs, to meet the other ranks in the collectives of a forward.
    """
    length = max((row.shape[0] for row in rows), default=2)
    padded = np.full((max(1, len(rows)), length), fill, dtype=dtype)
    for number, row in enumerate(rows):
        padded[number, : row.shape[0]] = row
    return padded
