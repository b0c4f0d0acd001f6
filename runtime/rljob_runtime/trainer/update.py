"""One step's optimizer updates: score what must be scored first, then mini-batches times epochs of the decoupled loss.

Every rank holds the whole batch and takes its rows, so denominators and the number of updates need no word between
ranks. The ranks meet in forwards, backwards and a few sums; a rank without rows runs empty micro-batches.

Shapes: B rows of a micro-batch, T tokens, N tokens of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rljob_api.correction import Fallback, Objective, OldLogprobs
from rljob_api.messages import BucketStats, Distribution, SourceStats
from rljob_api.spec import RLJobSpec
from rljob_runtime.correction.diagnostics import (
    discrepancy_by_source,
    discrepancy_by_staleness,
    staleness_distribution,
)
from rljob_runtime.correction.objective import DiscrepancyWeight, decoupled_policy_loss
from rljob_runtime.correction.ratios import Granularity, segment_ids
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import (
    EXACT_SOURCES,
    SOURCE_NAMES,
    UNSTEPPED_SOURCES,
    HeldWeights,
    OldRow,
    Source,
    interpolated,
    resolve,
)
from rljob_runtime.trainer.batch import TrainBatch, TrainRow
from rljob_runtime.trainer.distributed import World
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.optimizer import apply_gradients
from rljob_runtime.trainer.packing import mini_batches, pad_rows, rank_shares
from rljob_runtime.trainer.scoring import lockstep_micro_batches, score, token_tensor

_GRANULARITIES: dict[str, Granularity] = {"Token": "token", "Segment": "segment", "Sequence": "sequence"}
_ROUTES_WITHOUT_UNSTEPPED = (OldLogprobs.ENGINE, OldLogprobs.LINEAR, OldLogprobs.LOG_LINEAR)
_WEIGHTS: dict[str, DiscrepancyWeight] = {"None": "none", "Truncated": "truncated", "Raw": "raw"}


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """What the spec says about one step's updates."""

    route: OldLogprobs
    fallback: Fallback
    temperature: float
    token_budget: int
    mini_batches: int
    epochs: int
    clip_low: float
    clip_high: float
    discrepancy_low: float
    discrepancy_high: float
    granularity: Granularity
    discrepancy_weight: DiscrepancyWeight
    weight_cap: float
    entropy_coefficient: float
    gradient_clip: float

    @classmethod
    def of(cls, spec: RLJobSpec) -> UpdateSettings:
        """The settings of a job."""
        discrepancy = spec.correction.discrepancy
        low, high = discrepancy.bounds()
        weight = _WEIGHTS[discrepancy.weight]
        if spec.correction.objective is Objective.COUPLED:
            low, high, weight = 0.0, math.inf, "none"
        return cls(
            route=spec.correction.old_logprobs,
            fallback=spec.correction.fallback,
            temperature=spec.sampling.temperature,
            token_budget=spec.training.tokens_per_micro_batch,
            mini_batches=spec.training.mini_batches,
            epochs=spec.training.epochs,
            clip_low=spec.correction.clip.low,
            clip_high=spec.correction.clip.high,
            discrepancy_low=low,
            discrepancy_high=high,
            granularity=_GRANULARITIES[discrepancy.granularity],
            discrepancy_weight=weight,
            weight_cap=discrepancy.weight_cap,
            entropy_coefficient=spec.training.entropy_coefficient,
            gradient_clip=spec.training.gradient_clip,
        )


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Values of one row, arrays [T]. Tokens that are not trained have no meaningful old log-probability."""

    target_logprobs: NDArray[np.float32]
    """Of the row's first training forward; later epochs are not recorded. All tokens but the first have one."""
    old_logprobs: NDArray[np.float32]
    source: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one step's updates did: the same on every rank.

    Losses, norms and fractions are means over updates; fractions are shares of the tokens in the loss.
    """

    num_updates: int
    loss: float
    entropy: float
    """Nats, mean over the tokens in the loss."""
    gradient_norm: float
    """Before clipping."""
    keep_fraction: float
    clip_fraction: float
    active_fraction: float
    tokens_trained: int
    """Model tokens in the loss, each counted once whatever the epochs; with the next two, all model tokens."""
    tokens_over_bound: int
    tokens_missing: int
    """Within the bound, and their old log-probability was not to be had."""
    exact_fraction: float
    """Share of the tokens within the bound whose old log-probability is exact; 1 where no token is within it."""
    sources: dict[str, SourceStats]
    discrepancy_by_staleness: dict[str, BucketStats]
    staleness: Distribution
    """Of the trained tokens."""
    records: tuple[TokenRecord, ...]
    """One a row, in the batch's order."""


@dataclass(frozen=True, slots=True)
class _MiniBatch:
    own: tuple[int, ...]
    """This rank's rows."""
    model_tokens: int
    """Of all ranks: the denominator."""


class _Sums(NamedTuple):
    """Sums over forwards of this rank, then of all ranks."""

    loss: float
    entropy: float
    kept: float
    clipped: float
    active: float
    tokens: float
    """Tokens in the loss, once an epoch."""


