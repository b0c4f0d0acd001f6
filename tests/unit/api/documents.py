"""A small valid document, and changes to it."""

from __future__ import annotations

import copy
from typing import Any

MINIMAL: dict[str, Any] = {
    "apiVersion": "rljob.dev/v1alpha1",
    "kind": "RLJob",
    "metadata": {"name": "job"},
    "spec": {
        "model": {"path": "models/tiny"},
        "environment": {"name": "digit-copy"},
        "training": {"steps": 10, "tasksPerStep": 4, "learningRate": 0.001},
        "rolloutPools": [{"name": "main", "replicas": 1}],
    },
}

REMOVE = object()


def changed(*changes: dict[str, Any]) -> dict[str, Any]:
    """The minimal document with values set at (or, with REMOVE, taken from) dotted paths; missing objects are made."""
    document = copy.deepcopy(MINIMAL)
    for path, value in [item for each in changes for item in each.items()]:
        *parents, last = path.split(".")
        target: Any = document
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if value is REMOVE:
            del target[int(last) if isinstance(target, list) else last]
        elif isinstance(target, list):
            target[int(last)] = copy.deepcopy(value)
        else:
            target[last] = copy.deepcopy(value)
    return document
