"""Child processes of a run: each in a session of its own, with a log file, and none left behind.

A child is told to end when this process is killed (PR_SET_PDEATHSIG). What a child starts dies with its process group, or,
where it has a session of its own as torchrun's ranks have, is found by the job's uid in its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rljob_protocol.children import die_with_parent

REAP_SECONDS = 10.0


@dataclass(slots=True)
class Child:
    """A running process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self.process.poll()

    def signal(self, number: signal.Signals) -> None:
        """To the process alone: it passes on what it must."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill_group(self) -> None:
        """End the process and everything it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self, lines: int = 20) -> str:
        """Last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def last_said(self, event: str) -> str | None:
        """The error that its log's last line of this event gives, None without one: a launcher's traceback may follow it."""
        for line in reversed(self.tail(200).splitlines()):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    return str(entry.get("error", event))
        return None


def start(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
    """Start a child that writes to a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Child(name, process, log)


def stop_all(
    children: Sequence[Child], *, grace_seconds: float, in_a_hurry: Callable[[], bool] = lambda: False
) -> None:
    """SIGTERM to all, then SIGKILL to the groups of those that are still there after the grace, then reap.

    `in_a_hurry` is asked all the while; the grace ends when it says so.
    """
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and not in_a_hurry() and any(child.exit_code() is None for child in children):
        time.sleep(0.05)
    for child in children:
        # Also when the child itself is gone: what it started may not be.
        child.kill_group()
        child.process.wait()


def kill_marked(variable: str, value: str) -> list[int]:
    """SIGKILL every process that was started with `variable=value` in its environment, except this one; their ids.

    Returns when they are gone, at the latest after REAP_SECONDS.
    """
    killed = marked(variable, value)
    for pid in killed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + REAP_SECONDS
    while marked(variable, value) and time.monotonic() < deadline:
        time.sleep(0.02)
    return killed


def marked(variable: str, value: str) -> list[int]:
    """Live processes that were started with `variable=value` in their environment, except this one."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # gone, or another user's
    return found
