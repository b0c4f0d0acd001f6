"""A real nats-server on loopback, and links to it, all gone when the test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from rljob_api.names import JobNames
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.server import NatsServer

UID = "test"
NAMES = JobNames(UID)
LIMITS = StateLimits(max_tasks=256, trajectory_bytes=16 << 20, max_payload_bytes=8 << 20)

Connect = Callable[..., Awaitable[Link]]
"""`await connect()` or `await connect(url)`: a link that the fixture closes."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A running server with an empty store."""
    made = NatsServer(tmp_path / "nats")
    made.start()
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
async def connect(server: NatsServer) -> AsyncIterator[Connect]:
    """Makes links; their job's state is not created."""
    links: list[Link] = []

    async def make(url: str | None = None, names: JobNames = NAMES) -> Link:
        link = await Link.connect(names, url or server.url, client_name=f"test-{len(links)}")
        links.append(link)
        return link

    try:
        yield make
    finally:
        for link in links:
            await link.close()


@pytest.fixture
async def link(connect: Connect) -> Link:
    """A link to a job whose state exists."""
    made = await connect()
    await made.ensure_state(LIMITS)
    return made
