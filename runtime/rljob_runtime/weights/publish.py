"""Makes a version durable: chunks first, the manifest last, so that a readable manifest means readable weights."""

from __future__ import annotations

from collections.abc import Iterable

from rljob_api.weights import Blob, ModelFile
from rljob_runtime.weights.blobs import BlobStore, make_blob
from rljob_runtime.weights.encode import EncodedVersion


async def publish_version(store: BlobStore, encoded: EncodedVersion) -> Blob:
    """Store the chunks, then the manifest; returns the manifest's own blob."""
    for blob, data in encoded.chunks:
        await store.put(blob, data)
    manifest = encoded.manifest
    described = manifest.to_bytes()
    blob = make_blob(f"m-{manifest.epoch}-{manifest.version}", described)
    await store.put(blob, described)
    return blob


async def publish_model_files(store: BlobStore, files: Iterable[tuple[ModelFile, bytes]]) -> None:
    """Store the small files of the model directory."""
    for file, data in files:
        await store.put(file.blob, data)
