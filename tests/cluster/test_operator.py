"""The operator from its chart, on a real cluster, as its users meet it. Namespaces enforce the restricted level."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.cluster.cluster import Cluster, KubectlError, Namespace
from tests.cluster.rljobs import SYSTEM, Job, operator_metrics, quickstart

pytestmark = pytest.mark.timeout(1800)


def test_the_quickstart_trains_on_real_engines_to_the_end(team: Namespace) -> None:
    steps = int(os.environ.get("RLJOB_E2E_STEPS", "20"))
    job = Job.apply(team, quickstart(steps=steps, simulated=False))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=600)
    job.wait("both workers", lambda status: status["columns"]["rollouts"] == "2/2")
    rollouts = {pod["metadata"]["uid"] for pod in job.pods("main")}
    shown = team.kubectl("get", "rljobs")
    columns = "NAME READY REASON STEP VERSION CONVERGED STALENESS ROLLOUTS TRAINER RESTARTS AGE"
    assert " ".join(shown.splitlines()[0].split()) == columns
    ready = {pod["metadata"]["uid"]: _ready_since(pod) for pod in job.pods("main")}
    logs = team.kubectl("logs", f"--selector=rljob.dev/name={job.name},rljob.dev/pool=trainer", "--tail=50")
    assert '"event": "resumed"' not in logs and '"process": "trainer-0"' in logs
    job.wait("most steps", lambda status: status.get("step", 0) >= steps - 5, timeout_seconds=600)
    # Versions came and went: no Ready condition of a rollout pod moved, and none was replaced.
    assert {pod["metadata"]["uid"]: _ready_since(pod) for pod in job.pods("main")} == ready
    assert set(ready) == rollouts
    status = job.wait_for_condition("Succeeded", timeout_seconds=600) and job.status
    assert status["step"] == steps
    assert status["correction"]["exactFraction"] == "1.000"
    assert status["correction"]["route"] == "Snapshot"
    assert status["correction"]["tokens"]["lost"] == 0
    assert status["finalModel"] == {"version": steps, "uri": f"pvc://quickstart/{job.name}/final"}
    assert status["restarts"]["total"] == 0
    assert job.condition("Ready") | {"lastTransitionTime": ""} == {
        "type": "Ready",
        "status": "False",
        "reason": "Succeeded",
        "message": f"All {steps} steps are trained. The final model is pvc://quickstart/{job.name}/final.",
        "observedGeneration": 1,
        "lastTransitionTime": "",
    }
    assert [reason for reason, _ in job.events()] == ["Starting", "Training", "Succeeded"]
    team.cluster.wait_for("rollout pods to be gone", lambda: not job.pods("main"))
    job.delete()


def test_a_killed_trainer_is_restarted_from_its_checkpoint_as_a_new_attempt(team: Namespace) -> None:
    job = Job.apply(team, quickstart("killed", steps=40))
    job.wait("a checkpoint", lambda status: status.get("checkpoint"), timeout_seconds=600)
    rollouts = {pod["metadata"]["uid"] for pod in job.pods("main")}
    trainer = job.trainer_pod()
    saved = job.status["checkpoint"]["step"]
    job.kill(trainer, "rljob_runtime.trainer.main")
    job.wait("attempt 2", lambda status: status.get("attempt") == 2)
    assert job.status["restarts"] == {"total": 1, "counted": 1}
    message = next(message for reason, message in job.events() if reason == "TrainerFailed")
    assert "Attempt 2 begins from the last checkpoint (restart 1)" in message, message
    job.wait_for_condition("Succeeded", timeout_seconds=600)
    assert job.status["step"] == 40
    assert job.status["weights"]["epoch"] == 2
    log = team.kubectl("logs", f"job/{job.name}-trainer-2")
    resumed = next(json.loads(line) for line in log.splitlines() if '"event": "resumed"' in line)
    assert resumed["step"] >= saved
    assert {pod["metadata"]["uid"] for pod in job.pods("main")} <= rollouts
    series = f'rljob_step{{namespace="{team.name}",rljob="{job.name}"}}'
    assert operator_metrics(team.cluster)[series] == 40
    job.delete()
    assert not [name for name in operator_metrics(team.cluster) if team.name in name], "they go with the job"


def test_suspend_stops_all_pods_and_resume_goes_on_from_the_checkpoint(team: Namespace) -> None:
    job = Job.apply(team, quickstart("paused", steps=60))
    job.wait("step 4", lambda status: status.get("step", 0) >= 4, timeout_seconds=600)
    job.patch(suspend=True)
    job.wait_for_condition("Suspended", timeout_seconds=600)
    assert not job.pods("main")
    assert not job.pods("trainer")
    assert job.condition("Ready")["reason"] == "Suspended"
    saved = job.status["checkpoint"]["step"]
    assert saved >= 4  # the step it was at, not that of the last regular checkpoint
    job.patch(suspend=False)
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=600)
    assert job.status["attempt"] == 2
    assert job.status["restarts"] == {"total": 0, "counted": 0}
    job.wait("steps after it", lambda status: status.get("step", 0) > saved + 2, timeout_seconds=600)
    job.delete()
    assert not job.pods("main") and not job.pods("trainer")


def test_a_pool_is_scaled_without_touching_the_pods_that_stay(team: Namespace) -> None:
    document = quickstart("scaled", steps=400)
    job = Job.apply(team, document)
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=600)
    before = {pod["metadata"]["uid"] for pod in job.pods("main")}
    trainer = job.trainer_pod()
    pool = document["spec"]["rolloutPools"][0]
    job.patch(rolloutPools=[{**pool, "replicas": 3}])
    job.wait("3 ready", lambda status: status["columns"]["rollouts"] == "3/3")
    assert before < {pod["metadata"]["uid"] for pod in job.pods("main")}
    job.patch(rolloutPools=[{**pool, "replicas": 1}])
    team.cluster.wait_for("one pod", lambda: len(job.pods("main")) == 1, timeout_seconds=600)
    assert [pod["metadata"]["uid"] for pod in job.pods("trainer")] == [trainer["metadata"]["uid"]]
    assert job.status["attempt"] == 1
    job.delete()


def test_what_a_stranger_has_is_not_touched(team: Namespace) -> None:
    stranger = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "mine-trainer"},
        "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}]},
    }
    team.apply(stranger)
    before = team.get("service", "mine-trainer")
    job = Job.apply(team, quickstart("mine", steps=4))
    condition = job.wait_for_condition("Ready", "False", "ChildConflict")
    assert condition["message"] == (
        "Service mine-trainer is in the way: the job needs an object of that name and does not touch those of others. "
        "Rename or delete it, or give the job another name."
    )
    job.delete()
    assert team.get("service", "mine-trainer") == before


@pytest.mark.parametrize(
    ("name", "container", "reason", "words"),
    [
        ("image", {"image": "localhost/absent:dev"}, "ImageUnavailable", "cannot pull the image of container trainer"),
        (
            "huge",
            {"resources": {"requests": {"cpu": "512"}}},
            "PodsUnschedulable",
            "Insufficient cpu",
        ),
        (
            "secret",
            {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "a"}}}]},
            "ContainerNotStarted",
            'secret "absent" not found. Create what is missing',
        ),
        ("value", {"imagePullPolicy": "Sometimes"}, "InvalidTemplate", "imagePullPolicy"),
        ("typo", {"imagePullPolcy": "Always"}, "InvalidTemplate", 'containers[0].imagePullPolcy"'),
    ],
)
def test_what_keeps_pods_from_running_is_said_with_a_remedy(
    team: Namespace, name: str, container: dict[str, object], reason: str, words: str
) -> None:
    template = {"spec": {"containers": [{"name": "trainer", **container}]}}
    document = quickstart(name, steps=4, trainer={"template": template})
    job = Job.apply(team, document)
    condition = job.wait_for_condition("Ready", "False", reason)
    assert words in condition["message"], condition["message"]
    job.delete()


def test_a_gpu_that_is_not_there_fails_the_job(team: Namespace) -> None:
    """The dev cluster counts GPUs that do not exist: the pod is scheduled, and its process finds none."""
    container = {"name": "trainer", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    job = Job.apply(team, quickstart("gpu", steps=4, trainer={"template": {"spec": {"containers": [container]}}}))
    condition = job.wait_for_condition("Failed", timeout_seconds=600)
    assert condition["reason"] == "AcceleratorMissing"
    assert "the process finds no CUDA device" in condition["message"]
    job.delete()


def test_deleting_a_suspended_and_a_starting_job_leaves_nothing(team: Namespace) -> None:
    suspended = Job.apply(team, quickstart("asleep", steps=4, suspend=True))
    suspended.wait_for_condition("Suspended")
    assert suspended.status.get("attempt", 0) == 0
    starting = Job.apply(team, quickstart("young", steps=4))
    team.cluster.wait_for("its pods", lambda: starting.pods("trainer"))
    suspended.delete()
    starting.delete()
    found = team.kubectl("get", "jobs,deployments,pods,services,poddisruptionbudgets", "--output=name")
    assert found == "", found


def test_a_suspended_job_and_a_finished_one_cost_no_writes(team: Namespace, dev_cluster: Cluster) -> None:
    suspended = Job.apply(team, quickstart("resting", steps=4, suspend=True))
    suspended.wait_for_condition("Suspended")
    time.sleep(5)
    assert dev_cluster.layout is not None
    log = dev_cluster.layout.audit_log
    size = log.stat().st_size
    time.sleep(30)
    with log.open() as file:
        file.seek(size)
        entries = [json.loads(line) for line in file]
    user = f"system:serviceaccount:{SYSTEM}:rljob-operator"
    written = [
        (entry["verb"], entry["objectRef"]["resource"])
        for entry in entries
        if entry["user"]["username"] == user
        and entry["verb"] not in ("get", "list", "watch")
        # Other tests' namespaces may still be going away.
        and entry["objectRef"].get("namespace") in (SYSTEM, team.name)
    ]
    assert set(written) == {("update", "leases")}, written
    suspended.delete()


def test_the_operator_killed_in_mid_run_is_followed_by_another_and_training_goes_on(team: Namespace) -> None:
    job = Job.apply(team, quickstart("bereft", steps=400))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=600)
    uids = {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in job.pods(pool)}
    cluster = team.cluster
    for _ in range(2):
        before = job.status["step"]
        (pod,) = cluster.get("pods", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=operator")[
            "items"
        ]
        cluster.kubectl(
            *("delete", "pod", pod["metadata"]["name"], f"--namespace={SYSTEM}", "--grace-period=0", "--force")
        )
        job.wait("further steps", lambda status, seen=before: status["step"] > seen + 2, timeout_seconds=90)
    assert {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in job.pods(pool)} == uids
    assert job.status["attempt"] == 1
    assert job.status["restarts"]["total"] == 0
    job.delete()


def test_explain_reads_as_a_manual(operator: Cluster) -> None:
    said = operator.kubectl("explain", "rljob.spec.staleness")
    assert "maxVersions" in said and "DESCRIPTION" in said
    with pytest.raises(KubectlError, match="does not exist"):
        operator.kubectl("explain", "rljob.spec.stalness")


def _ready_since(pod: dict[str, object]) -> object:
    status = pod["status"]
    assert isinstance(status, dict)
    return next(item["lastTransitionTime"] for item in status["conditions"] if item["type"] == "Ready")
