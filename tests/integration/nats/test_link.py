"""Pointers, liveness and hints against a real nats-server that is killed, frozen and cut off."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import nats.js.errors
import pytest
from tests.integration.conftest import LIMITS, NAMES, Connect
from tests.integration.nats.cable import Cable

from rljob_api.errors import DeadlineExceeded, Fenced, MalformedMessage, MessagingUnavailable, StorageFull
from rljob_api.messages import CoordinatorHeartbeat, EpochClaim, Task, TermClaim, WorkerPhase, WorkerState
from rljob_api.names import KEY_COORDINATOR, KEY_EPOCH, KEY_TERM, worker_key
from rljob_protocol import deadlines
from rljob_protocol.link import Link, Versioned
from rljob_protocol.server import NatsServer, find_binary, free_port
from rljob_protocol.streams import TaskQueue, TrajectoryLog

pytestmark = pytest.mark.timeout(180)


async def next_of(follower: AsyncIterator[Versioned[EpochClaim]], seconds: float = 15.0) -> int:
    """The next value that a follower of `epoch` yields."""
    async with asyncio.timeout(seconds):
        return (await anext(follower)).value.epoch


async def put_raw(link: Link, bucket: str, key: str, data: bytes) -> None:
    """A value as a foreign or broken writer would leave it."""
    await (await link.jetstream.key_value(bucket)).put(key, data)


async def test_the_second_writer_of_a_revision_is_fenced_and_changes_nothing(link: Link, connect: Connect) -> None:
    other = await connect()
    first = await link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None)
    with pytest.raises(Fenced, match="epoch is no longer at revision None: another writer changed it"):
        await other.write(KEY_EPOCH, EpochClaim(epoch=100), expected_revision=None)
    await other.write(KEY_EPOCH, EpochClaim(epoch=2), expected_revision=first)
    with pytest.raises(Fenced, match=f"epoch is no longer at revision {first}: "):
        await link.write(KEY_EPOCH, EpochClaim(epoch=200), expected_revision=first)
    held = await link.read(KEY_EPOCH, EpochClaim)
    assert held is not None and held.value.epoch == 2


async def test_of_twenty_writers_at_once_exactly_one_wins_each_revision(link: Link, connect: Connect) -> None:
    links = [link, await connect(), await connect()]

    async def claim(number: int, revision: int | None) -> int | None:
        try:
            return await links[number % 3].write(KEY_TERM, TermClaim(term=number + 1), expected_revision=revision)
        except Fenced:
            return None

    revision: int | None = None
    for _ in range(5):
        revisions = await asyncio.gather(*(claim(number, revision) for number in range(20)))
        won = [(number, made) for number, made in enumerate(revisions) if made is not None]
        assert len(won) == 1
        held = await link.read(KEY_TERM, TermClaim)
        assert held is not None
        assert (held.value.term - 1, held.revision) == won[0]
        revision = held.revision


async def test_a_client_that_was_cut_off_sees_what_was_written_while_it_was_away(
    server: NatsServer, link: Link, connect: Connect
) -> None:
    async with Cable(server.port) as cable:
        away = await connect(cable.url)
        revision = await link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None)
        held = await away.read(KEY_EPOCH, EpochClaim)
        assert held is not None and held.value.epoch == 1
        cable.cut()
        with pytest.raises(DeadlineExceeded):
            await away.read(KEY_EPOCH, EpochClaim, deadline_seconds=0.5)
        for epoch in (2, 3):
            revision = await link.write(KEY_EPOCH, EpochClaim(epoch=epoch), expected_revision=revision)
        await cable.mend()
        held = await away.read(KEY_EPOCH, EpochClaim, deadline_seconds=15)
        assert held is not None and (held.value.epoch, held.revision) == (3, revision)


async def test_a_follower_that_missed_the_hint_looks_again_when_it_is_reconnected(
    server: NatsServer, link: Link, connect: Connect
) -> None:
    async with Cable(server.port) as cable:
        away = await connect(cable.url)
        # The timer alone would take a minute: what is seen sooner was woken by the hint or by the reconnect.
        follower = away.follow(KEY_EPOCH, EpochClaim, hint_subject=NAMES.published_hint, interval_seconds=60)
        revision = await link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None)
        assert await next_of(follower) == 1
        pending = asyncio.create_task(next_of(follower, 20))
        await asyncio.sleep(0.2)
        revision = await link.write(KEY_EPOCH, EpochClaim(epoch=2), expected_revision=revision)
        await link.hint(NAMES.published_hint)
        assert await pending == 2

        pending = asyncio.create_task(next_of(follower, 20))
        await asyncio.sleep(0.2)
        cable.cut()
        await link.write(KEY_EPOCH, EpochClaim(epoch=3), expected_revision=revision)
        await link.hint(NAMES.published_hint)
        await asyncio.sleep(0.5)
        assert not pending.done()
        await cable.mend()
        assert await pending == 3
        await follower.aclose()  # type: ignore[attr-defined]


async def test_a_follower_goes_on_over_three_crashes_of_the_server_and_misses_no_last_value(
    server: NatsServer, link: Link, connect: Connect
) -> None:
    writer = await connect()
    follower = link.follow(KEY_EPOCH, EpochClaim, interval_seconds=0.2)
    revision: int | None = None
    seen = []
    for epoch in range(1, 10):
        revision = await writer.write(KEY_EPOCH, EpochClaim(epoch=epoch), expected_revision=revision)
        if epoch % 3 == 0:
            # Killed right after the write was confirmed, before the follower can have looked.
            server.kill()
            await asyncio.sleep(0.3)
            server.start()
        seen.append(await next_of(follower, 20))
    assert seen == list(range(1, 10))
    await follower.aclose()  # type: ignore[attr-defined]


async def test_a_malformed_pointer_is_reported_and_the_follower_yields_the_next_good_one(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    follower = link.follow(KEY_EPOCH, EpochClaim, interval_seconds=0.1)
    await link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None)
    assert await next_of(follower) == 1
    pending = asyncio.create_task(next_of(follower))
    for garbage in (b"\xff\x00 not json", b'{"epoch": "many"}', b'{"epoch": 0}'):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "rljob.link"):
            await put_raw(link, NAMES.control_bucket, KEY_EPOCH, garbage)
            with pytest.raises(MalformedMessage, match="EpochClaim: "):
                await link.read(KEY_EPOCH, EpochClaim)
            await asyncio.sleep(0.4)
        assert "pointer refused" in [record.message for record in caplog.records]
        assert not pending.done()
    held = await (await link.jetstream.key_value(NAMES.control_bucket)).get(KEY_EPOCH)
    await link.write(KEY_EPOCH, EpochClaim(epoch=2), expected_revision=held.revision)
    assert await pending == 2
    await follower.aclose()  # type: ignore[attr-defined]


async def test_a_malformed_worker_state_hides_no_other_worker(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    state = WorkerState(worker="main-0", pool="main", incarnation="a", phase=WorkerPhase.SERVING)
    await link.beat(worker_key("main-0"), state)
    await put_raw(link, NAMES.liveness_bucket, worker_key("main-1"), b"{")
    await link.beat(worker_key("main-2"), state.model_copy(update={"worker": "main-2"}))
    with caplog.at_level(logging.WARNING, "rljob.link"):
        assert [worker.worker for worker in await link.live_workers()] == ["main-0", "main-2"]
    assert [record.message for record in caplog.records] == ["worker state refused"]


async def test_a_worker_that_writes_its_state_while_the_list_is_read_is_on_it(link: Link, connect: Connect) -> None:
    """Keys are listed by the server in one look: a consumer that is sent the keys misses one that is replaced meanwhile."""
    workers = ["main-0", "main-1", "main-2"]

    async def write(writer: Link, worker: str) -> None:
        for revision in itertools.count():
            state = WorkerState(
                worker=worker, pool="main", incarnation="a", phase=WorkerPhase.SERVING, revision=revision
            )
            await writer.beat(worker_key(worker), state)

    writing = [asyncio.create_task(write(await connect(), worker)) for worker in workers]
    try:
        while len(await link.live_workers()) < len(workers):
            await asyncio.sleep(0.01)
        for _ in range(400):
            assert [state.worker for state in await link.live_workers()] == workers
    finally:
        await deadlines.end(*writing)


def _crash(server: NatsServer) -> None:
    server.kill()


def _freeze(server: NatsServer) -> None:
    """Its socket still takes connections and bytes, and nothing ever answers."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{server.pid}/task").iterdir())
    while any((task / "stat").read_text().rsplit(")", 1)[1].split()[0] != "T" for task in tasks):
        time.sleep(0.01)  # a thread that is still running could answer