def resolve_batch(
    policy: Policy,
    batch: TrainBatch,
    store: SnapshotStore,
    settings: UpdateSettings,
    world: World,
    averages: HeldWeights | None = None,
) -> dict[int, OldRow]:
    """Old log-probabilities of this rank's rows, before the step's first update. Collective.

    With a single update the resident ones are left NaN: `train_on` takes them from its own forward, which saves a pass.
    With more they are scored here, in the row layout of the training forwards.
    """
    plan = _plan(batch, settings, world)
    old = resolve(
        batch.rows,
        [index for mini_batch in plan for index in mini_batch.own],
        route=settings.route,
        store=store,
        policy=policy,
        score=partial(score, policy, temperature=settings.temperature, token_budget=settings.token_budget),
        fallback=settings.fallback,
        averages=averages,
    )
    if len(plan) * settings.epochs > 1 and settings.route not in _ROUTES_WITHOUT_UNSTEPPED:
        for mini_batch in plan:
            logprobs = score(
                policy,
                [batch.rows[index].tokens for index in mini_batch.own],
                temperature=settings.temperature,
                token_budget=settings.token_budget,
            )
            for index, of_row in zip(mini_batch.own, logprobs, strict=True):
                unstepped = np.isin(old[index].source, UNSTEPPED_SOURCES)
                old[index].logprobs[unstepped] = of_row[unstepped]
    return old


def train_on(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    old: Mapping[int, OldRow],
    settings: UpdateSettings,
    world: World,
    *,
    rate: float,
    before_first_update: Callable[[], None] | None = None,
) -> UpdateReport:
    """Train one step's batch: at most `mini_batches * epochs` optimizer updates at one learning rate. Collective.

    The loss of a mini-batch is the decoupled policy loss minus the entropy bonus, both divided by its model tokens over
    all ranks and micro-batches, those masked or dropped included. A mini-batch without model tokens makes no update.

    Args:
        policy: the policy; its weights are those of `batch.version` at the call.
        optimizer: of `build_optimizer`.
        batch: the same on every rank.
        old: of `resolve_batch`, for this rank's rows.
        settings: the job's.
        world: this process's place.
        rate: learning rate.
        before_first_update: called once on every rank when the first mini-batch's gradients are there and the policy
            still is the resident version: forwards without gradient are allowed in it.

    Raises:
        TrainingDiverged: a gradient is not finite; earlier updates of the step have been made.
    """
    plan = _plan(batch, settings, world)
    sums = torch.zeros(len(_Sums._fields), dtype=torch.float64, device=policy.device)
    norms: list[float] = []
    records: dict[int, TokenRecord] = {}
    for epoch in range(settings.epochs):
        for mini_batch in plan:
            lengths = [batch.rows[index].num_tokens for index in mini_batch.own]
            for members in lockstep_micro_batches(lengths, settings.token_budget, policy.device):
                indices = [mini_batch.own[member] for member in members]
                target_BT, old_BT = _backward(
                    policy,
                    [batch.rows[index] for index in indices],
                    [old[index] for index in indices],
                    settings,
                    denominator=mini_batch.model_tokens,
                    world_size=world.size,
                    sums=sums,
                )
                if epoch == 0:
                    records |= _records(indices, batch.rows, old, target_BT, old_BT)
            if not norms and before_first_update is not None:
                before_first_update()
            norms.append(apply_gradients(policy, optimizer, rate=rate, clip=settings.gradient_clip))
    if not norms and before_first_update is not None:
        before_first_update()
    dist.all_reduce(sums)
    return _report(batch, norms, _Sums(*sums.tolist()), _gather(batch, records, policy.device))


def _plan(batch: TrainBatch, settings: UpdateSettings, world: World) -> list[_MiniBatch]:
    """Mini-batches of one epoch with at least one model token, and this rank's part of each."""
    plan = []
    for indices in mini_batches([row.task for row in batch.rows], settings.mini_batches):
        model_tokens = sum(batch.rows[index].num_model_tokens for index in indices)
        share = rank_shares([batch.rows[index].num_tokens for index in indices], world.size)[world.rank]
        if model_tokens:
            plan.append(_MiniBatch(own=tuple(indices[position] for position in share), model_tokens=model_tokens))
    return plan


