"""Scoring ahead of the step, on all ranks: rows that rank 0's pool wants, while the policy holds their version.

The version goes out with the rows, and the policy holds it for the whole of the forwards: it is the resident one, before
any update of a step, or one that the snapshot store puts in for the while. So a value cannot be of another version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rljob_api.messages import PoolReport
from rljob_runtime.correction.score_pool import Key
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Source
from rljob_runtime.trainer.ahead import TakenAhead
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.distributed import World, broadcast_bytes
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.packing import rank_shares
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.update import UpdateSettings


@dataclass(frozen=True, slots=True)
class ScoreRound:
    """Rows of tokens to score under one version."""

    version: int
    rows: tuple[NDArray[np.int32], ...]

    def to_bytes(self) -> bytes:
        """A safetensors file: the rows one after another, and their lengths."""
        return save_tensors(
            {
                "version": np.array([self.version], np.int64),
                "lengths": np.array([row.shape[0] for row in self.rows], np.int64),
                "tokens": np.concatenate([*self.rows, np.zeros(0, np.int32)]).astype(np.int32),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ScoreRound:
        """What `to_bytes` wrote."""
        arrays = load_tensors(data)
        ends = np.cumsum(arrays["lengths"])
        rows = np.split(arrays["tokens"], ends[:-1]) if len(ends) else []
        return cls(int(arrays["version"][0]), tuple(rows))


def broadcast_round(chosen: ScoreRound | None, device: torch.device) -> ScoreRound:
    """Rank 0's round on every rank; the others pass None. Collective."""
    return ScoreRound.from_bytes(broadcast_bytes(None if chosen is None else chosen.to_bytes(), device))


def score_round(
    policy: Policy,
    chosen: ScoreRound,
    snapshots: SnapshotStore,
    settings: UpdateSettings,
    world: World,
    *,
    resident: int,
) -> list[NDArray[np.float32]]:
    """Log-probabilities of every row, on every rank; each rank scores its share. Collective.

    Args:
        policy: holds `resident` at the call.
        chosen: the same on every rank.
        snapshots: where the round's version comes from if it is another one.
        settings: temperature and token budget are those of training.
        world: this process's place.
        resident: the version that the policy holds.

    Raises:
        KeyError: the version is neither resident nor among the snapshots.
    """
    share = rank_shares([row.shape[0] for row in chosen.rows], world.size)[world.rank]
    with nullcontext() if chosen.version == resident else snapshots.held(chosen.version, policy):
        own = score(
            policy,
            [chosen.rows[index] for index in share],
            temperature=settings.temperature,
            token_budget=settings.token_budget,
        )
    return _gathered(chosen.rows, dict(zip(share, own, strict=True)), policy.device)


def _gathered(
    rows: Sequence[NDArray[np.int32]], own: Mapping[int, NDArray[np.float32]], device: torch.device
) -> list[NDArray[np.float32]]:
    """All rows' values on every rank: each row has one owner, so a sum of otherwise zero arrays is exact."""
    values = [own.get(index, np.zeros(row.shape)) for index, row in enumerate(rows)]
    # One type on every rank, whatever the policy's and whether or not it has a row: else ranks wait for each other for ever.
    shared = torch.from_numpy(np.concatenate([*values, np.zeros(0)]).astype(np.float32)).to(device)
    dist.all_reduce(shared)
    ends = np.cumsum([row.shape[0] for row in rows], dtype=np.int64)
    return np.split(shared.cpu().numpy(), ends[:-1]) if rows else []


def pool_report(
    batch: TrainBatch, taken: Mapping[Key, TakenAhead], *, discarded: Mapping[str, int], num_bytes: int
) -> PoolReport:
    """What the pool did for a batch; `discarded` and `num_bytes` are the pool's own."""
    stale = pooled = poolable = 0
    for row in batch.rows:
        is_stale = row.trainable & (row.staleness > 0)
        is_pooled = is_stale & (row.known_source == Source.POOL)
        stale += int(is_stale.sum())
        pooled += int(is_pooled.sum())
        poolable += int((is_pooled | (is_stale & taken[row.task, row.sample].in_time)).sum())
    return PoolReport(
        stale_tokens=stale,
        pooled_tokens=pooled,
        poolable_tokens=poolable,
        discarded=dict(discarded),
        num_bytes=num_bytes,
    )
