"""What failures do to a job: ordered rules, the first match wins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rljob_api.base import FrozenModel
from rljob_api.enums import DocumentedEnum


class FailureAction(DocumentedEnum):
    FAIL_JOB = "FailJob", "Give up: the job fails with reason FailurePolicy."
    RESTART_JOB = "RestartJob", "Make a new attempt of the trainer gang, from the last checkpoint."
    RESTART_POOL = "RestartPool", "Restart the pods of the pool that failed."
    IGNORE = "Ignore", "Leave the failed pod to Kubernetes, which replaces it."


class PodCondition(FrozenModel):
    type: str = Field(min_length=1, max_length=316, description="Type of a pod condition, such as DisruptionTarget.")
    status: Literal["True", "False", "Unknown"] = Field(
        default="True", description="Status that the condition must have."
    )


class FailureRule(FrozenModel):
    name: str = Field(min_length=1, max_length=63, description="Name of the rule, shown in events.")
    pools: tuple[Annotated[str, Field(max_length=63)], ...] = Field(
        default=(),
        max_length=18,
        description="Pools the rule looks at: `trainer`, `old-policy`, or a rollout pool; empty is all.",
    )
    on_reasons: tuple[Annotated[str, Field(max_length=128)], ...] = Field(
        default=(), max_length=64, description="Failure reasons that match."
    )
    on_pod_conditions: tuple[PodCondition, ...] = Field(
        default=(), max_length=32, description="Pod conditions that match; one of them is enough."
    )
    action: FailureAction = Field(description="What a failure that matches does.")
    counts_toward_max: bool = Field(default=True, description="Whether the restart counts toward maxRestarts.")


class FailurePolicy(FrozenModel):
    max_restarts: int = Field(default=3, ge=0, le=10000, description="Counted restarts before the job fails.")
    rules: tuple[FailureRule, ...] = Field(
        default=(), max_length=32, description="Ordered rules; the first match wins."
    )
