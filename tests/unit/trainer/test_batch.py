"""A batch knows what may be trained, and survives its bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.fakes.trajectories import finished

from rljob_api.errors import MalformedMessage
from rljob_api.spec import Advantage
from rljob_runtime.trainer.batch import TrainBatch, TrainRow, build_batch
from rljob_runtime.trajectory_codec import Trajectory


def trajectory(task: int, sample: int, versions: list[int]) -> Trajectory:
    version = np.array(versions, np.int32)
    header = finished(task, sample, reward=float(sample))
    return Trajectory(
        header,
        np.arange(len(versions), dtype=np.int32),
        np.where(version >= 0, 0, -1).astype(np.int32),
        version,
        np.where(version >= 0, -0.5, 0).astype(np.float32),
    )


GROUPS = [
    [trajectory(8, 0, [-1, 3, 4, 5]), trajectory(8, 1, [-1, -1, 5])],
    [trajectory(6, 0, [-1, 1]), trajectory(6, 1, [-1, 2, -1, 5, 5])],
]


def batch() -> TrainBatch:
    return build_batch(GROUPS, version=5, max_versions=2, advantage=Advantage(normalize=False))


def test_tokens_over_the_bound_are_counted_as_model_tokens_and_not_trainable() -> None:
    built = batch()
    assert [(row.task, row.sample) for row in built.rows] == [(8, 0), (8, 1), (6, 0), (6, 1)]
    assert [row.staleness.tolist() for row in built.rows] == [[-1, 2, 1, 0], [-1, -1, 0], [-1, 4], [-1, 3, -1, 0, 0]]
    assert [row.trainable.tolist() for row in built.rows] == [
        [False, True, True, True],
        [False, False, True],
        [False, False],
        [False, False, False, True, True],
    ]
    assert built.num_model_tokens == 8
    assert built.rows[3].advantages.tolist() == [0, 0.5, 0, 0.5, 0.5]


def test_a_token_newer_than_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="trajectory 8/0 has tokens of version 5, and the step starts at version 4"):
        build_batch(GROUPS, version=4, max_versions=2, advantage=Advantage())


def test_bytes_bring_back_the_same_batch() -> None:
    original = batch()
    copy = TrainBatch.from_bytes(original.to_bytes())
    assert (copy.version, copy.groups_without_variance) == (5, 0)
    for before, after in zip(original.rows, copy.rows, strict=True):
        for field in dataclasses.fields(TrainRow):
            one, other = getattr(before, field.name), getattr(after, field.name)
            np.testing.assert_array_equal(one, other, strict=isinstance(one, np.ndarray))
            assert type(one) is type(other)


def test_an_empty_batch_survives_its_bytes() -> None:
    assert TrainBatch.from_bytes(TrainBatch(3, (), 2, 4).to_bytes()) == TrainBatch(3, (), 2, 4)


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(MalformedMessage, match="training batch: 9 bytes do not decode"):
        TrainBatch.from_bytes(b"\x01" * 9)
    with pytest.raises(MalformedMessage, match="training batch"):
        TrainBatch.from_bytes(batch().to_bytes()[:-3])
