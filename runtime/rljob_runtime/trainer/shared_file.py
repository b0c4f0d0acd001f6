"""A file of rank 0's node on the other nodes too: pods share no disk but the checkpoints' volume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rljob_runtime.trainer.distributed import World, broadcast_bytes, largest

CHUNK_BYTES = 64 << 20


@contextmanager
def on_every_node(path: Path | None, folder: Path, world: World) -> Iterator[Path | None]:
    """The path, on this node, of rank 0's file while the block lasts; None on every rank where rank 0 has none. Collective.

    Args:
        path: rank 0's file; other ranks pass None.
        folder: where the other nodes keep their copy; deleted at the end of the block.
        world: this process's place.
    """
    found = broadcast_bytes((str(path or "-")).encode() if world.is_main else None, world.device).decode()
    if found == "-":
        yield None
        return
    if world.num_nodes == 1:
        yield Path(found)
        return
    is_copy = world.node != 0
    local = folder / f"copy-{Path(found).name}" if is_copy else Path(found)
    writes = is_copy and world.local_rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        _send(Path(found), local if writes else None, world)
        largest(0, world.device)  # written on every node
        yield local
        largest(0, world.device)  # read by every rank
    finally:
        if writes:
            local.unlink(missing_ok=True)


def _send(source: Path, target: Path | None, world: World) -> None:
    size = source.stat().st_size if world.is_main else 0
    num_bytes = largest(size, world.device)
    reader = source.open("rb") if world.is_main else None
    writer = target.open("wb") if target is not None else None
    try:
        for _ in range(0, num_bytes, CHUNK_BYTES):
            data = broadcast_bytes(reader.read(CHUNK_BYTES) if reader is not None else None, world.device)
            if writer is not None:
                writer.write(data)
    finally:
        for file in (reader, writer):
            if file is not None:
                file.close()
