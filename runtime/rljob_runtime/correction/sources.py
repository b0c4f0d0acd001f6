"""Where each token's old log-probability comes from (docs/design.md, section 6).

Per token, the first that applies: *resident* (the version that the trainer holds), *snapshot* (a version reloaded from
memory), else the token is *missing* and leaves the loss. *current* and *engine* are baselines for comparison and are
used only where the job asks for them by name.

Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rljob_api.spec import OldLogprobs
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


SOURCE_NAMES = tuple(source.name.lower() for source in Source)
"""Names in metrics and records, by code."""
EXACT_SOURCES = (Source.RESIDENT, Source.SNAPSHOT)
UNSTEPPED_SOURCES = (Source.RESIDENT, Source.CURRENT)
"""Sources that are the trainer's weights before the step's first update."""


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


@dataclass(frozen=True, slots=True)
class OldRow:
    """Old log-probabilities of one trajectory."""

    logprobs: NDArray[np.float32]
    """[T], 0 where the source is NONE or MISSING, NaN where it is RESIDENT or CURRENT and not scored yet."""
    source: NDArray[np.int8]
    """[T], codes of `Source`."""


ScoreRows = Callable[[Sequence[NDArray[np.int32]]], list[NDArray[np.float32]]]
"""This rank's rows of tokens -> log-probability of each token under the weights that the policy holds. Collective."""


def assign_sources(row: SampledRow, route: OldLogprobs, snapshots: Sequence[int]) -> NDArray[np.int8]:
    """The source of each token [T], given the versions that the snapshot store holds."""
    source = np.full(row.tokens.shape, Source.NONE, np.int8)
    resident = row.trainable & (row.staleness == 0)
    stale = row.trainable & (row.staleness > 0)
    match route:
        case OldLogprobs.ENGINE:
            source[row.trainable] = Source.ENGINE
            return source
        case OldLogprobs.CURRENT:
            source[stale] = Source.CURRENT
        case OldLogprobs.SNAPSHOT:
            source[stale] = np.where(np.isin(row.weight_version[stale], snapshots), Source.SNAPSHOT, Source.MISSING)
        case OldLogprobs.RESIDENT:
            source[stale] = Source.MISSING
    source[resident] = Source.RESIDENT
    return source


def resolve(
    rows: Sequence[SampledRow],
    own: Sequence[int],
    *,
    route: OldLogprobs,
    store: SnapshotStore,
    policy: PublishedParameters,
    score: ScoreRows,
) -> dict[int, OldRow]:
    """Old log-probabilities of this rank's rows, by row index. Collective.

    Each stored version that any rank's tokens name is switched to once, in ascending order, whether or not this rank
    has a token of it: scoring is a collective. Only rows with tokens of that version are scored, up to the last of
    them, and only those tokens keep their values.

    Args:
        rows: the whole batch, the same on every rank.
        own: indices of the rows that this rank needs.
        route: what the job asks for.
        store: snapshots; the same versions on every rank.
        policy: the model whose weights are switched, and put back bit for bit.
        score: log-probabilities under the weights that the policy holds at the call.
    """
    sources = [assign_sources(row, route, store.versions) for row in rows]
    resolved: dict[int, OldRow] = {}
    for index in own:
        logprobs = np.zeros(sources[index].shape, np.float32)
        logprobs[np.isin(sources[index], UNSTEPPED_SOURCES)] = np.nan
        from_engine = sources[index] == Source.ENGINE
        logprobs[from_engine] = rows[index].behavior_logprobs[from_engine]
        resolved[index] = OldRow(logprobs, sources[index])

    for version in _versions(rows, sources):
        chosen = {
            index: np.flatnonzero((sources[index] == Source.SNAPSHOT) & (rows[index].weight_version == version))
            for index in own
        }
        chosen = {index: positions for index, positions in chosen.items() if positions.size}
        with store.held(version, policy):
            scored = score([rows[index].tokens[: positions[-1] + 1] for index, positions in chosen.items()])
        for (index, positions), logprobs in zip(chosen.items(), scored, strict=True):
            resolved[index].logprobs[positions] = logprobs[positions]
    return resolved


def _versions(rows: Sequence[SampledRow], sources: Sequence[NDArray[np.int8]]) -> list[int]:
    named = [row.weight_version[source == Source.SNAPSHOT] for row, source in zip(rows, sources, strict=True)]
    return [int(version) for version in np.unique(np.concatenate(named))] if named else []
