"""A rollout pool: engines and environments. A worker is ready while it serves a version within the staleness bound."""

from __future__ import annotations

from typing import Any

from rljob_api import names
from rljob_api.pools import RolloutPool
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.worker_deployment import Workers, worker_deployment
from rljob_operator.core.observed import Observed

GRACE_SECONDS = 60
"""Time to hand over partial rollouts."""


def rollout_deployment(observed: Observed, spec: RLJobSpec, pool: RolloutPool, image: str) -> dict[str, Any]:
    """The Deployment of a rollout pool."""
    workers = Workers(
        pool=pool.name,
        container=names.ROLLOUT_CONTAINER,
        command=("python", "-m", "rljob_runtime.rollout"),
        grace_seconds=GRACE_SECONDS,
        replicas=pool.replicas,
        template=pool.template,
    )
    return worker_deployment(observed, spec, workers, image)
