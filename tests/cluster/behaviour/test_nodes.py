"""Several nodes: a gang across two, a drain under disruption budgets, a node that is lost. These need our dev cluster."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tools.devcluster import binaries, power
from tools.devcluster.layout import REPOSITORY

from tests.cluster.cluster import Cluster, Namespace
from tests.cluster.rljobs import Job, processes_of, quickstart

pytestmark = pytest.mark.timeout(600)

SPREAD = {
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"rljob.dev/pool": "trainer"}},
            "matchLabelKeys": ["rljob.dev/attempt"],
        }
    ]
}
SOON = [
    {"key": f"node.kubernetes.io/{problem}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
    for problem in ("not-ready", "unreachable")
]


@pytest.fixture(scope="module")
def two_nodes(operator: Cluster, dev_cluster: Cluster) -> Cluster:
    """A second node; it goes with the cluster."""
    up = [sys.executable, "-m", "tools.devcluster", "up", "--nodes", "2"]
    subprocess.run(up, cwd=REPOSITORY, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return dev_cluster


@pytest.fixture
def team2(two_nodes: Cluster, team: Namespace) -> Namespace:
    return team


def template(container: str, **spec: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": container}], **spec}}


def node_of(pod: dict[str, Any]) -> str:
    return str(pod["spec"].get("nodeName"))


def preferring(node: str) -> dict[str, Any]:
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    preferred = [{"weight": 100, "preference": term}]
    return {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}}


def test_a_gang_of_two_pods_on_two_nodes_trains_with_two_pools_of_different_size(team2: Namespace) -> None:
    document = quickstart("gang", steps=12)
    pool = document["spec"]["rolloutPools"][0]
    document["spec"]["trainer"] = {"replicas": 2, "template": template("trainer", **SPREAD)}
    document["spec"]["rolloutPools"] = [
        {**pool, "name": "large", "replicas": 2},
        {**pool, "name": "small", "replicas": 1},
    ]
    job = Job.apply(team2, document)
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=240)
    assert {node_of(pod) for pod in job.pods("trainer")} == {"node-0", "node-1"}
    assert (len(job.pods("large")), len(job.pods("small"))) == (2, 1)
    assert job.status["columns"]["trainer"] == "2/2"
    assert [(pool["name"], pool["desired"]) for pool in job.status["pools"]] == [("large", 2), ("small", 1)]
    assert all(processes_of(pod, "rljob_runtime.trainer.main") for pod in job.pods("trainer"))
    # The death of one rank is the end of the attempt, of both pods.
    second = next(pod for pod in job.pods("trainer") if pod["metadata"]["name"].startswith("gang-trainer-1-1"))
    job.kill(second, "rljob_runtime.trainer.main")
    job.wait("attempt 2", lambda status: status["attempt"] == 2)
    job.wait_for_condition("Succeeded", timeout_seconds=300)
    assert job.status["step"] == 12
    assert job.status["restarts"] == {"total": 1, "counted": 1}
    job.delete()


def test_a_drain_takes_one_engine_after_the_other_and_the_trainer_goes_on_elsewhere(team2: Namespace) -> None:
    rule = {
        "name": "node-events",
        "onPodConditions": [{"type": "DisruptionTarget"}],
        "action": "RestartJob",
        "countsTowardMax": False,
    }
    document = quickstart("drained", steps=2000, failurePolicy={"maxRestarts": 0, "rules": [rule]})
    document["spec"]["trainer"] = {"template": template("trainer", **preferring("node-1"))}
    document["spec"]["rolloutPools"][0]["template"] = template("rollout", **preferring("node-1"))
    job = Job.apply(team2, document)
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    assert {node_of(pod) for pool in ("main", "trainer") for pod in job.pods(pool)} == {"node-1"}
    saved = job.status["step"]
    cluster = team2.cluster
    selector = f"--pod-selector=rljob.dev/name={job.name}"
    try:
        drained = subprocess.Popen(
            [
                cluster.kubectl_binary,
                f"--kubeconfig={cluster.kubeconfig}",
                "drain",
                "node-1",
                "--delete-emptydir-data",
                selector,
                "--timeout=150s",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        least = 2
        while drained.poll() is None:
            ready = sum(is_ready(pod) for pod in job.pods("main"))
            least = min(least, ready)
        output, _ = drained.communicate()
        assert drained.returncode == 0, output
        assert least >= 1, "the budget lets one engine at a time go"
        job.wait("attempt 2", lambda status: status["attempt"] == 2)
        assert job.status["restarts"] == {"total": 1, "counted": 0}
        job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
        assert {node_of(pod) for pool in ("main", "trainer") for pod in job.pods(pool)} == {"node-0"}
        job.wait("further steps", lambda status: status["step"] > saved + 5, timeout_seconds=90)
    finally:
        cluster.kubectl("uncordon", "node-1")
    job.delete()


def test_a_lost_node_costs_its_pods_and_the_job_goes_on_elsewhere(team2: Namespace) -> None:
    document = quickstart("bereaved", steps=4000)
    document["spec"]["trainer"] = {
        "template": template("trainer", tolerations=SOON, terminationGracePeriodSeconds=5, **preferring("node-1"))
    }
    document["spec"]["rolloutPools"][0]["template"] = template(
        "rollout", tolerations=SOON, terminationGracePeriodSeconds=5, **preferring("node-0")
    )
    job = Job.apply(team2, document)
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    assert {node_of(pod) for pod in job.pods("trainer")} == {"node-1"}
    saved = job.status["step"]
    layout = team2.cluster.layout
    assert layout is not None
    power.off(layout.node(1))
    try:
        job.wait("attempt 2", lambda status: status["attempt"] == 2, timeout_seconds=180)
        job.wait("further steps", lambda status: status["step"] > saved + 5, timeout_seconds=240)
        assert {node_of(pod) for pod in job.pods("trainer") if pod["status"]["phase"] == "Running"} >= {"node-0"}
        assert job.status["restarts"]["total"] == 1
    finally:
        power.on(layout.node(1), binaries.locate(layout))
    team2.cluster.wait_for("node-1", lambda: is_ready(team2.cluster.get("node", "node-1")), timeout_seconds=90)
    job.delete(timeout_seconds=150)


def is_ready(item: dict[str, Any]) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in item["status"].get("conditions", ())
    )
