"""Environment calls on threads, with a deadline each.

Own daemon threads rather than a ThreadPoolExecutor: Python joins an executor's threads at exit, so one hung environment
would keep a drained worker from ever stopping. A thread that hangs cannot be killed; it is counted and holds its slot
until it returns, and when all slots hang the worker must be restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from rljob_api.errors import EnvironmentFailure, RljobError

T = TypeVar("T")


class EnvironmentThreads:
    """At most `size` calls at once; further ones wait for a slot."""

    def __init__(self, size: int, timeout_seconds: float) -> None:
        self._size = size
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(size)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._running = 0
        self._late: set[asyncio.Future[Any]] = set()
        self.hung = 0
        """Calls that outlived their timeout and have not returned yet."""

    async def call(self, what: str, function: Callable[[], T]) -> T:
        """The function's result, computed on a thread. `what` names the call in errors.

        Raises:
            EnvironmentFailure: it raised, or did not return within the timeout.
            RljobError: every thread hangs; nothing can run any more.
        """
        await self._slot()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._running += 1
        if self._threads < self._running:
            self._threads += 1
            threading.Thread(
                target=_serve, args=(self._calls,), name=f"environment-{self._threads}", daemon=True
            ).start()
        self._calls.put(lambda: _run(function, loop, lambda settle: self._returned(answer, settle)))
        timer = loop.call_later(self._timeout_seconds, self._give_up, answer, what)
        try:
            return await answer
        except EnvironmentFailure:
            raise
        except RljobError as error:
            raise EnvironmentFailure(f"{what}: {error}") from error
        except Exception as error:  # the environment's own: whatever it is, it says nothing about our state
            raise EnvironmentFailure(f"{what} raised {type(error).__name__}: {error}") from error
        finally:
            timer.cancel()

    def close(self) -> None:
        """Let idle threads end; hung ones are left behind as daemons."""
        for _ in range(self._threads):
            self._calls.put(None)

    async def _slot(self) -> None:
        if self.hung < self._size and not self._slots.locked():
            await self._slots.acquire()  # at once: a deadline would cost more than most calls
            return
        while True:
            if self.hung >= self._size:
                raise RljobError(
                    f"all {self._size} environment threads hang: restart the worker, and look for a call in the "
                    "environment that never returns"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_seconds):
                    await self._slots.acquire()
                return

    def _give_up(self, answer: asyncio.Future[Any], what: str) -> None:
        if not answer.done():
            self.hung += 1
            self._late.add(answer)
            limit = f"{self._timeout_seconds:g} s (environment.timeoutSeconds)"
            answer.set_exception(EnvironmentFailure(f"{what} did not return within {limit}"))

    def _returned(self, answer: asyncio.Future[Any], settle: Callable[[asyncio.Future[Any]], None]) -> None:
        self._running -= 1
        self._slots.release()
        if answer in self._late:
            self._late.discard(answer)
            self.hung -= 1
        elif not answer.done():  # else its caller was cancelled
            settle(answer)


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()


def _run(
    function: Callable[[], T],
    loop: asyncio.AbstractEventLoop,
    returned: Callable[[Callable[[asyncio.Future[T]], None]], None],
) -> None:
    settle: Callable[[asyncio.Future[T]], None]
    try:
        result = function()
    except Exception as error:  # the top of the thread's loop: whatever it is, the caller gets it as EnvironmentFailure
        # A future refuses StopIteration, and its caller would wait for ever.
        caught = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
        settle = lambda answer: answer.set_exception(caught)  # noqa: E731
    else:
        settle = lambda answer: answer.set_result(result)  # noqa: E731
    with contextlib.suppress(RuntimeError):  # the event loop is closed: the worker has stopped meanwhile
        loop.call_soon_threadsafe(returned, settle)
