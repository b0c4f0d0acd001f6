"""Weight versions that main memory has no room for: one file each, mapped into memory, read as far as it is used."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import StorageError, StorageFull
from rljob_runtime.correction.reverse_delta import ReverseDelta

SUFFIX = ".version"
_ALIGNMENT = 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SpillFolder:
    """A folder that one process has to itself. What a dead one left there is removed at the start."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            StorageError: the folder cannot be made, or another process that lives uses it.
        """
        self._folder = folder
        self._written = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{folder} cannot hold old weight versions: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StorageError(f"{folder} holds old weight versions of another process that is running") from error
        for left_over in folder.glob(f"*{SUFFIX}"):
            left_over.unlink()

    def write(self, version: int, tensors: Mapping[str, ReverseDelta]) -> tuple[Path, dict[str, ReverseDelta]]:
        """Put a version's data into a new file; the same deltas, with their data mapped from it.

        Raises:
            StorageFull: the disk has no room; no file is left.
            StorageError: the file cannot be written; none is left.
        """
        self._written += 1
        path = self._folder / f"{version}-{self._written}{SUFFIX}"
        try:
            with path.open("xb") as file:
                # Room is claimed first: a mapped page without room on the disk would kill the process when it is used.
                os.posix_fallocate(file.fileno(), 0, max(1, _end(tensors)))
                for offset, array in _placed(tensors):
                    file.seek(offset)
                    file.write(array.data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise (StorageFull if error.errno in _FULL else StorageError)(
                f"weight version {version} cannot be kept in {self._folder}: {error.strerror}; it takes "
                f"{_end(tensors):,} bytes. Give the trainer more local disk, raise correction.snapshots.memoryBytes "
                "or lower staleness.maxVersions"
            ) from error
        mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
        arrays = iter([_view(mapped, offset, array) for offset, array in _placed(tensors)])
        return path, {
            name: replace(delta, values=next(arrays), places=next(arrays), counts=next(arrays))
            for name, delta in tensors.items()
        }

    def remove(self, path: Path) -> None:
        """Delete a file of `write`. Data that is still mapped stays readable until nobody refers to it."""
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all files and let the folder go."""
        for path in self._folder.glob(f"*{SUFFIX}"):
            path.unlink()
        os.close(self._lock)


def _placed(tensors: Mapping[str, ReverseDelta]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each array with its offset in the file, in the order that `write` reads them back in."""
    offset = 0
    for delta in tensors.values():
        for array in (delta.values, delta.places, delta.counts):
            yield offset, array
            offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def _end(tensors: Mapping[str, ReverseDelta]) -> int:
    return max((offset + array.nbytes for offset, array in _placed(tensors)), default=0)


def _view(mapped: NDArray[np.uint8], offset: int, like: NDArray[Any]) -> NDArray[Any]:
    return mapped[offset : offset + like.nbytes].view(like.dtype)
