"""The messaging of a job in memory: keys, tasks, trajectories and blobs, and an outage to order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.fakes.engine import probe_logprobs

from rljob_api.errors import BlobCorrupt, BlobMissing, DeadlineExceeded
from rljob_api.messages import PublishedVersion, Task, WorkerState
from rljob_api.weights import Blob, ModelFile, Probe, WeightManifest
from rljob_protocol.link import Versioned
from rljob_runtime.segment_codec import OpenSegment, decode_segment
from rljob_runtime.trajectory_codec import Trajectory, decode_trajectory


class FakeLink:
    """Keys of the control and the liveness bucket. While `is_down`, everything ends in DeadlineExceeded."""

    def __init__(self) -> None:
        self.keys: dict[str, Versioned[Any]] = {}
        self.live: dict[str, Any] = {}
        self.states: list[WorkerState] = []
        self.is_down = False

    def check(self) -> None:
        if self.is_down:
            raise DeadlineExceeded("no server")

    def put(self, key: str, value: Any) -> None:
        revision = self.keys[key].revision + 1 if key in self.keys else 1
        self.keys[key] = Versioned(value, revision)

    async def read(self, key: str, kind: type[Any]) -> Versioned[Any] | None:
        self.check()
        return self.keys.get(key)

    async def beat(self, key: str, value: Any) -> None:
        self.check()
        self.live[key] = value
        if isinstance(value, WorkerState):
            self.states.append(value)

    async def read_live(self, key: str, kind: type[Any]) -> Any:
        self.check()
        return self.live.get(key)

    async def follow(
        self, key: str, kind: type[Any], *, hint_subject: str | None = None, interval_seconds: float = 1.0
    ) -> AsyncIterator[Versioned[Any]]:
        seen = 0
        while True:
            if not self.is_down and key in self.keys and self.keys[key].revision > seen:
                seen = self.keys[key].revision
                yield self.keys[key]
            await asyncio.sleep(0.005)


class FakeLease:
    def __init__(self, queue: FakeQueue, task: Task, attempt: int) -> None:
        self.queue, self.task, self.attempt = queue, task, attempt

    async def ack(self) -> None:
        self.queue.link.check()
        self.queue.acked.append((self.task.task, self.task.sample))

    async def extend(self) -> None:
        self.queue.link.check()
        self.queue.extended += 1

    async def release(self, delay_seconds: float) -> None:
        self.queue.link.check()
        self.queue.released.append((self.task.task, self.task.sample, delay_seconds))
        if self.queue.redelivers:
            self.queue.waiting.append((self.task, self.attempt + 1))


class FakeQueue:
    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.waiting: list[tuple[Task, int]] = []
        self.acked: list[tuple[int, int]] = []
        self.released: list[tuple[int, int, float]] = []
        self.extended = 0
        self.redelivers = False

    def put(self, *tasks: Task) -> None:
        self.waiting += [(task, 1) for task in tasks]

    async def claim(self, max_tasks: int, wait_seconds: float) -> list[FakeLease]:
        self.link.check()
        if not self.waiting:
            await asyncio.sleep(min(wait_seconds, 0.01))
        taken, self.waiting = self.waiting[:max_tasks], self.waiting[max_tasks:]
        return [FakeLease(self, task, attempt) for task, attempt in taken]

    async def release_unclaimed(self) -> None:
        pass


class FakeLog:
    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.trajectories: list[Trajectory] = []

    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float) -> int:
        self.link.check()
        self.trajectories.append(decode_trajectory(data))
        return len(self.trajectories)


class FakeSegments:
    """The segment stream. `loses` drops the answers to so many appends; they are stored all the same."""

    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.segments: list[OpenSegment] = []
        self.loses = 0

    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float) -> int:
        await asyncio.sleep(0)
        self.link.check()
        segment = decode_segment(data)
        assert (segment.header.task, segment.header.sample) == (task, sample)
        self.segments.append(segment)
        if self.loses:
            self.loses -= 1
            raise DeadlineExceeded("the answer was lost")
        return len(self.segments)


class MemoryStore:
    """Write-once blobs; `corrupt` names those that come wrong."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.corrupt: set[str] = set()

    async def put(self, blob: Blob, data: bytes | memoryview) -> None:
        self.blobs[blob.name] = bytes(data)

    async def replace(self, blob: Blob, data: bytes | memoryview) -> None:
        self.blobs[blob.name] = bytes(data)
        self.corrupt.discard(blob.name)

    async def fetch(self, blob: Blob, destination: Path) -> None:
        if blob.name not in self.blobs:
            raise BlobMissing(f"no blob {blob.name}")
        if blob.name in self.corrupt:
            raise BlobCorrupt(f"blob {blob.name}: sha256 differs")
        destination.write_bytes(self.blobs[blob.name])

    async def delete(self, name: str) -> None:
        del self.blobs[name]

    async def names(self) -> set[str]:
        return set(self.blobs)

    def add(self, name: str, data: bytes) -> Blob:
        self.blobs[name] = data
        return Blob(name=name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))

    def publish(self, version: int, tokenizer_dir: Path, *, epoch: int = 1) -> PublishedVersion:
        """A version whose weights file holds its number, as FakeEngine wants it."""
        data = str(version).encode()
        weights = self.add(f"w-{epoch}-{version}-0-{hashlib.sha256(data).hexdigest()[:16]}", data)
        files = tuple(
            ModelFile(file_name=path.name, blob=self.add(f"f-{path.name}", path.read_bytes()))
            for path in sorted(tokenizer_dir.iterdir())
        )
        manifest = WeightManifest(
            epoch=epoch,
            version=version,
            compute_type="Float32",
            blobs=(weights,),
            sha256=weights.sha256,
            num_bytes=weights.num_bytes,
            model_files=files,
            probe=Probe(tokens=(2, 3, 4, 5), logprobs=probe_logprobs(version, 3), compute_type="Float32"),
        )
        blob = self.add(f"m-{epoch}-{version}-0", manifest.to_bytes())
        return PublishedVersion(epoch=epoch, version=version, step=version, manifest=blob, num_bytes=len(data))
