"""Jobs and moments that the operator's tests share."""

from __future__ import annotations

from typing import Any

from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.api.documents import changed

from rljob_api.conditions import Condition, condition_of
from rljob_api.reasons import ConditionType
from rljob_api.status import FinalModelStatus
from rljob_operator.core.observed import Progress

CLAIM = {"spec.storage.checkpoint.persistentVolumeClaim": {"claimName": "ckpt"}}
DEDICATED = {"spec.correction.oldLogprobs": "Dedicated", "spec.oldPolicyPool": {"replicas": 2}}
FINAL = FinalModelStatus(version=10, uri="pvc://ckpt/job/final")


def cluster(*changes: dict[str, Any]) -> FakeKubernetes:
    """A cluster with a job of one trainer pod and two rollout pods, nothing made yet."""
    return FakeKubernetes(changed(CLAIM, {"spec.rolloutPools": [{"name": "main", "replicas": 2}]}, *changes))


def running(*changes: dict[str, Any]) -> FakeKubernetes:
    """The same, settled: everything runs."""
    made = cluster(*changes)
    made.settle()
    return made


def all_but_the_old_policy_pool(pod: dict[str, Any]) -> bool:
    """A scheduler that has no room for old-policy workers."""
    return str(pod["metadata"]["labels"]["rljob.dev/pool"]) != "old-policy"


def trainer_pod(fake: FakeKubernetes) -> dict[str, Any]:
    (pod,) = fake.pods("trainer")
    return pod


def finish(fake: FakeKubernetes) -> None:
    """The trainer ends well, with its final model durable."""
    fake.progress = Progress(final_model=FINAL)
    for pod in fake.pods("trainer"):
        fake.end(pod, 0)


def condition(fake: FakeKubernetes, kind: ConditionType) -> Condition:
    found = condition_of(fake.status.conditions, kind)
    assert found is not None, f"{kind} is not set"
    return found


def ready(fake: FakeKubernetes) -> tuple[str, str]:
    """(status, reason) of Ready."""
    found = condition(fake, ConditionType.READY)
    return found.status, str(found.reason)
