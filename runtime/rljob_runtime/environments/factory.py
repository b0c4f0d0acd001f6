"""Environments by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rljob_api.errors import RljobError, Violation
from rljob_runtime.environments.base import Environment
from rljob_runtime.environments.digits import SOLUTIONS, DigitEnvironment, DigitParameters
from rljob_runtime.environments.number_guess import GuessParameters, NumberGuessEnvironment
from rljob_runtime.environments.reasoning_gym_adapter import (
    ReasoningGymEnvironment,
    ReasoningGymParameters,
    create_dataset,
)

REASONING_GYM = "reasoning-gym"
NUMBER_GUESS = "number-guess"
NAMES = (*SOLUTIONS, NUMBER_GUESS, REASONING_GYM)

_BOUNDS = {"digits": (1, 64), "turns": (1, 1024), "base": (2, 10), "guesses": (1, 1024), "shots": (0, 32)}
_Parameters = DigitParameters | GuessParameters | ReasoningGymParameters


def make_environment(name: str, parameters: Mapping[str, Any], seed: int) -> Environment:
    """The episode of a seed.

    Raises:
        RljobError: unknown name or parameters; `check_environment` says so before a run.
    """
    match _parse(name, parameters):
        case DigitParameters() as digits:
            return DigitEnvironment(name, digits, seed)
        case GuessParameters() as guess:
            return NumberGuessEnvironment(guess, seed)
        case ReasoningGymParameters() as gym:
            return ReasoningGymEnvironment(gym, seed)


def check_environment(name: str, parameters: Mapping[str, Any]) -> tuple[Violation, ...]:
    """Why this environment cannot be used; empty when it can."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        return (
            Violation("spec.environment.name", repr(name), "unknown environment", f"{hint}Known: {', '.join(NAMES)}"),
        )
    try:
        parsed = _parse(name, parameters)
    except ValidationError as error:
        return tuple(
            Violation(
                ".".join(("spec.environment.parameters", *(str(part) for part in problem["loc"]))),
                repr(problem["input"])[:80],
                problem["msg"],
                f"See the parameters of {name} in docs/environments.md",
            )
            for problem in error.errors()
        )
    found = [
        Violation(
            f"spec.environment.parameters.{field}",
            str(getattr(parsed, field)),
            f"must be between {low} and {high}",
            "Choose a value in that range",
        )
        for field, (low, high) in _BOUNDS.items()
        if hasattr(parsed, field) and not low <= getattr(parsed, field) <= high
    ]
    if isinstance(parsed, ReasoningGymParameters) and not found:
        try:
            create_dataset(parsed, seed=0, size=1)
        except RljobError as error:
            found.append(
                Violation(
                    "spec.environment.parameters.dataset",
                    repr(parsed.dataset),
                    str(error),
                    "Choose a dataset of reasoning-gym and a configuration it knows",
                )
            )
    return tuple(found)


def _parse(name: str, parameters: Mapping[str, Any]) -> _Parameters:
    kind: type[_Parameters]
    if name in SOLUTIONS:
        kind = DigitParameters
    elif name == NUMBER_GUESS:
        kind = GuessParameters
    elif name == REASONING_GYM:
        kind = ReasoningGymParameters
    else:
        raise RljobError(f"unknown environment {name!r}; known: {', '.join(NAMES)}")
    adapter: TypeAdapter[_Parameters] = TypeAdapter(kind)
    unknown = sorted(set(parameters) - set(kind.__dataclass_fields__))
    if unknown:
        # TypeAdapter ignores unknown keys of a plain dataclass: a typing mistake must not be silent.
        raise ValidationError.from_exception_data(
            name, [{"type": "unexpected_keyword_argument", "loc": (key,), "input": parameters[key]} for key in unknown]
        )
    return adapter.validate_python(dict(parameters), strict=False)
