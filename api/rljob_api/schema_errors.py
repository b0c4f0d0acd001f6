"""What the schema refuses, in words that say what to do: one violation for each error that pydantic finds."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rljob_api.errors import Violation
from rljob_api.schema import Loc, field_of, model_at, path_of, shown

_OBJECT = ("must be an object", "Write its fields below it, indented.")
_LIST = ("must be a list", "Write one item a line, each after `- `.")
_WRONG_TYPE = {
    "int_type": ("must be an integer", "Write a whole number without quotes."),
    "float_type": ("must be a number", "Write a number without quotes."),
    "bool_type": ("must be true or false", "Write true or false without quotes."),
    "string_type": ("must be text", "Put it in quotes."),
    "model_type": _OBJECT,
    "dict_type": _OBJECT,
    "tuple_type": _LIST,
}
_BOUNDS = {
    "greater_than": ("gt", "must be greater than {}", "Choose a larger value."),
    "greater_than_equal": ("ge", "must be at least {}", "Choose a larger value."),
    "less_than": ("lt", "must be less than {}", "Choose a smaller value."),
    "less_than_equal": ("le", "must be at most {}", "Choose a smaller value."),
    "too_short": ("min_length", "must have at least {} item(s)", "Add items."),
    "too_long": ("max_length", "must have at most {} item(s)", "Remove items."),
    "string_too_short": ("min_length", "must have at least {} character(s)", "Write more, or leave the field out."),
    "string_too_long": ("max_length", "must have at most {} character(s)", "Shorten it."),
}


def distinct_errors(error: ValidationError) -> tuple[ErrorDetails, ...]:
    """The errors, each fault once: pydantic also calls a list too short when one of its items failed."""
    details = error.errors(include_url=False)
    above = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return tuple(detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in above)


def schema_violation(root: type[BaseModel], detail: ErrorDetails) -> Violation:
    """One error of a validation of `root` from JSON, as a violation."""
    loc, kind = detail["loc"], detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    value = shown(detail["input"])
    if kind == "missing":
        value, reason, remedy = "", "is required", f"Add it: {_description(root, loc)}"
    elif kind == "extra_forbidden":
        reason, remedy = "is not a known field", _nearest_field(root, loc)
    elif kind in ("enum", "literal_error"):
        reason, remedy = f"must be {context['expected'].replace(chr(39), '')}", "Write it exactly so."
    elif kind in _BOUNDS:
        bound, text, remedy = _BOUNDS[kind]
        reason = text.format(_number(context[bound]))
    elif kind in _WRONG_TYPE:
        reason, remedy = _WRONG_TYPE[kind]
    else:
        reason, remedy = detail["msg"], _description(root, loc)
    return Violation(path_of(loc) or "(document)", value, reason, remedy)


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _description(root: type[BaseModel], loc: Loc) -> str:
    """The user's reference of the field at `loc`."""
    model = model_at(root, loc[:-1])
    found = field_of(model, str(loc[-1])) if model is not None and loc else None
    return (found[1].description or "") if found is not None else ""


def _nearest_field(root: type[BaseModel], loc: Loc) -> str:
    model = model_at(root, loc[:-1])
    known = [str(field.alias) for field in model.model_fields.values()] if model is not None else []
    wanted = str(loc[-1]).lower().replace("_", "")
    nearest = difflib.get_close_matches(wanted, [name.lower() for name in known], n=1)
    if nearest:
        return f"Did you mean `{next(name for name in known if name.lower() == nearest[0])}`?"
    return f"Known fields: {', '.join(known)}." if known else "Remove it."
