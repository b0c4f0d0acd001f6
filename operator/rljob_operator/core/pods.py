"""Which pods count as there."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from rljob_operator.core.observed import Pod

LOST_AFTER = timedelta(seconds=30)
"""A pod that is still there so long after its grace period is on a node that is gone: no kubelet will ever say that it
ended. Its processes, should they live, are fenced by the epoch."""


def living(pods: Iterable[Pod], now: datetime) -> tuple[Pod, ...]:
    """Pods whose containers may still run."""
    return tuple(pod for pod in pods if pod.phase not in ("Succeeded", "Failed") and not is_lost(pod, now))


def present(pods: Iterable[Pod], now: datetime) -> tuple[Pod, ...]:
    """Pods that are still there, ended ones too."""
    return tuple(pod for pod in pods if not is_lost(pod, now))


def is_lost(pod: Pod, now: datetime) -> bool:
    return pod.deleted_at is not None and now > pod.deleted_at + LOST_AFTER
