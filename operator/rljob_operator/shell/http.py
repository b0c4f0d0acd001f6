"""/metrics and /healthz on one port, by hand: two fixed answers need no framework."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

REQUEST_SECONDS = 5.0


async def serve(port: int, registry: CollectorRegistry, stuck: Callable[[], str], refresh: Callable[[], None]) -> None:
    """Until cancelled. `stuck` gives a sentence about what is stuck, or nothing; `refresh` brings gauges up to date."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
                path = line.split(b" ")[1].split(b"?")[0] if line.count(b" ") >= 2 else b""
                status, kind, body = _answer(path, registry, stuck, refresh)
                head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (TimeoutError, OSError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", port)
    async with server:
        await server.serve_forever()


def _answer(
    path: bytes, registry: CollectorRegistry, stuck: Callable[[], str], refresh: Callable[[], None]
) -> tuple[str, str, bytes]:
    if path == b"/metrics":
        refresh()
        return "200 OK", "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry)
    if path == b"/healthz":
        sentence = stuck()
        if sentence:
            return "503 Service Unavailable", "text/plain; charset=utf-8", sentence.encode() + b"\n"
        return "200 OK", "text/plain; charset=utf-8", b"ok\n"
    return "404 Not Found", "text/plain; charset=utf-8", b"/metrics and /healthz are here\n"
