"""Scoring ahead of the step in a whole run: real NATS, torch and processes, the simulated engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from rljob.run_directory import RunDirectory
from tests.e2e.running import job, processes_naming, run, summary
from tests.e2e.test_simulated_run import largest_log_discrepancy, verify

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("processes", [1, 2])
def test_stale_tokens_are_scored_in_idle_time_and_each_value_verifies(tmp_path: Path, processes: int) -> None:
    directory = tmp_path / "run"
    # Engines slow enough for the trainer to wait: without idle time nothing is scored ahead.
    slow = {"simulated": {"decodeSeconds": 0.15}}
    document = job(
        training__steps=20,
        trainer={"processesPerReplica": processes},
        rolloutPools__0__engine=slow,
        staleness__maxVersions=4,
        correction={"eager": {"prefixTokens": 2}},
    )
    code, output = run(tmp_path, document, "--run-dir", str(directory))
    assert code == 0, output
    seen = summary(directory)
    assert (seen["finished"], seen["exactFraction"]) == (True, 1.0)
    assert 0 < seen["pooledShare"] <= seen["poolableShare"] <= 1
    assert "of the stale tokens scored ahead" in output
    assert seen["conservation"]["problems"] == []
    steps = RunDirectory(directory).read_steps()
    assert sum(step.seconds_eager for step in steps) > 0
    assert all(step.seconds_eager <= step.seconds_waiting for step in steps)
    pooled = sum(step.sources["pool"].tokens for step in steps if "pool" in step.sources)
    assert pooled == sum(step.pool.pooled_tokens for step in steps if step.pool is not None) > 0
    assert max(largest_log_discrepancy(directory).values()) <= 1e-4
    checked = verify(directory)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert processes_naming(str(tmp_path)) == []


def test_without_the_eager_pool_every_stale_token_is_left_to_the_snapshots(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    document = job(training__steps=12, correction={"eager": {"enabled": False}})
    code, output = run(tmp_path, document, "--run-dir", str(directory))
    assert code == 0, output
    assert summary(directory)["pooledShare"] is None
    steps = RunDirectory(directory).read_steps()
    assert {source for step in steps for source in step.sources} == {"resident", "snapshot"}
    assert sum(step.seconds_eager for step in steps) == 0


@pytest.mark.parametrize("eager", [True, False])
def test_the_interruption_route_is_exact_without_a_stored_version(tmp_path: Path, eager: bool) -> None:
    directory = tmp_path / "run"
    correction = {"oldLogprobs": "Interruption", "eager": {"enabled": eager}}
    code, output = run(tmp_path, job(training__steps=30, correction=correction), "--run-dir", str(directory))
    assert code == 0, output
    seen = summary(directory)
    assert (seen["finished"], seen["exactFraction"]) == (True, 1.0)
    assert seen["conservation"]["problems"] == []
    assert "MissedBarrier" not in seen["conservation"]["dropped"]
    assert seen["tokensLostToInterruptions"] == 0
    steps = RunDirectory(directory).read_steps()
    assert {source for step in steps for source in step.sources} == {"resident", "pool"}
    barriers = [step.barrier for step in steps]
    assert all(barrier is not None and barrier.missing == 0 for barrier in barriers)
    assert {barrier.workers for barrier in barriers if barrier is not None} <= {1, 2}  # one may start later
    assert barriers[-1] is not None and barriers[-1].workers == 2
    assert sum(barrier.tokens_scored for barrier in barriers if barrier is not None) > 0
    assert max(largest_log_discrepancy(directory).values()) <= 1e-4
    checked = verify(directory)
    assert checked.returncode == 0, checked.stdout + checked.stderr
