"""Guess a hidden digit: the observation depends on what the model did, so no answer can be prepared.

The model answers one digit a turn; the environment says `<` (the secret is lower), `>` (higher) or `!` (hit, a new secret).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult


@dataclass(frozen=True, slots=True)
class GuessParameters:
    guesses: int = 16
    base: int = 8


class NumberGuessEnvironment:
    """One episode of a fixed number of guesses; a turn's reward is 1 for a hit."""

    def __init__(self, parameters: GuessParameters, seed: int) -> None:
        self._source = random.Random(seed)
        self._parameters = parameters
        self._secret = self._source.randrange(parameters.base)
        self._hits = 0
        self._turn = 0

    def reset(self) -> tuple[Message, ...]:
        """A game begins as after a hit."""
        return (Message("user", "!"),)

    def step(self, answer: str) -> StepResult:
        """Compare; anything that is not one of the digits is a wrong guess below all of them."""
        guess = int(answer[0]) if answer[:1].isdigit() else -1
        hit = guess == self._secret
        said = "!" if hit else ("<" if guess > self._secret else ">")
        if hit:
            self._hits += 1
            self._secret = self._source.randrange(self._parameters.base)
        self._turn += 1
        return StepResult(float(hit), self._turn == self._parameters.guesses, said)

    def end(self) -> EpisodeEnd:
        """Hits a guess."""
        baseline = 1 / self._parameters.base
        return EpisodeEnd(self._hits / self._parameters.guesses, {"constantBaseline": baseline})
