"""The operator's side of NATS with a real server: what training reports comes through, also over an outage, and orders go out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.integration.conftest import Connect
from tests.unit.api.documents import changed
from tests.unit.cli.synthetic import report

from rljob_api.messages import (
    CheckpointPointer,
    DesiredVersion,
    JobSettings,
    PublishedVersion,
    TermClaim,
    TrainerPhase,
    TrainerState,
)
from rljob_api.names import KEY_CHECKPOINT, KEY_DESIRED, KEY_PUBLISHED, KEY_SETTINGS, KEY_TERM, KEY_TRAINER, JobNames
from rljob_api.spec import RLJobSpec
from rljob_api.validate import parse_job
from rljob_api.weights import Blob
from rljob_operator.core.observed import Identity, Progress
from rljob_operator.shell import coordination as module
from rljob_operator.shell.coordination import Coordination
from rljob_protocol.link import Link
from rljob_protocol.server import NatsServer
from rljob_protocol.streams import StepLog

UID = "coordinated"
CREATED = datetime(2026, 11, 23, tzinfo=UTC)
CLAIM = {"spec.storage.checkpoint.persistentVolumeClaim": {"claimName": "ckpt"}}
OWN_VOLUME = {"spec.storage.weights.persistentVolumeClaim": {"claimName": "weights"}}


def identity(generation: int = 1) -> Identity:
    return Identity("team", "job", UID, generation, "1", CREATED)


def spec_of(*changes: dict[str, Any]) -> RLJobSpec:
    return parse_job(changed(CLAIM, *changes)).spec


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.2)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(module, "CHECK_SECONDS", 2.0)


class Harness:
    def __init__(self, server: NatsServer) -> None:
        self.asked: list[tuple[str, str]] = []
        self.restarted: list[tuple[str, str]] = []

        async def restart(_namespace: str, pod: str, reason: str) -> None:
            self.restarted.append((pod, reason))

        self.coordination = Coordination(
            default_url=server.url,
            credentials=None,
            restart_pod=restart,
            changed=lambda namespace, name: self.asked.append((namespace, name)),
            owner=lambda: "me",
            wall_clock=lambda: datetime.fromtimestamp(time.time(), UTC),
            logger=logging.getLogger("test"),
        )

    @property
    def progress(self) -> Progress:
        return self.coordination.progress(UID)

    async def until(self, holds: Callable[[Progress], object], seconds: float = 10) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not holds(self.progress):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"not within {seconds} s: {self.progress}")


@pytest.fixture
async def harness(server: NatsServer) -> AsyncIterator[Harness]:
    made = Harness(server)
    yield made
    await made.coordination.stop()


async def trainer(harness: Harness, connect: Connect) -> Link:
    """The job's link as its trainer holds it, once the operator has made the state."""
    await harness.until(lambda progress: progress.known_since)
    return await connect(names=JobNames(UID))


def beat(number: int) -> TrainerState:
    return TrainerState(epoch=1, beat=number, phase=TrainerPhase.TRAINING, step=1, steps=10, version=1)


def published(version: int, *, final: bool = False) -> PublishedVersion:
    blob = Blob(name=f"manifest-{version}", sha256="0" * 64, num_bytes=1)
    return PublishedVersion(epoch=1, version=version, step=version, manifest=blob, num_bytes=1, final=final)


async def test_what_the_trainer_reports_is_known_a_look_later(harness: Harness, connect: Connect) -> None:
    await harness.coordination.want(identity(), spec_of())
    link = await trainer(harness, connect)
    await harness.until(lambda progress: progress.known_since)
    assert harness.progress.step is None and harness.progress.heartbeat_at is None
    await StepLog(link).append(report(7, epoch=1))
    await link.beat(KEY_TRAINER, beat(1))
    pointer = CheckpointPointer(epoch=1, version=7, step=7, directory="1-7", cursor=3)
    await link.write(KEY_CHECKPOINT, pointer, expected_revision=None)
    await harness.until(lambda progress: progress.step and progress.heartbeat_at and progress.checkpoint)
    assert harness.progress.step is not None and harness.progress.step.step == 7
    assert harness.progress.checkpoint is not None
    assert harness.progress.checkpoint.uri == "pvc://ckpt/job/1-7"
    # A heartbeat that does not rise is none: its time stays.
    first = harness.progress.heartbeat_at
    await link.beat(KEY_TRAINER, beat(1))
    await asyncio.sleep(0.5)
    assert harness.progress.heartbeat_at == first
    await link.beat(KEY_TRAINER, beat(2))
    await harness.until(lambda progress: progress.heartbeat_at != first)


async def test_a_report_of_an_older_epoch_replaces_nothing(harness: Harness, connect: Connect) -> None:
    await harness.coordination.want(identity(), spec_of())
    log = StepLog(await trainer(harness, connect))
    for epoch, step in ((2, 5), (1, 9), (2, 6)):
        await log.append(report(step, epoch=epoch))
    await harness.until(lambda progress: progress.step is not None and progress.step.step == 6)


