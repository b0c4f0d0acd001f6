"""Tasks and trajectories on a real nats-server: leases, bounds, and what survives its crash."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from tests.integration.conftest import LIMITS, NAMES, Connect

from rljob_api.errors import DeadlineExceeded
from rljob_api.messages import Task
from rljob_api.names import JobNames
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.server import NatsServer
from rljob_protocol.streams import ClaimedTask, TaskQueue, TrajectoryLog

pytestmark = pytest.mark.timeout(180)

Bounded = Callable[[StateLimits], Awaitable[Link]]


@pytest.fixture
def bounded(connect: Connect) -> Bounded:
    """A link to a job of its own with these bounds."""

    async def make(limits: StateLimits) -> Link:
        link = await connect(names=JobNames("bounded"))
        await link.ensure_state(limits)
        return link

    return make


def task(number: int, sample: int = 0) -> Task:
    return Task(task=number, sample=sample, epoch=1, min_version=0, seed=number)


async def claim_within(queue: TaskQueue, seconds: float, most: int = 16) -> list[ClaimedTask]:
    """The first leases that come within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if claimed := await queue.claim(most, max(0.1, min(0.5, deadline - time.monotonic()))):
            return claimed
    return []


async def read_all(log: TrajectoryLog, after: int, count: int, seconds: float = 20.0) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    async with asyncio.timeout(seconds):
        async for sequence, data in log.read(after):
            found.append((sequence, data))
            if len(found) == count:
                break
    return found


async def test_a_sample_published_twice_is_queued_once_also_while_it_is_leased(link: Link) -> None:
    queue = TaskQueue(link)
    assert await queue.publish(task(1, 2)) is True
    assert await queue.publish(task(1, 2)) is False
    assert await queue.publish(task(1, 3)) is True
    assert await queue.depth() == 2
    leases = await claim_within(queue, 5)
    assert sorted((lease.task.task, lease.task.sample) for lease in leases) == [(1, 2), (1, 3)]
    assert await queue.publish(task(1, 2)) is False
    for lease in leases:
        await lease.ack()
    assert await queue.depth() == 0
    assert await queue.claim(16, 0.5) == []


async def test_an_unacknowledged_lease_comes_back_after_ack_wait_unless_it_is_extended(bounded: Bounded) -> None:
    queue = TaskQueue(await bounded(replace(LIMITS, ack_wait_seconds=1.5)))
    await queue.publish(task(0))
    await queue.publish(task(1))
    started = time.monotonic()
    forgotten, kept = sorted(await claim_within(queue, 5), key=lambda lease: lease.task.task)
    assert (forgotten.attempt, kept.attempt) == (1, 1)

    async def extend() -> None:
        while True:
            await asyncio.sleep(0.4)
            await kept.extend()

    extending = asyncio.create_task(extend())
    try:
        (again,) = await claim_within(queue, 6)
        assert (again.task, again.attempt) == (forgotten.task, 2)
        assert time.monotonic() - started > 1.4
        await again.ack()
        assert await claim_within(queue, 2.5) == []
    finally:
        extending.cancel()
        await asyncio.gather(extending, return_exceptions=True)
    await kept.ack()
    assert await queue.depth() == 0


async def test_a_released_sample_comes_back_after_its_delay_and_at_once_without_one(link: Link) -> None:
    queue = TaskQueue(link)
    await queue.publish(task(0))
    (lease,) = await claim_within(queue, 5)
    await lease.release()
    (lease,) = await claim_within(queue, 2)
    assert lease.attempt == 2
    released = time.monotonic()
    await lease.release(1.5)
    (lease,) = await claim_within(queue, 5)
    assert lease.attempt == 3
    assert time.monotonic() - released > 1.4
    await lease.ack()


async def test_a_full_task_stream_makes_the_publisher_wait_and_loses_no_sample(bounded: Bounded) -> None:
    queue = TaskQueue(await bounded(replace(LIMITS, max_tasks=4)))
    for number in range(4):
        assert await queue.publish(task(number))
    with pytest.raises(DeadlineExceeded, match=r"task 4/0: the task stream stayed full for 0\.6 s"):
        await queue.publish(task(4), deadline_seconds=0.6)
    # A duplicate is told from a full stream.
    assert await queue.publish(task(3), deadline_seconds=0.6) is False

    async def publish_rest() -> None:
        for number in range(4, 12):
            assert await queue.publish(task(number), deadline_seconds=20)

    publishing = asyncio.create_task(publish_rest())
    await asyncio.sleep(0.3)
    done: list[int] = []
    while len(done) < 12:
        leases = await claim_within(queue, 10, 2)
        assert leases
        assert await queue.depth() <= 4
        for lease in leases:
            done.append(lease.task.task)
            await lease.ack()
    await publishing
    assert sorted(done) == list(range(12))


async def test_no_sample_is_lost_or_acknowledged_twice_over_a_crash_of_the_server(
    server: NatsServer, link: Link
) -> None:
    queue = TaskQueue(link)
    for number in range(6):
        await queue.publish(task(number))
    held = await claim_within(queue, 5, 2)
    server.kill()
    publishing = asyncio.create_task(queue.publish(task(6), deadline_seconds=20))
    await asyncio.sleep(0.3)
    server.start()
    assert await publishing

    async def acknowledged(lease: ClaimedTask) -> bool:
        try:
            await lease.ack()
        except DeadlineExceeded:
            return False  # the crash took the lease out of the server's memory: the sample is given out again
        return True

    done = [lease.task.task for lease in held if await acknowledged(lease)]
    while set(done) < set(range(7)):
        leases = await claim_within(queue, 15)
        assert leases
        done += [lease.task.task for lease in leases if await acknowledged(lease)]
    assert sorted(done) == list(range(7))
    assert await queue.depth() == 0


