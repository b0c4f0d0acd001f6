"""A worker's process against a real nats-server; the test plays trainer and coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rljob_api.correction import Correction, Eager, OldLogprobs
from rljob_api.messages import (
    Barrier,
    BarrierState,
    DesiredVersion,
    PublishedVersion,
    Task,
    WorkerPhase,
    WorkerState,
)
from rljob_api.names import KEY_BARRIER, KEY_DESIRED, KEY_PUBLISHED, JobNames, worker_key
from rljob_api.spec import RLJob
from rljob_api.weights import Probe
from rljob_protocol.ahead import SegmentLog
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.server import NatsServer
from rljob_protocol.streams import TaskQueue, TrajectoryLog
from rljob_runtime.model_source import materialise
from rljob_runtime.segment_codec import OpenSegment, decode_segment
from rljob_runtime.trajectory_codec import Trajectory, decode_trajectory
from rljob_runtime.weights.encode import encode_version, model_file_blobs
from rljob_runtime.weights.nats_blobs import NatsBlobStore
from rljob_runtime.weights.publish import publish_model_files, publish_version

pytestmark = pytest.mark.timeout(240)  # importing torch and transformers takes a minute on a busy machine

UID = "rollout-test"
JOB = RLJob.model_validate(
    {
        "metadata": {"name": "j"},
        "spec": {
            "model": {"random": {"hiddenSize": 32, "intermediateSize": 32, "layers": 1, "heads": 1}},
            "environment": {"name": "digit-copy", "parameters": {"digits": 4, "turns": 6}},
            "sampling": {"maxTokens": 4, "maxTrajectoryTokens": 128},
            "training": {"steps": 9, "tasksPerStep": 1, "learningRate": 0.001, "computeType": "Float32"},
            "rolloutPools": [
                {
                    "name": "main",
                    "maxConcurrentTrajectories": 8,
                    "engine": {"simulated": {"decodeSeconds": 0.08}},
                }
            ],
        },
    }
)


BARRIER_JOB = JOB.model_copy(
    update={
        "spec": JOB.spec.model_copy(
            update={
                "correction": Correction(
                    old_logprobs=OldLogprobs.INTERRUPTION, eager=Eager(prefix_tokens=6), barrier_timeout_seconds=3600
                ),
            }
        )
    }
)


class Trainer:
    """Publishes versions (each with other weights) and tasks, orders versions, reads what comes back."""

    def __init__(self, link: Link, directory: Path) -> None:
        self.link = link
        self.store = NatsBlobStore(link)
        self.directory = directory
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.queue, self.log = TaskQueue(link), TrajectoryLog(link)
        self.revisions: dict[str, int | None] = {}
        self.received: list[Trajectory] = []
        self.segments: list[tuple[int, OpenSegment]] = []

    async def serve(self, version: int, *, wrong_probe: bool = False) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
            tokens = torch.arange(3, 14)
            logits = self.model(tokens[None]).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        probe = Probe(
            tokens=tuple(tokens.tolist()),
            logprobs=tuple((logprobs - (0.1 if wrong_probe else 0.0)).tolist()),
            compute_type="Float32",
        )
        files = model_file_blobs(self.directory)
        await publish_model_files(self.store, files)
        encoded = encode_version(
            self.model.state_dict(),
            epoch=1,
            version=version,
            compute_type="Float32",
            model_files=[file for file, _ in files],
            probe=probe,
        )
        manifest = await publish_version(self.store, encoded)
        published = PublishedVersion(
            epoch=1, version=version, step=version, manifest=manifest, num_bytes=encoded.manifest.num_bytes
        )
        await self._write(KEY_PUBLISHED, published)
        await self._write(KEY_DESIRED, DesiredVersion(term=1, generation=version + 1, published=published))
        await self.link.hint(self.link.names.desired_hint)

    async def _write(self, key: str, value: Any) -> None:
        self.revisions[key] = await self.link.write(key, value, expected_revision=self.revisions.get(key))

    async def give(self, *numbers: int) -> None:
        for number in numbers:
            assert await self.queue.publish(Task(task=number, sample=0, epoch=1, min_version=0, seed=number))

    async def read(self) -> None:
        async for _, data in self.log.read(0):
            self.received.append(decode_trajectory(data))

    async def read_segments(self) -> None:
        async for sequence, data in SegmentLog(self.link).read(0):
            self.segments.append((sequence, decode_segment(data)))

    async def quiesce(self, version: int) -> None:
        await self._write(KEY_BARRIER, Barrier(epoch=1, version=version, state=BarrierState.QUIESCE))
        await self.link.hint(self.link.names.barrier_hint)

    async def release(self, version: int) -> None:
        await self._write(KEY_BARRIER, Barrier(epoch=1, version=version, state=BarrierState.RELEASED))
        await self.link.hint(self.link.names.barrier_hint)

    def tokens(self) -> dict[tuple[int, int], tuple[int, int, float]]:
        """(token, version, log-probability) of each model token on the segment stream, by (task, position)."""
        found = {}
        for _, segment in self.segments:
            rows = zip(segment.tokens, segment.weight_version, segment.behavior_logprobs, strict=True)
            for position, (token, version, logprob) in enumerate(rows, segment.header.start):
                if version >= 0:
                    found[segment.header.task, position] = int(token), int(version), float(logprob)
        return found

    async def state(self) -> WorkerState | None:
        return await self.link.read_live(worker_key("main-0"), WorkerState)


class Stage:
    """Server, trainer and the worker's process."""

    def __init__(self, server: NatsServer, trainer: Trainer, cache: Path, config: Path) -> None:
        self.server, self.trainer = server, trainer
        self.environ = os.environ | {
            "RLJOB_CONFIG": str(config),
            "RLJOB_UID": UID,
            "RLJOB_NATS_URL": server.url,
            "RLJOB_CACHE_DIR": str(cache),
            "RLJOB_WORKER": "main-0",
            "RLJOB_POOL": "main",
            "RLJOB_INCARNATION": "main-0.1",
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start_worker(self) -> asyncio.subprocess.Process:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rljob_runtime.rollout", env=self.environ
        )
        return self.process

    async def until(self, condition: Callable[[WorkerState], bool], seconds: float = 120.0) -> WorkerState:
        async with asyncio.timeout(seconds):
            while True:
                state = await self.trainer.state()
                if state is not None and condition(state):
                    return state
                await asyncio.sleep(0.05)


