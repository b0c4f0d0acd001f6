"""What users get wrong, and what their clusters do to them: each becomes a condition with a remedy; nothing loops hot."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.cluster import NATS_IMAGE, Cluster, Namespace, restricted_pod
from tests.cluster.rljobs import SYSTEM, Job, operator_metrics, quickstart

pytestmark = pytest.mark.timeout(300)

MAX_CALLS_PER_MINUTE = 120


def calls_per_minute(cluster: Cluster, seconds: float = 30) -> float:
    """API calls of the operator, its lease left out; each start of a watch counts."""

    def calls() -> float:
        series = operator_metrics(cluster).items()
        return sum(value for name, value in series if "rljob_api_calls_total" in name and '"leases"' not in name)

    before = calls()
    time.sleep(seconds)
    return 60 * (calls() - before) / seconds


def calm(cluster: Cluster, what: str) -> None:
    """No hot loop, and no operator that ended."""
    rate = calls_per_minute(cluster)
    print(f"seen: {what}: {rate:.0f} API calls a minute")
    assert rate <= MAX_CALLS_PER_MINUTE
    pods = cluster.get("pods", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=operator")["items"]
    assert [status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]] == [0] * len(pods)


def test_a_quota(team: Namespace, dev_cluster: Cluster) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "0"}}}
    team.apply(quota)
    job = Job.apply(team, quickstart("quota", steps=4))
    condition = job.wait_for_condition("Ready", "False", "PodsRefused", timeout_seconds=90)
    assert "exceeded quota: few" in condition["message"]
    assert "Raise the quota" in condition["message"]
    calm(dev_cluster, "quota")
    team.kubectl("delete", "resourcequota", "few")
    job.wait_for_condition("Succeeded", timeout_seconds=240)
    job.delete()


def test_a_template_that_the_security_level_refuses(team: Namespace) -> None:
    container = {"name": "rollout", "securityContext": {"allowPrivilegeEscalation": True}}
    document = quickstart("level", steps=4)
    document["spec"]["rolloutPools"][0]["template"] = {"spec": {"containers": [container]}}
    job = Job.apply(team, document)
    condition = job.wait_for_condition("Ready", "False", "PodsRefused", timeout_seconds=60)
    assert "allowPrivilegeEscalation" in condition["message"]
    job.delete()


def test_a_missing_claim(team: Namespace) -> None:
    document = quickstart("unclaimed", steps=4)
    document["spec"]["storage"]["checkpoint"]["persistentVolumeClaim"]["claimName"] = "absent"
    job = Job.apply(team, document)
    condition = job.wait_for_condition("Ready", "False", "PodsUnschedulable", timeout_seconds=60)
    assert 'persistentvolumeclaim "absent" not found' in condition["message"]
    job.delete()


def test_a_missing_secret_that_is_mounted(team: Namespace) -> None:
    spec = {
        "volumes": [{"name": "data", "secret": {"secretName": "absent"}}],
        "containers": [{"name": "trainer", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
    }
    job = Job.apply(team, quickstart("unmounted", steps=4, trainer={"template": {"spec": spec}}))
    condition = job.wait_for_condition("Ready", "False", "VolumeUnavailable", timeout_seconds=120)
    assert 'secret "absent" not found' in condition["message"]
    assert "Create the claim, Secret or ConfigMap" in condition["message"]
    job.delete()


def test_a_crashing_worker_is_named_with_what_it_said(team: Namespace) -> None:
    document = quickstart("crashing", steps=4)
    document["spec"]["environment"]["parameters"] = {"digits": 4, "turns": 12, "novel": 1}
    job = Job.apply(team, document)
    condition = job.wait_for_condition("Failed", timeout_seconds=120)
    assert condition["reason"] == "InvalidConfiguration"
    assert "novel" in condition["message"]
    job.delete()


def test_a_server_that_is_not_there(team: Namespace, dev_cluster: Cluster) -> None:
    document = quickstart("alone", steps=4, messaging={"url": "nats://127.0.0.1:9"})
    job = Job.apply(team, document)
    condition = job.wait_for_condition("Degraded", "True", "MessagingUnavailable", timeout_seconds=60)
    assert "no NATS server answered at nats://127.0.0.1:9" in condition["message"]
    assert "Check messaging.url" in condition["message"]
    calm(dev_cluster, "no NATS server")
    # It is deleted all the same, after a while, and says that something may be left.
    began = time.monotonic()
    job.delete(timeout_seconds=240)
    print(f"seen: deleted without NATS after {time.monotonic() - began:.0f} s")
    reasons = {event["reason"] for event in team.get("events")["items"]}
    assert "CleanupAbandoned" in reasons


def test_a_server_that_refuses_the_credentials(team: Namespace) -> None:
    command = ["nats-server", "--jetstream", "--store_dir", "/tmp/js", "--user", "someone", "--pass", "secret"]
    team.apply(restricted_pod("guarded", NATS_IMAGE, command))
    address = team.wait_for_phase("guarded", "Running")["status"]["podIP"]
    job = Job.apply(team, quickstart("stranger", steps=4, messaging={"url": f"nats://{address}:4222"}))
    condition = job.wait_for_condition("Degraded", "True", "MessagingUnavailable", timeout_seconds=60)
    assert "refuses these credentials: check messaging.credentialsSecretRef" in condition["message"]
    # With the server gone, the deletion does not hang.
    team.kubectl("delete", "pod", "guarded", "--wait=false")
    job.delete(timeout_seconds=240)


@pytest.mark.parametrize(
    ("kind", "name", "body"),
    [
        ("ConfigMap", "taken-trainer-1", {"data": {"mine": "1"}}),
        (
            "Job",
            "taken-trainer-1",
            {
                "spec": {
                    "suspend": True,
                    "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}},
                }
            },
        ),
        (
            "Deployment",
            "taken-main",
            {
                "spec": {
                    "replicas": 0,
                    "selector": {"matchLabels": {"a": "a"}},
                    "template": {
                        "metadata": {"labels": {"a": "a"}},
                        "spec": {"containers": [{"name": "a", "image": "a"}]},
                    },
                }
            },
        ),
    ],
)
def test_what_a_stranger_has_is_not_touched(team: Namespace, kind: str, name: str, body: dict[str, Any]) -> None:
    versions = {"ConfigMap": "v1", "Job": "batch/v1", "Deployment": "apps/v1"}
    # Even one that carries our labels.
    metadata = {"name": name, "labels": {"rljob.dev/name": "taken", "app.kubernetes.io/managed-by": "rljob"}}
    team.apply({"apiVersion": versions[kind], "kind": kind, "metadata": metadata, **body})
    team.cluster.wait_for("its status", lambda: kind == "ConfigMap" or "status" in team.get(kind.lower(), name))
    before = team.get(kind.lower(), name)
    job = Job.apply(team, quickstart("taken", steps=4))
    condition = job.wait_for_condition("Ready", "False", "ChildConflict")
    assert condition["message"].startswith(f"{kind} {name} is in the way"), condition["message"]
    time.sleep(6)
    job.delete()
    after = team.get(kind.lower(), name)
    assert (after["metadata"]["uid"], after.get("spec"), after.get("data")) == (
        before["metadata"]["uid"],
        before.get("spec"),
        before.get("data"),
    )


@contextmanager
def role_without(cluster: Cluster, resource: str, verb: str) -> Iterator[None]:
    """The operator's role lacks a verb meanwhile."""

    def put(rules: list[dict[str, Any]]) -> None:
        patch = json.dumps({"rules": rules})
        cluster.kubectl("patch", "clusterrole", "rljob-operator", "--type=merge", f"--patch={patch}")

    before = cluster.get("clusterrole", "rljob-operator")["rules"]
    changed = [
        {**rule, "verbs": [item for item in rule["verbs"] if item != verb]} if resource in rule["resources"] else rule
        for rule in before
    ]
    assert changed != before
    put(changed)
    try:
        yield
    finally:
        put(before)


