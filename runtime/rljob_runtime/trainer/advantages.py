"""Group-relative advantages: a sample is compared with the other samples of its task.

G samples of a group with rewards r: GRPO (arXiv 2402.03300) takes r - mean(r); RLOO (arXiv 2402.14740) takes r minus
the mean of the other samples, which is G/(G-1) times as much. Either can be divided by the group's standard deviation
(with Bessel's correction) + 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rljob_api.errors import MalformedMessage
from rljob_api.spec import Advantage, AdvantageEstimator, Credit
from rljob_runtime.trajectory_codec import Trajectory

_STANDARD_DEVIATION_FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class AdvantageEstimate:
    """Advantages of a batch, in the order of its groups and samples."""

    advantages: tuple[tuple[NDArray[np.float32], ...], ...]
    """One array [T] a trajectory, 0 on prompt and observation tokens."""
    groups_without_variance: int
    """Groups whose samples all did equally well: their advantages are 0."""


def token_advantages(groups: Sequence[Sequence[Trajectory]], settings: Advantage) -> AdvantageEstimate:
    """The advantage of each token: one a trajectory, or one a turn.

    With credit `Turn`, turn j is compared with turn j of those samples of the group that have one; a turn that no other
    sample reached has advantage 0.

    Raises:
        MalformedMessage: credit `Turn`, and a trajectory has a turn without a reward.
    """
    of_groups = [
        _of_turns(group, settings) if settings.credit is Credit.TURN else _of_trajectories(group, settings)
        for group in groups
    ]
    return AdvantageEstimate(
        advantages=tuple(tuple(row.astype(np.float32) for row in rows) for rows in of_groups),
        groups_without_variance=sum(not any(row.any() for row in rows) for rows in of_groups),
    )


def group_advantages(rewards_G: ArrayLike, settings: Advantage) -> NDArray[np.float64]:
    """Advantages [G] of samples with these rewards; exactly 0 for one sample and for equal rewards."""
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    # Compared by their range: the mean of equal floats may differ from them in the last digit, and the quotient of two
    # such residues is anything.
    if rewards_G.size < 2 or np.ptp(rewards_G) == 0:
        return np.zeros_like(rewards_G)
    advantages_G = rewards_G - rewards_G.mean()
    if settings.estimator is AdvantageEstimator.RLOO:
        advantages_G = advantages_G * (rewards_G.size / (rewards_G.size - 1))
    if settings.normalize:
        advantages_G = advantages_G / (rewards_G.std(ddof=1) + _STANDARD_DEVIATION_FLOOR)
    return np.asarray(advantages_G)


def _of_trajectories(group: Sequence[Trajectory], settings: Advantage) -> list[NDArray[np.float64]]:
    of_samples = group_advantages([trajectory.header.reward for trajectory in group], settings)
    return [
        np.where(trajectory.model_mask, advantage, 0.0) for trajectory, advantage in zip(group, of_samples, strict=True)
    ]


def _of_turns(group: Sequence[Trajectory], settings: Advantage) -> list[NDArray[np.float64]]:
    rows = [np.zeros(trajectory.num_tokens) for trajectory in group]
    for trajectory in group:
        turns, rewards = int(trajectory.turn.max()) + 1, len(trajectory.header.turn_rewards)
        if turns > rewards:
            raise MalformedMessage(
                f"trajectory {trajectory.header.task}/{trajectory.header.sample}: {turns} turns and {rewards} turn "
                "rewards: credit Turn needs a reward for each turn; use credit Trajectory with this environment"
            )
    for turn in range(max((len(trajectory.header.turn_rewards) for trajectory in group), default=0)):
        having = [number for number, trajectory in enumerate(group) if (trajectory.turn == turn).any()]
        advantages = group_advantages([group[number].header.turn_rewards[turn] for number in having], settings)
        for number, advantage in zip(having, advantages, strict=True):
            rows[number][group[number].turn == turn] = advantage
    return rows
