"""Weight blobs in a directory that trainer and rollout workers share."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import uuid
from pathlib import Path

from rljob_api.errors import BlobMissing, StorageError, StorageFull
from rljob_api.weights import Blob
from rljob_runtime.weights.blobs import verify_file

PARTIAL = ".partial-"


class VolumeBlobStore:
    """One file a blob; written under another name, synced and renamed, so that a reader sees all of it or nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def put(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store durably, once."""
        await asyncio.to_thread(self._put, blob, data, may_be_there=True)

    async def replace(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store durably whatever is there; a reader gets the old file or the new one."""
        await asyncio.to_thread(self._put, blob, data, may_be_there=False)

    async def fetch(self, blob: Blob, destination: Path) -> None:
        """Copy out and verify."""
        await asyncio.to_thread(self._fetch, blob, destination)

    async def delete(self, name: str) -> None:
        """Forget a blob."""
        await asyncio.to_thread((self._directory / name).unlink, missing_ok=True)

    async def names(self) -> set[str]:
        """Names of all blobs."""
        return await asyncio.to_thread(self._names)

    def _put(self, blob: Blob, data: bytes | memoryview, *, may_be_there: bool) -> None:
        path = self._directory / blob.name
        temporary = self._directory / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if may_be_there and path.exists() and path.stat().st_size == blob.num_bytes:
                return
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise write_error(error, blob, self._directory) from error

    def _fetch(self, blob: Blob, destination: Path) -> None:
        try:
            shutil.copyfile(self._directory / blob.name, destination)
        except FileNotFoundError as error:
            destination.unlink(missing_ok=True)
            raise BlobMissing(
                f"blob {blob.name} is not in {self._directory}: its version may have been cleaned up"
            ) from error
        except OSError as error:
            destination.unlink(missing_ok=True)
            raise write_error(error, blob, destination.parent) from error
        try:
            verify_file(blob, destination)
        except StorageError:
            destination.unlink(missing_ok=True)
            raise

    def _names(self) -> set[str]:
        if not self._directory.exists():
            return set()
        return {path.name for path in self._directory.iterdir() if not path.name.startswith(PARTIAL)}


def write_error(error: OSError, blob: Blob, directory: Path) -> StorageError:
    """The project's error for a failed write of a blob."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free if directory.exists() else 0
        return StorageFull(
            f"no room for blob {blob.name} ({blob.num_bytes} bytes) in {directory} ({free} bytes free): "
            "give the volume more space, or lower storage.checkpoint.everySteps so that fewer versions are kept"
        )
    return StorageError(f"blob {blob.name} could not be written to {directory}: {error.strerror or error}")
