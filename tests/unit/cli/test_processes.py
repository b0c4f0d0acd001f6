"""Children end when they should, in order, and never outlive what started them. Real processes, small scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rljob import processes
from rljob.processes import Child

MARK = "RLJOB_TEST_MARK"
OBEYS = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('up', flush=True)\ntime.sleep(60)"
REFUSES = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
HAS_CHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session={session})\n"
    "print('up', child.pid, flush=True)\ntime.sleep(60)"
)


@pytest.fixture
def mark() -> Iterator[str]:
    """A value in the environment of everything that the test starts; what is left is killed, and is a failure."""
    value = uuid.uuid4().hex
    yield value
    assert processes.kill_marked(MARK, value) == []


def start(script: str, directory: Path, mark: str) -> Child:
    child = processes.start(
        "child", [sys.executable, "-c", script], {**os.environ, MARK: mark}, directory / "logs" / "child.log"
    )
    deadline = time.monotonic() + 20
    while "up" not in child.tail() and child.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return child


def test_a_child_that_obeys_ends_in_order_and_leaves_its_log(tmp_path: Path, mark: str) -> None:
    child = start(OBEYS, tmp_path, mark)
    processes.stop_all([child], grace_seconds=20)
    assert child.exit_code() == 7
    assert child.tail() == "up"


def test_a_child_that_refuses_is_killed_after_the_grace(tmp_path: Path, mark: str) -> None:
    child = start(REFUSES, tmp_path, mark)
    began = time.monotonic()
    processes.stop_all([child], grace_seconds=0.3)
    assert child.exit_code() == -signal.SIGKILL
    assert time.monotonic() - began >= 0.3


def test_a_hurry_ends_the_grace(tmp_path: Path, mark: str) -> None:
    child = start(REFUSES, tmp_path, mark)
    began = time.monotonic()
    processes.stop_all([child], grace_seconds=60, in_a_hurry=lambda: True)
    assert child.exit_code() == -signal.SIGKILL
    assert time.monotonic() - began < 10


def test_what_a_killed_child_started_dies_with_its_group(tmp_path: Path, mark: str) -> None:
    child = start(HAS_CHILD.format(session=False), tmp_path, mark)
    child.kill_group()
    child.process.wait()
    assert await_none(mark) == []


def test_a_grandchild_in_a_session_of_its_own_is_found_by_its_mark(tmp_path: Path, mark: str) -> None:
    """As torchrun's ranks: the group's death does not reach them."""
    child = start(HAS_CHILD.format(session=True), tmp_path, mark)
    grandchild = int(child.tail().split()[1])
    child.kill_group()
    child.process.wait()
    assert processes.marked(MARK, mark) == [grandchild], "the negative control: it does outlive its parent"
    assert processes.kill_marked(MARK, mark) == [grandchild]
    assert processes.marked(MARK, mark) == []


def test_a_mark_is_the_whole_variable_and_not_a_part_of_it(tmp_path: Path, mark: str) -> None:
    child = start(OBEYS, tmp_path, mark)
    assert processes.marked(MARK, mark[:-1]) == []
    assert processes.marked(MARK, mark) == [child.pid]
    processes.stop_all([child], grace_seconds=20)


def test_children_end_when_their_parent_is_killed(tmp_path: Path, mark: str) -> None:
    parent = (
        "import os, sys, time\nfrom pathlib import Path\nfrom rljob import processes\n"
        f"child = processes.start('c', [sys.executable, '-c', {OBEYS!r}], os.environ, Path({str(tmp_path)!r}) / 'c.log')\n"
        "while 'up' not in child.tail(): time.sleep(0.01)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        child = int(process.stdout.readline())
        assert set(processes.marked(MARK, mark)) == {process.pid, child}
        process.kill()
        process.wait()
    assert await_none(mark) == []


def test_the_tail_is_the_last_lines_and_a_missing_log_has_none(tmp_path: Path) -> None:
    child = start("for i in range(50): print(i)", tmp_path, "none")
    child.process.wait()
    assert child.tail(3) == "47\n48\n49"
    child.log.unlink()
    assert child.tail() == ""


def await_none(mark: str) -> list[int]:
    """Marked processes that are still there after five seconds."""
    deadline = time.monotonic() + 5
    while processes.marked(MARK, mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return processes.marked(MARK, mark)


def test_what_a_child_last_said_of_an_event_is_found_before_its_launchers_traceback(tmp_path: Path, mark: str) -> None:
    said = [
        '{"event": "failed", "error": "first"}',
        "not json",
        '{"event": "failed", "error": "disk"}',
        "[1]",
        "Traceback",
    ]
    log = tmp_path / "log"
    child = processes.start("child", [sys.executable, "-c", f"print({chr(10).join(said)!r})"], dict(os.environ), log)
    child.process.wait(20)
    assert child.last_said("failed") == "disk"
    assert child.last_said("ended") is None
