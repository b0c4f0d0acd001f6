"""A loopback cable between a client and the server that a test can cut and mend: the client is away, the server is not."""

from __future__ import annotations

import asyncio
from types import TracebackType

from rljob_protocol.server import free_port


class Cable:
    """Carries bytes between its own port and the server's, until it is cut."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._port = free_port()
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Cable:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    async def mend(self) -> None:
        """New connections reach the server again."""
        self._listener = await asyncio.start_server(self._carry, "127.0.0.1", self._port)

    def cut(self) -> None:
        """Every connection breaks and no new one is made."""
        if self._listener is not None:
            self._listener.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers |= {writer, server_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, server_writer))
                group.create_task(self._copy(server_reader, writer))
        finally:
            self._writers -= {writer, server_writer}

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.transport.abort()
