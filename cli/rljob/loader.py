"""Reads RLJob files the way the Kubernetes API server does: YAML 1.2's core scalars, one document, no duplicate keys.

PyYAML alone follows YAML 1.1, where `1e-6` is text, `on` is true and `017` is 15; kubectl disagrees, and so would the
same file's verdict.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, ScalarNode
from yaml.resolver import BaseResolver

from rljob_api.errors import SpecError, Violation

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML reads it from the class)


_CORE = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def _int(loader: _Loader, node: ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    return int(text[2:] if base != 10 else text, base)


def _float(loader: _Loader, node: ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: _Loader, node: MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise ConstructorError(None, None, f"the key {key!r} stands here twice", key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor(BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_document(path: Path) -> object:
    """The one document of a YAML or JSON file.

    Raises:
        SpecError: the file cannot be read, is no YAML, or holds another number of documents.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}", "Check the path") from error
    if len(data) > MAX_BYTES:
        raise _refused(path, f"has {len(data)} bytes; an RLJob has at most {MAX_BYTES}", "Is this the right file?")
    try:
        documents = list(yaml.load_all(data.decode(), Loader=_Loader))
    except UnicodeDecodeError as error:
        raise _refused(path, "is not UTF-8 text", "Save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise _refused(path, f"{where}{error.problem}", "Correct the YAML") from error
    except yaml.YAMLError as error:
        raise _refused(path, str(error), "Correct the YAML") from error
    if len(documents) != 1:
        raise _refused(path, f"holds {len(documents)} documents", "Put one RLJob into a file")
    return documents[0]


def _refused(path: Path, reason: str, remedy: str) -> SpecError:
    return SpecError((Violation(str(path), "", reason, remedy),))
