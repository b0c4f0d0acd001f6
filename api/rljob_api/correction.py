"""How a job corrects for engines that differ and for staleness, and where its old log-probabilities come from."""

from __future__ import annotations

from pydantic import Field

from rljob_api.base import FrozenModel
from rljob_api.enums import DocumentedEnum


class OldLogprobs(DocumentedEnum):
    """Where old log-probabilities come from."""

    RESIDENT = "Resident", "Exact: the version that the trainer holds; needs staleness.maxVersions 0."
    SNAPSHOT = "Snapshot", "Exact: reload the version that generated the token."
    DEDICATED = "Dedicated", "Exact: the workers of oldPolicyPool score each token under the version that generated it."
    INTERRUPTION = (
        "Interruption",
        "Exact: workers stop before each update, and what they made is scored first; no old version is kept.",
    )
    EWMA = "Ewma", "Approximate: the policy of the averaged weights (revised PPO-EWMA); labelled, and audited."
    LINEAR = "Linear", "Baseline: engine and target probability, mixed by 1/(n+1) and n/(n+1) at staleness n."
    LOG_LINEAR = "LogLinear", "Baseline: the same mixture of log-probabilities."
    CURRENT = "Current", "Baseline, the usual bug: the policy before this step's first update."
    ENGINE = "Engine", "Baseline: the behavior log-probability itself, without a discrepancy correction."


class Fallback(DocumentedEnum):
    """What takes the place of an exact old log-probability that is not to be had."""

    DROP = "Drop", "Leave the token out of the loss, counted with its reason."
    EWMA = "Ewma", "The policy of the averaged weights, labelled and counted as such."


class Objective(DocumentedEnum):
    DECOUPLED = "Decoupled", "A mask on the discrepancy ratio, PPO's clip on the staleness ratio."
    COUPLED = "Coupled", "Baseline: PPO's clip alone; the discrepancy ratio is neither masked nor a weight."


class Granularity(DocumentedEnum):
    TOKEN = "Token", "The ratio of the token itself."
    SEGMENT = "Segment", "The geometric mean over the tokens of one weight version."
    SEQUENCE = "Sequence", "The geometric mean over the trajectory's model tokens."


class DiscrepancyWeight(DocumentedEnum):
    NONE = "None", "Weight 1: the ratio only masks."
    TRUNCATED = "Truncated", "The ratio, at most weightCap."
    RAW = "Raw", "The ratio as it is."


class Clip(FrozenModel):
    low: float = Field(default=0.2, ge=0, lt=1, description="ε below: the staleness ratio is kept above 1 - low.")
    high: float = Field(default=0.2, ge=0, description="ε above: the staleness ratio is kept below 1 + high.")


class Discrepancy(FrozenModel):
    """Mask, and optionally weight, on the discrepancy ratio (old policy over behavior policy)."""

    granularity: Granularity = Field(
        default=Granularity.TOKEN, description="What the ratio that is masked and weighted is taken over."
    )
    low: float | None = Field(
        default=None, gt=0, le=1, description="Lower bound of the kept ratio; unset is 0.5 for Token, 0.999 otherwise."
    )
    high: float | None = Field(
        default=None, ge=1, description="Upper bound of the kept ratio; unset is 2.0 for Token, 1.001 otherwise."
    )
    weight: DiscrepancyWeight = Field(
        default=DiscrepancyWeight.NONE, description="Weight of a token that the mask keeps."
    )
    weight_cap: float = Field(default=2.0, gt=0, description="Cap of the truncated weight.")

    def bounds(self) -> tuple[float, float]:
        """(low, high) with the granularity's defaults filled in."""
        low, high = (0.5, 2.0) if self.granularity is Granularity.TOKEN else (0.999, 1.001)
        return (low if self.low is None else self.low, high if self.high is None else self.high)


class Snapshots(FrozenModel):
    """Old versions in the trainer; in BFloat16 each as its difference to the next one."""

    memory_bytes: int | None = Field(
        default=None,
        ge=0,
        le=1 << 50,
        description=(
            "Host memory for old versions, a trainer process; unset is no bound. Without spill it must hold "
            "staleness.maxVersions + 1 full copies of the process's share of the model, checked where the size is known "
            "beforehand (model.random). Differences are smaller as a rule, but not always. It cannot be raised later, "
            "staleness.maxVersions can: leave room."
        ),
    )
    spill: bool = Field(
        default=False, description="Keep what is over memoryBytes on the pod's local disk, memory-mapped."
    )


class Eager(FrozenModel):
    """Scoring in the trainer's idle time, while the version that made a token is still resident."""

    enabled: bool = Field(
        default=True, description="Score ahead of the step whatever there is, while no batch is ready."
    )
    prefix_tokens: int = Field(
        default=256,
        ge=0,
        le=1 << 20,
        description=(
            "Workers send what they have of an unfinished trajectory each time that many tokens are new, and all of it when "
            "the weights change; 0 is never."
        ),
    )


class EwmaReset(FrozenModel):
    """When the average starts anew from the present weights: it has fallen too far behind."""

    threshold: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description=(
            "Reset while the share of tokens that the discrepancy mask keeps, relative to that of tokens with an exact "
            "old log-probability, is below this; 0 never resets."
        ),
    )
    patience: int = Field(default=2, ge=1, le=1000, description="Steps in a row below the threshold before a reset.")
    is_absolute: bool = Field(
        default=False, description="Compare the share itself, so that engine noise alone may cause a reset."
    )


class Ewma(FrozenModel):
    """Averaged weights (revised PPO-EWMA). Neither decay nor window: the decay follows the measured staleness."""

    decay: float | None = Field(
        default=None, ge=0, lt=1, description="Fixed decay β of the average, a version; not with window."
    )
    window: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Largest version gap W that the average is for: β = W/(W+2); not with decay.",
    )
    reset: EwmaReset = Field(default_factory=EwmaReset, description="When the average starts anew.")


class Correction(FrozenModel):
    old_logprobs: OldLogprobs = Field(
        default=OldLogprobs.SNAPSHOT,
        description="Where the log-probability comes from that a token had under the version that generated it.",
    )
    fallback: Fallback = Field(
        default=Fallback.DROP, description="What happens to tokens whose old log-probability cannot be had."
    )
    objective: Objective = Field(default=Objective.DECOUPLED, description="How the two ratios enter the loss.")
    snapshots: Snapshots = Field(
        default_factory=Snapshots,
        description=(
            "Old versions in the trainer, for Snapshot. With training.computeType BFloat16 a version is kept as its "
            "difference to the next one."
        ),
    )
    eager: Eager = Field(
        default_factory=Eager, description="Scoring in the trainer's idle time, for Snapshot and Interruption."
    )
    ewma: Ewma = Field(default_factory=Ewma, description="The averaged weights, for Ewma as route or fallback.")
    dedicated_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description=(
            "Dedicated: how long a step waits for the old-policy pool; then the fallback takes the tokens that are missing."
        ),
    )
    barrier_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description=(
            "Interruption: how long an update waits for workers to hand over what they made; a worker without contact "
            "for that long stops generating."
        ),
    )
    audit_fraction: float | None = Field(
        default=None,
        ge=0,
        le=0.05,
        description=(
            "Share of trained tokens that are scored again by their own published version, to measure the leak of the "
            "route; unset is 0.02 where the route or the fallback is Ewma, else 0."
        ),
    )
    clip: Clip = Field(default_factory=Clip, description="PPO clip on the staleness ratio.")
    discrepancy: Discrepancy = Field(default_factory=Discrepancy, description="Mask on the discrepancy ratio.")
