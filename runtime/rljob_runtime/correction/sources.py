"""Where each token's old log-probability comes from (docs/design.md, section 6).

Per token, the first that applies: *resident* (the version that the trainer holds), *pool* (scored earlier, while its
version was resident or in idle time) or *dedicated* (scored by an old-policy worker), *snapshot* (a version reloaded from
memory), else the fallback that the job allows (*ewma*), else the token is *missing* and leaves the loss. *ewma* as a route,
and the baselines *linear*, *log_linear*, *current* and *engine*, are used only where the job asks for them by name.

Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rljob_api.correction import Fallback, OldLogprobs
from rljob_runtime.correction.published import PublishedParameters
from rljob_runtime.correction.snapshots import SnapshotStore


class Source(IntEnum):
    """Code of a source, one a token."""

    NONE = 0  # not a trainable token
    RESIDENT = 1  # exact: the weights of the token's version, held by the trainer
    SNAPSHOT = 2  # exact: the weights of the token's version, reloaded
    CURRENT = 3  # baseline: the weights before this step's first update, newer than the token
    ENGINE = 4  # baseline: the behavior log-probability itself
    MISSING = 5  # the token's version is not to be had: out of the loss, and counted
    POOL = 6  # exact: scored ahead of the step by the weights of the token's version
    DEDICATED = 7  # exact: scored by an old-policy worker that held the token's version
    EWMA = 8  # approximate: the averaged weights
    LINEAR = 9  # baseline: behavior and target probability, mixed by the token's staleness
    LOG_LINEAR = 10  # baseline: the same of log-probabilities


SOURCE_NAMES = tuple(source.name.lower() for source in Source)
"""Names in metrics and records, by code."""
EXACT_SOURCES = (Source.RESIDENT, Source.SNAPSHOT, Source.POOL, Source.DEDICATED)
UNSTEPPED_SOURCES = (Source.RESIDENT, Source.CURRENT)
"""Sources that are the trainer's weights before the step's first update."""
KNOWN_SOURCES = (Source.POOL, Source.DEDICATED)
"""Sources whose values come with the batch."""
INTERPOLATED_SOURCES = (Source.LINEAR, Source.LOG_LINEAR)
"""Sources that are made of each update's own target log-probabilities."""
_VERSIONED_ROUTES = (OldLogprobs.SNAPSHOT, OldLogprobs.DEDICATED, OldLogprobs.INTERRUPTION)
"""Routes that look for the very version of a token."""
_WHOLE_ROUTES = {
    OldLogprobs.ENGINE: Source.ENGINE,
    OldLogprobs.LINEAR: Source.LINEAR,
    OldLogprobs.LOG_LINEAR: Source.LOG_LINEAR,
}
"""Baselines that are used for every token, resident or not."""


class SampledRow(Protocol):
    """What is needed of a trajectory: arrays [T]."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def weight_version(self) -> NDArray[np.int32]: ...
    @property
    def behavior_logprobs(self) -> NDArray[np.float32]: ...
    @property
    def staleness(self) -> NDArray[np.int32]: ...
    @property
    def trainable(self) -> NDArray[np.bool_]: ...
    @property
    def known_logprobs(self) -> NDArray[np.float32]: ...
    @property
    def known_source(self) -> NDArray[np.int8]: ...


@dataclass(frozen=True, slots=True)
class Known:
    """Old log-probabilities of one trajectory that were scored ahead of the step."""

    logprobs: NDArray[np.float32]
    """[T], 0 where there is none."""
    source: NDArray[np.int8]
    """[T], POOL or DEDICATED; NONE where there is none."""


class HeldWeights(Protocol):
    """Weights that the policy can hold for a while: the average of PPO-EWMA."""

    def held(self, policy: PublishedParameters) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class OldRow:
    """Old log-probabilities of one trajectory."""

    logprobs: NDArray[np.float32]
    """[T], 0 where the source is NONE or MISSING, NaN where it is unstepped or interpolated and not scored yet."""
    source: NDArray[np.int8]
    """[T], codes of `Source`."""


ScoreRows = Callable[[Sequence[NDArray[np.int32]]], list[NDArray[np.float32]]]
"""This rank's rows of tokens -> log-probability of each token under the weights that the policy holds. Collective."""


def assign_sources(
    row: SampledRow, route: OldLogprobs, snapshots: Sequence[int], fallback: Fallback = Fallback.DROP
) -> NDArray[np.int8]:
    """The source of each token [T], given the versions that the snapshot store holds."""
    source = np.full(row.tokens.shape, Source.NONE, np.int8)
    if route in _WHOLE_ROUTES:
        source[row.trainable] = _WHOLE_ROUTES[route]
        return source
    stale = row.trainable & (row.staleness > 0)
    source[stale] = Source.EWMA if fallback is Fallback.EWMA else Source.MISSING
    match route:
        case OldLogprobs.CURRENT:
            source[stale] = Source.CURRENT
        case OldLogprobs.EWMA:
            source[stale] = Source.EWMA
        case OldLogprobs.SNAPSHOT:
            source[stale & np.isin(row.weight_version, snapshots)] = Source.SNAPSHOT
    if route in _VERSIONED_ROUTES:
        known = stale & (row.known_source != Source.NONE)
        source[known] = row.known_source[known]
    source[row.trainable & (row.staleness == 0)] = Source.RESIDENT
    return source