@pytest.mark.parametrize("end", [_crash, _freeze], ids=["killed", "frozen"])
async def test_every_call_ends_at_its_deadline_when_the_server_is_away(
    server: NatsServer, link: Link, end: Callable[[NatsServer], None]
) -> None:
    queue, log = TaskQueue(link), TrajectoryLog(link)
    task = Task(task=0, sample=0, epoch=1, min_version=0, seed=0)
    assert await link.read(KEY_EPOCH, EpochClaim) is None
    assert await queue.claim(1, 0.1) == []  # binds its subscription while there is a server
    beat = CoordinatorHeartbeat(term=1, generation=1, beat=1)
    calls: dict[str, Awaitable[Any]] = {
        "read": link.read(KEY_EPOCH, EpochClaim, deadline_seconds=1),
        "write": link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None, deadline_seconds=1),
        "beat": link.beat(KEY_COORDINATOR, beat, deadline_seconds=1),
        "read_live": link.read_live(KEY_COORDINATOR, CoordinatorHeartbeat, deadline_seconds=1),
        "live_workers": link.live_workers(deadline_seconds=1),
        "publish": queue.publish(task, deadline_seconds=1),
        "append": log.append(0, 0, b"trajectory", deadline_seconds=1),
        "ensure_state": link.ensure_state(LIMITS, deadline_seconds=1),
        "delete_state": link.delete_state(deadline_seconds=1),
    }
    end(server)
    started = time.monotonic()
    outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
    took = time.monotonic() - started
    for name, outcome in zip(calls, outcomes, strict=True):
        assert isinstance(outcome, DeadlineExceeded), (name, outcome)
        assert re.search("NATS did not (answer|take it) within 1 s", str(outcome)), outcome
    assert took < 8
    # Where an outage is no error, the call ends all the same.
    async with asyncio.timeout(10):
        assert await queue.claim(1, 0.5) == []
        await link.hint(NAMES.desired_hint)


