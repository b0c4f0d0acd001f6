"""String constants that say what they mean, so that `kubectl explain` and the reference are made from the code."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MEANINGS = "x-meanings"
"""Key under which a JSON schema carries (value, meaning) pairs; a list, for pydantic sorts the keys of objects."""


class DocumentedEnum(StrEnum):
    """An enum whose members are declared as `NAME = "Value", "What it means, in a sentence."`."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        schema[MEANINGS] = [[member.value, member.meaning] for member in cls]
        return schema
