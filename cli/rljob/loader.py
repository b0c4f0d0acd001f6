"""RLJob files: YAML as version 1.2 means it, or JSON, one document a file.

PyYAML reads YAML 1.1, where `1e-6` is text, `on` is true, `017` is 15 and `12:30` is 750. A learning rate or a name
that changes its meaning between this command and the apiserver is worse than an error, so the scalars follow the core
schema of YAML 1.2. Keys are text as written. Tags other than the core schema's, merge keys (`<<`) and repeated keys are
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from rljob_api.errors import SpecError, Violation

MAX_FILE_BYTES = 1 << 20
"""An object of the apiserver holds 1.5 MB at most; a larger file is no RLJob."""
MAX_VALUES = 100_000
"""Values of a document with its aliases written out: a small file of nested aliases can mean billions."""

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_TEXT = "tag:yaml.org,2002:str"
_LIST = "tag:yaml.org,2002:seq"
_OBJECT = "tag:yaml.org,2002:map"

_CORE_SCALARS = {
    _NULL: re.compile(r"^(?:~|null|Null|NULL|)\Z"),
    _BOOL: re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z"),
    _INT: re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    _FLOAT: re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


class _CoreResolver(BaseResolver):
    """Resolves plain scalars by the core schema of YAML 1.2 (section 10.3.2)."""


for _tag, _pattern in _CORE_SCALARS.items():  # an int also looks like a float: the first that matches wins
    _CoreResolver.add_implicit_resolver(_tag, _pattern, None)


class _CoreLoader(Reader, Scanner, Parser, Composer, _CoreResolver):
    """Text to nodes; `_Builder` makes the values, so that no tag can make anything else."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreResolver.__init__(self)


def load_document(path: Path) -> object:
    """The one document of a YAML or JSON file, as null, booleans, numbers, texts, lists and objects.

    Raises:
        SpecError: the file cannot be read, is larger than 1 MiB, is no YAML or JSON, holds no or several documents,
            repeats a key, or uses tags, merge keys or recursion. The path says line and column.
    """
    text = _read(path)
    try:
        return _load_json(path, text) if path.suffix == ".json" else _load_yaml(path, text)
    except RecursionError as error:
        raise _refusal(str(path), "is nested too deeply", "Flatten it.") from error


def _refusal(where: str, reason: str, remedy: str) -> SpecError:
    return SpecError((Violation(where, "", reason, remedy),))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refusal(str(path), f"cannot be read ({error.strerror})", "Name a readable YAML or JSON file.") from error
    if len(data) > MAX_FILE_BYTES:
        raise _refusal(
            str(path), f"is larger than {MAX_FILE_BYTES} bytes", "An RLJob is a few kilobytes: name another file."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        raise _refusal(_at(path, *_position(before, len(before))), "is not UTF-8", "Save the file as UTF-8.") from error


def _position(text: str, offset: int) -> tuple[int, int]:
    """Line and column of an offset, counted from 1."""
    before = text[:offset]
    return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1


def _at(path: Path, line: int, column: int) -> str:
    return f"{path}:{line}:{column}"


# -------------------------------------------------------------------------------------------------------------- JSON


def _load_json(path: Path, text: str) -> object:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        built: dict[str, object] = {}
        for key, value in pairs:
            if key in built:
                raise _refusal(str(path), f"repeats the key {json.dumps(key)} in one object", "Keep one of the two.")
            built[key] = value
        return built

    try:
        return json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise _refusal(
            _at(path, error.lineno, error.colno), f"is not JSON: {error.msg}", "Mend the JSON there."
        ) from error
    except ValueError as error:
        raise _refusal(str(path), "has a number of thousands of digits", "Write a smaller number.") from error


# -------------------------------------------------------------------------------------------------------------- YAML


def _load_yaml(path: Path, text: str) -> object:
    try:
        loader = _CoreLoader(text)
        if not loader.check_node():
            raise _refusal(str(path), "is empty", "Write one RLJob into it.")
        node: Any = loader.get_node()
        if loader.check_node():
            second: Any = loader.get_node()
            where = _at(path, second.start_mark.line + 1, second.start_mark.column + 1)
            raise _refusal(where, "starts a second document", "Keep one RLJob a file.")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _at(path, mark.line + 1, mark.column + 1) if mark is not None else str(path)
        reason = ", ".join(filter(None, (error.context, error.problem)))
        remedy = "Indent with spaces." if "'\\t'" in reason else "Mend the YAML there."
        raise _refusal(where, f"is not YAML: {reason}", remedy) from error
    except ReaderError as error:
        where = _at(path, *_position(text, error.position))
        raise _refusal(
            where, f"has the control character {error.character:#x}", "Remove it, or write it as an escape in quotes."
        ) from error
    return _Builder(path).value(node)


def _whole(text: str) -> str:
    """The text with escaped surrogate pairs made one character: PyYAML leaves the halves that JSON's escapes write."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


class _Builder:
    """Nodes to values, with every alias written out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = 0
        self._open: set[int] = set()

    def value(self, node: Node) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._refusal(
                node, f"means more than {MAX_VALUES} values with its aliases written out", "Use fewer aliases."
            )
        match node:
            case ScalarNode():
                return self._scalar(node)
            case SequenceNode(tag=tag) if tag == _LIST:
                with self._inside(node):
                    return [self.value(item) for item in node.value]
            case MappingNode(tag=tag) if tag == _OBJECT:
                with self._inside(node):
                    return self._object(node)
            case _:
                raise self._wrong_tag(node)

    @contextmanager
    def _inside(self, node: Node) -> Iterator[None]:
        if id(node) in self._open:
            raise self._refusal(node, "contains itself", "Remove the alias that points to its own parent.")
        self._open.add(id(node))
        yield
        self._open.remove(id(node))

    def _object(self, node: MappingNode) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _NULL:
                raise self._refusal(key, "has a key that is no text", "Write keys as plain words.")
            if key.value == "<<" and key.style is None:
                raise self._refusal(key, "uses a merge key, which YAML 1.2 does not have", "Write the fields out.")
            name = _whole(key.value)
            if name in built:
                raise self._refusal(key, f"repeats the key {json.dumps(name)} in one object", "Keep one of the two.")
            built[name] = self.value(item)
        return built

    def _scalar(self, node: ScalarNode) -> bool | int | float | str | None:
        text, tag = node.value, node.tag
        if tag in _CORE_SCALARS and not _CORE_SCALARS[tag].match(text):  # an explicit tag on other text: !!int "x"
            raise self._wrong_tag(node)
        if tag == _NULL:
            return None
        if tag == _BOOL:
            return bool(text.lower() == "true")
        if tag == _INT:
            return self._integer(node)
        if tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if tag == _TEXT:
            return _whole(text)
        raise self._wrong_tag(node)

    def _integer(self, node: ScalarNode) -> int:
        text = node.value
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text[2:] if base != 10 else text, base)
        except ValueError as error:
            raise self._refusal(node, "has a number of thousands of digits", "Write a smaller number.") from error

    def _wrong_tag(self, node: Node) -> SpecError:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        return self._refusal(node, f"does not fit the tag {shown}", "Remove the tag: values are plain YAML.")

    def _refusal(self, node: Node, reason: str, remedy: str) -> SpecError:
        mark = node.start_mark
        return _refusal(_at(self._path, mark.line + 1, mark.column + 1), reason, remedy)
