"""A rollout pool's PodDisruptionBudget: drains take one engine after the other.

The trainer has none: its SIGTERM checkpoints, and a budget would only keep a node from being drained.
"""

from __future__ import annotations

from typing import Any

from rljob_api import names
from rljob_api.pools import RolloutPool
from rljob_operator.core.builders.metadata import labels, metadata
from rljob_operator.core.observed import Observed


def disruption_budget(observed: Observed, pool: RolloutPool) -> dict[str, Any]:
    """The budget. By maxUnavailable: a minimum equal to the replicas would block every drain for ever."""
    identity = observed.identity
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(identity, names.pool_name(identity.name, pool.name), pool=pool.name),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",  # a pod that crashes anyway must not hold a node
            "selector": {"matchLabels": labels(identity, pool.name)},
        },
    }
