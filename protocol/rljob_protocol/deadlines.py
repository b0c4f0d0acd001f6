"""Deadlines and cancellations that hold.

In Python 3.11 `asyncio.wait_for` returns its result instead of passing on a cancellation that comes at the same moment,
and the NATS client, which uses it everywhere, swallows others by itself. A deadline that cancels once can then be lost:
what it was to end goes on for ever. Here the work runs in a task of its own, which is cancelled until it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_AGAIN_SECONDS = 0.2


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The work's result.

    Raises:
        TimeoutError: it did not end in time and was cancelled.
        ConnectionAbortedError: it was cancelled, and not by us: its client gave it up.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError(f"did not end within {seconds:g} s")
    finally:
        await end(task)
        if not task.cancelled():
            task.exception()  # seen, also where our caller was cancelled: else asyncio complains of it at collection
    if task.cancelled():
        raise ConnectionAbortedError("given up by its client")
    return task.result()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks until they have ended; how they ended is theirs."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_SECONDS)
