"""The old-policy pool: workers that score trajectories under the versions that generated them, beside the trainer.

Without a PodDisruptionBudget, and with a short grace: a score that is cut off is made again by another worker.
"""

from __future__ import annotations

from typing import Any

from rljob_api import names
from rljob_api.pools import OldPolicyPool
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.worker_deployment import Workers, worker_deployment
from rljob_operator.core.observed import Observed

GRACE_SECONDS = 30
"""Time to end the forward pass that runs."""


def old_policy_deployment(observed: Observed, spec: RLJobSpec, pool: OldPolicyPool, image: str) -> dict[str, Any]:
    """The Deployment of the pool."""
    workers = Workers(
        pool=names.OLD_POLICY_POOL,
        container=names.OLD_POLICY_CONTAINER,
        command=("python", "-m", "rljob_runtime.old_policy"),
        grace_seconds=GRACE_SECONDS,
        replicas=pool.replicas,
        template=pool.template,
    )
    return worker_deployment(observed, spec, workers, image)
