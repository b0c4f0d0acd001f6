"""Digit tasks: one question a turn, answered digit by digit. Small enough to learn from nothing in minutes.

One context per episode: `1234=` 1234 `5678=` 5678 ... where the model writes what follows each `=`. The reward of a turn
is the share of right positions, so that even a random model gets a signal.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult

SOLUTIONS: dict[str, Callable[[str], str]] = {
    "digit-copy": lambda question: question,
    "digit-sort": lambda question: "".join(sorted(question)),
    "digit-reverse": lambda question: question[::-1],
}


@dataclass(frozen=True, slots=True)
class DigitParameters:
    digits: int = 4
    turns: int = 12
    base: int = 10


class DigitEnvironment:
    """One episode of `turns` questions of `digits` digits each."""

    def __init__(self, task: str, parameters: DigitParameters, seed: int) -> None:
        self._solve = SOLUTIONS[task]
        self._base = parameters.base
        source = random.Random(seed)
        self._questions = [
            "".join(str(source.randrange(parameters.base)) for _ in range(parameters.digits))
            for _ in range(parameters.turns)
        ]
        self._turn = 0
        self._rewards: list[float] = []

    def reset(self) -> tuple[Message, ...]:
        """The first question."""
        return (Message("user", f"{self._questions[0]}="),)

    def step(self, answer: str) -> StepResult:
        """Score an answer position by position; positions that were not answered are wrong."""
        solution = self._solve(self._questions[self._turn])
        reward = sum(given == right for given, right in zip(answer, solution, strict=False)) / len(solution)
        self._rewards.append(reward)
        self._turn += 1
        if self._turn == len(self._questions):
            return StepResult(reward, done=True)
        return StepResult(reward, done=False, observation=f"{self._questions[self._turn]}=")

    def end(self) -> EpisodeEnd:
        """Mean over all turns; turns that were not reached count as 0."""
        return EpisodeEnd(sum(self._rewards) / len(self._questions), {"constantBaseline": 1 / self._base})