@pytest.mark.parametrize("end", [_crash, _freeze], ids=["killed", "frozen"])
async def test_connecting_to_a_server_that_is_away_ends_with_what_to_check(
    server: NatsServer, end: Callable[[NatsServer], None]
) -> None:
    end(server)
    started = time.monotonic()
    with pytest.raises(MessagingUnavailable, match=r"no NATS server answered at .* within 1 s: check messaging\.url"):
        await Link.connect(NAMES, server.url, client_name="test", deadline_seconds=1)
    assert time.monotonic() - started < 15


async def test_a_full_disk_of_the_server_is_told_from_an_outage(link: Link) -> None:
    """The server sends it as an internal error, or as 503, which is otherwise waited out."""

    def attempt(code: int) -> Callable[[], Awaitable[None]]:
        async def refused() -> None:
            raise nats.js.errors.APIError.from_error(
                {"code": code, "err_code": 10077, "description": "write 1.blk: no space left on device"}
            )

        return refused

    for code in (500, 503):
        with pytest.raises(StorageFull, match=r"put: the disk of the NATS server is full .*: give JetStream more file"):
            await link.retry("put", attempt(code), deadline_seconds=2)


async def test_refused_credentials_are_named_at_once(tmp_path: Path) -> None:
    port = free_port()
    command = [find_binary(), "-a", "127.0.0.1", "-p", str(port), "--auth", "token"]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        started = time.monotonic()
        with pytest.raises(
            MessagingUnavailable, match=r"refuses these credentials: check messaging\.credentialsSecretRef"
        ):
            await Link.connect(NAMES, f"nats://127.0.0.1:{port}", client_name="test", deadline_seconds=20)
        assert time.monotonic() - started < 15
    finally:
        process.kill()
        await process.wait()


async def test_a_link_outlives_a_server_that_was_frozen_until_its_connections_were_stale(
    server: NatsServer, link: Link
) -> None:
    """20 s without an answer: the client gives the connection up, and must find the way back by itself."""
    assert server.pid is not None
    _freeze(server)
    reading = asyncio.create_task(link.read(KEY_EPOCH, EpochClaim, deadline_seconds=50))
    await asyncio.sleep(23)
    assert not reading.done()
    os.kill(server.pid, signal.SIGCONT)
    async with asyncio.timeout(15):
        assert await reading is None
    await link.write(KEY_EPOCH, EpochClaim(epoch=1), expected_revision=None, deadline_seconds=10)
