"""The run's own nats-server: started again on the same port and store when it ends."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rljob_api.errors import MessagingUnavailable
from rljob_protocol.server import NatsServer

MIN_FREE_BYTES = 4 << 20
MAX_RESTARTS = 20
RESTART_SECONDS = 120.0
"""How long a server that does not start is tried again; the other processes wait out an outage of that length."""
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)


class TendedServer:
    """A nats-server whose end is noticed by `tend`."""

    def __init__(
        self, directory: Path, *, port: int | None, max_payload_bytes: int, say: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._server = NatsServer(directory, port=port, max_payload_bytes=max_payload_bytes)
        self._say = say
        self._restarts = 0
        self._down_since: float | None = None
        self._retry_at = 0.0
        self._attempts = 0

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            MessagingUnavailable: it does not; the message says why.
        """
        self._server.start()

    def stop(self) -> None:
        """End it in order."""
        self._server.stop()

    def is_running(self) -> bool:
        """True while the process lives."""
        return self._server.is_running()

    async def tend(self, how_to_go_on: str) -> str | None:
        """Start it again if it ended and an attempt is due; the reason once the run must fail."""
        free = shutil.disk_usage(self._directory).free
        if free < MIN_FREE_BYTES:
            # Ended while there is room for last words: at none at all the server answers nobody, and all wait.
            return (
                f"{self._directory} has no room left for messages ({free >> 10} KiB free): free some, then go on with "
                f"{how_to_go_on}"
            )
        return None if self.is_running() else await self._restart()

    async def _restart(self) -> str | None:
        now = time.monotonic()
        if self._down_since is None:
            if self._restarts >= MAX_RESTARTS:
                return f"nats-server ended {self._restarts} times (see {self._directory / 'nats.log'})"
            self._restarts += 1
            self._down_since = self._retry_at = now
            self._say("nats-server ended: starting it again on the same port and store")
        if now < self._retry_at:
            return None
        try:
            await asyncio.to_thread(self._server.restart)
        except MessagingUnavailable as error:
            if time.monotonic() - self._down_since >= RESTART_SECONDS:
                return f"nats-server could not be started again for {RESTART_SECONDS:g} s: {error}"
            wait = BACKOFF_SECONDS[min(self._attempts, len(BACKOFF_SECONDS) - 1)]
            self._attempts += 1
            self._retry_at = time.monotonic() + wait
            self._say(f"nats-server did not start ({error}): trying again in {wait:g} s")
            return None
        if self._attempts:
            self._say(f"nats-server is back after {time.monotonic() - self._down_since:.0f} s")
        self._down_since, self._attempts = None, 0
        return None
