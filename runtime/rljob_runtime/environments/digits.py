"""Digit exercises: `digit-copy`, `digit-sort`, `digit-reverse`. Multi-turn, one context an episode, no infrastructure.

Each turn shows k digits and `=`; the answer is compared position by position. Small random models learn these within
minutes on a CPU, and an episode of many turns is long enough for several weight versions to land in it.

Example (digit-sort, 4 digits, 2 turns): shown `3718=`, answered `1378` (reward 1.0), shown `5520=`, answered `0555`
(0.75: `0255` is right), done; episode reward 0.875.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from math import comb
from statistics import fmean

from pydantic import Field

from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult
from rljob_runtime.environments.parameters import Parameters


class DigitTask(StrEnum):
    """What is asked of the digits; the value is the environment's name."""

    COPY = "digit-copy"
    SORT = "digit-sort"
    REVERSE = "digit-reverse"


class DigitParameters(Parameters):
    digits: int = Field(default=4, ge=1, le=256, description="Digits a question.")
    turns: int = Field(default=12, ge=1, le=4096, description="Questions an episode.")
    base: int = Field(default=10, ge=2, le=10, description="Digits are 0 to base - 1.")


_SOLUTIONS: Mapping[DigitTask, Callable[[str], str]] = {
    DigitTask.COPY: lambda digits: digits,
    DigitTask.SORT: lambda digits: "".join(sorted(digits)),
    DigitTask.REVERSE: lambda digits: digits[::-1],
}


class Digits:
    """One episode. The questions depend on the seed alone, so all samples of a group answer the same ones."""

    def __init__(self, task: DigitTask, parameters: DigitParameters, seed: int) -> None:
        generator = random.Random(seed)
        self._questions = tuple(
            "".join(str(generator.randrange(parameters.base)) for _ in range(parameters.digits))
            for _ in range(parameters.turns)
        )
        self._solve = _SOLUTIONS[task]
        self._baseline = constant_baseline(task, parameters)
        self._rewards: list[float] = []

    def reset(self) -> tuple[Message, ...]:
        """The first question, e.g. `3718=`."""
        return (Message("user", f"{self._questions[0]}="),)

    def step(self, answer: str) -> StepResult:
        """Reward: share of positions that are right. Missing positions are wrong, what follows the last is ignored."""
        right = self._solve(self._questions[len(self._rewards)])
        given = answer.strip()
        reward = sum(a == b for a, b in zip(given, right, strict=False)) / len(right)
        self._rewards.append(reward)
        turn = len(self._rewards)
        if turn == len(self._questions):
            return StepResult(reward=reward, done=True)
        return StepResult(reward=reward, done=False, observation=f"{self._questions[turn]}=")

    def end(self) -> EpisodeEnd:
        """Mean of the turns' rewards; a truncated episode is scored on the turns it has."""
        reward = fmean(self._rewards) if self._rewards else 0.0
        return EpisodeEnd(reward=reward, info={"constantBaseline": self._baseline})


def constant_baseline(task: DigitTask, parameters: DigitParameters) -> float:
    """Expected score of the best constant answer, over all questions.

    Copy and reverse: 1/base. Sort: position i holds the i-th order statistic of k uniform digits, and the best constant
    names its most frequent value; P(X_(i) <= v) = sum over j >= i of C(k, j) p^j (1 - p)^(k - j) with p = (v + 1)/base.
    """
    base, k = parameters.base, parameters.digits
    if task is not DigitTask.SORT:
        return 1 / base

    def at_most(i: int, v: int) -> float:
        p = (v + 1) / base
        return sum(comb(k, j) * p**j * (1 - p) ** (k - j) for j in range(i, k + 1))

    best = [max(at_most(i, v) - (at_most(i, v - 1) if v else 0.0) for v in range(base)) for i in range(1, k + 1)]
    return fmean(best)
