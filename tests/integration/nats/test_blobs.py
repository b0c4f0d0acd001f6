"""Weight blobs in both stores, whole and damaged: no byte reaches a caller that is not what was put."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.conftest import NAMES

from rljob_api.errors import BlobCorrupt, BlobMissing, StorageError
from rljob_api.weights import Blob, Probe, WeightManifest
from rljob_protocol.link import Link
from rljob_protocol.server import NatsServer
from rljob_runtime.weights.blobs import BlobStore, make_blob
from rljob_runtime.weights.encode import encode_version
from rljob_runtime.weights.fetch import fetch_manifest, fetch_weights
from rljob_runtime.weights.nats_blobs import NatsBlobStore
from rljob_runtime.weights.publish import publish_version, restore_version
from rljob_runtime.weights.volume import VolumeBlobStore

pytestmark = pytest.mark.timeout(180)

DATA = random.Random(1).randbytes(700_000)  # several of the object store's 128 KiB messages


@dataclass(frozen=True, slots=True)
class Place:
    """A store, and the way to its bytes that a broken disk or a foreign writer would have."""

    store: BlobStore
    read: Callable[[str], Awaitable[bytes]]
    overwrite: Callable[[str, bytes], Awaitable[None]]


def in_object_store(link: Link) -> Place:
    async def read(name: str) -> bytes:
        found = (await (await link.jetstream.object_store(NAMES.blob_bucket)).get(name)).data
        assert found is not None
        return found

    async def overwrite(name: str, data: bytes) -> None:
        await (await link.jetstream.object_store(NAMES.blob_bucket)).put(name, io.BytesIO(data))

    return Place(NatsBlobStore(link), read, overwrite)


def in_directory(directory: Path) -> Place:
    async def read(name: str) -> bytes:
        return await asyncio.to_thread((directory / name).read_bytes)

    async def overwrite(name: str, data: bytes) -> None:
        await asyncio.to_thread((directory / name).write_bytes, data)

    return Place(VolumeBlobStore(directory), read, overwrite)


@pytest.fixture(params=["object store", "directory"])
def place(request: pytest.FixtureRequest, link: Link, tmp_path: Path) -> Place:
    return in_object_store(link) if request.param == "object store" else in_directory(tmp_path / "weights")


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


async def test_what_is_fetched_is_what_was_put(place: Place, tmp_path: Path) -> None:
    for data in (DATA, b"x", b""):
        blob = make_blob("w-1-0-0000", data)
        await place.store.put(blob, memoryview(data))
        await place.store.fetch(blob, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == data
        assert blob.name in await place.store.names()


async def test_a_name_that_is_held_keeps_its_bytes(place: Place, tmp_path: Path) -> None:
    blob = make_blob("w-1-0-0000", DATA)
    await place.store.put(blob, DATA)
    await place.store.put(blob, flipped(DATA, 5))  # a writer that lies about its digest
    assert await place.read(blob.name) == DATA
    await place.store.fetch(blob, tmp_path / "fetched")


async def test_a_put_that_was_cut_off_is_made_whole_by_the_next_one(place: Place, tmp_path: Path) -> None:
    blob = make_blob("w-1-0-0000", DATA)
    await place.store.put(blob, DATA)
    await place.overwrite(blob.name, DATA[:1000])
    await place.store.put(blob, DATA)
    await place.store.fetch(blob, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == DATA


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: flipped(data, 8 * 400_000 + 3), "has digest"),
        (lambda data: data[:-1], "has 699999 bytes, its manifest says 700000"),
        (lambda data: data[:0], "has 0 bytes, its manifest says 700000"),
        (lambda data: data + b"\0", "has 700001 bytes, its manifest says 700000"),
    ],
    ids=["bit flipped", "last byte cut off", "emptied", "a byte too many"],
)
async def test_a_damaged_blob_is_refused_and_nothing_of_it_is_left(
    place: Place, tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    blob = make_blob("w-1-0-0000", DATA)
    await place.store.put(blob, DATA)
    await place.overwrite(blob.name, damage(DATA))
    with pytest.raises(BlobCorrupt, match=f"blob {blob.name} {said}.*altered"):
        await place.store.fetch(blob, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


async def test_bits_that_rot_on_the_servers_disk_are_refused(server: NatsServer, link: Link, tmp_path: Path) -> None:
    """The server's files themselves are changed: it must notice or the reader must, and neither gives the bytes on."""
    store = NatsBlobStore(link)
    blob = make_blob("w-1-0-0000", DATA)
    await store.put(blob, DATA)
    server.kill()
    marker = DATA[300_000:300_016]
    files = [path for path in (tmp_path / "nats").rglob("*.blk") if marker in path.read_bytes()]
    assert len(files) == 1
    held = files[0].read_bytes()
    place = held.index(marker)
    files[0].write_bytes(held[:place] + flipped(marker, 1) + held[place + 16 :])
    server.start()
    with pytest.raises((BlobCorrupt, BlobMissing)):
        async with asyncio.timeout(40):
            await store.fetch(blob, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


async def test_a_missing_blob_is_named(place: Place, tmp_path: Path) -> None:
    blob = make_blob("w-1-0-0000", DATA)
    for _ in range(2):
        with pytest.raises(BlobMissing, match=f"blob {blob.name} is not in .*: its version may have been cleaned up"):
            await place.store.fetch(blob, tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()
        # Once more, of one that was there and is deleted; deleting it again does nothing.
        await place.store.put(blob, DATA)
        await place.store.delete(blob.name)
        await place.store.delete(blob.name)
    assert await place.store.names() == set()


async def test_a_blob_whose_bytes_are_gone_is_missing_and_the_next_put_makes_it_whole(
    link: Link, tmp_path: Path
) -> None:
    """The object store's own read would wait for them for ever."""
    store = NatsBlobStore(link)
    blob = make_blob("w-1-0-0000", DATA)
    await store.put(blob, DATA)
    bucket = NAMES.blob_bucket
    await link.jetstream.purge_stream(f"OBJ_{bucket}", subject=f"$O.{bucket}.C.>")
    with pytest.raises(BlobMissing):
        async with asyncio.timeout(10):
            await store.fetch(blob, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    await store.put(blob, DATA)
    await store.fetch(blob, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == DATA


@pytest.mark.parametrize("frozen_at", [".C.", ".M."], ids=["its bytes", "its description"])
async def test_a_put_whose_answers_are_lost_ends_whole(
    server: NatsServer, link: Link, tmp_path: Path, frozen_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client undoes what it believes to have failed; that reaches the frozen server after what it undoes."""
    store = NatsBlobStore(link)
    blob = make_blob("w-1-0-0000", DATA)
    held = await link.jetstream.object_store(NAMES.blob_bucket)
    publish: Any = held._js.publish
    thawing: list[asyncio.TimerHandle] = []
    assert server.pid is not None

    async def freeze_once(subject: str, *arguments: Any, **options: Any) -> Any:
        if frozen_at in subject and not thawing:
            os.kill(server.pid, signal.SIGSTOP)
            thawing.append(asyncio.get_running_loop().call_later(7.0, os.kill, server.pid, signal.SIGCONT))
        return await publish(subject, *arguments, **options)

    monkeypatch.setattr(held._js, "publish", freeze_once)
    try:
        await store.put(blob, DATA)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert thawing
    await asyncio.sleep(0.5)
    async with asyncio.timeout(15):
        await store.fetch(blob, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == DATA


async def put_version(store: BlobStore, parts: list[bytes]) -> tuple[Blob, WeightManifest]:
    joined = b"".join(parts)
    whole = make_blob("whole", joined)
    blobs = []
    for index, part in enumerate(parts):
        blobs.append(make_blob(f"w-1-3-{index:04d}", part))
        await store.put(blobs[-1], part)
    probe = Probe(tokens=(1, 2), logprobs=(-1.0,), compute_type="Float32")
    manifest = WeightManifest(
        epoch=1,
        version=3,
        compute_type="Float32",
        blobs=tuple(blobs),
        sha256=whole.sha256,
        num_bytes=len(joined),
        model_files=(),
        probe=probe,
    )
    blob = make_blob("m-1-3", manifest.to_bytes())
    await store.put(blob, manifest.to_bytes())
    return blob, manifest


async def test_a_version_with_one_bad_chunk_of_three_leaves_no_file_in_the_cache(place: Place, tmp_path: Path) -> None:
    parts = [DATA[:300_000], DATA[300_000:600_000], DATA[600_000:]]
    blob, made = await put_version(place.store, parts)
    cache = tmp_path / "cache"
    manifest = await fetch_manifest(place.store, blob, cache)
    assert manifest == made
    whole = await fetch_weights(place.store, manifest, cache)
    assert whole.read_bytes() == DATA
    os.unlink(whole)

    await place.overwrite(manifest.blobs[2].name, flipped(parts[2], 0))
    with pytest.raises(BlobCorrupt):
        await fetch_weights(place.store, manifest, cache)
    await place.overwrite(manifest.blobs[2].name, parts[2])
    await place.store.delete(manifest.blobs[1].name)
    with pytest.raises(BlobMissing):
        await fetch_weights(place.store, manifest, cache)
    assert list(cache.iterdir()) == []


async def test_whole_chunks_in_the_wrong_order_are_refused(place: Place, tmp_path: Path) -> None:
    _, manifest = await put_version(place.store, [DATA[:1000], DATA[1000:2000]])
    swapped = manifest.model_copy(update={"blobs": manifest.blobs[::-1]})
    with pytest.raises(BlobCorrupt, match="version 3: its chunks are whole, joined they are not"):
        await fetch_weights(place.store, swapped, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone"])
async def test_a_damaged_version_is_stored_again_from_its_weights_and_from_no_others(
    place: Place, tmp_path: Path, damage: str
) -> None:
    state = {"a": torch.arange(5000.0), "b": torch.ones(3, 7)}
    probe = Probe(tokens=(1, 2), logprobs=(-1.0,), compute_type="Float32")
    encoded = encode_version(state, epoch=1, version=4, compute_type="Float32", model_files=(), probe=probe)
    published = await publish_version(place.store, encoded)
    (chunk,) = encoded.manifest.blobs
    for name in (chunk.name, published.name):
        data = await place.read(name)
        if damage == "gone":
            await place.store.delete(name)
        else:
            await place.overwrite(name, flipped(data, 12) if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises((BlobCorrupt, BlobMissing)):
        await fetch_manifest(place.store, published, tmp_path)

    held = await place.store.names()
    with pytest.raises(StorageError, match="not those that were published"):
        await restore_version(place.store, encoded.manifest, {**state, "b": torch.zeros(3, 7)})
    assert await place.store.names() == held
    with pytest.raises((BlobCorrupt, BlobMissing)):  # nothing was mended with the wrong weights
        await place.store.fetch(chunk, tmp_path / "chunk")

    await restore_version(place.store, encoded.manifest, state)
    manifest = await fetch_manifest(place.store, published, tmp_path)
    assert manifest == encoded.manifest
    assert (await fetch_weights(place.store, manifest, tmp_path)).read_bytes() == bytes(encoded.chunks[0][1])