def resolve(
    rows: Sequence[SampledRow],
    own: Sequence[int],
    *,
    route: OldLogprobs,
    store: SnapshotStore,
    policy: PublishedParameters,
    score: ScoreRows,
    fallback: Fallback = Fallback.DROP,
    averages: HeldWeights | None = None,
) -> dict[int, OldRow]:
    """Old log-probabilities of this rank's rows, by row index. Collective.

    Each stored version that any rank's tokens name is switched to once, the newest first, whether or not this rank
    has a token of it, and the average after them: scoring is a collective. Only rows with tokens of that version are
    scored, up to the last of them, and only those tokens keep their values. A value that is not finite is MISSING.

    Args:
        rows: the whole batch, the same on every rank.
        own: indices of the rows that this rank needs.
        route: what the job asks for.
        store: snapshots; the same versions on every rank.
        policy: the model whose weights are switched, and put back bit for bit.
        score: log-probabilities under the weights that the policy holds at the call.
        fallback: what stands in for a token's version that is not to be had.
        averages: the averaged weights; needed where the route or the fallback is Ewma.
    """
    sources = [assign_sources(row, route, store.versions, fallback) for row in rows]
    resolved = {index: _before_scoring(rows[index], sources[index]) for index in own}

    def fill(wanted: Mapping[int, NDArray[np.bool_]]) -> None:
        chosen = {index: np.flatnonzero(mask) for index, mask in wanted.items() if mask.any()}
        scored = score([rows[index].tokens[: positions[-1] + 1] for index, positions in chosen.items()])
        for (index, positions), logprobs in zip(chosen.items(), scored, strict=True):
            resolved[index].logprobs[positions] = logprobs[positions]

    with store.visiting(policy) as visit:
        for version in _newest_first(rows, sources):
            visit(version)
            fill(
                {index: (sources[index] == Source.SNAPSHOT) & (rows[index].weight_version == version) for index in own}
            )
    if averages is not None and any((source == Source.EWMA).any() for source in sources):
        with averages.held(policy):
            fill({index: sources[index] == Source.EWMA for index in own})
    for row in resolved.values():
        _leave_out_broken(row)
    return resolved


def interpolated(
    behavior_logprobs: Tensor, target_logprobs: Tensor, staleness: Tensor, source: Tensor, old_logprobs: Tensor
) -> Tensor:
    """`old_logprobs`, and the baselines' values where the source is LINEAR or LOG_LINEAR; any one shape.

    With a = 1/(n+1) at staleness n: a mu + (1-a) pi_theta, or the same of the logarithms. Section 5 of arXiv 2605.12070.
    """
    weight = 1.0 / (staleness.clamp(min=0).to(target_logprobs.dtype) + 1.0)
    target = target_logprobs.detach()
    log_linear = weight * behavior_logprobs + (1 - weight) * target
    linear = torch.logaddexp(weight.log() + behavior_logprobs, torch.log1p(-weight) + target)
    chosen = torch.where(source == Source.LOG_LINEAR, log_linear, old_logprobs)
    return torch.where(source == Source.LINEAR, linear, chosen)


def _before_scoring(row: SampledRow, source: NDArray[np.int8]) -> OldRow:
    logprobs = np.zeros(source.shape, np.float32)
    logprobs[np.isin(source, (*UNSTEPPED_SOURCES, *INTERPOLATED_SOURCES))] = np.nan
    from_engine, known = source == Source.ENGINE, np.isin(source, KNOWN_SOURCES)
    logprobs[from_engine] = row.behavior_logprobs[from_engine]
    logprobs[known] = row.known_logprobs[known]
    return OldRow(logprobs, source)


def _leave_out_broken(row: OldRow) -> None:
    """A version whose weights overflow must cost its own tokens, not the step."""
    broken = np.isin(row.source, (*KNOWN_SOURCES, Source.SNAPSHOT, Source.EWMA)) & ~np.isfinite(row.logprobs)
    row.source[broken] = Source.MISSING
    row.logprobs[broken] = 0.0


def _newest_first(rows: Sequence[SampledRow], sources: Sequence[NDArray[np.int8]]) -> list[int]:
    named = [row.weight_version[source == Source.SNAPSHOT] for row, source in zip(rows, sources, strict=True)]
    return [int(version) for version in np.unique(np.concatenate(named))[::-1]] if named else []
