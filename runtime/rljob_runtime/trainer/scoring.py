"""Log-probabilities without gradient: the same forward, kernels and row layout rules as training.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rljob_runtime.trainer.distributed import largest
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.packing import micro_batches, pad_rows


def score(
    policy: Policy, rows: Sequence[NDArray[np.int32]], *, temperature: float, token_budget: int
) -> list[NDArray[np.float32]]:
    """Log-probability of each token of this rank's rows; 0 for each row's first. Collective.

    Ranks may hold different numbers of rows, or none: they agree on a number of forwards and fill up with empty ones.
    """
    scored: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(rows)
    with torch.no_grad():
        for batch in lockstep_micro_batches([row.shape[0] for row in rows], token_budget, policy.device):
            tokens_BT = token_tensor([rows[index] for index in batch], policy.device)
            logprobs_BT = policy(tokens_BT, temperature=temperature, with_entropy=False).logprobs_BT.cpu().numpy()
            for number, index in enumerate(batch):
                scored[index] = logprobs_BT[number, : rows[index].shape[0]].copy()
    return scored


def lockstep_micro_batches(lengths: Sequence[int], token_budget: int, device: torch.device) -> list[list[int]]:
    """`micro_batches` of this rank's rows, with empty ones at the end so that each rank has as many. Collective.

    A forward is a collective: a rank that ran fewer of them would leave the others waiting for ever.
    """
    batches = micro_batches(lengths, token_budget)
    return batches + [[] for _ in range(largest(len(batches), device) - len(batches))]


def token_tensor(rows: Sequence[NDArray[np.int32]], device: torch.device) -> Tensor:
    """Token ids [B, T] int64, padded on the right with 0; [1, 2] for no rows."""
    return torch.from_numpy(pad_rows(rows, 0, np.int64)).to(device)
