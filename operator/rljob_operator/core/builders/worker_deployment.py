"""A pool of workers: a Deployment. Its pods are replaced one after the other, never with more of them than asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rljob_api import names
from rljob_api.pools import PodTemplate
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.config import pool_hash
from rljob_operator.core.builders.metadata import labels, metadata
from rljob_operator.core.builders.pod_template import (
    SCRATCH,
    WEIGHTS_FOLDER,
    Runtime,
    claim,
    environment,
    from_field,
    messaging,
    pod_template,
)
from rljob_operator.core.observed import Observed

READY_FILE = f"{SCRATCH}/ready"
"""The runtime keeps it while the worker can do its work."""


@dataclass(frozen=True, slots=True)
class Workers:
    """What tells one kind of pool from another."""

    pool: str
    container: str
    command: tuple[str, ...]
    grace_seconds: int
    """From SIGTERM to SIGKILL."""
    replicas: int | None
    template: PodTemplate | None


def worker_deployment(observed: Observed, spec: RLJobSpec, workers: Workers, image: str) -> dict[str, Any]:
    """The Deployment of a pool. Without `replicas` where an autoscaler owns the number."""
    identity = observed.identity
    hashed = pool_hash(spec, workers.pool)
    own = labels(identity, workers.pool)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(identity, names.pool_name(identity.name, workers.pool), pool=workers.pool, hashed=hashed),
        "spec": {
            **({} if workers.replicas is None else {"replicas": workers.replicas}),
            "selector": {"matchLabels": own},
            # GPUs are scarce: a second worker beside the one it replaces would wait for ever.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "revisionHistoryLimit": 1,
            # An engine takes minutes to start; our own conditions say what is late.
            "progressDeadlineSeconds": 2_147_483_647,
            "template": _template(observed, spec, workers, image, own, hashed),
        },
    }


def _template(
    observed: Observed, spec: RLJobSpec, workers: Workers, image: str, own: dict[str, str], hashed: str
) -> dict[str, Any]:
    identity = observed.identity
    secret = spec.messaging.credentials_secret_ref
    nats, volumes, mounts = messaging(spec.messaging.url or observed.settings.nats_url, secret.name if secret else None)
    variables = [*environment({names.ENV_UID: identity.uid, names.ENV_POOL: workers.pool}), *nats]
    variables.append(from_field(names.ENV_WORKER, "metadata.name"))
    variables += environment({names.ENV_READY_FILE: READY_FILE})
    weights = spec.storage.weights.persistent_volume_claim
    if weights is not None:
        volume, mount = claim("rljob-weights", weights.claim_name, WEIGHTS_FOLDER)
        volumes.append(volume)
        mounts.append({**mount, "readOnly": True})
        variables += environment({names.ENV_WEIGHTS_DIR: f"{WEIGHTS_FOLDER}/{identity.name}"})
    runtime = Runtime(
        container=workers.container,
        image=image,
        image_pull_policy=observed.settings.image_pull_policy,
        command=workers.command,
        config_map=names.config_name(identity.name, workers.pool, hashed),
        restart_policy="Always",
        grace_seconds=workers.grace_seconds,
        environment=tuple(variables),
        volumes=tuple(volumes),
        mounts=tuple(mounts),
        probes={
            "readinessProbe": {
                "exec": {"command": ["cat", READY_FILE]},
                "periodSeconds": 5,
                "timeoutSeconds": 10,  # on a busy node the probe's own process may start late
                "failureThreshold": 3,
            }
        },
    )
    return pod_template(workers.template, runtime, own, {names.ANNOTATION_HASH: hashed})
