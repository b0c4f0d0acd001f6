"""The audit: a small share of the trained tokens, scored again by the published versions that sampled them.

It says how far the values that the loss used are from the exact ones, whatever their source, and by scoring the tokens with
the versions since then, too, how far the policy moves from version to version: a forward for each version of staleness. One
that the trainer does not hold comes from the blob store, so the audit needs no snapshots; to load few of them, it is made
every `EVERY_STEPS` steps, for as many more trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rljob_api.correction import Correction, Fallback, OldLogprobs
from rljob_api.diagnostics import AuditReport
from rljob_api.spec import RLJobSpec
from rljob_runtime.correction.audit import audit_report, is_audited
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Source
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.distributed import World
from rljob_runtime.trainer.eager import ScoreRound, score_round
from rljob_runtime.trainer.model import Policy, compute_dtype
from rljob_runtime.trainer.shared_file import on_every_node
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings

EVERY_STEPS = 10
DEFAULT_FRACTION = 0.02

Exact = Mapping[int, NDArray[np.float32]]
"""Row -> log-probabilities [T] under each token's own version; NaN where none was made."""


@dataclass(frozen=True, slots=True)
class Audited:
    """One step's audit, by row; empty in steps without one."""

    exact: Exact
    by_age: Mapping[int, NDArray[np.float32]]
    """Row -> log-probabilities [K, T] under the version k before the present one; NaN where that is older than the token's,
    the present one, or was not to be had."""


def audited_share(correction: Correction) -> float:
    """Share of the trained tokens that are audited, over many steps."""
    if correction.audit_fraction is not None:
        return correction.audit_fraction
    is_approximate = OldLogprobs.EWMA is correction.old_logprobs or Fallback.EWMA is correction.fallback
    return DEFAULT_FRACTION if is_approximate else 0.0


