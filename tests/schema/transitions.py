"""Changes of a job, as data: those that the CRD refuses, and those that it must let pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.unit.api.documents import REMOVE, changed
from tests.unit.api.rule_cases import ON_A_CLUSTER


@dataclass(frozen=True)
class Transition:
    """A job, and a change to it."""

    kind: str
    """`change` of a value, `set` from unset, `unset`; or `live` for what may change."""
    before: dict[str, Any]
    after: dict[str, Any]
    field: str = ""
    """The immutable field that the refusal names; empty where the change is accepted."""

    @property
    def id(self) -> str:
        return f"{self.kind}:{next(iter(self.after), 'nothing')}"

    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The job before and after."""
        before = changed(ON_A_CLUSTER | self.before)
        return before, changed(ON_A_CLUSTER | self.before, self.after)


PARAMETERS = "spec.environment.parameters"
CREDENTIALS = {"spec.messaging": {"url": "nats://a:4222", "credentialsSecretRef": {"name": "a"}}}
EWMA = {"spec.correction.oldLogprobs": "Ewma", "spec.correction.ewma": {"window": 4, "reset": {"threshold": 0}}}
DEDICATED = {"spec.correction.oldLogprobs": "Dedicated", "spec.oldPolicyPool": {}}
RANDOM = {"spec.model": {"random": {}}, "spec.sampling.maxTrajectoryTokens": 512}

REFUSED = (
    Transition("change", {}, {"spec.model.path": "models/other"}, "model"),
    Transition("set", RANDOM, {"spec.model.random.keyValueHeads": 1}, "model"),
    Transition(
        "unset", RANDOM | {"spec.model.random.keyValueHeads": 1}, {"spec.model.random.keyValueHeads": REMOVE}, "model"
    ),
    Transition("change", {}, {"spec.model": {"persistentVolumeClaim": {"claimName": "a"}}}, "model"),
    Transition("change", {}, {"spec.environment.name": "number-guess"}, "environment"),
    Transition("set", {}, {PARAMETERS: {"digits": 4}}, "environment"),
    Transition("unset", {PARAMETERS: {"digits": 4}}, {PARAMETERS: REMOVE}, "environment"),
    Transition("change", {PARAMETERS: {"digits": 4}}, {PARAMETERS: {"digits": 5}}, "environment"),
    Transition("change", {PARAMETERS: {"digits": 4}}, {PARAMETERS: {"turns": 4}}, "environment"),
    Transition("change", {PARAMETERS: {"digits": 4}}, {PARAMETERS: {"digits": None}}, "environment"),
    Transition("change", {PARAMETERS: {"a": {"b": [1, 2]}}}, {PARAMETERS: {"a": {"b": [1, 3]}}}, "environment"),
    Transition("change", {PARAMETERS: {"a": {"b": 1}}}, {PARAMETERS: {"a": {"c": 1}}}, "environment"),
    Transition("change", {}, {"spec.correction.oldLogprobs": "Engine"}, "correction"),
    Transition("set", {}, {"spec.correction": {"clip": {"low": 0.1}}}, "correction"),
    Transition("unset", {"spec.correction": {"clip": {"low": 0.1}}}, {"spec.correction": REMOVE}, "correction"),
    Transition("set", {}, {"spec.correction.discrepancy.low": 0.9}, "correction"),
    Transition("set", {}, {"spec.correction.snapshots.memoryBytes": 1 << 30}, "correction"),
    Transition("unset", EWMA, {"spec.correction.ewma": REMOVE}, "correction"),
    # The old-policy pool belongs to its route: neither comes or goes without the other.
    Transition("change", {}, DEDICATED, "correction"),
    Transition("change", DEDICATED, {"spec.correction": REMOVE, "spec.oldPolicyPool": REMOVE}, "correction"),
    Transition("change", {}, {"spec.storage.checkpoint.everySteps": 10}, "storage"),
    Transition("set", {}, {"spec.storage.weights": {"nats": {}}}, "storage"),
    Transition("unset", {"spec.storage.weights": {"nats": {}}}, {"spec.storage.weights": REMOVE}, "storage"),
    Transition("change", {}, {"spec.storage.checkpoint.persistentVolumeClaim.claimName": "other"}, "storage"),
    Transition("unset", {"spec.failurePolicy.maxRestarts": 0}, {"spec.storage": REMOVE}, "storage"),
    Transition("set", {}, {"spec.messaging": {"url": "nats://a:4222"}}, "messaging"),
    Transition("unset", CREDENTIALS, {"spec.messaging": REMOVE}, "messaging"),
    Transition("unset", CREDENTIALS, {"spec.messaging.credentialsSecretRef": REMOVE}, "messaging"),
    Transition("change", CREDENTIALS, {"spec.messaging.url": "nats://b:4222"}, "messaging"),
)

POOLS = "spec.rolloutPools"
ACCEPTED = (
    Transition("live", {}, {}),
    Transition("live", {}, {"spec.suspend": True}),
    Transition("live", {}, {"spec.activeDeadlineSeconds": 60}),
    Transition("live", {"spec.activeDeadlineSeconds": 60}, {"spec.activeDeadlineSeconds": REMOVE}),
    Transition("live", {}, {"spec.staleness.maxVersions": 2}),
    Transition("live", {}, {"spec.weightSync.timeoutSeconds": 60}),
    Transition("live", {}, {"spec.failurePolicy.maxRestarts": 9}),
    Transition("live", {}, {f"{POOLS}.0.replicas": 3}),
    Transition("live", {}, {f"{POOLS}.0.replicas": REMOVE}),
    Transition("live", {}, {f"{POOLS}.0.template": {"spec": {"containers": [{"name": "rollout", "image": "mine"}]}}}),
    Transition("live", {}, {POOLS: [{"name": "main", "replicas": 1}, {"name": "more", "replicas": 2}]}),
    Transition("live", {POOLS: [{"name": "main"}, {"name": "more"}]}, {POOLS: [{"name": "main"}]}),
    Transition("live", {}, {"spec.trainer.replicas": 2}),
    Transition("live", DEDICATED, {"spec.oldPolicyPool.replicas": 3}),
    Transition("live", DEDICATED, {"spec.oldPolicyPool.template": {"spec": {"containers": [{"name": "old-policy"}]}}}),
    Transition("live", EWMA, {"spec.staleness.maxVersions": 2}),
    Transition("live", {}, {"spec.training.learningRate": 0.01}),
    # The same value, written out: what the apiserver filled in is no change.
    Transition("live", {}, {"spec.storage.checkpoint.everySteps": 20}),
    Transition("live", {}, {"spec.messaging": {}}),
    Transition("live", {}, {"spec.correction": {"oldLogprobs": "Snapshot", "clip": {"high": 0.2}}}),
    Transition("live", {"spec.storage.weights": {"nats": {}}}, {"spec.suspend": True}),
    Transition("live", {PARAMETERS: {"a": None, "b": {"c": [1.5, "x"]}}}, {"spec.suspend": True}),
)
