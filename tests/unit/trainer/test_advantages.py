"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tests.fakes.trajectories import finished

from rljob_api.errors import MalformedMessage
from rljob_api.spec import Advantage, AdvantageEstimator, Credit
from rljob_runtime.trainer.advantages import group_advantages, token_advantages
from rljob_runtime.trajectory_codec import Trajectory

REWARDS = [0.0, 0.5, 1.0, 1.0]
GRPO = [-0.625, -0.125, 0.375, 0.375]
STANDARD_DEVIATION = ((0.625**2 + 0.125**2 + 2 * 0.375**2) / 3) ** 0.5


def settings(estimator: str = "GRPO", *, normalize: bool = False, credit: str = "Trajectory") -> Advantage:
    return Advantage(estimator=AdvantageEstimator(estimator), normalize=normalize, credit=Credit(credit))


def trajectory(turns: list[int], turn_rewards: list[float], reward: float = 0.0) -> Trajectory:
    turn = np.array(turns, np.int32)
    header = finished(4, 2, turn_rewards=tuple(turn_rewards), reward=reward)
    zeros = np.zeros(len(turns), np.int32)
    return Trajectory(header, zeros, turn, np.where(turn >= 0, 0, -1).astype(np.int32), zeros.astype(np.float32))


@pytest.mark.parametrize(
    ("estimator", "normalize", "expected"),
    [
        ("GRPO", False, GRPO),
        ("GRPO", True, [a / (STANDARD_DEVIATION + 1e-4) for a in GRPO]),
        ("RLOO", False, [0 - 2.5 / 3, 0.5 - 2 / 3, 1 - 1.5 / 3, 1 - 1.5 / 3]),
        ("RLOO", True, [a * 4 / 3 / (STANDARD_DEVIATION + 1e-4) for a in GRPO]),
    ],
)
def test_a_group_is_compared_with_itself(estimator: str, normalize: bool, expected: list[float]) -> None:
    found = group_advantages(REWARDS, settings(estimator, normalize=normalize))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["GRPO", "RLOO"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1 / 3] * 7, [0.7], []])
def test_equal_rewards_and_single_samples_have_advantage_exactly_zero(
    estimator: str, normalize: bool, rewards: list[float]
) -> None:
    # The control: the mean of three times 0.1 is not 0.1, so a plain difference would not be zero.
    assert np.mean([0.1] * 3) != 0.1
    assert not group_advantages(rewards, settings(estimator, normalize=normalize)).any()


def test_a_trajectory_has_one_advantage_on_all_its_model_tokens() -> None:
    group = [trajectory([-1, 0, 0, -1, 1], [0, 0], reward=1.0), trajectory([-1, -1, 0], [0], reward=0.0)]
    found = token_advantages([group], settings())
    assert [row.tolist() for row in found.advantages[0]] == [[0, 0.5, 0.5, 0, 0.5], [0, 0, -0.5]]
    assert all(row.dtype == np.float32 for row in found.advantages[0])


def test_a_turn_is_compared_with_the_same_turn_of_samples_that_have_it() -> None:
    group = [
        trajectory([-1, 0, 0, -1, 1, -1, 2], [1.0, 0.0, 1.0]),
        trajectory([-1, 0, -1, 1], [0.0, 1.0]),
        trajectory([-1, 0], [0.5]),
    ]
    found = token_advantages([group], settings(credit="Turn"))
    assert [row.tolist() for row in found.advantages[0]] == [
        [0, 0.5, 0.5, 0, -0.5, 0, 0],  # nobody else reached turn 2
        [0, -0.5, 0, 0.5],
        [0, 0.0],
    ]
    assert found.groups_without_variance == 0


def test_groups_without_variance_are_counted() -> None:
    flat = [trajectory([-1, 0], [1.0], reward=0.25)] * 3
    spread = [trajectory([-1, 0], [1.0], reward=reward) for reward in (0.0, 1.0)]
    assert token_advantages([flat, spread, flat], settings()).groups_without_variance == 2
    # Equal in each turn although not in the whole: the turns decide.
    assert token_advantages([spread], settings(credit="Turn")).groups_without_variance == 1


def test_a_turn_without_a_reward_is_refused_where_turns_are_compared() -> None:
    group = [trajectory([-1, 0, -1, 1], [1.0])]
    with pytest.raises(MalformedMessage, match="trajectory 4/2: 2 turns and 1 turn rewards: credit Turn needs"):
        token_advantages([group], settings(credit="Turn"))
    assert token_advantages([group], settings()).groups_without_variance == 1