class Auditor:
    """Scores the chosen rows of a batch. All ranks make the same calls in the same order."""

    def __init__(
        self,
        spec: RLJobSpec,
        policy: Policy,
        snapshots: SnapshotStore,
        world: World,
        *,
        fetch_version: Callable[[int], Path | None],
        scratch: Path,
    ) -> None:
        """`fetch_version` gives rank 0 a version's published file, or None where it is gone; other ranks never call it."""
        self._route = spec.correction.old_logprobs
        self._share = audited_share(spec.correction)
        self._seed = spec.training.seed
        self._dtype = compute_dtype(spec.training.compute_type)
        self._settings = UpdateSettings.of(spec)
        self._policy = policy
        self._snapshots = snapshots
        self._world = world
        self._fetch_version = fetch_version
        self._scratch = scratch

    def score(self, batch: TrainBatch, step: int) -> Audited:
        """The audited rows' stale tokens, under their own version and all that came since. Collective.

        To be called while the policy holds the batch's version.
        """
        exact: dict[int, NDArray[np.float32]] = {}
        by_age: dict[int, NDArray[np.float32]] = {}
        if self._share == 0 or step % EVERY_STEPS:
            return Audited(exact, by_age)
        fraction = min(1.0, self._share * EVERY_STEPS)
        stale = {
            index: row.trainable & (row.staleness > 0)
            for index, row in enumerate(batch.rows)
            if is_audited(row.task, row.sample, seed=self._seed, fraction=fraction)
        }
        for version in _versions_since(batch, stale):
            places = {index: _places(batch, index, mask, version) for index, mask in stale.items()}
            places = {index: positions for index, positions in places.items() if positions.size}
            rows = tuple(batch.rows[index].tokens[: positions[-1] + 1] for index, positions in places.items())
            with self._store_of(version) as store:
                if store is None:
                    continue
                scored = score_round(
                    self._policy,
                    ScoreRound(version, rows),
                    store,
                    self._settings,
                    self._world,
                    resident=batch.version,
                )
            for (index, positions), logprobs in zip(places.items(), scored, strict=True):
                row = batch.rows[index]
                own = positions[row.weight_version[positions] == version]
                exact.setdefault(index, np.full(row.num_tokens, np.nan, np.float32))[own] = logprobs[own]
                shape = (int(row.staleness[stale[index]].max()) + 1, row.num_tokens)
                ages = np.where(
                    row.weight_version[positions] == version, row.staleness[positions], batch.version - version
                )
                by_age.setdefault(index, np.full(shape, np.nan, np.float32))[ages, positions] = logprobs[positions]
        return Audited(exact, by_age)

    @contextmanager
    def _store_of(self, version: int) -> Iterator[SnapshotStore | None]:
        """A store that holds the version while the block lasts; None where it is nowhere to be had. Collective."""
        if version in self._snapshots.versions:
            yield self._snapshots
            return
        file = self._fetch_version(version) if self._world.is_main else None
        loaded: SnapshotStore | None = None
        with on_every_node(file, self._scratch, self._world) as path:
            if path is not None:
                loaded = SnapshotStore(self._dtype)
                loaded.load_full(version, self._policy, path)
        try:
            yield loaded
        finally:
            if file is not None:  # the scoring inside the block was a collective: every rank has read it
                file.unlink(missing_ok=True)

    def report(
        self, batch: TrainBatch, update: UpdateReport, audited: Audited, average: tuple[float, ...]
    ) -> AuditReport | None:
        """What the audited tokens say; None in steps without one.

        Args:
            batch: the step's.
            update: what the loss used.
            audited: of `score`.
            average: share of each version in the average that scored the step, newest first; empty without one.
        """
        if not audited.exact:
            return None
        oldest = max(len(by_age) for by_age in audited.by_age.values())
        columns = []
        for index, exact in audited.exact.items():
            row, record = batch.rows[index], update.records[index]
            by_age = np.full((oldest, row.num_tokens), np.nan, np.float32)
            by_age[: len(audited.by_age[index])] = audited.by_age[index]
            by_age[0] = record.target_logprobs
            chosen = np.isfinite(exact) & (record.source != Source.MISSING) & (record.source != Source.NONE)
            columns.append(
                np.vstack([record.old_logprobs, row.behavior_logprobs, row.staleness, by_age])[:, chosen].astype(
                    np.float64
                )
            )
        approximate_N, behavior_N, staleness_N, *by_age_KN = np.concatenate(columns, axis=1)
        return audit_report(
            approximate_logprobs_N=approximate_N,
            behavior_logprobs_N=behavior_N,
            logprobs_by_age_KN=np.array(by_age_KN),
            staleness_N=staleness_N,
            version_weights=self._weights(average),
        )

    def _weights(self, average: tuple[float, ...]) -> tuple[float, ...]:
        match self._route:
            case OldLogprobs.CURRENT:
                return (1.0,)
            case OldLogprobs.EWMA:
                return average
        return ()


def _versions_since(batch: TrainBatch, stale: Mapping[int, NDArray[np.bool_]]) -> list[int]:
    """Versions of the marked tokens, and those after the oldest of them up to the present one, ascending."""
    named = {int(version) for index, mask in stale.items() for version in batch.rows[index].weight_version[mask]}
    dense = [
        int(batch.rows[index].weight_version[mask].min())
        for index, mask in stale.items()
        if mask.any() and _counts_versions(batch, index, mask)
    ]
    return sorted(named.union(range(min(dense), batch.version)) if dense else named)


def _places(batch: TrainBatch, index: int, mask: NDArray[np.bool_], version: int) -> NDArray[np.int64]:
    """Marked tokens of a row that the version sampled, or that are older and are scored by it to see the policy move."""
    row = batch.rows[index]
    older = _counts_versions(batch, index, mask) & (row.weight_version < version)
    return np.flatnonzero(mask & ((row.weight_version == version) | older))


def _counts_versions(batch: TrainBatch, index: int, mask: NDArray[np.bool_]) -> bool:
    """Whether staleness is the difference of version numbers: a resume counts numbers up without a step."""
    row = batch.rows[index]
    return bool((batch.version - row.weight_version[mask] == row.staleness[mask]).all())
