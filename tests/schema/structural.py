"""What the apiserver does with a structural schema, written a second time and small: defaults, and what it refuses.

Expressions (x-kubernetes-validations) are left out: only the apiserver itself can run those.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

OPEN = "x-kubernetes-preserve-unknown-fields"
SIZES = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems"), "object": ("", "maxProperties")}
KEYWORDS = (
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "maxProperties",
)
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def parts(schema: dict[str, Any], pattern: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(pattern, schema) of the whole and of everything below it; `[*]` is an item, `.*` the value of any key."""
    yield pattern, schema
    for name, field in schema.get("properties", {}).items():
        yield from parts(field, f"{pattern}.{name}".lstrip("."))
    if "items" in schema:
        yield from parts(schema["items"], f"{pattern}[*]")
    if "additionalProperties" in schema:
        yield from parts(schema["additionalProperties"], f"{pattern}.*")


def constraints(schema: dict[str, Any]) -> set[tuple[str, str]]:
    """(pattern, keyword) of everything that can refuse a value of the right type."""
    found = set()
    for pattern, part in parts(schema):
        found |= {(pattern, keyword) for keyword in KEYWORDS if keyword in part}
        found |= {(f"{pattern}.{name}".lstrip("."), "required") for name in part.get("required", ())}
        if part.get("x-kubernetes-list-type") == "map":
            found.add((pattern, "list-map"))
    return found


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """The value with nulls of fields dropped and defaults filled in, all the way down."""
    if isinstance(value, list) and "items" in schema:
        return [defaulted(schema["items"], item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, field in schema.get("properties", {}).items():
        if filled.get(name) is None:
            filled.pop(name, None)
            if "default" in field:
                filled[name] = copy.deepcopy(field["default"])
        if name in filled:
            filled[name] = defaulted(field, filled[name])
    return filled


def refused(schema: dict[str, Any], value: Any, pattern: str = "") -> Iterator[tuple[str, str]]:
    """(pattern, keyword) of every constraint that a value with its defaults breaks; also `type` and `unknown`."""
    kind = schema.get("type")
    if kind is None:
        return
    if not _is(kind, value):
        yield pattern, "type"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield pattern, "enum"
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
            yield pattern, "minimum"
        if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
            yield pattern, "maximum"
    if kind in SIZES:
        fewest, most = SIZES[kind]
        if len(value) < schema.get(fewest, 0):
            yield pattern, fewest
        if len(value) > schema.get(most, len(value)):
            yield pattern, most
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield pattern, "pattern"
    if kind == "array":
        keys = (
            [tuple(item.get(key) for key in schema["x-kubernetes-list-map-keys"]) for item in value]
            if (schema.get("x-kubernetes-list-type") == "map" and all(isinstance(item, dict) for item in value))
            else []
        )
        if any(keys.count(key) > 1 for key in keys):
            yield pattern, "list-map"
        for item in value:
            yield from refused(schema["items"], item, f"{pattern}[*]")
    if kind == "object":
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{pattern}.{name}".lstrip("."), "required"
        for name, item in value.items():
            below = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            place = f"{pattern}.{name if name in schema.get('properties', {}) else '*'}".lstrip(".")
            if below is not None:
                yield from refused(below, item, place)
            elif not schema.get(OPEN):
                yield f"{pattern}.{name}".lstrip("."), "unknown"


def _is(kind: str, value: Any) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
