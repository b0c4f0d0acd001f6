"""The segment and score streams on a real nats-server: read by cursor, and never in the way of those who append."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.integration.conftest import LIMITS, Connect

from rljob_api.names import JobNames
from rljob_protocol.ahead import ScoreLog, SegmentLog
from rljob_protocol.link import Link
from rljob_protocol.message_log import MessageLog
from rljob_protocol.server import NatsServer

pytestmark = pytest.mark.timeout(180)


async def read_until(log: MessageLog, after: int, last: int) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    async with asyncio.timeout(20):
        async for sequence, data in log.read(after):
            found.append((sequence, data))
            if sequence >= last:
                break
    return found


async def test_segments_and_scores_are_read_from_a_cursor_each_on_its_own_stream(
    server: NatsServer, link: Link
) -> None:
    segments, scores = SegmentLog(link), ScoreLog(link)
    assert [await segments.append(1, 2, data) for data in (b"a", b"b", b"b")] == [1, 2, 3]
    assert await scores.append(1, 2, b"s") == 1
    assert await read_until(segments, 1, 3) == [(2, b"b"), (3, b"b")]
    server.restart()
    assert await read_until(scores, 0, 1) == [(1, b"s")]
    assert (await segments.last_sequence(), await scores.last_sequence()) == (3, 1)


async def test_a_full_stream_discards_its_oldest_messages_and_takes_each_new_one_at_once(connect: Connect) -> None:
    link = await connect(names=JobNames("bounded"))
    await link.ensure_state(replace(LIMITS, ahead_bytes=64 << 10))
    log = SegmentLog(link)
    payloads = [bytes([number]) * 10_000 for number in range(16)]
    sequences = [await log.append(number, 0, data, deadline_seconds=5) for number, data in enumerate(payloads)]
    used, allowed = await log.usage()
    assert used <= allowed == 64 << 10
    read = await read_until(log, 0, sequences[-1])
    kept = len(read)
    assert 4 <= kept <= 6
    assert read == list(zip(sequences, payloads, strict=True))[-kept:]
