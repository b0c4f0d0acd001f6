"""A job's state in NATS: who owns it, that it grows with its bound, and that a sweep takes only what is its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime

from tests.integration.conftest import LIMITS, Connect

from rljob_api.names import JobNames
from rljob_operator.shell.coordination import Coordination
from rljob_protocol.server import NatsServer


async def exists(connect: Connect, uid: str) -> bool:
    link = await connect(names=JobNames(uid))
    return any(uid in (info.config.name or "") for info in await link.jetstream.streams_info())


def coordination(server: NatsServer, owner: str) -> Coordination:
    async def nothing(*_: str) -> None:
        return

    return Coordination(
        default_url=server.url,
        credentials=None,
        restart_pod=nothing,
        changed=lambda *_: None,
        owner=lambda: owner,
        wall_clock=lambda: datetime(2026, 11, 23, tzinfo=UTC),
        logger=logging.getLogger("test"),
    )


async def made(connect: Connect, uid: str, owner: str) -> None:
    link = await connect(names=JobNames(uid))
    await link.ensure_state(LIMITS, owner=owner)


async def test_a_sweep_takes_what_two_looks_found_without_a_job_and_nothing_of_others(
    server: NatsServer, connect: Connect
) -> None:
    for uid, owner in (("living", "me"), ("orphan", "me"), ("theirs", "other"), ("unmarked", "")):
        await made(connect, uid, owner)
    swept = coordination(server, "me")
    assert await swept.sweep(lambda: frozenset({"living"})) == 0, "it may only just have been created"
    assert await swept.sweep(lambda: frozenset({"living"})) == 1
    left = {uid: await exists(connect, uid) for uid in ("living", "orphan", "theirs", "unmarked")}
    assert left == {"living": True, "orphan": False, "theirs": True, "unmarked": True}
    assert await swept.sweep(lambda: frozenset({"living"})) == 0


async def test_a_job_that_appears_between_two_looks_is_kept(server: NatsServer, connect: Connect) -> None:
    await made(connect, "young", "me")
    swept = coordination(server, "me")
    assert await swept.sweep(frozenset) == 0
    assert await swept.sweep(lambda: frozenset({"young"})) == 0
    assert await exists(connect, "young")


async def test_a_deletion_that_was_cut_off_is_found_by_the_sweep(server: NatsServer, connect: Connect) -> None:
    await made(connect, "half", "me")
    link = await connect(names=JobNames("half"))
    for stream in (link.names.trajectories_stream, f"KV_{link.names.control_bucket}"):
        await link.jetstream.delete_stream(stream)
    assert [names.uid for names in await link.jobs_of("me")] == ["half"]


async def test_a_raised_bound_makes_the_task_stream_longer_and_a_lowered_one_does_not_cut_it(connect: Connect) -> None:
    link = await connect()
    await link.ensure_state(LIMITS)

    async def length() -> tuple[int | None, int | None]:
        stream = await link.jetstream.stream_info(link.names.tasks_stream)
        consumer = await link.jetstream.consumer_info(link.names.tasks_stream, link.names.rollout_consumer)
        return stream.config.max_msgs, consumer.config.max_ack_pending

    assert await length() == (256, 1000)
    await link.ensure_state(replace(LIMITS, max_tasks=4096))
    assert await length() == (4096, 4096)
    await link.ensure_state(LIMITS)
    assert await length() == (4096, 4096)
