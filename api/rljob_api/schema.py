"""Walks over the models: from a path in a document to the model that declares it, from a job to the objects at a path.

Paths are written as kubectl writes them, `spec.rolloutPools[0].name`; a pattern has `[*]` in place of an index. A `loc`
is the same path as a tuple of keys and indexes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Loc: TypeAlias = tuple[str | int, ...]

_PART = re.compile(r"\[(\d+)\]|\[([^\]]*)\]|([^.\[\]]+)")
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN_CHARACTERS = 80


def path_of(loc: Loc) -> str:
    """Text of a path, on one line; keys that are no plain words (labels, environment names) go into brackets."""
    path = ""
    for part in loc:
        if isinstance(part, str) and _PLAIN_KEY.fullmatch(part):
            path += f".{part}" if path else part
        else:
            text = str(part)
            path += f"[{text if text.isprintable() else json.dumps(text)[1:-1]}]"
    return path


def loc_of(path: str) -> Loc:
    """The inverse of `path_of`, for keys of printable characters other than brackets."""
    return tuple(int(index) if index else key or word for index, key, word in _PART.findall(path))


def joined(place: str, field: str) -> str:
    """Path of `field` (a relative path, perhaps empty) inside `place` (perhaps empty)."""
    return place + field if not place or not field or field.startswith("[") else f"{place}.{field}"


def shown(value: object) -> str:
    """A value as the user wrote it, in JSON, shortened to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The one model inside a field's annotation (`X`, `X | None`, `tuple[X, ...]`), or None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := model_in(part)) is not None), None)


def field_of(model: type[BaseModel], alias: str) -> tuple[str, FieldInfo] | None:
    """Python name and description of the field that documents call `alias`."""
    return next(((name, field) for name, field in model.model_fields.items() if field.alias == alias), None)


def model_at(root: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The model that declares the object at `loc`; None inside free JSON or where nothing is declared."""
    model: type[BaseModel] | None = root
    for part in loc:
        if isinstance(part, int):
            continue  # an index into the tuple of models that the field declares
        found = field_of(model, part) if model is not None else None
        model = model_in(found[1].annotation) if found is not None else None
    return model


def places(root: BaseModel, pattern: str) -> Iterator[tuple[str, Any]]:
    """(path, object) of everything that a pattern names; what is unset or absent is left out.

    Example: `spec.rolloutPools[*].engine` -> (`spec.rolloutPools[0].engine`, Engine(...)), ...
    """
    found: list[tuple[str, Any]] = [("", root)]
    for part in _PART.findall(pattern):
        _, star, word = part
        step: list[tuple[str, Any]] = []
        for path, target in found:
            if star == "*":
                step += [(f"{path}[{index}]", item) for index, item in enumerate(target)]
            elif (declared := field_of(type(target), word)) is not None:
                step.append((joined(path, word), getattr(target, declared[0], None)))
        found = [(path, target) for path, target in step if target is not None]
    yield from found


def is_given(document: Any, path: str) -> bool:
    """Whether the document itself has a value at `path`, as opposed to a default."""
    for part in loc_of(path):
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