async def test_withdrawn_samples_are_gone_queued_or_leased_and_their_numbers_can_come_again(link: Link) -> None:
    queue = TaskQueue(link)
    for number in (7, 8, 11):
        for sample in (0, 1):
            assert await queue.publish(task(number, sample))
    (leased,) = await claim_within(queue, 5.0, most=1)
    assert (leased.task.task, leased.task.sample) == (7, 0)
    assert await queue.withdraw(8) == 2
    assert await queue.depth() == 2
    assert await queue.withdraw(8) == 0
    assert await queue.withdraw(7) == 1
    await leased.ack()  # its worker went on, and hears of nothing
    assert await queue.publish(task(8))
    (claimed,) = await claim_within(queue, 5.0)
    assert (claimed.task.task, claimed.task.sample) == (8, 0)


async def test_a_malformed_task_is_removed_and_counted_and_the_next_is_served(link: Link) -> None:
    queue = TaskQueue(link)
    await link.jetstream.publish(NAMES.task_subject(0, 0), b"\x00 garbage")
    await link.jetstream.publish(NAMES.task_subject(0, 1), b'{"task": -1}')
    await queue.publish(task(1))
    (lease,) = await claim_within(queue, 5)
    assert lease.task.task == 1
    await lease.ack()
    assert queue.malformed == 2
    assert await queue.depth() == 0


async def test_a_full_trajectory_log_makes_workers_wait_until_it_is_cut_and_loses_nothing(bounded: Bounded) -> None:
    log = TrajectoryLog(await bounded(replace(LIMITS, trajectory_bytes=64 << 10)))
    payloads = [bytes([number]) * 10_000 for number in range(16)]
    stored: list[int] = []

    async def fill() -> None:
        for number, payload in enumerate(payloads):
            stored.append(await log.append(number, 0, payload, deadline_seconds=0.6))

    with pytest.raises(
        DeadlineExceeded, match=r"the log stayed full for 0\.6 s: the trainer does not checkpoint, or mess"
    ):
        await fill()
    assert 4 <= len(stored) <= 6
    used, allowed = await log.usage()
    assert allowed == 64 << 10
    assert 0.8 < used / allowed <= 1

    async def append_rest() -> None:
        for number in range(len(stored), 16):
            await log.append(number, 0, payloads[number], deadline_seconds=30)

    appending = asyncio.create_task(append_rest())
    await asyncio.sleep(0.3)
    assert not appending.done()
    read: list[tuple[int, bytes]] = []
    async with asyncio.timeout(40):
        async for sequence, data in log.read(0):
            read.append((sequence, data))
            if len(read) == 16:
                break
            if len(read) % 4 == 0:
                await log.cut(sequence)  # as a checkpoint does
    await appending
    assert [data for _, data in read] == payloads
    assert [sequence for sequence, _ in read] == sorted({sequence for sequence, _ in read})


async def test_the_log_is_read_in_order_from_a_cursor_without_gap_or_repeat_over_crashes(
    server: NatsServer, link: Link, connect: Connect
) -> None:
    log, reader = TrajectoryLog(link), TrajectoryLog(await connect())
    sequences = [await log.append(number, 0, f"{number}".encode()) for number in range(150)]
    reading = asyncio.create_task(read_all(reader, sequences[19], 280, seconds=50))
    await asyncio.sleep(0.5)
    server.kill()
    appending = asyncio.create_task(log.append(150, 0, b"150", deadline_seconds=20))
    await asyncio.sleep(0.3)
    server.start()
    await appending
    for number in range(151, 220):
        await log.append(number, 0, f"{number}".encode())
    server.restart()
    for number in range(220, 300):
        await log.append(number, 0, f"{number}".encode())
    read = await reading
    assert [int(data) for _, data in read] == list(range(20, 300))
    assert [sequence for sequence, _ in read] == list(range(sequences[19] + 1, sequences[19] + 281))
    again = await read_all(reader, read[100][0], 179)
    assert again == read[101:]


async def test_a_trajectory_appended_again_is_stored_once_also_after_a_crash(server: NatsServer, link: Link) -> None:
    log = TrajectoryLog(link)
    first = await log.append(7, 0, b"same")
    assert await log.append(7, 0, b"same") == first
    server.restart()
    assert await log.append(7, 0, b"same") == first
    # Another attempt at the sample is another trajectory: the trainer's ledger decides between them.
    second = await log.append(7, 0, b"another attempt")
    assert (await log.last_sequence(), second) == (2, 2)


async def test_a_trajectory_whose_append_met_a_long_outage_is_stored_once(server: NatsServer, link: Link) -> None:
    """The client keeps every unanswered attempt and sends all of them when the server is back."""
    log = TrajectoryLog(link)
    server.kill()
    appending = [
        asyncio.create_task(log.append(number, 0, f"{number}".encode(), deadline_seconds=40)) for number in range(3)
    ]
    await asyncio.sleep(12)  # longer than an attempt waits for its answer
    server.start()
    async with asyncio.timeout(20):
        sequences = await asyncio.gather(*appending)
    assert sorted(sequences) == [1, 2, 3]
    await asyncio.sleep(0.5)
    assert await log.last_sequence() == 3