def test_a_role_that_lacks_a_verb(team: Namespace, dev_cluster: Cluster) -> None:
    with role_without(dev_cluster, "poddisruptionbudgets", "create"):
        job = Job.apply(team, quickstart("unallowed", steps=4000))
        condition = job.wait_for_condition("Ready", "False", "PermissionMissing", timeout_seconds=60)
        assert "cannot create resource" in condition["message"]
        assert "Install the chart's role of this version." in condition["message"]
        calm(dev_cluster, "a verb to write is missing")
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    job.delete()


def test_an_operator_that_may_not_look(team: Namespace, dev_cluster: Cluster) -> None:
    job = Job.apply(team, quickstart("unseen", steps=4000))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    pods = {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in job.pods(pool)}
    with role_without(dev_cluster, "pods", "list"):
        # A watch that is open stays open: the refusal is met by the next start.
        where = f"--namespace={SYSTEM}"
        dev_cluster.kubectl("rollout", "restart", "deployment/rljob-operator", where)
        dev_cluster.kubectl(
            "rollout", "status", "deployment/rljob-operator", where, "--timeout=90s", timeout_seconds=100
        )
        condition = job.wait_for_condition("Ready", "False", "PermissionMissing", timeout_seconds=60)
        assert 'cannot list resource "pods"' in condition["message"]
        calm(dev_cluster, "a verb to read is missing")
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=120)
    assert {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in job.pods(pool)} == pods
    assert job.status["attempt"] == 1
    job.delete()


@contextmanager
def changed_crd(cluster: Cluster, change: Any) -> Iterator[None]:
    """The installed CRD with another schema; as it was afterwards."""
    before = cluster.get("crd", "rljobs.rljob.dev")["spec"]["versions"]
    versions = json.loads(json.dumps(before))
    change(versions[0]["schema"]["openAPIV3Schema"]["properties"])

    def put(value: Any) -> None:
        cluster.kubectl(
            "patch",
            "crd",
            "rljobs.rljob.dev",
            "--type=merge",
            f"--patch={json.dumps({'spec': {'versions': value}})}",
        )
        time.sleep(3)  # the apiserver takes the new schema up a moment later

    put(versions)
    try:
        yield
    finally:
        put(before)


def test_a_crd_that_is_newer_than_the_operator(team: Namespace, dev_cluster: Cluster) -> None:
    def change(properties: dict[str, Any]) -> None:
        properties["spec"]["properties"]["novel"] = {"type": "string"}

    with changed_crd(dev_cluster, change):
        job = Job.apply(team, quickstart("newer", steps=4, novel="x"))
        condition = job.wait_for_condition("Ready", "False", "InvalidConfiguration", timeout_seconds=60)
        assert "spec.novel" in condition["message"]
        assert "If the CRD is older or newer than the operator, install those of one version." in condition["message"]
        calm(dev_cluster, "a newer CRD")
        job.delete()


def test_a_crd_that_is_older_than_the_operator(team: Namespace, dev_cluster: Cluster) -> None:
    def change(properties: dict[str, Any]) -> None:
        del properties["status"]["properties"]["throughput"]
        del properties["status"]["properties"]["startedTime"]

    with changed_crd(dev_cluster, change):
        job = Job.apply(team, quickstart("older", steps=4000))
        condition = job.wait_for_condition("Degraded", "True", "CrdOutdated", timeout_seconds=180)
        assert "throughput" in condition["message"]
        assert "Install the CRD of the operator's version." in condition["message"]
        calm(dev_cluster, "an older CRD")
        job.delete()
