"""Bases of every model: frozen, unknown fields refused, camelCase on the wire."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError
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
