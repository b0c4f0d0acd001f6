"""Makes a version durable: chunks first, the manifest last, so that a readable manifest means readable weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rljob_api.errors import StorageError
from rljob_api.weights import Blob, ModelFile, WeightManifest
from rljob_runtime.weights.blobs import BlobStore, make_blob
from rljob_runtime.weights.encode import EncodedVersion, cut_state


async def publish_version(store: BlobStore, encoded: EncodedVersion) -> Blob:
    """Store the chunks, then the manifest; returns the manifest's own blob."""
    for blob, data in encoded.chunks:
        await store.put(blob, data)
    blob, described = _manifest_blob(encoded.manifest)
    await store.put(blob, described)
    return blob


async def restore_version(store: BlobStore, manifest: WeightManifest, state: Mapping[str, Tensor]) -> None:
    """Store a published version's bytes again under the same names: what the store holds was found damaged.

    Args:
        store: holds the version.
        manifest: of the version, as it was published.
        state: its weights, as they were given to `encode_version`.

    Raises:
        StorageError: these weights are not the version's; nothing was written.
        StorageFull: there is no room.
    """
    _, chunks = cut_state(state, epoch=manifest.epoch, version=manifest.version)
    if tuple(blob for blob, _ in chunks) != manifest.blobs:
        raise StorageError(
            f"version {manifest.version} is damaged in the store, and the resident weights are not those that were "
            "published: they were changed since. Nothing was written; start again from the checkpoint"
        )
    for blob, data in chunks:
        await store.replace(blob, data)
    await store.replace(*_manifest_blob(manifest))


async def publish_model_files(store: BlobStore, files: Iterable[tuple[ModelFile, bytes]]) -> None:
    """Store the small files of the model directory."""
    for file, data in files:
        await store.put(file.blob, data)


def _manifest_blob(manifest: WeightManifest) -> tuple[Blob, bytes]:
    described = manifest.to_bytes()
    return make_blob(f"m-{manifest.epoch}-{manifest.version}", described), described
