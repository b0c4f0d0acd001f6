"""Which blob store a job uses."""

from __future__ import annotations

from pathlib import Path

from rljob_protocol.link import Link
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.nats_blobs import NatsBlobStore
from rljob_runtime.weights.volume import VolumeBlobStore


def blob_store(link: Link, weights_dir: Path | None) -> BlobStore:
    """The shared directory when there is one, else the NATS object store."""
    return NatsBlobStore(link) if weights_dir is None else VolumeBlobStore(weights_dir)
