"""What rank 0 writes for others to follow: the epoch, published versions, the checkpoint pointer. Compare-and-set, fenced."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rljob_api.base import WireMessage
from rljob_api.errors import Fenced
from rljob_api.messages import CheckpointPointer, EpochClaim, PublishedVersion, RetainedVersions
from rljob_api.names import KEY_CHECKPOINT, KEY_EPOCH, KEY_PUBLISHED, KEY_RETAINED
from rljob_api.weights import ModelFile, WeightManifest
from rljob_protocol.link import Link
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.encode import EncodedVersion, model_file_blobs
from rljob_runtime.weights.publish import publish_model_files, publish_version, restore_version
from rljob_runtime.weights.retention import unneeded_blobs

CLAIM_ATTEMPTS = 20


class Publisher:
    """Rank 0's pen. Every write is refused (`Fenced`) as soon as a newer epoch exists."""

    def __init__(self, link: Link, store: BlobStore, epoch: int, logger: logging.Logger) -> None:
        self._link = link
        self._store = store
        self._logger = logger
        self._published_revision: int | None = None
        self._checkpoint_revision: int | None = None
        self._retained_revision: int | None = None
        self._manifest: WeightManifest | None = None
        """Of the version that this trainer published last."""
        self.retained: dict[int, PublishedVersion] = {}
        """Versions whose blobs are kept."""
        self.epoch = epoch
        self.published: PublishedVersion | None = None
        self.checkpoint: CheckpointPointer | None = None

    @classmethod
    async def claim(cls, link: Link, store: BlobStore, logger: logging.Logger) -> Publisher:
        """Claim the next epoch before any other write, then read what earlier epochs left.

        Raises:
            Fenced: other claimants won every attempt.
        """
        for _ in range(CLAIM_ATTEMPTS):
            held = await link.read(KEY_EPOCH, EpochClaim)
            epoch = 1 if held is None else held.value.epoch + 1
            revision = None if held is None else held.revision
            try:
                await link.write(KEY_EPOCH, EpochClaim(epoch=epoch), expected_revision=revision)
            except Fenced:
                continue
            publisher = cls(link, store, epoch, logger)
            await publisher._read_pointers()
            return publisher
        raise Fenced(
            f"the trainer's epoch could not be claimed in {CLAIM_ATTEMPTS} attempts: another trainer keeps claiming"
        )

    async def _read_pointers(self) -> None:
        published = await self._link.read(KEY_PUBLISHED, PublishedVersion)
        if published is not None:
            self._published_revision, self.published = published.revision, published.value
        retained = await self._link.read(KEY_RETAINED, RetainedVersions)
        if retained is not None:
            self._retained_revision = retained.revision
            self.retained = {version.version: version for version in retained.value.versions}
        checkpoint = await self._link.read(KEY_CHECKPOINT, CheckpointPointer)
        if checkpoint is not None:
            self._checkpoint_revision, self.checkpoint = checkpoint.revision, checkpoint.value

    async def publish_model_files(self, directory: Path) -> tuple[ModelFile, ...]:
        """Make config and tokenizer files durable, for engines that have no model directory of their own."""
        files = model_file_blobs(directory)
        await publish_model_files(self._store, files)
        return tuple(file for file, _ in files)

    async def publish(self, encoded: EncodedVersion, *, step: int, final: bool) -> PublishedVersion:
        """Upload a version's bytes and manifest, then announce it: never before both are durable (invariant 3).

        Raises:
            Fenced: a trainer of a newer epoch published; this one must stop.
        """
        manifest_blob = await publish_version(self._store, encoded)
        self._manifest = encoded.manifest
        version = PublishedVersion(
            epoch=self.epoch,
            version=encoded.manifest.version,
            step=step,
            base=encoded.manifest.base,
            manifest=manifest_blob,
            num_bytes=encoded.manifest.num_bytes,
            final=final,
        )
        self.retained[version.version] = version
        await self._write_retained()
        self._published_revision = await self._set(KEY_PUBLISHED, version, self._published_revision, PublishedVersion)
        self.published = version
        await self._link.hint(self._link.names.published_hint)
        return version

    async def restore(self, state: Mapping[str, Tensor]) -> None:
        """Store the bytes of the version published last again: workers found them damaged.

        Raises:
            StorageError: `state` is not what was published.
        """
        if self._manifest is None:
            raise ValueError("a version is restored before one was published")
        await restore_version(self._store, self._manifest, state)

    async def point_to_checkpoint(self, pointer: CheckpointPointer) -> None:
        """Make a finished checkpoint the current one."""
        self._checkpoint_revision = await self._set(
            KEY_CHECKPOINT, pointer, self._checkpoint_revision, CheckpointPointer
        )
        self.checkpoint = pointer

    async def keep_versions_from(self, oldest: int) -> int:
        """Delete the blobs of versions below `oldest`; returns how many."""
        self.retained = {number: version for number, version in self.retained.items() if number >= oldest}
        await self._write_retained()
        gone = unneeded_blobs(await self._store.names(), oldest=oldest)
        for name in gone:
            await self._store.delete(name)
        return len(gone)

    async def _write_retained(self) -> None:
        retained = RetainedVersions(
            epoch=self.epoch, versions=tuple(version for _, version in sorted(self.retained.items()))
        )
        self._retained_revision = await self._set(KEY_RETAINED, retained, self._retained_revision, RetainedVersions)

    async def _set(self, key: str, value: WireMessage, revision: int | None, kind: type[WireMessage]) -> int:
        try:
            return await self._link.write(key, value, expected_revision=revision)
        except Fenced:
            held = await self._link.read(key, kind)
            if held is not None and held.value == value:
                return held.revision  # the write had landed and only its answer was lost over an outage
            raise


def oldest_version_needed(retained: Mapping[int, PublishedVersion], *, checkpoint_step: int, max_versions: int) -> int:
    """Oldest version that a token not yet trained and checkpointed may name: a replay from the checkpoint stays exact.

    Counted in steps: a resume publishes another version of the same step, so version numbers run ahead of staleness.
    """
    return min(
        (version.version for version in retained.values() if version.step >= checkpoint_step - max_versions), default=0
    )
