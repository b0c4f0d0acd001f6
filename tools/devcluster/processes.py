"""Long-running processes: each is recorded by pid and start time before it runs, and only such a record is ever ended.

A pid alone is not an identity, since pids are used again; the start time in clock ticks since boot makes it one.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tools.devcluster.commands import wait_until
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
    record.unlink(missing_ok=True)
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(layout.state)}
    with (layout.logs / f"{name}.log").open("ab") as log:
        if os.fork() == 0:
            _become([str(word) for word in command], environment, log.fileno(), record)
    wait_until(f"the record of {name} in {layout.processes}", record.exists, timeout_seconds=10, every_seconds=0.002)
    process = recorded(layout, name)
    assert process is not None, f"{record} is renamed into place and whole"
    return process


def _become(words: list[str], environment: dict[str, str], log: int, record: Path) -> NoReturn:
    """In the child: leave a record, then turn into the program, which keeps pid and start time.

    The child records itself, so that there is no moment at which a starter that is killed leaves an unknown process.
    """
    try:
        os.setsid()
        os.chdir(environment["HOME"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        partial = record.with_name(f".{record.name}")
        partial.write_text(f"{os.getpid()} {start_ticks(os.getpid())}\n")
        partial.rename(record)
        os.execvpe(words[0], words, environment)
    except BaseException as error:
        os.write(2, f"{words[0]} could not be started: {error}\n".encode())
    finally:
        os._exit(127)


def recorded(layout: Layout, name: str) -> Process | None:
    try:
        pid, ticks = (layout.processes / name).read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return Process(name, int(pid), int(ticks))


def all_recorded(layout: Layout) -> tuple[Process, ...]:
    if not layout.processes.is_dir():
        return ()
    found = (recorded(layout, path.name) for path in sorted(layout.processes.glob("[!.]*")))
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
