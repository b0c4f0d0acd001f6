"""A rollout worker over fakes, and the trainer's and coordinator's part of the conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.engine import FakeEngine
from tests.fakes.messaging import FakeLink, FakeLog, FakeQueue, FakeSegments, MemoryStore
from tests.fakes.tokenizers import character_tokenizer

from rljob_api.messages import DesiredVersion, Task, WorkerState
from rljob_api.names import KEY_DESIRED, KEY_PUBLISHED
from rljob_api.spec import RLJob
from rljob_runtime.rollout.worker import RolloutWorker
from rljob_runtime.settings import RuntimeSettings


def job(**changes: Any) -> RLJob:
    spec: dict[str, Any] = {
        "model": {"random": {}},
        "environment": {"name": "digit-copy", "parameters": {"digits": 2, "turns": 3}},
        "sampling": {"maxTokens": 2, "maxTrajectoryTokens": 64},
        "training": {"steps": 1, "tasksPerStep": 1, "learningRate": 0.001, "computeType": "Float32"},
        "weightSync": {"coordinatorTimeoutSeconds": 20},
        "rolloutPools": [{"name": "main", "maxConcurrentTrajectories": 4}],
    }
    return RLJob.model_validate({"metadata": {"name": "j"}, "spec": {**spec, **changes}})


def sample(number: int, **changes: Any) -> Task:
    return Task(**{"task": number, "sample": 0, "epoch": 1, "min_version": 0, "seed": number, **changes})


class Rig:
    """A worker over fakes, and the trainer's and coordinator's part of the conversation."""

    def __init__(self, tmp_path: Path, rljob: RLJob, alphabet: str = "0123456789=") -> None:
        self.tokenizer_dir = character_tokenizer(tmp_path / "tokenizer", alphabet)
        self.link, self.store = FakeLink(), MemoryStore()
        self.queue, self.log = FakeQueue(self.link), FakeLog(self.link)
        self.segments = FakeSegments(self.link)
        self.engine = FakeEngine(lambda position: 3 + position % 10)
        self.generation = 0
        cache = tmp_path / "cache"
        cache.mkdir()
        settings = RuntimeSettings(
            job=rljob,
            uid="u",
            nats_url="",
            credentials=None,
            cache_dir=cache,
            checkpoint_dir=None,
            weights_dir=None,
            record_dir=None,
            record_bytes=0,
            worker="main-0",
            pool="main",
            incarnation="main-0.1",
            attempt=1,
        )
        self.worker = RolloutWorker(
            settings,
            self.link,  # type: ignore[arg-type]
            self.queue,  # type: ignore[arg-type]
            self.log,  # type: ignore[arg-type]
            self.store,
            lambda directory: self.engine,
            self.segments,
            engine_compute_type="Float32",
            lease_seconds=0.15,
        )
        self.exit: asyncio.Task[int] | None = None

    def publish(self, version: int) -> None:
        self.link.put(KEY_PUBLISHED, self.store.publish(version, self.tokenizer_dir))

    def order(self, version: int) -> None:
        self.publish(version)
        self.generation += 1
        published = self.link.keys[KEY_PUBLISHED].value
        self.link.put(KEY_DESIRED, DesiredVersion(term=1, generation=self.generation, published=published))

    def start(self) -> None:
        self.exit = asyncio.create_task(self.worker.run())

    async def stop(self) -> int:
        self.worker.request_drain()
        return await self.ended()

    async def ended(self) -> int:
        assert self.exit is not None
        return await asyncio.wait_for(asyncio.shield(self.exit), 30)

    @property
    def state(self) -> WorkerState:
        return self.worker._state()

    @property
    def last(self) -> WorkerState:
        return self.link.states[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def is_conserved(state: WorkerState) -> bool:
    c = state.counters
    return c.tokens_generated == c.tokens_delivered + sum(c.tokens_dropped.values()) + c.tokens_in_flight
