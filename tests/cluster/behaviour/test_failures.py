"""What failures do to a job: defaults, rules, stalls, deadlines, the TTL."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.cluster.cluster import KubectlError, Namespace
from tests.cluster.rljobs import Job, quickstart

pytestmark = pytest.mark.timeout(420)

RANK = "rljob_runtime.trainer.main"
WORKER = "rljob_runtime.rollout"


def policy(*rules: dict[str, Any], max_restarts: int = 3) -> dict[str, Any]:
    return {"maxRestarts": max_restarts, "rules": list(rules)}


def running(team: Namespace, name: str, **spec: Any) -> Job:
    job = Job.apply(team, quickstart(name, steps=2000, **spec))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    return job


def uids(job: Job, pool: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in job.pods(pool)}


def test_a_killed_rollout_worker_is_started_again_alone_and_no_task_is_lost(team: Namespace) -> None:
    # Engines slow enough to be what the trainer waits for: a worker without work has nothing to lose.
    job = running(
        team, "worker", rolloutPools=[{"name": "main", "replicas": 2, "engine": {"simulated": {"decodeSeconds": 0.05}}}]
    )
    job.wait("steps of both workers", lambda status: status["step"] >= 3)
    trainer, pods = uids(job, "trainer"), job.pods("main")
    job.kill(pods[0], WORKER)
    job.wait("its restart", lambda status: status["pools"][0]["restarts"] == 1)
    job.wait("all ready", lambda status: status["columns"]["rollouts"] == "2/2")
    assert uids(job, "main") == {pod["metadata"]["uid"] for pod in pods}
    assert uids(job, "trainer") == trainer
    assert job.status["restarts"] == {"total": 0, "counted": 0}
    step = job.status["step"]
    job.wait("further steps", lambda status: status["step"] > step + 5)
    tokens = job.status["correction"]["tokens"]
    assert tokens["lost"] > 0, "what the killed worker had made is counted"
    job.delete()


def test_rules_are_asked_in_their_order(team: Namespace) -> None:
    rules = (
        {"name": "pool-anew", "pools": ["main"], "action": "RestartPool"},
        {
            "name": "free",
            "pools": ["trainer"],
            "onReasons": ["TrainerFailed"],
            "action": "RestartJob",
            "countsTowardMax": False,
        },
        {"name": "never", "pools": ["trainer"], "action": "FailJob"},
    )
    job = running(team, "rules", failurePolicy=policy(*rules, max_restarts=0))
    before, trainer = uids(job, "main"), uids(job, "trainer")
    job.kill(job.pods("main")[0], WORKER)
    team.cluster.wait_for(
        "new pods of the pool",
        lambda: len(uids(job, "main")) == 2 and not uids(job, "main") & before,
        timeout_seconds=120,
    )
    assert uids(job, "trainer") == trainer
    job.wait("all ready", lambda status: status["columns"]["rollouts"] == "2/2")
    job.kill(job.trainer_pod(), RANK)
    job.wait("attempt 2", lambda status: status["attempt"] == 2)
    assert job.status["restarts"] == {"total": 1, "counted": 0}
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    # Live: a changed policy touches no pod and holds from now on.
    pods = uids(job, "trainer") | uids(job, "main")
    job.patch(failurePolicy=policy({"name": "never", "onReasons": ["TrainerFailed"], "action": "FailJob"}))
    assert uids(job, "trainer") | uids(job, "main") == pods
    job.kill(job.trainer_pod(), RANK)
    condition = job.wait_for_condition("Failed")
    assert condition["reason"] == "FailurePolicy"
    assert "Rule never of failurePolicy fails the job." in condition["message"]
    job.delete()


def test_more_restarts_than_allowed_fail_the_job(team: Namespace) -> None:
    job = running(team, "often", failurePolicy=policy(max_restarts=1))
    for attempt in (1, 2):
        job.kill(job.trainer_pod(), RANK)
        if attempt == 1:
            job.wait("attempt 2", lambda status: status["attempt"] == 2)
            job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    condition = job.wait_for_condition("Failed")
    assert condition["reason"] == "MaxRestartsExceeded"
    assert "maxRestarts is 1" in condition["message"]
    team.cluster.wait_for("rollouts to be gone", lambda: not job.pods("main"), timeout_seconds=120)
    assert job.pods("trainer"), "the failed pod stays, for its log"
    job.delete()


def test_an_evicted_trainer_starts_anew_and_a_rule_by_pod_condition_does_not_count_it(team: Namespace) -> None:
    rule = {
        "name": "node-events",
        "onPodConditions": [{"type": "DisruptionTarget"}],
        "action": "RestartJob",
        "countsTowardMax": False,
    }
    job = running(team, "evicted", failurePolicy=policy(rule, max_restarts=0))
    trainer = job.trainer_pod()
    name = trainer["metadata"]["name"]
    eviction = (
        f'{{"apiVersion":"policy/v1","kind":"Eviction","metadata":{{"name":"{name}","namespace":"{team.name}"}}}}'
    )
    team.kubectl(
        "create", "--raw", f"/api/v1/namespaces/{team.name}/pods/{name}/eviction", "--filename=-", text_input=eviction
    )
    job.wait("attempt 2", lambda status: status["attempt"] == 2)
    assert job.status["restarts"] == {"total": 1, "counted": 0}
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    job.delete()


def test_a_trainer_without_heartbeats_is_started_anew(team: Namespace) -> None:
    template = {"spec": {"terminationGracePeriodSeconds": 10, "containers": [{"name": "trainer"}]}}
    job = Job.apply(team, quickstart("stalled", steps=2000, trainer={"stallSeconds": 15, "template": template}))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    job.kill(job.trainer_pod(), RANK, signal.SIGSTOP)
    job.wait("attempt 2", lambda status: status["attempt"] == 2, timeout_seconds=90)
    (message,) = [message for reason, message in job.events() if reason == "TrainerStalled"]
    assert "gave no heartbeat for 15 s (trainer.stallSeconds)" in message
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    assert job.status["restarts"] == {"total": 1, "counted": 1}
    job.delete()


def test_the_start_deadline_names_what_did_not_run(team: Namespace) -> None:
    huge = {"spec": {"containers": [{"name": "trainer", "resources": {"requests": {"cpu": "512"}}}]}}
    job = Job.apply(team, quickstart("late", steps=4, trainer={"template": huge}, startDeadlineSeconds=15))
    condition = job.wait_for_condition("Failed", timeout_seconds=60)
    assert condition["reason"] == "StartDeadlineExceeded"
    assert "within 15 s (startDeadlineSeconds)" in condition["message"]
    assert "Insufficient cpu" in condition["message"]
    team.cluster.wait_for(
        "its pods to be gone", lambda: not job.pods("main") and not job.pods("trainer"), timeout_seconds=120
    )
    job.delete()


def test_the_active_deadline_ends_the_job_and_the_ttl_deletes_it(team: Namespace) -> None:
    job = Job.apply(team, quickstart("short", steps=5000, activeDeadlineSeconds=30, ttlSecondsAfterFinished=20))
    condition = job.wait_for_condition("Failed", timeout_seconds=90)
    assert condition["reason"] == "ActiveDeadlineExceeded"
    assert "30 s (activeDeadlineSeconds)" in condition["message"]

    def gone() -> bool:
        try:
            team.kubectl("get", "rljob", job.name)
        except KubectlError as error:
            return "not found" in str(error)
        return False

    team.cluster.wait_for("the TTL", gone, timeout_seconds=180)
    assert not job.pods("trainer")