@pytest.fixture
async def stage(tmp_path: Path, server: NatsServer) -> AsyncIterator[Stage]:
    link = await Link.connect(JobNames(UID), server.url, client_name="test")
    await link.ensure_state(
        StateLimits(max_tasks=256, trajectory_bytes=16 << 20, max_payload_bytes=8 << 20, ack_wait_seconds=15)
    )
    config = tmp_path / "job.json"
    config.write_text(JOB.model_dump_json(by_alias=True))
    trainer = Trainer(link, materialise(JOB.spec.model, tmp_path / "model"))
    made = Stage(server, trainer, tmp_path / "cache", config)
    reading = asyncio.gather(trainer.read(), trainer.read_segments())
    try:
        yield made
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if made.process is not None and made.process.returncode is None:
            made.process.kill()
            await made.process.wait()
        await link.close()


def is_conserved(state: WorkerState) -> bool:
    c = state.counters
    return c.tokens_generated == c.tokens_delivered + sum(c.tokens_dropped.values()) + c.tokens_in_flight


async def test_a_worker_serves_is_interrupted_outlives_an_outage_and_drains(stage: Stage) -> None:
    trainer = stage.trainer
    await trainer.serve(0)
    await trainer.give(*range(24))
    process = await stage.start_worker()
    await stage.until(lambda state: state.serving_version == 0 and state.in_flight == 8)
    for version in (1, 2):
        await trainer.serve(version)
        await stage.until(lambda state, version=version: state.serving_version == version)  # type: ignore[misc]
    stage.server.kill()
    await asyncio.sleep(1.0)
    stage.server.restart()
    # A kill may take an acknowledgement with it, and then a sample is delivered twice: the trainer's ledger drops one.
    async with asyncio.timeout(120):
        while {t.header.task for t in trainer.received} < set(range(24)):
            await asyncio.sleep(0.05)
    assert {t.header.task for t in trainer.received} == set(range(24))
    assert {t.num_model_tokens for t in trainer.received} <= set(range(6, 25))
    spanning = [t for t in trainer.received if len(t.versions) > 1]
    assert spanning and all(t.header.interruptions >= 1 for t in spanning)

    await trainer.give(*range(100, 116))
    await stage.until(lambda state: state.in_flight == 8)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    last = await trainer.state()
    assert last is not None and last.phase is WorkerPhase.STOPPED and last.in_flight == 0
    assert is_conserved(last) and last.counters.tokens_lost == 0
    assert last.counters.interruptions == 2 and last.counters.partials_continued >= 1
    # The leases went back at once: another worker gets them long before they run out after 15 s.
    finished = {t.header.task for t in trainer.received}
    returned: set[int] = set()
    async with asyncio.timeout(5):
        while not set(range(100, 116)) <= finished | returned:
            for lease in await trainer.queue.claim(16, 0.5):
                returned.add(lease.task.task)
                await lease.ack()


