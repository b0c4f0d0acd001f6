"""What benches of a training step share: the settings of a job, and trajectories that nobody sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rljob_api.messages import Outcome, TrajectoryHeader
from rljob_api.spec import RLJobSpec
from rljob_runtime.trainer.update import UpdateSettings
from rljob_runtime.trajectory_codec import Trajectory


def update_settings(**changes: Any) -> UpdateSettings:
    """Those of a job that leaves everything at its default, but for `changes`."""
    spec = RLJobSpec.model_validate(
        {
            "model": {"random": {}},
            "environment": {"name": "digit-copy"},
            "training": {"steps": 1, "tasksPerStep": 1, "learningRate": 1e-3},
            "rolloutPools": [{"name": "main"}],
        }
    )
    return dataclasses.replace(UpdateSettings.of(spec), **changes)


def made_trajectory(
    task: int,
    sample: int,
    reward: float,
    *,
    tokens: NDArray[np.int64],
    turn: NDArray[np.int32],
    weight_version: NDArray[np.int32],
    behavior_logprobs: NDArray[np.floating],
) -> Trajectory:
    """A finished trajectory; arrays [T], as `Trajectory` has them."""
    header = TrajectoryHeader(
        task=task,
        sample=sample,
        attempt=1,
        epoch=1,
        worker="made",
        incarnation="made",
        outcome=Outcome.FINISHED,
        reward=reward,
    )
    return Trajectory(
        header,
        tokens.astype(np.int32),
        turn.astype(np.int32),
        weight_version.astype(np.int32),
        behavior_logprobs.astype(np.float32),
    )
