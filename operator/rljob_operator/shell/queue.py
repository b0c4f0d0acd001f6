"""A queue of keys: each at most once in it, never two passes of one key at a time, failures with growing pauses."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable

BACKOFF_SECONDS = (0.2, 60.0)

Key = tuple[str, str]
"""(namespace, name)"""


class WorkQueue:
    """Keys to be worked on. `jitter()` gives a number in [0, 1).

    produces    keys, to `get`
    consumes    `add`, `add_after`, `done`
    waits for   a key, or the moment at which one becomes due
    unblocked by  `add`, a timer
    """

    def __init__(self, jitter: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._jitter = jitter
        self._clock = clock
        self._ready: OrderedDict[Key, float] = OrderedDict()
        """Key -> since when."""
        self._running: dict[Key, float] = {}
        self._again: set[Key] = set()
        """Added while they ran."""
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._numbers = itertools.count()
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    @property
    def depth(self) -> int:
        return len(self._ready)

    @property
    def oldest_seconds(self) -> float:
        """How long the oldest key waits or runs."""
        since = min([*self._ready.values(), *self._running.values()], default=None)
        return 0.0 if since is None else self._clock() - since

    def add(self, key: Key) -> None:
        """Now; if it runs, once more afterwards."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._ready:
            self._ready[key] = self._clock()
            self._changed.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Later; of several moments the earliest counts."""
        if seconds <= 0:
            self.add(key)
            return
        at = self._clock() + seconds
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            heapq.heappush(self._heap, (at, next(self._numbers), key))
            self._changed.set()

    async def get(self) -> Key:
        """The next key; `done` must follow."""
        while True:
            self._move_due()
            if self._ready:
                key, _ = self._ready.popitem(last=False)
                self._running[key] = self._clock()
                return key
            self._changed.clear()
            wait = self._heap[0][0] - self._clock() if self._heap else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: Key, *, failed: bool = False, retry_after: float | None = None) -> float:
        """The pass is over. A failed one comes again after a pause, which is returned (0 else)."""
        del self._running[key]
        again = key in self._again
        self._again.discard(key)
        if not failed:
            self._failures.pop(key, None)
            if again:
                self.add(key)
            return 0.0
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        pause = min(BACKOFF_SECONDS[0] * 2.0 ** min(count, 20), BACKOFF_SECONDS[1]) * (0.75 + 0.5 * self._jitter())
        pause = max(pause, retry_after or 0.0)
        self.add_after(key, pause)
        return pause

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    def _move_due(self) -> None:
        while self._heap and self._heap[0][0] <= self._clock():
            at, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == at:
                del self._due[key]
                self.add(key)
