"""Where weight blobs live. Write-once: a blob's name holds its digest, so a name never means two contents."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from rljob_api.errors import BlobCorrupt
from rljob_api.weights import Blob

READ_BYTES = 4 << 20


class BlobStore(Protocol):
    """Two implementations: the NATS object store and a shared directory."""

    async def put(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store the bytes durably; storing a name again does nothing.

        Raises:
            StorageFull: there is no room.
        """

    async def replace(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store the bytes durably also where the name exists: what is there was found damaged.

        Raises:
            StorageFull: there is no room.
        """

    async def fetch(self, blob: Blob, destination: Path) -> None:
        """Write the verified bytes to `destination`; nothing is left there when it fails.

        Raises:
            BlobMissing: there is no such blob.
            BlobCorrupt: size or digest differ from the manifest's.
        """

    async def delete(self, name: str) -> None:
        """Forget a blob; forgetting an unknown one does nothing."""

    async def names(self) -> set[str]:
        """Names of all blobs."""


def make_blob(name: str, data: bytes | memoryview) -> Blob:
    """Describe bytes; the digest's start is appended to the name."""
    digest = hashlib.sha256(data).hexdigest()
    return Blob(name=f"{name}-{digest[:16]}", sha256=digest, num_bytes=len(data))


def verify_file(blob: Blob, path: Path) -> None:
    """Check a file against its blob.

    Raises:
        BlobCorrupt: size or digest differ.
    """
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
            size += len(part)
    if size != blob.num_bytes:
        raise BlobCorrupt(
            f"blob {blob.name} has {size} bytes, its manifest says {blob.num_bytes}: it was cut off or altered"
        )
    if digest.hexdigest() != blob.sha256:
        raise BlobCorrupt(
            f"blob {blob.name} has digest {digest.hexdigest()[:16]}…, its manifest says {blob.sha256[:16]}…: it was altered"
        )
