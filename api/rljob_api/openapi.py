"""Models -> structural OpenAPI v3 schemas, the dialect of JSON schema that a CustomResourceDefinition takes.

What differs from the JSON schema that pydantic writes: no `$ref`, one type at each place, no null (kubectl and the
apiserver take `field: null` as left out), exclusive bounds as booleans, no titles, and defaults that are only complete
once every object down to them has one of its own (`default: {}`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import BaseModel

from rljob_api.enums import MEANINGS

Schema: TypeAlias = dict[str, Any]

_OPEN = "x-kubernetes-preserve-unknown-fields"
_LIST_TYPE = "x-kubernetes-list-type"
_KEPT = (
    "type",
    "description",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "maxProperties",
    _OPEN,
    _LIST_TYPE,
    "x-kubernetes-list-map-keys",
)
_DROPPED = {"$defs", "title", "default", "const", "$ref", "anyOf", "exclusiveMinimum", "exclusiveMaximum", "required"}
_DROPPED |= {"properties", "items", "additionalProperties", MEANINGS}
_ANY_JSON: Schema = {_OPEN: True, "nullable": True}
_EMPTY_OBJECT: Schema = {"maxProperties": 0, "additionalProperties": {"type": "boolean"}}
"""An object without fields. Without `additionalProperties` the apiserver's rules cannot compare it with itself."""


def structural_schema(model: type[BaseModel], *, defaults: bool) -> Schema:
    """The schema of a model, with every nested model written out.

    Args:
        defaults: whether the apiserver fills in what is left out: yes for what users write, no for status.

    Raises:
        TypeError: the model says something that a structural schema has no words for.
    """
    schema = model.model_json_schema(by_alias=True)
    return _Converter(schema.get("$defs", {}), defaults).convert(schema, model.__name__)


class _Converter:
    def __init__(self, definitions: Schema, defaults: bool) -> None:
        self._definitions = definitions
        self._defaults = defaults

    def convert(self, schema: Schema, where: str) -> Schema:
        schema = self._one_type(schema, where)
        if "type" not in schema and _OPEN not in schema:
            if set(schema) - {"description", "title", "default"}:
                raise TypeError(f"{where}: no type: {schema}")
            return _ANY_JSON | _described(schema)
        unknown = set(schema) - set(_KEPT) - _DROPPED
        if unknown:
            raise TypeError(f"{where}: a structural schema has no {', '.join(sorted(unknown))}")
        converted = _described(schema) | {key: schema[key] for key in _KEPT if key in schema and key != "description"}
        if "const" in schema:
            converted["enum"] = [schema["const"]]
        for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if exclusive in schema:
                converted |= {bound: schema[exclusive], exclusive: True}
        match schema.get("type"):
            case "object":
                converted |= self._object(schema, where)
            case "array":
                converted[_LIST_TYPE] = schema.get(_LIST_TYPE, "atomic")
                converted["items"] = self.convert(schema["items"], f"{where}[*]")
        return converted

    def _object(self, schema: Schema, where: str) -> Schema:
        properties = schema.get("properties", {})
        values = schema.get("additionalProperties")
        if _OPEN in schema:
            values = None
        if not properties:
            if isinstance(values, dict):
                return {"additionalProperties": self.convert(values, f"{where}.*")}
            return {} if _OPEN in schema else dict(_EMPTY_OBJECT)
        required = schema.get("required", [])
        converted: Schema = {"required": list(required)} if required else {}
        converted["properties"] = {
            name: self._property(field, f"{where}.{name}", name in required) for name, field in properties.items()
        }
        return converted

    def _property(self, field: Schema, where: str, required: bool) -> Schema:
        converted = self.convert(field, where)
        if self._defaults and not required:
            default = field.get("default")
            if default is None and "properties" in converted and _OPEN not in converted and "anyOf" not in field:
                default = {}  # null is not allowed, so its own fields have the defaults to fill in
            if default not in (None, []):
                converted["default"] = default
        return converted

    def _one_type(self, schema: Schema, where: str) -> Schema:
        """The schema with its reference and its alternatives resolved."""
        if "$ref" in schema:
            target = self._definitions[schema["$ref"].removeprefix("#/$defs/")]
            schema = self._one_type(target, where) | {key: item for key, item in schema.items() if key != "$ref"}
        if "anyOf" not in schema:
            return schema
        options = [self._one_type(option, where) for option in schema["anyOf"] if option != {"type": "null"}]
        beside = {key: item for key, item in schema.items() if key != "anyOf"}
        if len(options) == 1:
            return options[0] | beside
        if [set(option) & {"enum"} for option in options] == [{"enum"}, set()] and options[1]["type"] == "string":
            # A known value, or the text of a newer writer: the meanings stay, the list of values does not bind.
            return options[1] | {MEANINGS: options[0][MEANINGS]} | beside
        raise TypeError(f"{where}: a structural schema has no union of {options}")


def _described(schema: Schema) -> Schema:
    """The description, with the meaning of each value in the form in which Kubernetes documents its own enums."""
    text = schema.get("description", "")
    meanings = schema.get(MEANINGS)
    if meanings:
        text += "\n\nPossible values:\n" + "\n".join(f" - `{value}`: {meaning}" for value, meaning in meanings)
    return {"description": text} if text else {}