def _backward(
    policy: Policy,
    rows: Sequence[TrainRow],
    old: Sequence[OldRow],
    settings: UpdateSettings,
    *,
    denominator: int,
    world_size: int,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one micro-batch; adds to `sums`, returns detached target and old log-probabilities.

    Both are [B, T]. Collective, also without rows.
    """

    def padded(arrays: Sequence[NDArray[np.generic]], fill: float, dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(pad_rows(arrays, fill, dtype)).to(policy.device)

    tokens_BT = token_tensor([row.tokens for row in rows], policy.device)
    turn_BT = padded([row.turn for row in rows], -1, np.int64)
    weight_version_BT = padded([row.weight_version for row in rows], -1, np.int64)
    source_BT = padded([row.source for row in old], Source.NONE, np.int64)
    known_BT = padded([row.logprobs for row in old], 0.0, np.float32)
    mask_BT = (source_BT != Source.NONE) & (source_BT != Source.MISSING)

    scores = policy(tokens_BT, temperature=settings.temperature, with_entropy=True)
    target_BT = scores.logprobs_BT
    # Before the step's only update the policy is the resident version: its own forward is pi_old, to the bit.
    old_BT = torch.where(known_BT.isnan(), target_BT.detach(), known_BT)
    behavior_BT = padded([row.behavior_logprobs for row in rows], 0.0, np.float32)
    staleness_BT = padded([row.staleness for row in rows], 0, np.int64)
    old_BT = interpolated(behavior_BT, target_BT, staleness_BT, source_BT, old_BT)
    loss, stats = decoupled_policy_loss(
        target_logprobs_BT=target_BT,
        old_logprobs_BT=old_BT,
        behavior_logprobs_BT=behavior_BT,
        advantages_BT=padded([row.advantages for row in rows], 0.0, np.float32),
        mask_BT=mask_BT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        discrepancy_low=settings.discrepancy_low,
        discrepancy_high=settings.discrepancy_high,
        granularity=settings.granularity,
        discrepancy_weight=settings.discrepancy_weight,
        weight_cap=settings.weight_cap,
        segment_ids_BT=segment_ids(turn_BT, weight_version_BT),
        denominator=denominator,
    )
    entropy = torch.where(mask_BT, scores.entropy_BT, 0.0).sum()
    if settings.entropy_coefficient:
        loss = loss - settings.entropy_coefficient * entropy / denominator
    # FSDP averages gradients over ranks; the loss is a sum over them.
    torch.autograd.backward(loss * world_size)

    share = stats["mask_tokens"]
    sums += torch.stack(
        [
            loss.detach(),
            entropy.detach(),
            stats["discrepancy_keep_fraction"] * share,
            stats["clip_fraction"] * share,
            stats["active_fraction"] * share,
            share,
        ]
    )
    return target_BT.detach(), old_BT


def _records(
    indices: Sequence[int], rows: Sequence[TrainRow], old: Mapping[int, OldRow], target_BT: Tensor, old_BT: Tensor
) -> dict[int, TokenRecord]:
    target, known = target_BT.cpu().numpy(), old_BT.cpu().numpy()
    return {
        index: TokenRecord(
            target[number, : rows[index].num_tokens], known[number, : rows[index].num_tokens], old[index].source
        )
        for number, index in enumerate(indices)
    }


def _gather(batch: TrainBatch, own: Mapping[int, TokenRecord], device: torch.device) -> tuple[TokenRecord, ...]:
    """All rows' records on every rank: each row has one owner, so a sum of otherwise zero arrays [3, N] is exact."""
    ends = np.cumsum([row.num_tokens for row in batch.rows], dtype=np.int64)
    flat = np.zeros((3, int(ends[-1]) if len(ends) else 0), np.float32)
    for index, record in own.items():
        place = slice(int(ends[index]) - batch.rows[index].num_tokens, int(ends[index]))
        flat[0, place], flat[1, place], flat[2, place] = record.target_logprobs, record.old_logprobs, record.source
    shared = torch.from_numpy(flat).to(device)
    dist.all_reduce(shared)
    target, known, source = (np.split(array, ends[:-1]) for array in shared.cpu().numpy())
    return tuple(
        TokenRecord(*arrays) for arrays in zip(target, known, (codes.astype(np.int8) for codes in source), strict=True)
    )[: len(batch.rows)]


def _report(batch: TrainBatch, norms: Sequence[float], sums: _Sums, records: tuple[TokenRecord, ...]) -> UpdateReport:
    def joined(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        return np.concatenate([*arrays, np.zeros(0)]).astype(dtype)

    source_N = joined([record.source for record in records], np.int8)
    trainable_N = source_N != Source.NONE
    trained_N = trainable_N & (source_N != Source.MISSING)
    log_discrepancy_N = (
        joined([record.old_logprobs for record in records], np.float64)
        - joined([row.behavior_logprobs for row in batch.rows], np.float64)
    )[trained_N]
    staleness_N = joined([row.staleness for row in batch.rows], np.int32)[trained_N]
    num_trainable, num_trained = int(trainable_N.sum()), int(trained_N.sum())
    num_updates, tokens = max(1, len(norms)), max(1.0, sums.tokens)
    return UpdateReport(
        num_updates=len(norms),
        loss=sums.loss / num_updates,
        entropy=sums.entropy / tokens,
        gradient_norm=sum(norms) / num_updates,
        keep_fraction=sums.kept / tokens,
        clip_fraction=sums.clipped / tokens,
        active_fraction=sums.active / tokens,
        tokens_trained=num_trained,
        tokens_over_bound=batch.num_model_tokens - num_trainable,
        tokens_missing=num_trainable - num_trained,
        exact_fraction=float(np.isin(source_N, EXACT_SOURCES).sum()) / num_trainable if num_trainable else 1.0,
        sources=discrepancy_by_source(log_discrepancy_N, source_N[trained_N], SOURCE_NAMES),
        discrepancy_by_staleness=discrepancy_by_staleness(log_discrepancy_N, staleness_N),
        staleness=staleness_distribution(staleness_N),
        records=records,
    )
