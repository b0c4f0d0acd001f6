"""What the worker's machine orders, done: fetch a version, shut the gate, apply, probe. Each answers with an event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rljob_api.errors import BlobCorrupt, BlobMissing, EngineError, MalformedMessage, ProtocolError, StorageError
from rljob_api.messages import PublishedVersion
from rljob_api.weights import WeightManifest
from rljob_protocol.worker import identity
from rljob_protocol.worker_events import (
    Applied,
    ApplyFailed,
    Fetched,
    FetchFailed,
    GateShut,
    ProbeFailed,
    ProbePassed,
    Resumed,
)
from rljob_runtime.rollout.engine import InferenceEngine
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.probe_check import check_probe
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.fetch import fetch_manifest, fetch_weights


@dataclass(frozen=True, slots=True)
class FetchedVersion:
    manifest: WeightManifest
    weights: Path


class Swapper:
    """Moves one engine from version to version. The machine sees to it that nothing here runs twice at a time."""

    def __init__(
        self, store: BlobStore, engine: InferenceEngine, gate: Gate, cache_dir: Path, *, engine_compute_type: str
    ) -> None:
        self._store = store
        self._engine = engine
        self._gate = gate
        self._cache_dir = cache_dir
        self._engine_compute_type = engine_compute_type
        self._fetched: dict[tuple[int, int], FetchedVersion] = {}

    async def fetch(self, published: PublishedVersion) -> Fetched | FetchFailed:
        """Manifest and weights on local disk, verified; generation goes on meanwhile."""
        self._forget_all()  # what an order has superseded since
        try:
            manifest = await fetch_manifest(self._store, published.manifest, self._cache_dir)
            if (manifest.epoch, manifest.version) != identity(published):
                found = f"manifest {published.manifest.name} is of version {manifest.version}, epoch {manifest.epoch}"
                return FetchFailed(published, found, corrupt=True)
            weights = await fetch_weights(self._store, manifest, self._cache_dir)
        except (BlobCorrupt, BlobMissing, MalformedMessage) as error:
            return FetchFailed(published, str(error), corrupt=True)
        except (StorageError, ProtocolError, OSError) as error:
            return FetchFailed(published, str(error), corrupt=False)
        self._fetched[identity(published)] = FetchedVersion(manifest, weights)
        return Fetched(published)

    async def shut(self, deadline_seconds: float) -> GateShut:
        """Every request is out of the engine, its tokens kept.

        Raises:
            DeadlineExceeded, EngineError: the engine does not answer; it must be restarted.
        """
        await self._gate.shut(deadline_seconds)
        return GateShut()

    async def resume(self) -> Resumed:
        """The engine schedules again with the version that it has, behind the gate.

        Raises:
            EngineError: it does not; it must be restarted.
        """
        await self._engine.resume()
        return Resumed()

    async def apply(self, published: PublishedVersion) -> Applied | ApplyFailed:
        """The engine holds the version and schedules again, behind the gate."""
        fetched = self._fetched[identity(published)]
        try:
            await self._engine.apply(fetched.manifest, fetched.weights)
            await self._engine.resume()
        except EngineError as error:
            return ApplyFailed(published, str(error))
        return Applied(published)

    async def probe(self, published: PublishedVersion) -> ProbePassed | ProbeFailed:
        """Score the manifest's probe with the engine and compare."""
        probe = self._fetched[identity(published)].manifest.probe
        try:
            scores = await self._engine.score(probe.tokens)
        except EngineError as error:
            return ProbeFailed(published, str(error))
        result = check_probe(probe, scores, self._engine_compute_type)
        if not result.passed:
            return ProbeFailed(published, result.reason)
        self._forget_all()
        return ProbePassed(published)

    def _forget_all(self) -> None:
        """Free the disk: a version is needed from its fetch to its probe."""
        for fetched in self._fetched.values():
            fetched.weights.unlink(missing_ok=True)
        self._fetched.clear()
