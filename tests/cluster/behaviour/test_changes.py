"""What a change of the spec does while the job runs (docs/design.md, 7b), and what a queue such as Kueue does to it."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import KubectlError, Namespace
from tests.cluster.rljobs import Job, quickstart

pytestmark = pytest.mark.timeout(300)


def uids(job: Job, pool: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in job.pods(pool)}


def running(team: Namespace, name: str) -> Job:
    job = Job.apply(team, quickstart(name, steps=4000))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    return job


def test_staleness_and_weight_sync_change_live_without_touching_pods(team: Namespace) -> None:
    job = running(team, "live")
    before = uids(job, "main") | uids(job, "trainer")
    job.wait("stale tokens", lambda status: status["staleness"]["max"] >= 2, timeout_seconds=90)
    job.patch(staleness={"maxVersions": 0}, weightSync={"timeoutSeconds": 60})
    job.wait("synchronous training", lambda status: status["staleness"]["max"] == 0, timeout_seconds=90)
    step = job.status["step"]
    job.wait("further steps", lambda status: status["step"] > step + 5)
    assert job.status["staleness"]["max"] == 0
    job.patch(staleness={"maxVersions": 6})
    job.wait("stale tokens", lambda status: status["staleness"]["max"] >= 3, timeout_seconds=90)
    assert uids(job, "main") | uids(job, "trainer") == before
    assert job.status["attempt"] == 1
    assert job.status["correction"]["exactFraction"] == "1.000"
    job.delete()


def test_a_pools_template_rolls_that_pool_alone_and_pools_come_and_go(team: Namespace) -> None:
    job = running(team, "rolled")
    trainer, main = uids(job, "trainer"), uids(job, "main")
    pool = job.get()["spec"]["rolloutPools"][0]
    other = {**pool, "name": "second", "replicas": 1}
    job.patch(rolloutPools=[pool, other])
    job.wait("the second pool", lambda status: status["columns"]["rollouts"] == "3/3")
    assert uids(job, "main") == main
    second = uids(job, "second")
    environment = [{"name": "EXAMPLE", "value": "1"}]
    pool["template"] = {"spec": {"containers": [{"name": "rollout", "env": environment}]}}
    job.patch(rolloutPools=[pool, other])
    team.cluster.wait_for(
        "new pods of main", lambda: len(uids(job, "main")) == 2 and not uids(job, "main") & main, timeout_seconds=150
    )
    assert uids(job, "second") == second
    job.patch(rolloutPools=[pool])
    team.cluster.wait_for("the second pool to be gone", lambda: not uids(job, "second"), timeout_seconds=90)
    assert uids(job, "trainer") == trainer
    assert job.status["attempt"] == 1
    job.delete()


def test_the_trainers_fields_make_a_new_attempt_that_is_not_counted(team: Namespace) -> None:
    job = running(team, "retrained")
    rollouts = uids(job, "main")
    job.patch(training={"learningRate": 0.002})
    job.wait("attempt 2", lambda status: status["attempt"] == 2)
    assert job.status["restarts"] == {"total": 0, "counted": 0}
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    assert uids(job, "main") == rollouts
    assert any("a new attempt begins from the last checkpoint" in message for _, message in job.events())
    job.delete()


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"random": {"hiddenSize": 128}}},
        {"environment": {"parameters": {"digits": 5}}},
        {"correction": {"oldLogprobs": "Current"}},
        {"storage": {"checkpoint": {"keep": 7}}},
        {"messaging": {"url": "nats://elsewhere:4222"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_may_not_change_is_refused(team: Namespace, change: dict[str, object]) -> None:
    job = Job.apply(team, quickstart("fixed", steps=4, suspend=True))
    job.wait_for_condition("Suspended")
    with pytest.raises(KubectlError, match="cannot be changed"):
        job.patch(**change)
    job.delete()


def test_a_queue_may_hold_a_job_steer_it_and_let_it_go(team: Namespace) -> None:
    """What Kueue does to an integration: created suspended, node selectors put in, then unsuspended; later preempted."""
    job = Job.apply(team, quickstart("queued", steps=4000, suspend=True))
    job.wait_for_condition("Suspended")
    assert not job.pods("trainer") and not job.pods("main")
    spec = job.get()["spec"]
    selector = {"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-0"}, "containers": []}}
    trainer = {**selector, "spec": {**selector["spec"], "containers": [{"name": "trainer"}]}}
    rollout = {**selector, "spec": {**selector["spec"], "containers": [{"name": "rollout"}]}}
    job.patch(
        trainer={"template": trainer},
        rolloutPools=[{**pool, "template": rollout} for pool in spec["rolloutPools"]],
        suspend=False,
    )
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    assert job.status["attempt"] == 1
    for pool in ("main", "trainer"):
        assert all(pod["spec"]["nodeSelector"] == selector["spec"]["nodeSelector"] for pod in job.pods(pool))
    job.patch(suspend=True)  # preempted
    job.wait_for_condition("Suspended", timeout_seconds=150)
    assert not job.pods("trainer") and not job.pods("main")
    assert job.status["restarts"] == {"total": 0, "counted": 0}
    job.delete()