async def test_a_version_whose_probe_is_wrong_is_never_served_and_ends_the_process(stage: Stage) -> None:
    await stage.trainer.serve(0, wrong_probe=True)
    await stage.trainer.give(0)
    process = await stage.start_worker()
    assert await asyncio.wait_for(process.wait(), 120) == 70
    last = await stage.trainer.state()
    assert last is not None and last.phase is WorkerPhase.POISONED and last.serving_version is None
    assert "differ by up to 0.1 nats" in last.message
    assert last.counters.swaps_failed == 1 and last.counters.tokens_generated == 0
    assert stage.trainer.received == []


async def test_a_job_that_is_wrong_for_the_worker_ends_with_the_code_for_it(stage: Stage, tmp_path: Path) -> None:
    wrong = json.loads(JOB.model_dump_json(by_alias=True))
    wrong["spec"]["environment"] = {"name": "digit-copi", "parameters": {}}
    (tmp_path / "job.json").write_text(json.dumps(wrong))
    process = await stage.start_worker()
    assert await asyncio.wait_for(process.wait(), 120) == 78


async def test_a_worker_streams_prefixes_keeps_a_barrier_over_an_outage_and_goes_on_with_the_next_version(
    stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "job.json").write_text(BARRIER_JOB.model_dump_json(by_alias=True))
    trainer = stage.trainer
    await trainer.serve(0)
    await trainer.give(*range(16))
    process = await stage.start_worker()
    await stage.until(lambda state: state.serving_version == 0 and state.in_flight == 8)
    async with asyncio.timeout(60):
        while not trainer.segments:  # sent while nothing was finished, or no barrier was there
            await asyncio.sleep(0.05)
    await trainer.quiesce(0)
    held = await stage.until(lambda state: state.barrier == (1, 0))
    assert held.phase is WorkerPhase.HELD and held.segments_sequence > 0
    async with asyncio.timeout(30):
        while max(sequence for sequence, _ in trainer.segments) < held.segments_sequence:
            await asyncio.sleep(0.05)
    known = trainer.tokens()
    stage.server.kill()
    await asyncio.sleep(1.0)
    stage.server.restart()
    await stage.until(lambda state: state.revision > held.revision + 2)
    later = await trainer.state()
    assert later is not None and later.barrier == (1, 0)
    assert later.counters.tokens_generated == held.counters.tokens_generated, "it stands still"
    await trainer.serve(1)
    await trainer.release(0)
    async with asyncio.timeout(120):
        while {t.header.task for t in trainer.received} < set(range(16)):
            await asyncio.sleep(0.05)
    spanning = 0
    delivered: set[tuple[int, int]] = set()
    for trajectory in trainer.received:
        task = trajectory.header.task
        delivered |= {(task, i) for i in range(trajectory.num_tokens) if trajectory.weight_version[i] >= 0}
        spanning += len(trajectory.versions) > 1
        for position in range(trajectory.num_tokens):
            if trajectory.weight_version[position] == 0 and len(trajectory.versions) > 1:
                expected = (int(trajectory.tokens[position]), 0, float(trajectory.behavior_logprobs[position]))
                assert known[task, position] == expected, "what was handed over is what was delivered"
    assert spanning >= 1
    assert set(known) <= delivered, "no token handed over was lost"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    last = await trainer.state()
    assert last is not None and is_conserved(last)
    assert last.counters.interruptions == 1 and last.counters.barrier_seconds > 1.0
