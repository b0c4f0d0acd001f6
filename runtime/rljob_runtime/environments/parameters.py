"""Parameters of environments: strict models, and refusals that say which parameter and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pydantic import ConfigDict, JsonValue, ValidationError

from rljob_api.base import FrozenModel
from rljob_api.errors import SpecError, Violation

PARAMETERS_PATH = "spec.environment.parameters"


class Parameters(FrozenModel):
    """Base of an environment's parameters. Strict: `digits: "4"` is refused rather than guessed at."""

    model_config = ConfigDict(strict=True)


P = TypeVar("P", bound=Parameters)


def parse(kind: type[P], parameters: Mapping[str, JsonValue]) -> P:
    """Parameters as a checked model.

    Raises:
        SpecError: unknown or ill-typed parameters; one violation each.
    """
    try:
        return kind.model_validate(dict(parameters))
    except ValidationError as error:
        known = [field.alias or name for name, field in kind.model_fields.items()]
        found = tuple(
            _violation(detail["loc"], detail["type"], detail["msg"], detail["input"], known)
            for detail in error.errors()
        )
        raise SpecError(found) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy: the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else f"Use one of: {', '.join(names)}."


def _violation(location: tuple[int | str, ...], kind: str, message: str, value: object, known: list[str]) -> Violation:
    path = PARAMETERS_PATH + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    if kind == "extra_forbidden":
        return Violation(path, "", "unknown parameter of this environment", nearest(str(location[-1]), known))
    return Violation(
        path, repr(value)[:80], message[:1].lower() + message[1:], "Correct the parameter or leave it out."
    )
