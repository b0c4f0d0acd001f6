"""A document as the apiserver would get it, and a job as far as it can be read.

`as_sent` makes the JSON that kubectl would send: Go prints a whole float without its point, so `steps: 60.0` arrives as
the integer 60, and the command line gives the same verdict. `partial_model` reads what is left of a document with
errors, so that rules over several fields can speak in the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter

from rljob_api.errors import Violation
from rljob_api.schema import Loc, field_of, model_in, path_of

M = TypeVar("M", bound=BaseModel)

_MAX_DEPTH = 64
_MAX_WHOLE = 1e21  # from there on Go prints floats with an exponent


def as_sent(document: object) -> tuple[Any, tuple[Violation, ...]]:
    """The document as plain JSON values, and what in it JSON cannot hold (left out of the result as null)."""
    violations: list[Violation] = []

    def refuse(loc: Loc, value: object, reason: str, remedy: str) -> None:
        violations.append(Violation(path_of(loc) or "(document)", _shortened(value), reason, remedy))

    def convert(value: object, loc: Loc) -> Any:
        if len(loc) > _MAX_DEPTH:
            return refuse(loc[:3], "", f"is nested more than {_MAX_DEPTH} levels deep", "Flatten it.")
        match value:
            case int() if not -(1 << 63) <= value < 1 << 63:
                return refuse(loc, value, "must fit into 64 bits", "Choose a smaller number.")
            case str() if not _is_text(value):
                return refuse(loc, value, "is not valid Unicode", "Write the character itself, not half of an escape.")
            case None | bool() | int() | str():
                return value
            case float():
                if not math.isfinite(value):
                    return refuse(loc, value, "must be a finite number", "JSON has no infinity and no NaN.")
                return int(value) if value.is_integer() and abs(value) < _MAX_WHOLE else value
            case Mapping():
                for key in value:
                    if not _is_text(key):
                        refuse(loc, key, "has a key that is not text", "Put the key in quotes.")
                return {key: convert(item, (*loc, key)) for key, item in value.items() if _is_text(key)}
            case list() | tuple():
                return [convert(item, (*loc, index)) for index, item in enumerate(value)]
            case _:
                return refuse(loc, value, f"is a {type(value).__name__}, which JSON cannot hold", "Put it in quotes.")

    return convert(document, ()), tuple(violations)


def without_nulls(model: type[BaseModel], document: Any) -> Any:
    """The document without `field: null`, which the apiserver takes as left out; inside free JSON a null is a value."""
    if not isinstance(document, dict):
        return document
    kept = {}
    for key, value in document.items():
        declared = field_of(model, key)
        if declared is None or value is not None:
            inner = model_in(declared[1].annotation) if declared is not None else None
            if inner is not None and isinstance(value, list):
                value = [without_nulls(inner, item) for item in value]
            kept[key] = value if inner is None else without_nulls(inner, value)
    return kept


def _is_text(value: object) -> bool:
    # Half of a surrogate pair is a Python str, but no JSON parser takes it.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _shortened(value: object) -> str:
    # An integer of more than 4300 digits refuses to be written out.
    if isinstance(value, int) and value.bit_length() > 64:
        return hex(value)[:40] + "…"
    return repr(value)[:80]


def partial_model(model: type[M], document: Mapping[str, Any], bad: frozenset[Loc], loc: Loc = ()) -> M:
    """The model without the fields that failed: reading one of those raises AttributeError.

    Args:
        document: JSON object for the model.
        bad: paths that failed their own check; a field with a bad path at or below it is left out, but an object below
            is kept with its own bad fields left out.
    """
    values: dict[str, Any] = {}
    absent: list[str] = []
    for name, field in model.model_fields.items():
        here = (*loc, str(field.alias))
        value = document.get(str(field.alias))
        inner = model_in(field.annotation)
        if here in bad:
            absent.append(name)
        elif str(field.alias) not in document:
            continue
        elif inner is not None and isinstance(value, dict):
            values[name] = partial_model(inner, value, bad, here)
        elif inner is not None and isinstance(value, list):
            values[name] = tuple(
                _hollow(inner) if (*here, index) in bad else partial_model(inner, item, bad, (*here, index))
                for index, item in enumerate(value)
            )
        elif any(path[: len(here)] == here for path in bad):
            absent.append(name)
        else:
            values[name] = TypeAdapter[Any](cast(Any, field.annotation)).validate_python(value)
    written = {name for name in absent if str(model.model_fields[name].alias) in document}
    made = model.model_construct(_fields_set=set(values) | written, **values)
    for name in absent:
        # model_construct fills in defaults: a rule must not judge a default in place of what the user wrote.
        made.__dict__.pop(name, None)
    return made


def _hollow(model: type[M]) -> M:
    """A stand-in for an item that is no object at all: every field is absent."""
    made = model.model_construct()
    made.__dict__.clear()
    return made
