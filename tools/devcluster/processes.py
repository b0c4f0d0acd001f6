"""Long-running processes: each is recorded by pid and start time before it runs, and only such a record is ever ended.

A pid alone is not an identity, since pids are used again; the start time in clock ticks since boot makes it one.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout


@dataclass(frozen=True, slots=True)
class Process:
    """A process by pid and start time (clock ticks since boot)."""

    name: str
    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks

    def signal(self, number: signal.Signals) -> None:
        if self.is_alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, or None when there is no such process; a zombie has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the program's name, in brackets, may hold blanks
    return None if fields[0] in "ZX" else int(fields[19])


def start(layout: Layout, name: str, command: Sequence[str | Path]) -> Process:
    """Start `command` in a session of its own, logging to NAME.log, unless the recorded one still runs."""
    known = recorded(layout, name)
    if known is not None and known.is_alive():
        return known
    layout.processes.mkdir(parents=True, exist_ok=True)
    layout.logs.mkdir(parents=True, exist_ok=True)
    record = layout.processes / name

    def record_this_process() -> None:
        # In the child, before the program: if we are killed right now, `down` still finds it. The program that it
        # becomes (exec, nsenter, unshare without fork) keeps pid and start time.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        record.write_text(f"{os.getpid()} {start_ticks(os.getpid())}\n")

    with (layout.logs / f"{name}.log").open("ab") as log:
        subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=layout.state,
            preexec_fn=record_this_process,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(layout.state)},
        )
    found = recorded(layout, name)
    if found is None:
        raise DevClusterError(f"{name} was started and left no record in {layout.processes}: the folder was removed.")
    return found


def recorded(layout: Layout, name: str) -> Process | None:
    try:
        pid, ticks = (layout.processes / name).read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return Process(name, int(pid), int(ticks))


def all_recorded(layout: Layout) -> tuple[Process, ...]:
    if not layout.processes.is_dir():
        return ()
    found = (recorded(layout, path.name) for path in sorted(layout.processes.iterdir()))
    return tuple(process for process in found if process is not None)


def stop(processes: Iterable[Process], *, patience_seconds: float) -> None:
    """SIGTERM, and SIGKILL for what is left after `patience_seconds` (0: SIGKILL at once). Returns when all are gone."""
    left = [process for process in processes if process.is_alive()]
    if patience_seconds > 0:
        for process in left:
            process.signal(signal.SIGTERM)
        left = _still_alive(left, patience_seconds)
    for process in left:
        process.signal(signal.SIGKILL)
    left = _still_alive(left, 10)
    if left:
        names = ", ".join(f"{process.name} (pid {process.pid})" for process in left)
        raise DevClusterError(f"still running 10 s after SIGKILL: {names}. They hang in the kernel: look at dmesg.")


def _still_alive(processes: list[Process], seconds: float) -> list[Process]:
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def log_tail(layout: Layout, name: str, lines: int = 8) -> str:
    path = layout.logs / f"{name}.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
