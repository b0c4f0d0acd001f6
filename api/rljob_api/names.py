"""Every subject, stream, bucket, key and environment variable: each string once.

All NATS names carry the RLJob's UID, so a re-created job never meets the state of its predecessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

API_VERSION: Literal["rljob.dev/v1alpha1"] = "rljob.dev/v1alpha1"
KIND: Literal["RLJob"] = "RLJob"


@dataclass(frozen=True, slots=True)
class JobNames:
    """NATS names of one job."""

    uid: str

    @classmethod
    def of_tasks_stream(cls, stream: str) -> JobNames | None:
        """The job whose task stream has this name; None where it is no such stream."""
        uid = stream.removeprefix("rljob-").removesuffix("-tasks")
        return cls(uid) if uid and stream == cls(uid).tasks_stream else None

    # Streams and their subjects.
    @property
    def tasks_stream(self) -> str:
        return f"rljob-{self.uid}-tasks"

    @property
    def trajectories_stream(self) -> str:
        return f"rljob-{self.uid}-trajectories"

    @property
    def steps_stream(self) -> str:
        """One StepReport a step, kept for the live view, the report and the operator."""
        return f"rljob-{self.uid}-steps"

    @property
    def segments_stream(self) -> str:
        """Parts of unfinished trajectories, for scoring ahead; nothing that must not be lost."""
        return f"rljob-{self.uid}-segments"

    @property
    def scores_stream(self) -> str:
        """Old log-probabilities from old-policy workers."""
        return f"rljob-{self.uid}-scores"

    def segment_subject(self, task: int | str = "*", sample: int | str = "*") -> str:
        return f"rljob.{self.uid}.segments.{task}.{sample}"

    def score_subject(self, task: int | str = "*", sample: int | str = "*") -> str:
        return f"rljob.{self.uid}.scores.{task}.{sample}"

    def task_subject(self, task: int | str = "*", sample: int | str = "*") -> str:
        return f"rljob.{self.uid}.tasks.{task}.{sample}"

    def trajectory_subject(self, task: int | str = "*", sample: int | str = "*") -> str:
        return f"rljob.{self.uid}.trajectories.{task}.{sample}"

    @property
    def steps_subject(self) -> str:
        return f"rljob.{self.uid}.steps"

    @property
    def rollout_consumer(self) -> str:
        """The one durable pull consumer of the task stream that all rollout workers share."""
        return "rollouts"

    @property
    def old_policy_consumer(self) -> str:
        """The one durable pull consumer of the trajectory stream that all old-policy workers share."""
        return "old-policy"

    # Key-value buckets. Pointers never expire; liveness expires, and is judged by the reader's own timer.
    @property
    def control_bucket(self) -> str:
        return f"rljob-{self.uid}-control"

    @property
    def liveness_bucket(self) -> str:
        return f"rljob-{self.uid}-liveness"

    @property
    def blob_bucket(self) -> str:
        return f"rljob-{self.uid}-blobs"

    # Plain messages: hints for latency, never the only way to learn something.
    @property
    def published_hint(self) -> str:
        return f"rljob.{self.uid}.hints.published"

    @property
    def desired_hint(self) -> str:
        return f"rljob.{self.uid}.hints.desired"

    @property
    def barrier_hint(self) -> str:
        return f"rljob.{self.uid}.hints.barrier"


# Keys of the control bucket.
KEY_EPOCH = "epoch"  # EpochClaim, written by trainer rank 0
KEY_PUBLISHED = "published"  # PublishedVersion, written by trainer rank 0
KEY_RETAINED = "retained"  # RetainedVersions, written by trainer rank 0
KEY_CHECKPOINT = "checkpoint"  # CheckpointPointer, written by trainer rank 0
KEY_SETTINGS = "settings"  # JobSettings, written by the operator when a live field of the spec changes
KEY_TERM = "term"  # TermClaim, written by the coordinator
KEY_DESIRED = "desired"  # DesiredVersion, written by the coordinator
KEY_BARRIER = "barrier"  # Barrier, written by trainer rank 0 (interruption route)

# Keys of the liveness bucket.
KEY_COORDINATOR = "coordinator"  # CoordinatorHeartbeat
KEY_TRAINER = "trainer"  # TrainerState


def worker_key(worker: str) -> str:
    """Liveness key of one rollout worker, e.g. `worker.main-0`."""
    return f"worker.{worker}"


WORKER_KEY_PREFIX = "worker."


def old_policy_key(worker: str) -> str:
    """Liveness key of one old-policy worker, e.g. `old-policy.0`."""
    return f"{OLD_POLICY_KEY_PREFIX}{worker}"


OLD_POLICY_KEY_PREFIX = "old-policy."

# Environment of the runtime processes (pods and local processes alike).
ENV_CONFIG = "RLJOB_CONFIG"  # path of the resolved RLJob (JSON)
ENV_UID = "RLJOB_UID"
ENV_NATS_URL = "RLJOB_NATS_URL"
ENV_NATS_CREDENTIALS = "RLJOB_NATS_CREDENTIALS"  # path of a credentials file, optional
ENV_WORKER = "RLJOB_WORKER"  # worker id: pod name, or pool-index locally
ENV_POOL = "RLJOB_POOL"
ENV_INCARNATION = "RLJOB_INCARNATION"  # changes at each start of a worker's process
ENV_ATTEMPT = "RLJOB_ATTEMPT"
ENV_CHECKPOINT_DIR = "RLJOB_CHECKPOINT_DIR"
ENV_WEIGHTS_DIR = "RLJOB_WEIGHTS_DIR"  # shared directory of weight blobs, when storage.weights.volume is chosen
ENV_CACHE_DIR = "RLJOB_CACHE_DIR"  # private scratch of one process
ENV_RECORD_DIR = "RLJOB_RECORD_DIR"  # trainer: keep a record for `rljob verify`
ENV_RECORD_BYTES = "RLJOB_RECORD_BYTES"
ENV_READY_FILE = "RLJOB_READY_FILE"  # rollout, old-policy: exists while the worker can do its work
ENV_MODEL_DIR = "RLJOB_MODEL_DIR"  # trainer: where model.persistentVolumeClaim is mounted
ENV_RANK_ENDS = "RLJOB_RANK_ENDS"  # trainer rank: folder in which it says how it ended, for its launcher
ENV_ACCELERATOR = "RLJOB_ACCELERATOR"  # "cuda" where the pod asks for a GPU: without one the process must not start
ENV_TERMINATION_FILE = "RLJOB_TERMINATION_FILE"  # why the process ended, for Kubernetes; unset is its own default

# Kubernetes: labels and annotations of children, and the finalizer of the RLJob.
LABEL_NAME = "rljob.dev/name"
LABEL_POOL = "rljob.dev/pool"  # `trainer`, `old-policy`, or the name of a rollout pool
LABEL_ATTEMPT = "rljob.dev/attempt"  # of the trainer's Job and its pods
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "rljob"
ANNOTATION_HASH = "rljob.dev/hash"  # of the user's fields that went into a child
FINALIZER = "rljob.dev/nats-cleanup"
FIELD_MANAGER = "rljob-operator"
TRAINER_POOL = "trainer"
OLD_POLICY_POOL = "old-policy"
TRAINER_CONTAINER = "trainer"
ROLLOUT_CONTAINER = "rollout"
OLD_POLICY_POOL = "old-policy"
OLD_POLICY_CONTAINER = "old-policy"


def trainer_job_name(job: str, attempt: int) -> str:
    """The attempt is in the name: two gangs can never share an object."""
    return f"{job}-trainer-{attempt}"


def trainer_service_name(job: str) -> str:
    """Headless Service by which the trainer's ranks find each other."""
    return f"{job}-trainer"


def pool_name(job: str, pool: str) -> str:
    """Deployment of a pool, and PodDisruptionBudget of a rollout pool."""
    return f"{job}-{pool}"


def config_name(job: str, pool: str, distinction: int | str) -> str:
    """Immutable ConfigMap: of a trainer's attempt, or of a pool's hash."""
    return f"{job}-{pool}-{distinction}"
