"""One attempt of the trainer gang: an Indexed Job. Any failure ends the whole of it; the next attempt is another Job."""

from __future__ import annotations

from typing import Any

from rljob_api import names
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.config import trainer_hash
from rljob_operator.core.builders.metadata import labels, metadata
from rljob_operator.core.builders.pod_template import (
    CHECKPOINT_FOLDER,
    WEIGHTS_FOLDER,
    Runtime,
    claim,
    environment,
    from_field,
    messaging,
    pod_template,
)
from rljob_operator.core.observed import Observed

MODEL_FOLDER = "/var/lib/rljob-model"
RENDEZVOUS_PORT = 29400
GRACE_SECONDS = 120
"""From SIGTERM to SIGKILL: time for the checkpoint."""


def trainer_job(observed: Observed, spec: RLJobSpec, attempt: int, image: str) -> dict[str, Any]:
    """The Job of an attempt."""
    identity, pool = observed.identity, spec.trainer
    name = names.trainer_job_name(identity.name, attempt)
    service = names.trainer_service_name(identity.name)
    url = spec.messaging.url or observed.settings.nats_url
    secret = spec.messaging.credentials_secret_ref
    nats, volumes, mounts = messaging(url, secret.name if secret else None)
    variables = [
        *environment({names.ENV_UID: identity.uid, names.ENV_ATTEMPT: str(attempt)}),
        *nats,
        *environment({names.ENV_CHECKPOINT_DIR: f"{CHECKPOINT_FOLDER}/{identity.name}"}),
        from_field(names.ENV_WORKER, "metadata.name"),
    ]
    checkpoint = spec.storage.checkpoint.persistent_volume_claim
    if checkpoint is None:  # then failurePolicy.maxRestarts is 0: it need not outlive the pod
        volumes.append({"name": "rljob-checkpoints", "emptyDir": {}})
        mounts.append({"name": "rljob-checkpoints", "mountPath": CHECKPOINT_FOLDER})
    else:
        volume, mount = claim("rljob-checkpoints", checkpoint.claim_name, CHECKPOINT_FOLDER)
        volumes.append(volume)
        mounts.append(mount)
    weights = spec.storage.weights.persistent_volume_claim
    if weights is not None:
        volume, mount = claim("rljob-weights", weights.claim_name, WEIGHTS_FOLDER)
        volumes.append(volume)
        mounts.append(mount)
        variables += environment({names.ENV_WEIGHTS_DIR: f"{WEIGHTS_FOLDER}/{identity.name}"})
    model = spec.model.persistent_volume_claim
    if model is not None:
        volumes.append(
            {"name": "rljob-model", "persistentVolumeClaim": {"claimName": model.claim_name, "readOnly": True}}
        )
        mount = {"name": "rljob-model", "mountPath": MODEL_FOLDER, "readOnly": True}
        mounts.append({**mount, "subPath": model.path} if model.path else mount)
        variables += environment({names.ENV_MODEL_DIR: MODEL_FOLDER})
    runtime = Runtime(
        container=names.TRAINER_CONTAINER,
        image=image,
        image_pull_policy=observed.settings.image_pull_policy,
        command=(
            "python",
            "-m",
            "rljob_runtime.trainer.launch",
            f"--nodes={pool.replicas}",
            f"--processes={pool.processes_per_replica}",
            f"--main-address={name}-0.{service}",
            f"--main-port={RENDEZVOUS_PORT}",
        ),
        config_map=names.config_name(identity.name, names.TRAINER_POOL, attempt),
        restart_policy="Never",
        grace_seconds=GRACE_SECONDS,
        environment=tuple(variables),
        volumes=tuple(volumes),
        mounts=tuple(mounts),
        pod={"subdomain": service},
    )
    own = labels(identity, names.TRAINER_POOL, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(identity, name, pool=names.TRAINER_POOL, attempt=attempt, hashed=trainer_hash(spec)),
        "spec": {
            "completionMode": "Indexed",
            "completions": pool.replicas,
            "parallelism": pool.replicas,
            "backoffLimit": 0,
            # Not to fail sooner: so that the Job says why when the evicted pod is gone.
            "podFailurePolicy": {
                "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            # A pod that is only on its way out may still train: its successor waits until it is gone.
            "podReplacementPolicy": "Failed",
            "template": pod_template(pool.template, runtime, own, {}),
        },
    }
