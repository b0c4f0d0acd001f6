"""Every message and key-value value of the protocol: versioned JSON bytes in and out.

Who writes what is fixed (docs/design.md, section 3). Readers re-read on start, on reconnect and on a timer; nothing here
is an event that must not be missed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from rljob_api.base import FrozenModel, WireMessage
from rljob_api.diagnostics import AuditReport, Diagnostics
from rljob_api.spec import Staleness
from rljob_api.weights import Blob


class EpochClaim(WireMessage):
    """Control key `epoch`: the trainer's incarnation, claimed by compare-and-set before any other write."""

    epoch: int = Field(ge=1)


class PublishedVersion(WireMessage):
    """Control key `published`: the newest weight version whose bytes are durable. Writer: trainer rank 0, fenced by epoch."""

    epoch: int = Field(ge=1)
    version: int = Field(ge=0)
    step: int = Field(ge=0)
    """Steps trained when this version was made."""
    base: int | None = None
    manifest: Blob
    num_bytes: int = Field(ge=0)
    final: bool = False
    """True for the last version of the job: nothing more will be trained."""


class RetainedVersions(WireMessage):
    """Control key `retained`: versions whose blobs are kept, oldest first. A replay after a resume scores with them."""

    epoch: int = Field(ge=1)
    versions: tuple[PublishedVersion, ...]


class TermClaim(WireMessage):
    """Control key `term`: the coordinator's incarnation, claimed by compare-and-set."""

    term: int = Field(ge=1)


class DesiredVersion(WireMessage):
    """Control key `desired`: the coordinator's order to the workers. The highest (term, generation) counts."""

    term: int = Field(ge=1)
    generation: int = Field(ge=1)
    published: PublishedVersion
    """The version to serve: any published one, not necessarily the newest."""
    quarantined: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, int]:
        return (self.term, self.generation)


class JobSettings(WireMessage):
    """Control key `settings`: fields of the spec that change without touching pods. Writer: the operator's leader.

    Where it is not there (one machine), the fields of the configuration count.
    """

    generation: int = Field(ge=0)
    """metadata.generation that they are of; a lower one never replaces a higher one."""
    staleness: Staleness
    coordinator_timeout_seconds: float = Field(gt=0)


class BarrierState(StrEnum):
    QUIESCE = "Quiesce"  # stop generating, hand over what is unscored, stay paused
    RELEASED = "Released"  # the update is made, or given up: go on, with the next version where there is one


class Barrier(WireMessage):
    """Control key `barrier`: the interruption route's stop before an update. Writer: trainer rank 0, by compare-and-set.

    Level-triggered: the highest (epoch, version) counts, and RELEASED comes after QUIESCE of the same.
    """

    epoch: int = Field(ge=1)
    version: int = Field(ge=0)
    """The resident version, whose tokens are scored behind the barrier; the update ends it."""
    state: BarrierState


class CoordinatorHeartbeat(WireMessage):
    """Liveness key `coordinator`."""

    term: int
    generation: int
    beat: int
    """Rises with each heartbeat; readers judge life by their own clock since it last rose."""


class WorkerPhase(StrEnum):
    STARTING = "Starting"  # engine not up yet, or no version loaded yet
    SERVING = "Serving"  # gate open
    SWAPPING = "Swapping"  # gate shut: abort, apply, probe
    HELD = "Held"  # gate shut: a barrier holds, or the trainer is silent (interruption route)
    POISONED = "Poisoned"  # apply or probe failed; the process is about to restart
    DRAINING = "Draining"  # told to stop; partials are being handed over or counted
    STOPPED = "Stopped"  # last write of this incarnation


class WorkerCounters(FrozenModel):
    """Running totals of one worker incarnation, in tokens unless named otherwise."""

    tokens_generated: int = 0
    """Model tokens that the engine returned to the worker."""
    tokens_delivered: int = 0
    """Model tokens in trajectories that the stream accepted."""
    tokens_dropped: dict[str, int] = Field(default_factory=dict)
    """Model tokens that ended here, by reason (environment failure, malformed, superseded ...)."""
    tokens_in_flight: int = 0
    """Model tokens held in unfinished trajectories right now."""
    tokens_salvaged: int = 0
    """Model tokens kept in partial rollouts over interruptions, counted once per interruption."""
    tokens_lost: int = 0
    """Model tokens lost to interruptions; stays 0 unless something is wrong."""
    interruptions: int = 0
    """Weight-version changes that shut the gate."""
    barrier_seconds: float = 0.0
    """Time for which a barrier, or a silent trainer, held the gate shut; swaps are in `pause_seconds`."""
    partials_continued: int = 0
    """Partial rollouts with >= 1 model token before and >= 1 after a version change."""
    trajectories: int = 0
    environment_failures: int = 0
    malformed: int = 0
    swaps_failed: int = 0
    segments_sent: int = 0
    """Messages on the segment stream."""
    segments_failed: int = 0
    """Messages that the segment stream did not take in time; each was sent again, later."""


