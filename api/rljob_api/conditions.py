"""Conditions of a job, as Kubernetes means them: a set by type; transition times move only when the status does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rljob_api.base import FrozenModel
from rljob_api.reasons import ConditionType, Reason

RFC3339_SECONDS = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$"
"""Times in status: UTC, whole seconds, as metav1.Time writes them."""


class Condition(FrozenModel):
    """One condition. Types and reasons that a newer operator wrote are kept as text."""

    type: ConditionType | Annotated[str, Field(max_length=316)] = Field(
        union_mode="left_to_right", description="What the condition speaks of."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Reason | Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        union_mode="left_to_right", description="Why, in one CamelCase word."
    )
    message: str = Field(default="", max_length=32768, description="Why, in a sentence with the next action.")
    observed_generation: int = Field(default=0, ge=0, description="Generation of the spec that was looked at.")
    last_transition_time: str | None = Field(
        default=None,
        pattern=RFC3339_SECONDS,
        description="When the status last changed; set by set_condition.",
    )


def set_condition(conditions: tuple[Condition, ...], new: Condition, now: str) -> tuple[Condition, ...]:
    """The conditions with `new` in the place of the one of its type, or at the end.

    The transition time is `now` where the status is another than before (or the type is new) and otherwise stays,
    whatever reason and message say. Where nothing changed the result equals the input: there is nothing to write.

    Args:
        now: RFC 3339, UTC, whole seconds: `2026-11-23T01:00:00Z`.
    """
    before = next((condition for condition in conditions if condition.type == new.type), None)
    same = before is not None and before.status == new.status
    since = before.last_transition_time if before is not None and same else now
    placed = Condition.model_validate(new.model_dump() | {"last_transition_time": since})
    if before is None:
        return (*conditions, placed)
    return tuple(placed if condition.type == new.type else condition for condition in conditions)


def condition_of(conditions: tuple[Condition, ...], kind: ConditionType) -> Condition | None:
    """The condition of one type, or None."""
    return next((condition for condition in conditions if condition.type == kind), None)
