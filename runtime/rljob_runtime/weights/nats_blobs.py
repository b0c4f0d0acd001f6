"""Weight blobs in the NATS object store. Reads go to a file: reading into memory is quadratic in the client."""

from __future__ import annotations

import io
from pathlib import Path

import nats.js.errors
from nats.js.api import ObjectInfo
from nats.js.object_store import ObjectStore

from rljob_api.errors import BlobCorrupt, BlobMissing, StorageError, StorageFull
from rljob_api.weights import Blob
from rljob_protocol.link import ATTEMPT_SECONDS, STREAM_FULL, Link
from rljob_runtime.weights.blobs import verify_file
from rljob_runtime.weights.volume import write_error

MISSING = (
    nats.js.errors.ObjectNotFoundError,
    nats.js.errors.NotFoundError,
    nats.js.errors.ObjectDeletedError,
)
INSUFFICIENT_STORAGE = STREAM_FULL | {10023, 10047}
TRANSFER_SECONDS = 600.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A transfer that is slower counts as stuck (the client waits for lost messages for ever) and is begun again."""


class NatsBlobStore:
    """Objects of the job's bucket. Putting an existing name would replace its bytes, so it is looked up first."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._store: ObjectStore | None = None

    async def put(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store durably, once."""
        await self._put(blob, data, may_be_there=True)

    async def replace(self, blob: Blob, data: bytes | memoryview) -> None:
        """Store durably whatever is there; a reader of the old bytes begins again."""
        await self._put(blob, data, may_be_there=False)

    async def _put(self, blob: Blob, data: bytes | memoryview, *, may_be_there: bool) -> None:
        is_looked_for = may_be_there

        async def attempt() -> None:
            nonlocal is_looked_for
            store = await self._bucket()
            # An attempt whose answers were lost is undone by the client, and that may reach the server late: what it
            # left is not looked at. The next one has a place of its own, and is read back when it is through.
            if is_looked_for and await self._is_whole(store, blob):
                return
            is_looked_for = False
            await store.put(blob.name, io.BytesIO(data))
            if not await self._is_whole(store, blob):
                raise ConnectionError(f"blob {blob.name} did not arrive whole")

        try:
            await self._link.retry(f"put blob {blob.name}", attempt, **_deadlines(blob))
        except nats.js.errors.APIError as error:
            if error.err_code in INSUFFICIENT_STORAGE:
                raise StorageFull(
                    f"no room for blob {blob.name} ({blob.num_bytes} bytes) in the NATS object store ({error.description}): "
                    "give JetStream more file storage, or choose storage.weights.persistentVolumeClaim"
                ) from error
            raise StorageError(f"blob {blob.name} could not be stored: {error.description or error}") from error

    async def fetch(self, blob: Blob, destination: Path) -> None:
        """Read into a file and verify."""

        async def attempt() -> None:
            store = await self._bucket()
            info = await store.get_info(blob.name)
            if not await self._has_all_chunks(info):  # the client would wait for them for ever
                raise nats.js.errors.ObjectNotFoundError
            with destination.open("wb") as file:
                await store.get(blob.name, writeinto=file)

        try:
            await self._link.retry(f"fetch blob {blob.name}", attempt, **_deadlines(blob))
            verify_file(blob, destination)
        except MISSING as error:
            destination.unlink(missing_ok=True)
            raise BlobMissing(
                f"blob {blob.name} is not in the NATS object store: its version may have been cleaned up"
            ) from error
        except nats.js.errors.DigestMismatchError as error:
            destination.unlink(missing_ok=True)
            raise BlobCorrupt(f"blob {blob.name}: the object store's own digest does not match its bytes") from error
        except OSError as error:
            destination.unlink(missing_ok=True)
            raise write_error(error, blob, destination.parent) from error
        except StorageError:
            destination.unlink(missing_ok=True)
            raise

    async def delete(self, name: str) -> None:
        """Forget a blob."""

        async def attempt() -> None:
            try:
                await (await self._bucket()).delete(name)
            except MISSING:
                return

        await self._link.retry(f"delete blob {name}", attempt)

    async def names(self) -> set[str]:
        """Names of all blobs."""

        async def attempt() -> set[str]:
            try:
                listed = await (await self._bucket()).list(ignore_deletes=True)
            except nats.js.errors.NotFoundError:
                return set()
            return {info.name for info in listed if info.name is not None and not info.deleted}

        return await self._link.retry("list blobs", attempt)

    async def _is_whole(self, store: ObjectStore, blob: Blob) -> bool:
        try:
            info = await store.get_info(blob.name)
        except MISSING:
            return False
        return info.size == blob.num_bytes and await self._has_all_chunks(info)

    async def _has_all_chunks(self, info: ObjectInfo) -> bool:
        names = self._link.names
        subject = f"$O.{names.blob_bucket}.C.{info.nuid}"
        stream = await self._link.jetstream.stream_info(f"OBJ_{names.blob_bucket}", subjects_filter=subject)
        return (stream.state.subjects or {}).get(subject, 0) == (info.chunks or 0)

    async def _bucket(self) -> ObjectStore:
        if self._store is None:
            self._store = await self._link.jetstream.object_store(self._link.names.blob_bucket)
        return self._store


def _deadlines(blob: Blob) -> dict[str, float]:
    attempt = ATTEMPT_SECONDS + blob.num_bytes / SLOWEST_BYTES_PER_SECOND
    return {"attempt_seconds": attempt, "deadline_seconds": max(TRANSFER_SECONDS, 3 * attempt)}
