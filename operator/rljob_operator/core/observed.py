"""Everything that one reconcile pass may look at. The shell gathers it (shell/gather.py); `decide` reads nothing else.

Contract of the shell: caches no older than its own last write (read-your-writes), all children by the label
`rljob.dev/name` of the job's namespace, and for every wanted child's name an object of that name that is not ours, if
there is one (`strangers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from rljob_api.errors import Violation
from rljob_api.messages import StepReport
from rljob_api.spec import RLJobSpec
from rljob_api.status import CheckpointStatus, FinalModelStatus, RLJobStatus
from rljob_protocol.coordinator import CoordinationSummary


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator was installed with."""

    runtime_image: str
    nats_url: str
    """Server of jobs whose `messaging` names none."""
    image_pull_policy: str = "IfNotPresent"
    cleanup_timeout_seconds: float = 120.0
    """How long a deleted job waits for NATS before its streams are left to the sweep."""
    crash_loop_seconds: float = 60.0
    """A worker's pod that crashes for longer is deleted: a new one may land on another node."""
    status_seconds: float = 5.0
    """Least time between two status writes that carry progress only."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Metadata of the object itself."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created_at: datetime
    deleted_at: datetime | None = None
    finalizers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Termination:
    """How a container ended. `reason` is ours where the process left a message, else Kubernetes' own (OOMKilled)."""

    reason: str
    exit_code: int
    finished_at: datetime | None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    name: str
    is_ready: bool = False
    restarts: int = 0
    waiting: str = ""
    """Reason: ImagePullBackOff, CrashLoopBackOff, CreateContainerConfigError ..."""
    waiting_message: str = ""
    ended: Termination | None = None
    ended_before: Termination | None = None
    """`lastState`: how it ended before its last restart."""


@dataclass(frozen=True, slots=True)
class PodCondition:
    type: str
    status: str
    reason: str = ""
    message: str = ""
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the job. `pool` is `trainer`, `old-policy` or the name of a rollout pool."""

    name: str
    uid: str
    resource_version: str
    pool: str
    phase: str
    created_at: datetime
    attempt: int | None = None
    """Of a trainer pod."""
    deleted_at: datetime | None = None
    """deletionTimestamp: when its grace period is over."""
    conditions: tuple[PodCondition, ...] = ()
    containers: tuple[Container, ...] = ()
    template_hash: str = ""

    @property
    def is_ready(self) -> bool:
        return self.deleted_at is None and any(c.type == "Ready" and c.status == "True" for c in self.conditions)

    @property
    def has_ended_well(self) -> bool:
        """Its containers ended with 0; the phase says so a moment later."""
        ended = [container.ended for container in self.containers]
        return self.phase == "Succeeded" or (
            bool(ended) and all(end is not None and end.exit_code == 0 for end in ended)
        )

    def condition(self, kind: str) -> PodCondition | None:
        return next((condition for condition in self.conditions if condition.type == kind), None)


@dataclass(frozen=True, slots=True)
class TrainerJob:
    """One attempt of the trainer gang."""

    name: str
    uid: str
    resource_version: str
    attempt: int
    created_at: datetime
    config_hash: str
    """Of the fields that went into it; another wanted hash means a new attempt."""
    is_deleting: bool = False
    is_complete: bool = False
    is_failed: bool = False
    finished_at: datetime | None = None
    """When it became complete or failed, by the apiserver's clock."""
    is_disrupted: bool = False
    """Whether it failed because a pod of it was evicted, preempted or lost with its node."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A pool of workers as it is."""

    name: str
    uid: str
    resource_version: str
    pool: str
    replicas: int
    template_hash: str
    is_deleting: bool = False


@dataclass(frozen=True, slots=True)
class Child:
    """Another object of ours: Service, ConfigMap, PodDisruptionBudget."""

    kind: str
    name: str
    uid: str
    resource_version: str
    is_deleting: bool = False


@dataclass(frozen=True, slots=True)
class Stranger:
    """An object with a child's name that is not ours."""

    kind: str
    name: str
    owner: str = ""
    """`Kind/name` of its controller, where it has one."""


@dataclass(frozen=True, slots=True)
class Clue:
    """A Kubernetes Event that explains why something is stuck: FailedMount, FailedCreate, FailedScheduling."""

    kind: str
    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The apiserver refused one of our writes in the last pass."""

    kind: str
    name: str
    code: int
    reason: str
    """Invalid, Forbidden, ..."""
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What training itself reports, from NATS. Fields are None as long as nothing was reported.

    An operator that has just started knows nothing yet: that nothing was reported means something only from `known_since`
    on, and only for what happened before `read_at`.
    """

    known_since: datetime | None = None
    """When this operator first read the job's keys."""
    read_at: datetime | None = None
    """When it began to read them last."""

    reachable: bool = True
    """Whether the job's NATS server answers."""
    unreachable_since: datetime | None = None
    unreachable_because: str = ""
    step: StepReport | None = None
    heartbeat_at: datetime | None = None
    """When the trainer's heartbeat last rose, by the operator's clock."""
    checkpoint: CheckpointStatus | None = None
    final_model: FinalModelStatus | None = None
    coordination: CoordinationSummary | None = None
    state_is_gone: bool = False
    """Whether the job's streams and buckets were deleted."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at everything."""

    identity: Identity
    spec: RLJobSpec | None
    """None when it was refused; then `violations` says why."""
    violations: tuple[Violation, ...]
    status: RLJobStatus
    settings: Settings
    now: datetime
    trainer_jobs: tuple[TrainerJob, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    pods: tuple[Pod, ...] = ()
    others: tuple[Child, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    clues: tuple[Clue, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    unseen: str = ""
    """Why a kind of child cannot be seen: the operator's role lacks a verb. Then nothing else here can be relied on."""
    pruned: tuple[str, ...] = ()
    """Fields of the status that the installed CRD does not know."""
    progress: Progress = field(default_factory=Progress)

    @property
    def trainer_pods(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.attempt is not None)

    def pods_of(self, pool: str) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.pool == pool and pod.attempt is None)
