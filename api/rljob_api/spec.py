"""The RLJob: what a user declares. Frozen, camelCase on the wire, unknown fields refused.

Field descriptions are the user reference: they appear in `kubectl explain` and in docs/reference. Rules that need more
than one field live in `validate.py`; the correction in `correction.py`; pods, pools and engines in `pools.py`; failure
rules in `failure_policy.py`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from rljob_api.base import FrozenBoundedTexts, FrozenJsonObject, FrozenModel, FrozenNumbers, FrozenObject, FrozenTexts
from rljob_api.correction import Correction
from rljob_api.enums import DocumentedEnum
from rljob_api.extensions import LIST_MAP_BY_NAME
from rljob_api.failure_policy import FailurePolicy
from rljob_api.names import API_VERSION, KIND
from rljob_api.pools import OldPolicyPool, RolloutPool, TrainerPool


class ComputeType(StrEnum):
    """Number format of forward and backward passes; master weights and optimizer state are always fp32."""

    FLOAT32 = "Float32"
    BFLOAT16 = "BFloat16"


class OnExceeded(DocumentedEnum):
    """What happens to tokens older than `staleness.maxVersions` when their batch is trained."""

    MASK_TOKENS = "MaskTokens", "Leave the tokens over the bound out of the loss; the rest of the trajectory trains."
    DROP_GROUP = "DropGroup", "Drop the whole group of a token over the bound."
    WAIT = "Wait", "Start a step only when no group can miss the bound: strict, and slower with heavy tails."


class AdvantageEstimator(DocumentedEnum):
    GRPO = "GRPO", "Reward minus the group's mean."
    RLOO = "RLOO", "Reward minus the mean of the group's other samples."


class Credit(DocumentedEnum):
    TRAJECTORY = "Trajectory", "One advantage on all model tokens of a trajectory."
    TURN = "Turn", "Turn j is compared with turn j of the group's other samples."


class SyncMode(DocumentedEnum):
    INTERRUPT = "Interrupt", "Stop generation, keep the partial rollouts, change version, go on."


# ---------------------------------------------------------------------------------------------------------- model


class HuggingFaceModel(FrozenModel):
    repo: str = Field(
        min_length=1, max_length=256, description="Repository on the Hugging Face hub, `organisation/name`."
    )
    revision: str = Field(
        min_length=1,
        max_length=256,
        description="Commit or tag. Required, so that a restart trains the same model.",
    )


class ClaimModel(FrozenModel):
    claim_name: str = Field(
        min_length=1, max_length=253, description="PersistentVolumeClaim that holds the model directory."
    )
    path: str = Field(default="", max_length=4096, description="Folder inside the volume; empty is its root.")


class RandomModel(FrozenModel):
    """A small randomly initialised model with a character tokenizer, made on the spot: for examples and tests."""

    architecture: Literal["Llama", "Qwen3"] = Field(default="Llama", description="Architecture of the decoder.")
    alphabet: str = Field(
        default="0123456789=",
        min_length=1,
        max_length=1024,
        description="Characters of the tokenizer, one token each, after the three special tokens pad, end and begin.",
    )
    hidden_size: int = Field(default=64, ge=8, le=8192, description="Width of the residual stream.")
    intermediate_size: int = Field(default=128, ge=8, le=65536, description="Width of the feed-forward layers.")
    layers: int = Field(default=2, ge=1, le=128, description="Number of decoder layers.")
    heads: int = Field(default=2, ge=1, le=128, description="Number of attention heads.")
    key_value_heads: int | None = Field(default=None, ge=1, description="Key/value heads; unset equals `heads`.")
    head_dim: Literal[32, 64, 96, 128, 256] = Field(
        default=32, description="Width of one head; the sizes that the CPU and GPU attention kernels share."
    )
    max_positions: int = Field(
        default=512, ge=16, le=1 << 20, description="Longest sequence the model takes, in tokens."
    )
    tied_embeddings: bool = Field(default=False, description="Share the input embedding with the output layer.")
    initializer_range: float = Field(default=0.02, gt=0, le=1, description="Standard deviation of the initial weights.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights.")


class Model(FrozenModel):
    """The initial model: exactly one source."""

    hugging_face: HuggingFaceModel | None = Field(default=None, description="Fetch from the Hugging Face hub.")
    persistent_volume_claim: ClaimModel | None = Field(default=None, description="Read from a PersistentVolumeClaim.")
    path: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="A model directory inside the trainer's container or machine.",
    )
    random: RandomModel | None = Field(
        default=None, description="Make a small random model on the spot, with a character tokenizer: for tests."
    )


# ------------------------------------------------------------------------------------------- environment, sampling


class Environment(FrozenModel):
    """What poses tasks and scores answers."""

    name: str = Field(
        min_length=1, max_length=63, description="`reasoning-gym`, or a built-in environment such as `digit-copy`."
    )
    parameters: FrozenJsonObject = Field(
        default_factory=FrozenObject,
        max_length=256,
        description="Parameters of the environment, passed through as they are.",
    )
    timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="Longest time that one reset, step or reward may take. A timeout is retried, never scored.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="How often a sample is tried when its environment fails, before it is dropped with a reason.",
    )


class Sampling(FrozenModel):
    """How rollouts sample. Only what the trainer can score exactly is accepted: temperature, and lengths.

    topP, topK, minP, penalties, logitBias, badWords, minTokens and guidedDecoding may be given with their neutral
    values only: the probability of a token under a truncated distribution is not what the training forward computes.
    """

    temperature: float = Field(default=1.0, gt=0, le=100, description="Softmax temperature; the loss uses the same.")
    max_tokens: int = Field(default=256, ge=1, le=(1 << 20) - 1, description="Longest model turn, in tokens.")
    max_trajectory_tokens: int = Field(
        default=4096,
        ge=2,
        le=1 << 20,
        description=(
            "Longest trajectory with prompt and observations, in tokens; an episode that reaches it ends as truncated."
        ),
    )
    samples_per_task: int = Field(
        default=8, ge=1, le=1024, description="Samples of one task: the group that advantages are computed over."
    )
    top_p: float = Field(default=1.0, description="Must be 1.")
    top_k: int = Field(default=0, description="Must be 0 (off).")
    min_p: float = Field(default=0.0, description="Must be 0.")
    repetition_penalty: float = Field(default=1.0, description="Must be 1.")
    presence_penalty: float = Field(default=0.0, description="Must be 0.")
    frequency_penalty: float = Field(default=0.0, description="Must be 0.")
    min_tokens: int = Field(default=0, description="Must be 0.")
    logit_bias: FrozenNumbers = Field(default_factory=FrozenObject, max_length=1024, description="Must be empty.")
    bad_words: tuple[Annotated[str, Field(max_length=256)], ...] = Field(
        default=(), max_length=1024, description="Must be empty."
    )
    # Texts, not free JSON: a rule of the apiserver cannot see a field whose content is open.
    guided_decoding: FrozenBoundedTexts | None = Field(
        default=None, description="Must be unset.", json_schema_extra={"maxProperties": 64}
    )


# ------------------------------------------------------------------------------------------------ training, staleness


class Advantage(FrozenModel):
    estimator: AdvantageEstimator = Field(
        default=AdvantageEstimator.GRPO, description="Baseline that rewards are compared with."
    )
    normalize: bool = Field(default=True, description="Divide by the group's standard deviation (+ 1e-4).")
    credit: Credit = Field(default=Credit.TRAJECTORY, description="Which tokens share an advantage.")


class Training(FrozenModel):
    steps: int = Field(
        ge=1, le=10_000_000, description="Steps to train. One step is one batch and one published weight version."
    )
    tasks_per_step: int = Field(ge=1, le=65536, description="Groups a step (B).")
    learning_rate: float = Field(gt=0, le=1, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's second moment decay.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest global gradient norm.")
    entropy_coefficient: float = Field(default=0.0, ge=0, le=1, description="Weight of the entropy bonus.")
    mini_batches: int = Field(
        default=1, ge=1, le=1024, description="Optimizer updates a pass over the batch; groups are never split."
    )
    epochs: int = Field(default=1, ge=1, le=64, description="Passes over the batch.")
    compute_type: ComputeType = Field(
        default=ComputeType.BFLOAT16,
        description=(
            "Number format of the trainer's passes: Float32, or BFloat16 for half the memory and the speed of GPUs. "
            "Master weights and optimizer state stay fp32."
        ),
    )
    tokens_per_micro_batch: int = Field(
        default=16384, ge=16, description="Padded tokens that one forward holds, a process."
    )
    advantage: Advantage = Field(default_factory=Advantage, description="How rewards become advantages.")
    min_group_size: int | None = Field(
        default=None, ge=1, description="Fewest finished samples of a group that trains; unset is samplesPerTask."
    )
    straggler_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description=(
            "How long a group waits for its missing samples after the first finished, before it trains or drops as one."
        ),
    )
    seed: int = Field(default=0, ge=0, description="Seed of the task order and of everything random in the trainer.")


class Staleness(FrozenModel):
    max_versions: int = Field(
        default=4,
        ge=0,
        le=1024,
        description=(
            "Bound η on the staleness of a trained token, in weight versions. 0 is synchronous. May change while the job "
            "runs; with correction.snapshots.memoryBytes, and a model whose size is known, as far as that memory goes."
        ),
    )
    on_exceeded: OnExceeded = Field(
        default=OnExceeded.MASK_TOKENS,
        description="What happens to tokens over the bound.",
    )


class WeightSync(FrozenModel):
    mode: SyncMode = Field(
        default=SyncMode.INTERRUPT,
        description="How a worker goes from one version to the next.",
    )
    timeout_seconds: float = Field(
        default=120.0, gt=0, le=86400, description="A worker that has not converged by then is reported and restarted."
    )
    coordinator_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        le=86400,
        description="Without a coordinator heartbeat for that long, workers follow the published version themselves.",
    )


# ------------------------------------------------------------------------------------------------- storage, messaging


class ClaimStorage(FrozenModel):
    claim_name: str = Field(
        min_length=1,
        max_length=253,
        description="Name of the PersistentVolumeClaim; `rljob run` uses a folder of the run instead.",
    )


class CheckpointStorage(FrozenModel):
    persistent_volume_claim: ClaimStorage | None = Field(
        default=None, description="Volume that checkpoints are kept on."
    )
    every_steps: int = Field(default=20, ge=1, le=10_000_000, description="Steps between checkpoints.")
    keep: int = Field(default=2, ge=1, le=1000, description="Checkpoints kept.")


class NatsWeights(FrozenModel):
    """Weight blobs in the NATS object store."""


class WeightStorage(FrozenModel):
    """Where weight blobs live: at most one; neither set is the NATS object store."""

    nats: NatsWeights | None = Field(default=None, description="The NATS object store (default).")
    persistent_volume_claim: ClaimStorage | None = Field(
        default=None, description="A volume that trainer and rollout pods share."
    )


class Storage(FrozenModel):
    checkpoint: CheckpointStorage = Field(
        default_factory=CheckpointStorage, description="Checkpoints of model, optimizer and cursor."
    )
    weights: WeightStorage = Field(
        default_factory=WeightStorage, description="Weight versions on their way to the rollout pools."
    )


class SecretReference(FrozenModel):
    name: str = Field(min_length=1, max_length=253, description="Name of a Secret in the job's namespace.")


class Messaging(FrozenModel):
    url: str | None = Field(
        default=None,
        min_length=1,
        max_length=2048,
        description="NATS server; unset is the operator's own, or an embedded one with `rljob run`.",
    )
    credentials_secret_ref: SecretReference | None = Field(
        default=None, description="Secret with a NATS credentials file under the key `user.creds`."
    )
    max_payload_bytes: int = Field(
        default=8 << 20, ge=1 << 20, le=64 << 20, description="Largest message; the largest trajectory must fit."
    )
    trajectory_stream_bytes: int = Field(
        default=1 << 30,
        ge=16 << 20,
        le=1 << 50,
        description="Bound of the trajectory stream. At 70 % of it the trainer checkpoints and cuts it off.",
    )


# ------------------------------------------------------------------------------------------------------------ the job


class RLJobSpec(FrozenModel):
    suspend: bool = Field(default=False, description="Checkpoint, stop all pods and keep the job; set back to go on.")
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, description="Longest running time; the clock restarts on resume."
    )
    start_deadline_seconds: int = Field(
        default=900,
        ge=1,
        description=(
            "Trainer, minReplicas of every rollout pool and, with an old-policy pool, one worker of it must run by then, "
            "else the job fails with StartDeadlineExceeded."
        ),
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, description="Delete the finished job after that long."
    )
    model: Model = Field(
        description="The initial model: exactly one of huggingFace, persistentVolumeClaim, path, random."
    )
    environment: Environment = Field(description="What poses tasks and scores answers.")
    sampling: Sampling = Field(default_factory=Sampling, description="How rollouts sample.")
    training: Training = Field(description="Steps, batch, optimizer, advantages.")
    staleness: Staleness = Field(default_factory=Staleness, description="How old a trained token may be.")
    correction: Correction = Field(default_factory=Correction, description="Old log-probabilities, mask and clip.")
    weight_sync: WeightSync = Field(default_factory=WeightSync, description="How rollout workers change version.")
    storage: Storage = Field(default_factory=Storage, description="Checkpoints and weight blobs.")
    messaging: Messaging = Field(default_factory=Messaging, description="The NATS server that the pods use.")
    trainer: TrainerPool = Field(default_factory=TrainerPool, description="The trainer pool (torchrun, FSDP2).")
    old_policy_pool: OldPolicyPool | None = Field(
        default=None,
        description=(
            "Workers that score tokens under old versions: needed by correction.oldLogprobs Dedicated, refused with any "
            "other. `{}` is one worker with defaults."
        ),
    )
    rollout_pools: Annotated[tuple[RolloutPool, ...], Field(min_length=1, max_length=16)] = Field(
        description="Pools of rollout workers, by name.", json_schema_extra=LIST_MAP_BY_NAME
    )
    failure_policy: FailurePolicy = Field(
        default_factory=FailurePolicy, description="What failures do to the job; the first rule that matches wins."
    )


class ObjectMeta(FrozenModel):
    """The part of Kubernetes metadata that a file may carry."""

    name: str = Field(description="Name of the job: RFC 1035 label, at most 40 characters.")
    namespace: str | None = Field(default=None, description="Namespace.")
    labels: FrozenTexts = Field(default_factory=FrozenObject, description="Labels.")
    annotations: FrozenTexts = Field(default_factory=FrozenObject, description="Annotations.")


class RLJob(FrozenModel):
    """One asynchronous reinforcement-learning job: a model, an environment, a trainer pool and rollout pools."""

    api_version: Literal["rljob.dev/v1alpha1"] = Field(default=API_VERSION, description="Version of this schema.")
    kind: Literal["RLJob"] = Field(default=KIND, description="Kind of the object.")
    metadata: ObjectMeta = Field(description="Name, namespace, labels and annotations.")
    spec: RLJobSpec = Field(description="What the user wants; never written by the operator.")
