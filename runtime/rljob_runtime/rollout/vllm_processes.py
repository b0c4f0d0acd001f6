"""Ends the processes that an engine started, whatever state it is in."""

from __future__ import annotations

import psutil

TERMINATE_SECONDS = 5.0
KILL_SECONDS = 5.0


def children() -> frozenset[psutil.Process]:
    """Every process below this one, but for Python's own resource tracker, which lives as long as this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in process.cmdline()):
                found.add(process)
        except psutil.NoSuchProcess:
            continue
    return frozenset(found)


def end(processes: frozenset[psutil.Process]) -> int:
    """Wait for processes to end, then kill what is left; returns how many had to be killed. Blocks."""
    _, left = psutil.wait_procs(processes, timeout=TERMINATE_SECONDS)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=KILL_SECONDS)
    return len(left)
