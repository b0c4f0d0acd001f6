"""Locks between processes, with a deadline. They are flocks: a process that dies lets go of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.devcluster.commands import wait_until
from tools.devcluster.layout import Layout

_UP_OR_DOWN_TIMEOUT_SECONDS = 1800
_FIXED_PATHS_TIMEOUT_SECONDS = 60


@contextmanager
def of_cluster(layout: Layout) -> Iterator[None]:
    """One `up` or `down` at a time for a cluster."""
    layout.lock.parent.mkdir(parents=True, exist_ok=True)
    layout.lock.touch()
    what = f"another `up` or `down` of cluster {layout.name} to end"
    with _locked(layout.lock, what, _UP_OR_DOWN_TIMEOUT_SECONDS):
        yield


@contextmanager
def of_fixed_paths() -> Iterator[None]:
    """One cluster at a time mounts over, or removes, the paths that all clusters of a machine share.

    Removing a folder unmounts, without an error, what is mounted on it in other mount namespaces.
    """
    with _locked(Path("/var/lib"), "another cluster's mounts", _FIXED_PATHS_TIMEOUT_SECONDS):
        yield


@contextmanager
def _locked(path: Path, what: str, timeout_seconds: float) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)

    def acquired() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        wait_until(what, acquired, timeout_seconds=timeout_seconds)
        yield
    finally:
        os.close(descriptor)
