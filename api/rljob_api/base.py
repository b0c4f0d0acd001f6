"""Bases of every model: frozen, unknown fields refused, camelCase on the wire; and JSON frozen all the way down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Never, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, ValidationError
from pydantic.alias_generators import to_camel

from rljob_api.errors import MalformedMessage


class FrozenModel(BaseModel):
    """A value object: immutable, camelCase in JSON, snake_case in Python, no unknown fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
    )


class WireMessage(FrozenModel):
    """A message or KV value: JSON bytes in and out. Unknown fields of a newer writer are ignored (one version back)."""

    model_config = ConfigDict(extra="ignore")

    def to_bytes(self) -> bytes:
        """UTF-8 JSON with camelCase names."""
        return self.model_dump_json(by_alias=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode and validate.

        Raises:
            MalformedMessage: the bytes are not JSON or do not fit the schema.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "(message)"
            raise MalformedMessage(f"{cls.__name__}: {where}: {first['msg']} ({len(data)} bytes)") from error


class FrozenObject(dict[str, Any]):
    """A JSON object that cannot be changed: a frozen pydantic model does not freeze the dicts it holds.

    A dict, and not only a Mapping, so that json, yaml and `**parameters` take it as it is. `copy` and `|` give plain,
    mutable dicts.
    """

    __slots__ = ()

    def _refuse(self, *_args: object, **_kwargs: object) -> Never:
        raise TypeError("this JSON object belongs to a frozen model: build a new one with dict(...)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenObject], tuple[dict[str, Any]]]:
        # The default protocol rebuilds a dict item by item, which is refused; deepcopy would fail.
        return (FrozenObject, (dict(self),))


def freeze(value: Any) -> Any:
    """The same JSON value with every object a FrozenObject and every array a tuple."""
    if isinstance(value, Mapping):
        return FrozenObject({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The same JSON value as fresh plain dicts and lists, for a builder to change."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value


_FROZEN = AfterValidator(freeze)
_THAWED = PlainSerializer(thaw)  # pydantic's own serializer of JsonValue does not expect tuples

FrozenJson = Annotated[JsonValue, _FROZEN, _THAWED]
"""Any JSON value, frozen all the way down."""
FrozenJsonObject = Annotated[Mapping[str, JsonValue], _FROZEN, _THAWED]
"""A JSON object, frozen all the way down."""
FrozenTexts = Annotated[Mapping[str, str], _FROZEN, _THAWED]
"""A frozen map of texts."""
FrozenBoundedTexts = Annotated[Mapping[str, Annotated[str, Field(max_length=1024)]], _FROZEN, _THAWED]
"""The same, each text with a bound: rules of the apiserver read nothing without one."""
FrozenNumbers = Annotated[Mapping[str, float], _FROZEN, _THAWED]
"""A frozen map of numbers."""
