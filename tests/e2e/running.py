"""Starts the real `rljob` command on a job written for the test, and cleans up whatever it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


def job(**changes: Any) -> dict[str, Any]:
    """A small job on the simulated engine; `changes` are dotted paths with dots written as `__`."""
    document: dict[str, Any] = {
        "apiVersion": "rljob.dev/v1alpha1",
        "kind": "RLJob",
        "metadata": {"name": "small"},
        "spec": {
            "model": {"random": {"hiddenSize": 32, "intermediateSize": 64, "heads": 1, "alphabet": "0123456789="}},
            "environment": {"name": "digit-copy", "parameters": {"digits": 2, "turns": 6}},
            "sampling": {"maxTokens": 2, "maxTrajectoryTokens": 64, "samplesPerTask": 4},
            "training": {
                "steps": 40,
                "tasksPerStep": 4,
                "learningRate": 0.001,
                "computeType": "Float32",
                "advantage": {"credit": "Turn"},
            },
            "staleness": {"maxVersions": 3},
            "storage": {"checkpoint": {"everySteps": 10}},
            "rolloutPools": [
                {
                    "name": "main",
                    "replicas": 2,
                    "maxConcurrentTrajectories": 16,
                    "engine": {"simulated": {"decodeSeconds": 0.004}},
                }
            ],
        },
    }
    for dotted, value in changes.items():
        place = document["spec"]
        *parents, last = dotted.split("__")
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return document


@contextmanager
def started(
    directory: Path, document: dict[str, Any], *arguments: str, wrapper: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """`rljob run` on the document, in a session of its own; killed with all its children at the end.

    `wrapper` is a command that ends by executing its arguments.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "job.yaml"
    file.write_text(yaml.safe_dump(document))
    command = [*wrapper, sys.executable, "-m", "rljob.main", "run", str(file), "--plain", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (directory / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)


def run(directory: Path, document: dict[str, Any], *arguments: str, timeout: float = 240) -> tuple[int, str]:
    """(exit code, output) of a whole run."""
    with started(directory, document, *arguments) as process:
        code = process.wait(timeout)
    return code, (directory / "output.txt").read_text()


def processes_naming(text: str) -> list[int]:
    """Live processes whose command line or environment names `text`: what a run left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and text.encode() in said:
            found.append(int(entry.name))
    return found


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def wait_for_steps(run_directory: Path, steps: int, timeout: float = 240) -> None:
    """Until the run's steps.jsonl has that many lines."""
    deadline = time.monotonic() + timeout
    path = run_directory / "steps.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.2)
    raise AssertionError(f"{path} did not reach {steps} steps within {timeout:g} s")


def summary(run_directory: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    loaded: dict[str, Any] = json.loads((run_directory / "summary.json").read_text())
    return loaded
