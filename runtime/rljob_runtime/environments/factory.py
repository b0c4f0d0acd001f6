"""Environments by name: making one for an episode, and refusing a wrong name or parameter at validation."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from rljob_api.errors import SpecError, Violation
from rljob_runtime.environments import reasoning_gym_adapter
from rljob_runtime.environments.base import Environment
from rljob_runtime.environments.digits import DigitParameters, Digits, DigitTask
from rljob_runtime.environments.number_guess import NumberGuess, NumberGuessParameters
from rljob_runtime.environments.parameters import nearest, parse
from rljob_runtime.environments.reasoning_gym_adapter import ReasoningGym, ReasoningGymParameters

NUMBER_GUESS = "number-guess"
REASONING_GYM = "reasoning-gym"
ENVIRONMENT_NAMES: tuple[str, ...] = (*(task.value for task in DigitTask), NUMBER_GUESS, REASONING_GYM)


def make_environment(name: str, parameters: Mapping[str, JsonValue], seed: int) -> Environment:
    """The environment of one episode; equal arguments give the same task.

    Raises:
        SpecError: unknown name, or wrong parameters.
    """
    match name:
        case DigitTask.COPY | DigitTask.SORT | DigitTask.REVERSE:
            return Digits(DigitTask(name), parse(DigitParameters, parameters), seed)
        case "number-guess":
            return NumberGuess(parse(NumberGuessParameters, parameters), seed)
        case "reasoning-gym":
            return ReasoningGym(parse(ReasoningGymParameters, parameters), seed)
        case _:
            raise SpecError((_unknown(name),))


def check_environment(name: str, parameters: Mapping[str, JsonValue]) -> tuple[Violation, ...]:
    """Every reason why no episode of this environment could be made; empty when all is well."""
    try:
        make_environment(name, parameters, seed=0)
    except SpecError as error:
        return error.violations
    if name == REASONING_GYM:
        return reasoning_gym_adapter.check(parse(ReasoningGymParameters, parameters))
    return ()


def _unknown(name: str) -> Violation:
    return Violation("spec.environment.name", name, "no environment of that name", nearest(name, ENVIRONMENT_NAMES))
