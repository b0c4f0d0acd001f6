"""The dedicated route as a user runs it: `rljob run` with an old-policy pool, on the simulated engine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rljob.run_directory import RunDirectory
from rljob_api.messages import StepReport
from tests.e2e.running import children_of, job, processes_naming, started, summary, wait_for_steps

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 10


def dedicated(timeout_seconds: float = 600.0, **changes: Any) -> dict[str, Any]:
    return job(
        training__steps=STEPS,
        correction={"oldLogprobs": "Dedicated", "fallback": "Drop", "dedicatedTimeoutSeconds": timeout_seconds},
        oldPolicyPool={"replicas": 1},
        # Slow enough for a signal sent after a few steps to come in mid-run.
        rolloutPools__0__engine={"simulated": {"decodeSeconds": 0.05}},
        **changes,
    )


def steps_of(run_directory: Path) -> list[StepReport]:
    return RunDirectory(run_directory).read_steps()


def tokens_from(steps: list[StepReport], source: str) -> int:
    return sum(step.sources[source].tokens for step in steps if source in step.sources)


def old_policy_worker(runner: int) -> int | None:
    for pid in children_of(runner):
        if b"rljob_runtime.old_policy" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def test_a_dedicated_run_is_exact_and_its_record_verifies_also_when_the_worker_is_killed_in_mid_run(
    tmp_path: Path,
) -> None:
    run_directory = tmp_path / "run"
    with started(tmp_path, dedicated(), "--run-dir", str(run_directory)) as process:
        wait_for_steps(run_directory, 4)
        worker = old_policy_worker(process.pid)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert "old-policy worker old-policy-0 ended with -9: starting it again" in output
    seen = summary(run_directory)
    assert (seen["finished"], seen["steps"], seen["exactFraction"]) == (True, STEPS, 1.0)
    assert seen["conservation"]["problems"] == []
    assert seen["workerRestarts"] == 1
    steps = steps_of(run_directory)
    stale = tokens_from(steps, "dedicated")
    assert stale > 0
    assert {source for step in steps for source in step.sources} == {"resident", "dedicated"}
    reports = [step.dedicated for step in steps]
    assert sum(r.tokens_scored for r in reports if r is not None) == stale
    assert sum(r.tokens_late for r in reports if r is not None) == 0
    assert (run_directory / "logs" / "old-policy-0.log").exists()
    assert processes_naming(str(tmp_path)) == []


def test_with_fallback_drop_an_impossible_timeout_and_a_worker_that_hangs_late_tokens_are_counted_and_nothing_else_is_lost(
    tmp_path: Path,
) -> None:
    run_directory = tmp_path / "run"
    with started(tmp_path, dedicated(timeout_seconds=0.001), "--run-dir", str(run_directory)) as process:
        wait_for_steps(run_directory, 3)
        worker = old_policy_worker(process.pid)
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        wait_for_steps(run_directory, STEPS - 1)
        os.kill(worker, signal.SIGCONT)
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output
    steps = steps_of(run_directory)
    late = sum(step.dedicated.tokens_late for step in steps if step.dedicated is not None)
    assert late > 0
    seen = summary(run_directory)
    assert seen["finished"] is True
    assert seen["conservation"]["dropped"]["MissingOldLogprob"] == late
    assert seen["conservation"]["problems"] == []
    assert seen["exactFraction"] < 1.0
    assert max(step.dedicated.waiting_seconds for step in steps if step.dedicated is not None) < 60.0
    assert "stale tokens late" in output
