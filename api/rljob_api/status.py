"""What the operator observed of a job. Integers and decimal strings, never floats; no list of pods beyond ten laggards.

A status is a summary that can be observed again; the exceptions are `attempt` and `restarts`, which are written before
they are acted on. Fields that a newer operator wrote are ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from rljob_api.base import FrozenModel
from rljob_api.conditions import RFC3339_SECONDS, Condition
from rljob_api.correction import OldLogprobs
from rljob_api.extensions import LIST_MAP_BY_NAME, LIST_MAP_BY_TYPE

MAX_LAGGARDS = 10
MAX_SERVING_VERSIONS = 256
"""Newest versions that a status lists; a pod below them is a laggard, named as such."""

Time = Annotated[str, Field(pattern=RFC3339_SECONDS)]
"""RFC 3339, UTC, whole seconds."""
Decimal = Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?$", max_length=32)]
"""A number with a fraction: the API conventions of Kubernetes refuse floats, which do not survive a round trip."""
Count = Annotated[int, Field(ge=0)]
Percent = Annotated[int, Field(ge=0, le=100)]


class StatusPart(FrozenModel):
    model_config = ConfigDict(extra="ignore")


class RestartStatus(StatusPart):
    total: Count = Field(default=0, description="Restarts of the whole job.")
    counted: Count = Field(default=0, description="Those that count toward failurePolicy.maxRestarts.")


class ServingVersion(StatusPart):
    version: Count = Field(description="A weight version.")
    pods: Count = Field(description="Rollout pods that serve it.")


class WeightStatus(StatusPart):
    epoch: Count = Field(default=0, description="Incarnation of the trainer that published last.")
    published: Count | None = Field(default=None, description="Newest version whose bytes are durable.")
    desired: Count | None = Field(default=None, description="Version that the coordinator ordered.")
    converged_pods: Count = Field(default=0, description="Rollout pods that serve the desired version.")
    serving_versions: tuple[ServingVersion, ...] = Field(
        default=(), max_length=MAX_SERVING_VERSIONS, description="Pods by served version, newest first."
    )


class StalenessStatus(StatusPart):
    p50: Count = Field(default=0, description="Median staleness of the tokens trained in the last step, in versions.")
    p95: Count = Field(default=0, description="Their 95th percentile.")
    max: Count = Field(default=0, description="The largest.")


class TokenCounts(StatusPart):
    trained: Count = Field(default=0, description="Tokens that entered the loss.")
    salvaged: Count = Field(default=0, description="Tokens of partial rollouts that went on after an interruption.")
    lost: Count = Field(default=0, description="Tokens that died with their worker.")
    dropped: Count = Field(default=0, description="Tokens dropped or masked, with a reason.")


class CorrectionStatus(StatusPart):
    route: OldLogprobs | None = Field(default=None, description="Where old log-probabilities come from.")
    exact_fraction: Decimal | None = Field(default=None, description="Share of trained tokens with an exact one.")
    keep_fraction: Decimal | None = Field(
        default=None, description="Share of the last step's tokens that the discrepancy mask kept."
    )
    clip_fraction: Decimal | None = Field(
        default=None, description="Share of the last step's tokens that PPO's clip stopped."
    )
    pooled_fraction: Decimal | None = Field(
        default=None,
        description="Share of the last step's stale tokens that were scored ahead, at no cost on its critical path.",
    )
    leak: Decimal | None = Field(
        default=None,
        description="Of the last audit: RMS difference between the old log-probabilities used and the exact ones, in nats.",
    )
    interruptions: Count = Field(default=0, description="Trajectories interrupted by a new version and continued.")
    tokens: TokenCounts = Field(default_factory=TokenCounts, description="What became of the model tokens.")


class ThroughputStatus(StatusPart):
    tokens_per_second: Count = Field(default=0, description="Model tokens trained a second, over the last steps.")
    trainer_idle_percent: Percent = Field(default=0, description="Share of the time that the trainer waited for data.")
    rollout_idle_percent: Percent = Field(default=0, description="Share of the time that engines had no request.")


class PoolStatus(StatusPart):
    name: str = Field(max_length=63, description="Name of the pool.")
    desired: Count = Field(default=0, description="Workers asked for.")
    ready: Count = Field(
        default=0, description="Workers that are ready; a rollout worker is while it serves a version within the bound."
    )
    restarts: Count = Field(default=0, description="Container restarts of the pool.")
    laggards: tuple[Annotated[str, Field(max_length=253)], ...] = Field(
        default=(), max_length=MAX_LAGGARDS, description="Up to ten pods that have not converged in time."
    )


class CheckpointStatus(StatusPart):
    version: Count = Field(description="Weight version that was saved.")
    step: Count = Field(description="Steps trained by then.")
    uri: str = Field(min_length=1, max_length=4096, description="Where it is: `pvc://CLAIM/FOLDER`.")


class FinalModelStatus(StatusPart):
    version: Count = Field(description="Weight version of the final model.")
    uri: str = Field(min_length=1, max_length=4096, description="Where the user's model is.")


class ColumnStatus(StatusPart):
    """Texts for kubectl's columns: a JSON path cannot join numbers."""

    converged: str = Field(default="", max_length=64, description="Converged of all rollout pods: `1/2`.")
    staleness: str = Field(default="", max_length=64, description="p50/p95/max: `1/3/4`.")
    rollouts: str = Field(default="", max_length=64, description="Ready of desired rollout pods: `2/2`.")
    trainer: str = Field(default="", max_length=64, description="Ready of desired trainer pods: `1/1`.")


class RLJobStatus(StatusPart):
    observed_generation: Count = Field(default=0, description="Generation of the spec that was last reconciled.")
    start_time: Time | None = Field(default=None, description="When the running time began to count; anew on resume.")
    started_time: Time | None = Field(
        default=None, description="When trainer and enough workers of every pool first ran since startTime."
    )
    completion_time: Time | None = Field(default=None, description="When the job succeeded or failed.")
    attempt: Count = Field(default=0, description="Attempt of the whole gang; written before it is acted on.")
    runtime_image: str | None = Field(
        default=None, max_length=1024, description="Image of the runtime pods, pinned at the first start."
    )
    restarts: RestartStatus = Field(default_factory=RestartStatus, description="Restarts so far.")
    step: Count = Field(default=0, description="Steps trained.")
    weights: WeightStatus = Field(default_factory=WeightStatus, description="Versions trained, ordered and served.")
    staleness: StalenessStatus = Field(default_factory=StalenessStatus, description="How old the trained tokens are.")
    correction: CorrectionStatus = Field(default_factory=CorrectionStatus, description="Old log-probabilities.")
    throughput: ThroughputStatus = Field(default_factory=ThroughputStatus, description="How fast, and who waits.")
    pools: tuple[PoolStatus, ...] = Field(
        default=(),
        max_length=17,
        description="Rollout pools, and the old-policy pool as `old-policy`.",
        json_schema_extra=LIST_MAP_BY_NAME,
    )
    checkpoint: CheckpointStatus | None = Field(default=None, description="The last checkpoint.")
    final_model: FinalModelStatus | None = Field(default=None, description="The result, once the job succeeded.")
    columns: ColumnStatus = Field(default_factory=ColumnStatus, description="Texts for kubectl's columns.")
    conditions: tuple[Condition, ...] = Field(
        default=(), max_length=32, description="Conditions, by type.", json_schema_extra=LIST_MAP_BY_TYPE
    )
