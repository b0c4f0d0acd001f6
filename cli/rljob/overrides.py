"""`--set PATH=VALUE`: changes to a document before it is validated, so that a wrong one is refused like any other."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from rljob_api.errors import BadInput


def with_settings(document: object, settings: Sequence[str]) -> object:
    """A copy of the document with each `path=value` applied in order.

    A path names fields by dots and list items by number: `spec.rolloutPools.0.replicas`. Missing parents are made. The
    value is JSON where it is that, else text.

    Raises:
        BadInput: there is no `=`, or the path leads through something that has no fields.
    """
    changed = copy.deepcopy(document)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not all(path.split(".")):
            raise BadInput(f"--set {setting}: write it as PATH=VALUE, for example spec.training.steps=40")
        _assign(changed, path.split("."), _value(value), setting)
    return changed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(document: Any, path: Sequence[str], value: Any, setting: str) -> None:
    place = document
    for depth, key in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(place, dict):
            if is_last:
                place[key] = value
            else:
                place = place.setdefault(key, {})
        elif isinstance(place, list) and key.isdigit() and int(key) < len(place):
            if is_last:
                place[int(key)] = value
            else:
                place = place[int(key)]
        else:
            where = ".".join(path[:depth]) or "the document"
            what = f"a list of {len(place)}" if isinstance(place, list) else f"{json.dumps(place, default=str)[:40]}"
            raise BadInput(f"--set {setting}: {where} is {what}, which has no {key!r}")
