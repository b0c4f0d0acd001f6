"""`rljob run` as a user starts it, on the simulated engine: the protocol end to end, with real NATS, torch and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from rljob.run_directory import RunDirectory
from tests.e2e.running import (
    children_of,
    job,
    processes_naming,
    run,
    started,
    summary,
    wait_for_steps,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def verify(run_directory: Path, tokens: int = 500) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rljob.main", "verify", str(run_directory), "--tokens", str(tokens)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def largest_log_discrepancy(run_directory: Path) -> dict[int, float]:
    """Largest |log r_d| of all steps by staleness."""
    found: dict[int, float] = {}
    for line in (run_directory / "steps.jsonl").read_text().splitlines():
        for staleness, stats in json.loads(line)["discrepancyByStaleness"].items():
            found[int(staleness)] = max(found.get(int(staleness), 0.0), stats["maxAbsLogDiscrepancy"])
    return found


def test_a_job_trains_forty_versions_and_every_claim_about_it_verifies(tmp_path: Path) -> None:
    document = job()
    # However slow the trainer, a version comes in the middle of some trajectory here.
    slow = {"name": "slow", "maxConcurrentTrajectories": 2, "engine": {"simulated": {"decodeSeconds": 0.15}}}
    document["spec"]["rolloutPools"].append(slow)
    code, output = run(tmp_path, document, "--run-dir", str(tmp_path / "run"))
    assert code == 0, output
    assert "SIMULATED" in output
    seen = summary(tmp_path / "run")
    assert seen["finished"] is True
    assert seen["steps"] == seen["versions"] == 40
    assert seen["exactFraction"] == 1.0
    assert seen["stalenessMax"] <= 3
    assert seen["partialsContinued"] > 0
    assert seen["tokensLostToInterruptions"] == 0
    assert seen["conservation"]["problems"] == []
    assert seen["conservation"]["lost"] == 0
    by_staleness = largest_log_discrepancy(tmp_path / "run")
    assert sorted(by_staleness) == [0, 1, 2, 3]
    assert max(by_staleness.values()) <= 1e-4
    checked = verify(tmp_path / "run")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "everything holds" in checked.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "run" / "checkpoints" / "final" / "model.safetensors").exists()
    assert processes_naming(str(tmp_path)) == []


def test_the_current_policy_in_place_of_the_old_one_puts_staleness_into_the_discrepancy_ratio(tmp_path: Path) -> None:
    """The bug that the paper names (arXiv 2605.12070), on request; the exact source's values are checked above."""
    document = job(training__steps=30, correction={"oldLogprobs": "Current"})
    code, output = run(tmp_path, document, "--run-dir", str(tmp_path / "run"))
    assert code == 0, output
    by_staleness = largest_log_discrepancy(tmp_path / "run")
    assert sorted(by_staleness) == [0, 1, 2, 3]
    assert by_staleness[0] <= 1e-4
    assert min(by_staleness[staleness] for staleness in (1, 2, 3)) >= 1e-2
    report = (tmp_path / "run" / "report.html").read_text()
    assert "staleness leaks into the discrepancy mask" in report


def test_ctrl_c_stops_in_order_and_resume_goes_on_with_two_trainer_processes(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    document = job(training__steps=24, trainer={"processesPerReplica": 2})
    with started(tmp_path, document, "--run-dir", str(run_directory)) as process:
        wait_for_steps(run_directory, 8)
        process.send_signal(signal.SIGINT)
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 130, output
    assert f"--resume {run_directory}" in output
    assert processes_naming(str(tmp_path)) == []
    stopped = summary(run_directory)
    assert stopped["finished"] is False
    assert stopped["conservation"]["problems"] == []

    command = [sys.executable, "-m", "rljob.main", "run", "--resume", str(run_directory), "--plain"]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    seen = summary(run_directory)
    assert seen["finished"] is True
    assert seen["steps"] == 24
    assert seen["epochs"] == 2
    assert seen["exactFraction"] == 1.0
    assert seen["conservation"]["problems"] == []
    checked = verify(run_directory, 200)
    assert checked.returncode == 0, checked.stdout
    assert processes_naming(str(tmp_path)) == []


def test_a_killed_trainer_is_resumed_from_its_checkpoint_and_rolls_out_anew_what_got_too_old(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    document = job(training__steps=24, storage={"checkpoint": {"everySteps": 100}})
    with started(tmp_path, document, "--run-dir", str(run_directory)) as process:
        wait_for_steps(run_directory, 12)
        trainer = [
            pid
            for launcher in children_of(process.pid)
            for pid in children_of(launcher)
            if b"trainer.main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(trainer[0], signal.SIGKILL)
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 1, output
    assert f"--resume {run_directory}" in output
    resumed = subprocess.run(
        [sys.executable, "-m", "rljob.main", "run", "--resume", str(run_directory), "--plain"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    seen = summary(run_directory)
    assert (seen["finished"], seen["steps"], seen["epochs"], seen["exactFraction"]) == (True, 24, 2, 1.0)
    assert seen["conservation"]["problems"] == []
    # Twelve steps' samples are of versions that the resume rolled back. Trained as they are, each step from the fifth to the
    # fifteenth would hold nothing but tokens over the bound. Now and then a step may still get late groups only.
    assert seen["conservation"]["dropped"]["RolledBack"] > 0
    trained = [0, *(step.tokens_trained for step in RunDirectory(run_directory).read_steps())]
    assert sum(before == after for before, after in pairwise(trained)) <= 3
    assert verify(run_directory, 200).returncode == 0
    assert processes_naming(str(tmp_path)) == []
