"""An asyncio loop on its own thread, so that NATS goes on while the trainer's main thread computes.

produces    results of coroutines, to the main thread
consumes    coroutines that the main thread submits
waits for   submissions; each call has a deadline
unblocked by  the coroutine's end, its deadline, or a crash of a long-running task, which fails every later call
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from rljob_api.errors import DeadlineExceeded
from rljob_protocol.deadlines import end

T = TypeVar("T")


class Background:
    """Owns the thread, the loop and its long-running tasks."""

    def __init__(self, name: str = "nats") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._running: list[concurrent.futures.Future[None]] = []
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T], *, deadline_seconds: float) -> T:
        """Run a coroutine on the loop and wait for its result.

        Raises:
            DeadlineExceeded: it took longer than the deadline; it was cancelled.
            Exception: whatever the coroutine raised, or what ended a long-running task before.
        """
        self.check()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(deadline_seconds)
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise DeadlineExceeded(
                f"{getattr(coroutine, '__qualname__', coroutine)} took longer than {deadline_seconds:g} s"
            ) from error

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Keep a coroutine running until `stop`; should it fail, the next `call` or `check` raises its error."""
        self._running.append(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def check(self) -> None:
        """Raise what ended a long-running task, if one ended."""
        for future in self._running:
            if future.done() and not future.cancelled():
                future.result()

    def cancel_tasks(self) -> None:
        """Cancel the long-running tasks; calls still work."""
        for future in self._running:
            future.cancel()
        self._running.clear()

    def stop(self) -> None:
        """Cancel everything and end the thread."""
        self.cancel_tasks()
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @staticmethod
    async def _drain() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await end(*others)
        await asyncio.gather(*others, return_exceptions=True)