async def test_a_final_version_asks_for_a_pass_once(harness: Harness, connect: Connect) -> None:
    await harness.coordination.want(identity(), spec_of(OWN_VOLUME))
    link = await trainer(harness, connect)
    await harness.until(lambda progress: progress.known_since)
    harness.asked.clear()
    await link.write(KEY_PUBLISHED, published(10, final=True), expected_revision=None)
    await harness.until(lambda progress: progress.final_model)
    assert harness.progress.final_model is not None
    assert (harness.progress.final_model.version, harness.progress.final_model.uri) == (10, "pvc://ckpt/job/final")
    await asyncio.sleep(0.5)
    assert harness.asked == [("team", "job")]


async def test_a_published_version_is_ordered_only_where_its_manifest_is(harness: Harness, connect: Connect) -> None:
    await harness.coordination.want(identity(), spec_of())
    link = await trainer(harness, connect)
    revision = await link.write(KEY_PUBLISHED, published(1), expected_revision=None)
    await asyncio.sleep(1.5)
    assert await link.read(KEY_DESIRED, DesiredVersion) is None
    store = await link.jetstream.object_store(link.names.blob_bucket)
    await store.put("manifest-2", b"{}")
    await link.write(KEY_PUBLISHED, published(2), expected_revision=revision)

    async def ordered() -> int:
        held = await link.read(KEY_DESIRED, DesiredVersion)
        return -1 if held is None else held.value.published.version

    async with asyncio.timeout(10):
        while await ordered() != 2:
            await asyncio.sleep(0.05)


async def test_an_outage_is_told_with_its_cause_and_its_beginning_and_ends_by_itself(
    harness: Harness, server: NatsServer
) -> None:
    await harness.coordination.want(identity(), spec_of())
    await harness.until(lambda progress: progress.known_since)
    harness.asked.clear()
    server.kill()
    await harness.until(lambda progress: not progress.reachable, seconds=40)
    since = harness.progress.unreachable_since
    assert since is not None and harness.progress.unreachable_because
    assert harness.asked == [("team", "job")], "the condition must be shown"
    await asyncio.sleep(1.0)
    assert harness.progress.unreachable_since == since, "several failures are one outage"
    server.start()
    await harness.until(lambda progress: progress.reachable, seconds=20)
    assert harness.progress.unreachable_since is None and harness.progress.unreachable_because == ""
    assert harness.asked == [("team", "job")] * 2
    assert harness.coordination.running == 1


async def test_live_settings_are_told_and_an_older_generation_takes_nothing_back(
    harness: Harness, server: NatsServer, connect: Connect
) -> None:
    await harness.coordination.want(identity(2), spec_of({"spec.staleness": {"maxVersions": 3}}))
    link = await trainer(harness, connect)

    async def told() -> tuple[int, int]:
        held = await link.read(KEY_SETTINGS, JobSettings)
        return (0, 0) if held is None else (held.value.generation, held.value.staleness.max_versions)

    async def until_told(wanted: tuple[int, int]) -> None:
        async with asyncio.timeout(10):
            while await told() != wanted:
                await asyncio.sleep(0.05)

    await until_told((2, 3))
    await harness.coordination.want(identity(3), spec_of({"spec.staleness": {"maxVersions": 6}}))
    await until_told((3, 6))
    late = Harness(server)
    await late.coordination.want(identity(2), spec_of({"spec.staleness": {"maxVersions": 3}}))
    await late.until(lambda progress: progress.known_since)
    await late.coordination.stop()
    assert await told() == (3, 6)


async def test_only_what_the_coordinator_works_with_costs_a_new_term(harness: Harness, connect: Connect) -> None:
    async def term() -> int:
        held = await link.read(KEY_TERM, TermClaim)
        return 0 if held is None else held.value.term

    await harness.coordination.want(identity(), spec_of())
    link = await trainer(harness, connect)
    await harness.until(lambda progress: progress.coordination)
    before = await term()
    await harness.coordination.want(identity(2), spec_of({"spec.suspend": False}, {"spec.activeDeadlineSeconds": 60}))
    await asyncio.sleep(0.5)
    assert await term() == before
    await harness.coordination.want(identity(3), spec_of({"spec.weightSync": {"timeoutSeconds": 77}}))
    async with asyncio.timeout(10):
        while await term() != before + 1:
            await asyncio.sleep(0.05)


async def test_a_suspended_job_keeps_what_it_reported_and_a_deleted_one_nothing(
    harness: Harness, connect: Connect
) -> None:
    await harness.coordination.want(identity(), spec_of())
    link = await trainer(harness, connect)
    await StepLog(link).append(report(3, epoch=1))
    await harness.until(lambda progress: progress.step)
    await harness.coordination.unwant(UID)
    assert harness.coordination.running == 0
    assert harness.progress.step is not None and harness.progress.coordination is None
    await harness.coordination.delete_state(identity(), None)
    assert harness.progress.state_is_gone
    left = [info.config.name for info in await link.jetstream.streams_info() if UID in (info.config.name or "")]
    assert left == []
    await harness.coordination.forget(UID)
    assert harness.progress == Progress()


async def test_a_deletion_without_nats_says_so_and_succeeds_when_it_is_back(
    harness: Harness, server: NatsServer
) -> None:
    await harness.coordination.want(identity(), spec_of())
    await harness.until(lambda progress: progress.known_since)
    server.kill()
    await harness.coordination.delete_state(identity(), None)
    assert not harness.progress.state_is_gone
    assert not harness.progress.reachable and harness.progress.unreachable_since is not None
    server.start()
    await harness.coordination.delete_state(identity(), None)
    assert harness.progress.state_is_gone
