"""Steps a second of `rljob run` with fixed device times, over the bound of the pipeline; asynchronous against synchronous.

The simulated engine samples for real and takes fixed times, so generation takes the same whatever else two cores do.
With G seconds to generate one batch and T seconds in which the trainer trains it,

    synchronous run    one step takes at least G + T + swap
    asynchronous run   one step takes at least max(G + swap, T): the slower of two stages that run side by side

G = tokens of a batch / episodes at once * decode time, if no episode's place is ever empty. The swap is the load time:
each worker stops once a version. T is measured in the same run: what the trainer's step takes without waiting.
The figure is the bound's step time over the measured one, for steps after the pipeline has filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.measure import Figure

DIGITS, TURNS = 4, 12
DECODE_SECONDS, LOAD_SECONDS = 0.04, 0.1
WORKERS, AT_ONCE = 2, 32
WARM_UP_STEPS = 6
STEPS = {"asynchronous": 36, "synchronous": 18}


@dataclass(frozen=True, slots=True)
class Steps:
    """Steady steps of one run, arrays over steps, in seconds."""

    wall: np.ndarray[Any, Any]
    busy: np.ndarray[Any, Any]
    generation: np.ndarray[Any, Any]
    rollout_idle: float

    @property
    def trainer_idle(self) -> float:
        return float(1 - self.busy.sum() / self.wall.sum())


def main() -> None:
    """Measure and print."""
    asynchronous, synchronous = _run("asynchronous", 4), _run("synchronous", 0)
    value = _share_of_bound(asynchronous, slice(None))
    count = len(asynchronous.wall)
    thirds = [_share_of_bound(asynchronous, slice(i * count // 3, (i + 1) * count // 3)) for i in range(3)]
    detail = (
        f"{asynchronous.wall.mean():.2f} s a step: generation {asynchronous.generation.mean():.2f} s + swap {LOAD_SECONDS:g} s beside "
        f"training {asynchronous.busy.mean():.2f} s; trainer idle {asynchronous.trainer_idle:.0%}, rollout idle "
        f"{asynchronous.rollout_idle:.0%}. Synchronous: {synchronous.wall.mean():.2f} s a step, trainer idle "
        f"{synchronous.trainer_idle:.0%}, rollout idle {synchronous.rollout_idle:.0%}: "
        f"{synchronous.wall.mean() / asynchronous.wall.mean():.2f} times the wall-clock"
    )
    Figure(
        "async_pipeline", value, min(thirds), max(thirds), f"thirds of {len(asynchronous.wall)} steps", detail
    ).print()


def _share_of_bound(steps: Steps, which: slice) -> float:
    bound = max(steps.generation[which].mean() + LOAD_SECONDS, steps.busy[which].mean())
    return float(bound / steps.wall[which].mean())


def _run(kind: str, max_versions: int) -> Steps:
    job = {
        "apiVersion": "rljob.dev/v1alpha1",
        "kind": "RLJob",
        "metadata": {"name": kind},
        "spec": {
            "model": {"random": {"hiddenSize": 32, "intermediateSize": 64, "heads": 1, "alphabet": "0123456789="}},
            "environment": {"name": "digit-copy", "parameters": {"digits": DIGITS, "turns": TURNS}},
            "sampling": {"maxTokens": DIGITS, "maxTrajectoryTokens": 128, "samplesPerTask": 8},
            "training": {
                "steps": STEPS[kind],
                "tasksPerStep": 8,
                "epochs": 20,  # real work for the trainer, about as long as generation
                "learningRate": 1e-6,
                "computeType": "Float32",
            },
            "staleness": {"maxVersions": max_versions},
            "storage": {"checkpoint": {"everySteps": 100}},
            "rolloutPools": [
                {
                    "name": "main",
                    "replicas": WORKERS,
                    "maxConcurrentTrajectories": AT_ONCE,
                    "engine": {"simulated": {"decodeSeconds": DECODE_SECONDS, "loadSeconds": LOAD_SECONDS}},
                }
            ],
        },
    }
    with tempfile.TemporaryDirectory(prefix="rljob-bench-") as folder:
        file, run = Path(folder) / "job.yaml", Path(folder) / "run"
        file.write_text(yaml.safe_dump(job))
        command = [
            sys.executable,
            "-m",
            "rljob.main",
            "run",
            str(file),
            "--plain",
            "--no-record",
            "--run-dir",
            str(run),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            raise RuntimeError(
                f"the {kind} run ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    wall = np.array([step["secondsTotal"] for step in steps])
    busy = wall - np.array([step["secondsWaiting"] for step in steps])
    tokens = np.diff([step["tokensTrained"] + sum(step["tokensDropped"].values()) for step in steps], prepend=0)
    generation = tokens / (WORKERS * AT_ONCE) * DECODE_SECONDS
    steady = slice(WARM_UP_STEPS, None)
    return Steps(wall[steady], busy[steady], generation[steady], summary["rolloutIdleShare"])


if __name__ == "__main__":
    main()
