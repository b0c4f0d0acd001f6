"""Whether workers find the newest version damaged in the store while the trainer waits for what they make with it.

Without that version they may never make anything that the staleness bound lets in, and then no next version comes: the
trainer, which still holds the weights, stores them again.

    produces    the workers that cannot read the newest version
    consumes    worker states, read on a timer while the trainer waits
    waits for   its timer
    unblocked by  the timer; each read has a deadline
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from rljob_api.errors import DeadlineExceeded
from rljob_protocol.link import Link

LOOK_SECONDS = 10.0
AGAIN_SECONDS = 60.0
"""By then every worker has tried again: longer than its longest wait between two fetches (protocol/worker.py)."""


class DamageWatch:
    """Lives on the background loop; the loop's thread reads what it found."""

    def __init__(
        self,
        link: Link,
        epoch: int,
        waits_with: Callable[[], int | None],
        logger: logging.Logger,
        *,
        look_seconds: float = LOOK_SECONDS,
        again_seconds: float = AGAIN_SECONDS,
    ) -> None:
        """`waits_with` gives the version that the trainer published last while it waits, None while it works."""
        self._link = link
        self._epoch = epoch
        self._waits_with = waits_with
        self._logger = logger
        self._look_seconds = look_seconds
        self._again_seconds = again_seconds
        self._found: tuple[int, tuple[str, ...]] | None = None
        self._restored: tuple[int, float] | None = None

    def workers_without(self, version: int) -> tuple[str, ...]:
        """Live workers that found this version damaged or gone when they last fetched it."""
        found = self._found
        return found[1] if found is not None and found[0] == version else ()

    def restored(self, version: int) -> None:
        """The version was stored again: what workers found before counts no more."""
        self._restored = version, time.monotonic()
        self._found = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._look_seconds)
            version = self._waits_with()
            if version is None or self._is_being_tried(version):
                self._found = None
                continue
            try:
                states = await self._link.live_workers()
            except DeadlineExceeded as error:
                self._logger.warning("worker states could not be read", extra={"error": str(error)})
                continue
            if not self._is_being_tried(version):  # since the states were asked for
                self._found = version, tuple(s.worker for s in states if s.unreadable == (self._epoch, version))

    def _is_being_tried(self, version: int) -> bool:
        if self._restored is None or self._restored[0] != version:
            return False
        return time.monotonic() - self._restored[1] < self._again_seconds
