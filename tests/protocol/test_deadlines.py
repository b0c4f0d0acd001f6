"""Deadlines hold against work that swallows cancellations, and hide none of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rljob_protocol.deadlines import end, within

LONG = 30.0


class Stubborn:
    """Work that survives its first cancellations, as the NATS client's does."""

    def __init__(self, survives: int) -> None:
        self.left = survives
        self.is_running = False

    async def work(self) -> None:
        self.is_running = True
        try:
            while True:
                try:
                    await asyncio.sleep(LONG)
                except asyncio.CancelledError:
                    if self.left == 0:
                        raise
                    self.left -= 1
        finally:
            self.is_running = False


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def refuse() -> int:
    raise ValueError("no")


async def test_a_result_and_an_error_pass_through() -> None:
    assert await within(LONG, answer()) == 42
    with pytest.raises(ValueError, match="no"):
        await within(LONG, refuse())


@pytest.mark.parametrize("survives", [0, 1, 3])
async def test_work_that_swallows_cancellations_is_ended_all_the_same(survives: int) -> None:
    stubborn = Stubborn(survives)
    with pytest.raises(TimeoutError):
        await within(0.01, stubborn.work())
    assert not stubborn.is_running


async def test_a_plain_timeout_loses_to_it() -> None:
    stubborn = Stubborn(1)

    async def timed() -> None:
        async with asyncio.timeout(0.01):
            await stubborn.work()

    task = asyncio.create_task(timed())
    await asyncio.sleep(0.3)
    assert stubborn.is_running
    await end(task)
    assert not stubborn.is_running


async def test_the_callers_cancellation_is_never_lost() -> None:
    """Also where it comes in the moment in which the work ends: asyncio.wait_for returns the result then."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> int:
        return await future

    for timed in (asyncio.create_task(within(LONG, wait())), asyncio.create_task(within(LONG, Stubborn(2).work()))):
        await asyncio.sleep(0.01)
        if not future.done():
            future.set_result(1)
        timed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await timed


async def test_work_that_its_client_cancels_is_a_lost_connection_and_not_our_end() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> int:
        return await future

    task = asyncio.create_task(within(LONG, wait()))
    await asyncio.sleep(0.01)
    future.cancel()
    with pytest.raises(ConnectionAbortedError):
        await task


async def test_end_takes_generators_and_groups_with_it() -> None:
    stubborn = [Stubborn(survives) for survives in range(3)]

    async def numbers() -> AsyncIterator[int]:
        while True:
            yield 1
            await asyncio.sleep(LONG)

    async def read() -> None:
        async for _ in numbers():
            pass

    tasks = [asyncio.create_task(one.work()) for one in stubborn] + [asyncio.create_task(read())]
    await asyncio.sleep(0.01)
    await end(*tasks)
    assert all(task.done() for task in tasks)
    assert not any(one.is_running for one in stubborn)
    await end(*tasks)