class WorkerState(WireMessage):
    """Liveness key `worker.<id>`: one worker's own report. Writer: that worker."""

    worker: str
    pool: str
    incarnation: str
    revision: int = 0
    """Rises with each write; life is judged by the reader's clock since it last rose."""
    phase: WorkerPhase
    epoch: int = 0
    serving_version: int | None = None
    failed_version: int | None = None
    """Version that this incarnation could not load: a failed apply or a failed probe."""
    unreadable: tuple[int, int] | None = None
    """(epoch, version) whose stored bytes it found damaged or gone at its last fetch; None while it tries again."""
    order: tuple[int, int] | None = None
    """(term, generation) that the serving version was ordered by; None when followed from `published` (degraded)."""
    degraded: bool = False
    in_flight: int = 0
    """Episodes running."""
    counters: WorkerCounters = Field(default_factory=WorkerCounters)
    tokens_per_second: float = 0.0
    idle_share: float = 0.0
    pause_seconds: tuple[float, ...] = ()
    """Gate-shut times of the last interruptions, at most 64."""
    barrier: tuple[int, int] | None = None
    """(epoch, version) of the barrier that this worker keeps: it generates nothing, and what it had has been handed over."""
    segments_sequence: int = 0
    """Last message of the segment stream that holds something of this worker's."""
    trajectories_sequence: int = 0
    """The same of the trajectory stream."""
    message: str = ""


class OldPolicyState(WireMessage):
    """Liveness key `old-policy.<id>`: one old-policy worker's own report. Writer: that worker."""

    worker: str
    incarnation: str
    revision: int = 0
    """Rises with each write; life is judged by the reader's clock since it last rose."""
    epoch: int = 0
    version: int | None = None
    """Newest version that it can score with."""
    trajectories_scored: int = 0
    tokens_scored: int = 0
    backlog: int = 0
    """Trajectories on the stream that no old-policy worker has scored yet."""
    busy_share: float = 0.0
    message: str = ""


class TrainerPhase(StrEnum):
    STARTING = "Starting"
    WAITING = "Waiting"
    TRAINING = "Training"
    PUBLISHING = "Publishing"
    CHECKPOINTING = "Checkpointing"
    FINISHED = "Finished"


class TrainerState(WireMessage):
    """Liveness key `trainer`: rank 0's heartbeat."""

    epoch: int
    beat: int
    phase: TrainerPhase
    step: int
    steps: int
    version: int
    message: str = ""


class CheckpointPointer(WireMessage):
    """Control key `checkpoint`: the current checkpoint. Writer: trainer rank 0, by compare-and-set."""

    epoch: int
    version: int
    step: int
    directory: str
    """Folder name below the checkpoint root: `<epoch>-<version>`."""
    cursor: int
    """Sequence in the trajectory stream up to which everything is trained or dropped."""


class Task(WireMessage):
    """One sample to roll out, on subject `tasks.<task>.<sample>`. The un-acked message is the lease."""

    task: int = Field(ge=0)
    """Admission number of the group: never reused, a pure function of it gives the prompt."""
    sample: int = Field(ge=0)
    epoch: int = Field(ge=1)
    min_version: int = Field(ge=0)
    """An engine that serves an older version must not start it."""
    seed: int
    """Seed of the environment instance, the same for all samples of the group."""


class Outcome(StrEnum):
    FINISHED = "Finished"  # the environment said done
    TRUNCATED = "Truncated"  # maxTrajectoryTokens reached; scored
    ENVIRONMENT_FAILED = "EnvironmentFailed"  # infrastructure failure after maxAttempts; never scored


class TrajectoryHeader(WireMessage):
    """JSON metadata of a trajectory message (its tensors: `trajectory.py`)."""

    task: int = Field(ge=0)
    sample: int = Field(ge=0)
    attempt: int = Field(ge=1)
    epoch: int = Field(ge=1)
    worker: str
    incarnation: str
    outcome: Outcome
    turn_rewards: tuple[float, ...] = ()
    """Reward of each turn; the trajectory's reward is their mean unless `reward` says otherwise."""
    reward: float = 0.0
    interruptions: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    """Unix seconds on the worker's clock, for duration statistics only."""
    error: str = ""
    info: dict[str, float] = Field(default_factory=dict)
    """Numbers of the environment's own, averaged into the report (for example `constantBaseline`)."""


class SegmentHeader(WireMessage):
    """JSON metadata of a segment message: tokens [start, start + n) of an unfinished trajectory (tensors as a trajectory's)."""

    task: int = Field(ge=0)
    sample: int = Field(ge=0)
    attempt: int = Field(ge=1)
    worker: str
    incarnation: str
    start: int = Field(ge=0)
    """Tokens of the trajectory before the first one here: they came in earlier messages of the same attempt."""


class ScoreHeader(WireMessage):
    """JSON metadata of a score message: old log-probabilities of one trajectory, from an old-policy worker."""

    task: int = Field(ge=0)
    sample: int = Field(ge=0)
    sequence: int = Field(ge=1)
    """Of the trajectory on its stream: two trajectories of one sample have different scores."""
    worker: str


