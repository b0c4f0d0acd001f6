"""Trainer pool, rollout pools and their engines, old-policy pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rljob_api.base import FrozenJsonObject, FrozenModel
from rljob_api.extensions import OPEN_OBJECT, OPEN_POD_SPEC


class PodTemplate(FrozenModel):
    """A Kubernetes pod template. Unknown fields are kept as they are; the operator applies them strictly."""

    metadata: FrozenJsonObject | None = Field(
        default=None,
        description="Labels and annotations of the pods; the operator adds its own.",
        json_schema_extra=OPEN_OBJECT,
    )
    spec: FrozenJsonObject | None = Field(
        default=None,
        description=(
            "Pod spec. In the container `trainer`, `rollout` or `old-policy` the operator owns command, probes, RLJOB_* "
            "environment and /dev/shm; all else is kept as it is."
        ),
        json_schema_extra=OPEN_POD_SPEC,
    )


class TrainerPool(FrozenModel):
    replicas: int = Field(default=1, ge=1, le=4096, description="Trainer pods.")
    processes_per_replica: int = Field(
        default=1, ge=1, le=64, description="torchrun processes a pod; on GPUs one a device."
    )
    stall_seconds: int = Field(
        default=600, ge=1, description="Without a step heartbeat for that long the gang restarts (TrainerStalled)."
    )
    template: PodTemplate | None = Field(
        default=None, description="Template of the trainer pods; a change makes a new attempt from the checkpoint."
    )


class VllmEngine(FrozenModel):
    """vLLM's AsyncLLM in the rollout process."""

    compute_type: Literal["Float32", "BFloat16"] | None = Field(
        default=None, description="Unset is training.computeType."
    )
    tensor_parallel_size: int = Field(default=1, ge=1, le=64, description="GPUs that one engine spans.")
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Fixed size of the KV cache; unset lets vLLM take its share of the device.",
    )
    enforce_eager: bool = Field(default=False, description="No graph capture; always on without a GPU.")


class SimulatedEngine(FrozenModel):
    """A simulated engine for protocol and scale tests: samples from the loaded weights with fixed device times."""

    decode_seconds: float = Field(default=0.0, ge=0, le=10, description="Time of one decode step, whatever the batch.")
    prefill_seconds: float = Field(default=0.0, ge=0, le=10, description="Time to take in one request.")
    load_seconds: float = Field(default=0.0, ge=0, le=600, description="Time to load a weight version.")
    batch_invariant: bool = Field(
        default=False,
        description="Compute each request by itself: what it yields is then the same to the last bit whatever runs beside it.",
    )


class Engine(FrozenModel):
    """Inference engine of a pool: at most one; none is vLLM with its defaults."""

    vllm: VllmEngine | None = Field(default=None, description="vLLM in the rollout process (default).")
    simulated: SimulatedEngine | None = Field(default=None, description="Simulated engine, for tests only.")


class RolloutPool(FrozenModel):
    name: str = Field(max_length=63, description="Name of the pool: RFC 1035 label, at most 16 characters.")
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=10000,
        description="Rollout workers; unset leaves the number to a HorizontalPodAutoscaler (one with `rljob run`).",
    )
    min_replicas: int = Field(default=1, ge=0, description="Workers that must run for the job to count as started.")
    max_concurrent_trajectories: int = Field(
        default=64, ge=1, le=4096, description="Episodes that one worker runs at once."
    )
    engine: Engine = Field(
        default_factory=Engine, description="Inference engine: at most one; none is vLLM with its defaults."
    )
    template: PodTemplate | None = Field(
        default=None, description="Template of the pool's pods; a change replaces them one after the other."
    )


class OldPolicyPool(FrozenModel):
    """Workers that hold old weight versions and score trajectories as they arrive, beside the trainer."""

    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Old-policy workers; one of them must be ready for the job to count as started.",
    )
    template: PodTemplate | None = Field(
        default=None, description="Template of the pool's pods; a change replaces them one after the other."
    )
