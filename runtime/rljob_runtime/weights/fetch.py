"""Brings a version to this machine: every chunk verified, joined into one safetensors file, renamed when whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from rljob_api.errors import BlobCorrupt
from rljob_api.weights import Blob, WeightManifest
from rljob_runtime.weights.blobs import READ_BYTES, BlobStore


async def fetch_manifest(store: BlobStore, blob: Blob, cache: Path) -> WeightManifest:
    """The manifest that a blob holds.

    Raises:
        BlobMissing, BlobCorrupt: the store cannot give it.
        MalformedMessage: its bytes are not a manifest.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f".{blob.name}"
    await store.fetch(blob, path)
    try:
        return WeightManifest.from_bytes(path.read_bytes())
    finally:
        path.unlink(missing_ok=True)


async def fetch_weights(store: BlobStore, manifest: WeightManifest, cache: Path) -> Path:
    """Path of the version's verified safetensors file; one that was fetched before is not fetched again.

    Raises:
        BlobMissing, BlobCorrupt: a chunk is missing or altered; nothing half-done is left.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cached_path(cache, manifest)
    if path.exists():
        return path
    joined, part = path.with_suffix(".joining"), path.with_suffix(".part")
    try:
        joined.unlink(missing_ok=True)
        for blob in manifest.blobs:
            await store.fetch(blob, part)
            await asyncio.to_thread(_append, part, joined)
        if await asyncio.to_thread(_digest, joined) != manifest.sha256:
            raise BlobCorrupt(
                f"version {manifest.version}: its chunks are whole, joined they are not what the manifest says"
            )
        os.replace(joined, path)
    finally:
        joined.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return path


async def fetch_model_files(store: BlobStore, manifest: WeightManifest, directory: Path) -> None:
    """Config and tokenizer files into a directory, each verified."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in manifest.model_files:
        await store.fetch(file.blob, directory / file.file_name)


def cached_path(cache: Path, manifest: WeightManifest) -> Path:
    """Where a version's file lies; the digest in the name makes a cached file trustworthy."""
    return cache / f"{manifest.epoch}-{manifest.version}-{manifest.sha256[:16]}.safetensors"


def drop_cached_versions(cache: Path, keep: set[Path]) -> None:
    """Delete cached versions that are not in `keep`."""
    for path in cache.glob("*.safetensors"):
        if path not in keep:
            path.unlink(missing_ok=True)


def _append(part: Path, joined: Path) -> None:
    with part.open("rb") as source, joined.open("ab") as target:
        shutil.copyfileobj(source, target, READ_BYTES)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
