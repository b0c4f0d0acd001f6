"""Only what was started here is ever ended, and what was started is always found again."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.devcluster import processes
from tools.devcluster.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(tmp_path, "unit")
    layout.state.mkdir(parents=True)
    yield layout
    processes.stop(processes.all_recorded(layout), patience_seconds=0)


def test_a_started_process_is_recorded_by_pid_and_start_time(layout: Layout) -> None:
    process = processes.start(layout, "sleeper", ["sleep", "60"])
    assert processes.recorded(layout, "sleeper") == process
    assert process.start_ticks == processes.start_ticks(process.pid)
    assert process.is_alive()


def test_a_running_process_is_not_started_twice(layout: Layout) -> None:
    first = processes.start(layout, "sleeper", ["sleep", "60"])
    assert processes.start(layout, "sleeper", ["sleep", "60"]) == first


def test_a_process_that_ended_is_started_again(layout: Layout) -> None:
    first = processes.start(layout, "sleeper", ["sleep", "60"])
    processes.stop([first], patience_seconds=5)
    assert not first.is_alive()
    assert processes.start(layout, "sleeper", ["sleep", "60"]).is_alive()


def test_a_stranger_that_got_the_same_pid_is_left_alone(layout: Layout) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        ticks = processes.start_ticks(stranger.pid)
        assert ticks is not None
        stale = processes.Process("sleeper", stranger.pid, ticks - 1)
        processes.stop([stale], patience_seconds=0)
        assert stranger.poll() is None
        processes.stop([dataclasses.replace(stale, start_ticks=ticks)], patience_seconds=0)
        assert stranger.wait(timeout=5) == -signal.SIGKILL, "the same call with the right start time does end it"


def test_a_zombie_has_ended() -> None:
    with subprocess.Popen(["true"]) as child:
        deadline = time.monotonic() + 5
        while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().split() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes.start_ticks(child.pid) is None


def test_a_process_that_ignores_sigterm_is_killed_after_the_patience(layout: Layout) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    process = processes.start(layout, "stubborn", ["sh", "-c", script])
    deadline = time.monotonic() + 5
    while "ready" not in processes.log_tail(layout, "stubborn") and time.monotonic() < deadline:
        time.sleep(0.01)
    begin = time.monotonic()
    processes.stop([process], patience_seconds=0.5)
    assert not process.is_alive()
    assert time.monotonic() - begin >= 0.5


def test_the_record_is_there_before_the_program_runs(layout: Layout) -> None:
    record = layout.processes / "early"
    processes.start(layout, "early", ["sh", "-c", f"cat {record}; sleep 60"])
    deadline = time.monotonic() + 5
    while not processes.log_tail(layout, "early") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes.log_tail(layout, "early") == record.read_text().strip()


def test_a_process_inherits_no_secret_of_its_starter(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s3cret")
    processes.start(layout, "env", ["sh", "-c", "env; echo end; sleep 60"])
    deadline = time.monotonic() + 5
    while "end" not in processes.log_tail(layout, "env") and time.monotonic() < deadline:
        time.sleep(0.01)
    environment = processes.log_tail(layout, "env")
    assert f"HOME={layout.state}" in environment
    assert "s3cret" not in environment
