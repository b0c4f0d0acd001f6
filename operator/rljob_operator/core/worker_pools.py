"""The pools that are Deployments: each rollout pool, and the old-policy pool where the job has one."""

from __future__ import annotations

from dataclasses import dataclass

from rljob_api import names
from rljob_api.spec import RLJobSpec


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """What all of them have."""

    name: str
    replicas: int | None
    """None where an autoscaler owns the number."""
    least: int
    """Ready workers below which the job does not run as asked."""


def rollout_pools(spec: RLJobSpec) -> tuple[WorkerPool, ...]:
    """In the order of the spec."""
    return tuple(WorkerPool(pool.name, pool.replicas, pool.min_replicas) for pool in spec.rollout_pools)


def old_policy_pools(spec: RLJobSpec) -> tuple[WorkerPool, ...]:
    """One or none. One worker is enough to go on: what waits for the others is late, not lost."""
    pool = spec.old_policy_pool
    return () if pool is None else (WorkerPool(names.OLD_POLICY_POOL, pool.replicas, 1),)


def worker_pools(spec: RLJobSpec) -> tuple[WorkerPool, ...]:
    """All of them."""
    return (*rollout_pools(spec), *old_policy_pools(spec))
