"""`number-guess`: guess a hidden number, hear lower, higher or hit. The observations depend on what the model did.

After a hit a new number is drawn and the game goes on until the turns are used up; a turn's reward is 1 for a hit. With
`replies: symbols` (for models with a character tokenizer) the prompt is `=`, and the replies are `<` (the number is
lower), `>` (higher), `=` (hit, a new one is drawn) and `?` (not a number in range).
"""

from __future__ import annotations

import random
from statistics import fmean
from typing import Literal

from pydantic import Field

from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult
from rljob_runtime.environments.parameters import Parameters


class NumberGuessParameters(Parameters):
    numbers: int = Field(default=10, ge=2, le=1_000_000, description="The hidden number lies in 0 to numbers - 1.")
    turns: int = Field(default=12, ge=1, le=4096, description="Guesses an episode.")
    replies: Literal["symbols", "words"] = Field(default="symbols", description="`symbols` or `words`.")


_SYMBOLS = {"hit": "=", "lower": "<", "higher": ">", "invalid": "?"}
_WORDS = {
    "hit": "Hit! I have thought of a new number.",
    "lower": "My number is lower.",
    "higher": "My number is higher.",
    "invalid": "Answer with one number in the range.",
}


class NumberGuess:
    """One episode. The hidden numbers depend on the seed alone."""

    def __init__(self, parameters: NumberGuessParameters, seed: int) -> None:
        self._parameters = parameters
        self._generator = random.Random(seed)
        self._secret = self._generator.randrange(parameters.numbers)
        self._replies = _SYMBOLS if parameters.replies == "symbols" else _WORDS
        self._rewards: list[float] = []

    def reset(self) -> tuple[Message, ...]:
        """`=`, or the rules in words."""
        if self._parameters.replies == "symbols":
            return (Message("user", self._replies["hit"]),)
        top = self._parameters.numbers - 1
        return (
            Message("user", f"I have thought of a number from 0 to {top}. Guess it: answer with the number alone."),
        )

    def step(self, answer: str) -> StepResult:
        """Reward 1 for a hit, else 0; the reply says where the number lies."""
        guess = _number(answer)
        if guess is None or guess >= self._parameters.numbers:
            outcome = "invalid"
        elif guess == self._secret:
            outcome = "hit"
            self._secret = self._generator.randrange(self._parameters.numbers)
        else:
            outcome = "lower" if self._secret < guess else "higher"
        self._rewards.append(1.0 if outcome == "hit" else 0.0)
        done = len(self._rewards) == self._parameters.turns
        return StepResult(reward=self._rewards[-1], done=done, observation="" if done else self._replies[outcome])

    def end(self) -> EpisodeEnd:
        """Hits a turn. A constant guess hits the k-th number only after the k - 1 before it: chance n^-k."""
        n, turns = self._parameters.numbers, self._parameters.turns
        baseline = fmean(n ** -float(k) for k in range(1, turns + 1))
        reward = fmean(self._rewards) if self._rewards else 0.0
        return EpisodeEnd(reward=reward, info={"constantBaseline": baseline})


def _number(answer: str) -> int | None:
    text = answer.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
