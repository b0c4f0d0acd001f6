"""What failures do to a job: ordered rules, the first match wins."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from rljob_api.base import FrozenModel


class FailureAction(StrEnum):
    FAIL_JOB = "FailJob"
    RESTART_JOB = "RestartJob"
    RESTART_POOL = "RestartPool"
    IGNORE = "Ignore"


class PodCondition(FrozenModel):
    type: str = Field(min_length=1, description="Type of a pod condition, such as DisruptionTarget.")
    status: str = Field(default="True", description="Its status.")


class FailureRule(FrozenModel):
    name: str = Field(min_length=1, max_length=63, description="Name of the rule, shown in events.")
    pools: tuple[str, ...] = Field(
        default=(), description="Pools the rule looks at (`trainer` or a rollout pool); empty is all."
    )
    on_reasons: tuple[str, ...] = Field(default=(), description="Failure reasons that match.")
    on_pod_conditions: tuple[PodCondition, ...] = Field(default=(), description="Pod conditions that match.")
    action: FailureAction = Field(description="FailJob, RestartJob, RestartPool or Ignore.")
    counts_toward_max: bool = Field(default=True, description="Whether the restart counts toward maxRestarts.")


class FailurePolicy(FrozenModel):
    max_restarts: int = Field(default=3, ge=0, le=10000, description="Counted restarts before the job fails.")
    rules: tuple[FailureRule, ...] = Field(
        default=(), max_length=32, description="Ordered rules; the first match wins."
    )
