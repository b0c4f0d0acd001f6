"""The audit: a small share of the trained tokens, scored again by the published versions that sampled them.

It says how far the values that the loss used are from the exact ones, whatever their source. A version that the trainer
does not hold comes from the blob store, so the audit needs no snapshots; to load few of them, it is made every
`EVERY_STEPS` steps, for as many more trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rljob_api.diagnostics import AuditReport
from rljob_api.spec import Correction, Fallback, OldLogprobs, RLJobSpec
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

    def exact(self, batch: TrainBatch, step: int) -> Exact:
        """Exact values of the audited rows' stale tokens; empty in steps without an audit. Collective.

        To be called while the policy holds the batch's version.
        """
        found: dict[int, NDArray[np.float32]] = {}
        if self._share == 0 or step % EVERY_STEPS:
            return found
        fraction = min(1.0, self._share * EVERY_STEPS)
        chosen = [
            index
            for index, row in enumerate(batch.rows)
            if is_audited(row.task, row.sample, seed=self._seed, fraction=fraction)
        ]
        stale = {index: batch.rows[index].trainable & (batch.rows[index].staleness > 0) for index in chosen}
        versions = {int(v) for index, mask in stale.items() for v in batch.rows[index].weight_version[mask]}
        for version in sorted(versions):
            places = {
                index: np.flatnonzero(mask & (batch.rows[index].weight_version == version))
                for index, mask in stale.items()
            }
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
                values = found.setdefault(index, np.full(batch.rows[index].num_tokens, np.nan, np.float32))
                values[positions] = logprobs[positions]
        return found

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
        self, batch: TrainBatch, update: UpdateReport, exact: Exact, average: tuple[float, ...]
    ) -> AuditReport | None:
        """What the audited tokens say; None in steps without one.

        Args:
            batch: the step's.
            update: what the loss used.
            exact: of `exact`.
            average: share of each version in the average that scored the step, newest first; empty without one.
        """
        if not exact:
            return None
        rows = [(batch.rows[index], update.records[index], values) for index, values in exact.items()]
        chosen = [
            np.isfinite(values) & (record.source != Source.MISSING) & (record.source != Source.NONE)
            for _, record, values in rows
        ]

        def joined(arrays: list[NDArray[np.generic]]) -> NDArray[np.generic]:
            return np.concatenate([array[mask] for array, mask in zip(arrays, chosen, strict=True)])

        return audit_report(
            approximate_logprobs_N=joined([record.old_logprobs for _, record, _ in rows]),
            exact_logprobs_N=joined([values for _, _, values in rows]),
            behavior_logprobs_N=joined([row.behavior_logprobs for row, _, _ in rows]),
            target_logprobs_N=joined([record.target_logprobs for _, record, _ in rows]),
            staleness_N=joined([row.staleness for row, _, _ in rows]),
            version_weights=self._weights(average),
        )

    def _weights(self, average: tuple[float, ...]) -> tuple[float, ...]:
        match self._route:
            case OldLogprobs.CURRENT:
                return (1.0,)
            case OldLogprobs.EWMA:
                return average
        return ()
