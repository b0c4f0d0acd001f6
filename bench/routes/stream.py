"""The rollouts of a run, step by step: from its record, or from a file that holds a few steps of one.

A window has steps before and after the measured ones. Those before it fill the stores with the versions that the measured
steps name; those after it hold the rest of what the measured versions sampled, which some routes score while they last.

Shapes: T tokens of one trajectory, N tokens of all trajectories, R trajectories.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from rljob.record import Record, RecordedStep
from rljob_api.correction import OldLogprobs
from rljob_api.messages import Outcome, TrajectoryHeader
from rljob_api.spec import RLJob, RLJobSpec
from rljob_runtime.correction.sources import Source
from rljob_runtime.trajectory_codec import Trajectory

RECORDED = Path(__file__).parents[1] / "recorded"
Key = tuple[int, int]
"""(task, sample)"""


@dataclass(frozen=True, slots=True)
class Step:
    """One step's batch, as the trainer took it."""

    version: int
    """At the start of the step."""
    groups: tuple[tuple[Trajectory, ...], ...]
    ahead: Mapping[Key, NDArray[np.bool_]]
    """[T], tokens that the run had scored ahead of the step."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group]


@dataclass(frozen=True, slots=True)
class Stream:
    """Consecutive steps of one run."""

    spec: RLJobSpec
    steps: tuple[Step, ...]

    @property
    def lead(self) -> int:
        """Steps at either end that are not measured: no token is further from its step."""
        return self.spec.staleness.max_versions

    @property
    def measured(self) -> range:
        return range(self.lead, len(self.steps) - self.lead)

    @property
    def knows_what_was_ahead(self) -> bool:
        """Only a run of the snapshot route can say what it scored ahead of the step and what in it."""
        return self.spec.correction.old_logprobs is OldLogprobs.SNAPSHOT


def read_record(directory: Path, count: int) -> Stream:
    """The middle `count` measured steps of a run's record, with those around them.

    Raises:
        ValueError: the record has fewer steps, or versions are missing between them.
    """
    spec = RLJob.model_validate_json((directory.parent / "job.json").read_bytes()).spec
    recorded = list(Record(directory).steps())
    length = count + 2 * spec.staleness.max_versions
    first = (len(recorded) - length) // 2
    if first < 0:
        raise ValueError(f"{directory} holds {len(recorded)} steps, and {count} measured ones take {length}")
    steps = tuple(_step(found) for found in recorded[first : first + length])
    if [step.version for step in steps] != list(range(steps[0].version, steps[0].version + length)):
        raise ValueError(f"{directory}: steps {first + 1} to {first + length} do not follow one another: a resume?")
    return Stream(spec, steps)


def _step(found: RecordedStep) -> Step:
    rows = []
    for index, header in enumerate(found.headers):
        row = found.row(index)
        arrays = (found.tensors[name][row] for name in ("tokens", "turn", "weight_version", "behavior_logprobs"))
        rows.append((Trajectory(header, *arrays), found.tensors["old_source"][row] == Source.POOL))
    return made_step(found.version_start, rows)


def made_step(version: int, rows: Sequence[tuple[Trajectory, NDArray[np.bool_]]]) -> Step:
    """A step of trajectories, neighbours of one task being a group, and what was scored ahead of each [T]."""
    groups = itertools.groupby((trajectory for trajectory, _ in rows), lambda trajectory: trajectory.header.task)
    ahead = {(trajectory.header.task, trajectory.header.sample): of_row for trajectory, of_row in rows}
    return Step(version, tuple(tuple(group) for _, group in groups), ahead)


def save_stream(stream: Stream, path: Path) -> None:
    """Keep a stream in one small file: seven bytes a token."""
    rows = [(step, trajectory) for step in stream.steps for trajectory in step.trajectories]
    headers = [trajectory.header for _, trajectory in rows]
    tokens = np.concatenate([trajectory.tokens for _, trajectory in rows])
    turn = np.concatenate([trajectory.turn for _, trajectory in rows])
    age = np.concatenate([step.version - trajectory.weight_version for step, trajectory in rows])
    ahead = np.concatenate([step.ahead[row.header.task, row.header.sample] for step, row in rows])
    shape = [
        (step.version, row.header.task, row.header.sample, row.num_tokens, len(row.header.turn_rewards))
        for step, row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "tokens": tokens.astype(np.min_scalar_type(int(tokens.max()))),
            "turn": turn.astype(np.int8),
            "age": np.where(turn >= 0, age, 0).astype(np.uint8),
            "ahead": ahead.astype(np.uint8),
            "behavior_logprobs": np.concatenate([row.behavior_logprobs for _, row in rows]).astype(np.float16),
            "rows": np.array(shape, np.int32),
            "reward": np.array([header.reward for header in headers], np.float32),
            "turn_rewards": np.concatenate([np.array(header.turn_rewards, np.float32) for header in headers]),
        },
        path,
        {"spec": stream.spec.model_dump_json(by_alias=True, exclude_unset=True)},
    )


def load_stream(path: Path) -> Stream:
    """What `save_stream` wrote; behavior log-probabilities are rounded to half precision."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        spec = RLJobSpec.model_validate_json((file.metadata() or {})["spec"])
    shape = arrays["rows"].astype(np.int64)
    ends, reward_ends = np.cumsum(shape[:, 3])[:-1], np.cumsum(shape[:, 4])[:-1]
    columns = [np.split(arrays[name], ends) for name in ("tokens", "turn", "age", "ahead", "behavior_logprobs")]
    rewards = np.split(arrays["turn_rewards"], reward_ends)
    by_version: dict[int, list[tuple[Trajectory, NDArray[np.bool_]]]] = {}
    for (version, task, sample, *_), reward, turn_rewards, tokens, turn, age, ahead, logprobs in zip(
        shape.tolist(), arrays["reward"].tolist(), rewards, *columns, strict=True
    ):
        header = TrajectoryHeader(
            task=task,
            sample=sample,
            attempt=1,
            epoch=1,
            worker="recorded",
            incarnation="recorded",
            outcome=Outcome.FINISHED,
            turn_rewards=tuple(turn_rewards.tolist()),
            reward=reward,
        )
        weight_version = np.where(turn >= 0, version - age.astype(np.int32), -1)
        trajectory = Trajectory(
            header,
            tokens.astype(np.int32),
            turn.astype(np.int32),
            weight_version.astype(np.int32),
            logprobs.astype(np.float32),
        )
        by_version.setdefault(version, []).append((trajectory, ahead.astype(np.bool_)))
    return Stream(spec, tuple(made_step(version, rows) for version, rows in by_version.items()))