class Distribution(FrozenModel):
    """Summary of per-token staleness in one step."""

    mean: float = 0.0
    p50: int = 0
    p95: int = 0
    max: int = 0
    histogram: dict[str, int] = Field(default_factory=dict)
    """Staleness (as text) -> tokens."""


class SourceStats(FrozenModel):
    """Log discrepancy ratio of the tokens whose old log-probability came from one source."""

    tokens: int
    rms_log_discrepancy: float
    max_abs_log_discrepancy: float


class BucketStats(FrozenModel):
    """The same per staleness bucket."""

    tokens: int
    rms_log_discrepancy: float
    max_abs_log_discrepancy: float


class EwmaReport(FrozenModel):
    """The average of weights as it stands after a step's version was published."""

    decay: float
    weight: float
    """1 after a reset, towards 1 / (1 - decay)."""
    center_of_mass: float
    """Mean age of the weights in it, in versions."""
    relative_distance: float
    """Norm of (present weights - average) over that of the present weights."""
    resets: int
    steps_since_reset: int
    low_streak: int
    """Steps in a row whose keep fraction was below the reset threshold."""
    staleness_gap: float
    """Mean staleness of the last steps minus the center of mass, in versions: the average leaks least at 0."""


class DedicatedReport(FrozenModel):
    """How a step's old-policy pool did (route Dedicated). Tokens are those within the bound that are not resident."""

    waiting_seconds: float = 0.0
    """How long the step, otherwise ready, waited for scores; part of its `seconds_waiting`."""
    tokens_scored: int = 0
    tokens_late: int = 0
    """No old-policy worker had scored them when the wait was over: the fallback's."""
    backlog: int = 0
    """Trajectories that no worker had scored yet."""
    workers: int = 0
    """Old-policy workers alive."""


class PoolReport(FrozenModel):
    """What was scored ahead of a step, in model tokens of its batch within the staleness bound."""

    stale_tokens: int
    """Of versions before the step's own: all that need an old log-probability from elsewhere."""
    pooled_tokens: int
    """Those of them that were scored ahead, at no cost on the step's critical path."""
    poolable_tokens: int
    """Those that could have been: they arrived while their version was resident, or were scored ahead anyway."""
    discarded: dict[str, int] = Field(default_factory=dict)
    """Cumulative: model tokens that left the pool, or values that did not enter it, by reason."""
    num_bytes: int = 0
    """Memory of the pool."""


class BarrierReport(FrozenModel):
    """The interruption route's stop before an update."""

    workers: int
    """Live workers that were waited for."""
    missing: int
    """Those of them that had not handed over when the time was up."""
    seconds: float
    """From the order to stop until everything handed over was read."""
    tokens_scored: int = 0
    """Model tokens that the resident version scored behind the barrier."""


class StepReport(WireMessage):
    """What one step did: one message a step on the steps stream, one line in metrics.jsonl."""

    epoch: int
    step: int
    """1-based: steps trained after this one."""
    version: int
    """Version that this step published."""
    reward: float
    baseline: float | None = None
    """Reward of a constant answer on the same tasks, where the environment knows it."""
    loss: float
    entropy: float
    gradient_norm: float
    learning_rate: float
    route: str
    exact_fraction: float
    """Share of the batch's model tokens within the bound whose old log-probability is exact."""
    sources: dict[str, SourceStats] = Field(default_factory=dict)
    staleness: Distribution = Field(default_factory=Distribution)
    discrepancy_by_staleness: dict[str, BucketStats] = Field(default_factory=dict)
    ewma: EwmaReport | None = None
    """Where the route or the fallback is the average of weights."""
    keep_fraction: float
    clip_fraction: float
    active_fraction: float
    trajectories: int
    trajectories_spanning_versions: int
    mean_trajectory_tokens: float
    tokens_trained: int
    """Cumulative, as the counters below: model tokens that entered a step's batch and were not dropped."""
    tokens_dropped: dict[str, int] = Field(default_factory=dict)
    tokens_received: dict[str, int] = Field(default_factory=dict)
    """Model tokens in the trajectories read so far, by worker incarnation."""
    tokens_pending: int = 0
    """Received by the trainer, neither trained nor dropped yet."""
    last_sequence: int = 0
    """Last message of the trajectory stream that the counters cover."""
    groups_without_variance: int = 0
    seconds_waiting: float = 0.0
    seconds_eager: float = 0.0
    """Of the waiting: scoring ahead of the step."""
    seconds_scoring: float = 0.0
    seconds_auditing: float = 0.0
    seconds_training: float = 0.0
    seconds_publishing: float = 0.0
    seconds_checkpointing: float = 0.0
    seconds_total: float = 0.0
    dedicated: DedicatedReport | None = None
    queue_tasks: int = 0
    queue_trajectories: int = 0
    pool: PoolReport | None = None
    """Where the route scores ahead."""
    barrier: BarrierReport | None = None
    """Where the route is Interruption."""
    finished_at: float = 0.0
    diagnostics: Diagnostics | None = None
    audit: AuditReport | None = None
    kind: Literal["StepReport"] = "StepReport"
