"""Deadlines, the end, the TTL, suspension, deletion, and what stands in the way."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.operator.scenarios import cluster, condition, finish, ready, running, trainer_pod

from rljob_api.names import FINALIZER
from rljob_api.reasons import ConditionType, Reason
from rljob_operator.core.observed import Progress, Refusal
from rljob_operator.core.plan import Merge, Replace


def never(_: object) -> bool:
    return False


def test_the_start_deadline_counts_until_everything_ran_once() -> None:
    fake = cluster({"spec.startDeadlineSeconds": 100})
    fake.schedulable = never
    fake.settle()
    fake.now += timedelta(seconds=80)
    fake.settle()
    assert ready(fake)[1] == "Starting"
    fake.now += timedelta(seconds=25)
    fake.settle()
    failed = condition(fake, ConditionType.FAILED)
    assert failed.reason == Reason.START_DEADLINE_EXCEEDED
    assert "0 of 1 trainer pods run." in failed.message

    started = running({"spec.startDeadlineSeconds": 100})
    started.end(trainer_pod(started), 1)
    started.schedulable = never
    started.settle()
    started.now += timedelta(seconds=1000)
    started.settle()
    assert not started.status.completion_time, "a job that ran is not starting any more"


def test_the_active_deadline_and_its_clock_on_resume() -> None:
    fake = running({"spec.activeDeadlineSeconds": 1000})
    fake.now += timedelta(seconds=900)
    fake.edit(suspend=True)
    fake.settle()
    fake.now += timedelta(seconds=5000)
    fake.settle()
    fake.edit(suspend=False)
    fake.settle()
    fake.now += timedelta(seconds=900)
    fake.settle()
    assert ready(fake) == ("True", "Training")
    fake.now += timedelta(seconds=100)
    fake.settle()
    assert condition(fake, ConditionType.FAILED).reason == Reason.ACTIVE_DEADLINE_EXCEEDED
    assert not fake.of_kind("Deployment") and not fake.pods("trainer")


def test_a_job_succeeds_only_with_its_final_model() -> None:
    fake = running()
    fake.progress = Progress(reachable=False, unreachable_since=fake.now)
    fake.end(trainer_pod(fake), 0)
    fake.settle()
    assert not fake.status.completion_time, "whether the model is durable is not known"
    assert fake.status.attempt == 1
    finish(fake)
    fake.settle()
    succeeded = condition(fake, ConditionType.SUCCEEDED)
    assert succeeded.message == "All 10 steps are trained. The final model is pvc://ckpt/job/final."
    assert fake.status.final_model is not None
    assert (fake.status.columns.rollouts, fake.status.columns.trainer) == ("", ""), "nothing of it runs any more"
    assert [pool.ready for pool in fake.status.pools] == [0]
    assert fake.nats_deleted
    assert [job["metadata"]["name"] for job in fake.of_kind("Job")] == ["job-trainer-1"], "its log stays"


def test_the_ttl_deletes_the_finished_job() -> None:
    fake = running({"spec.ttlSecondsAfterFinished": 60})
    finish(fake)
    fake.settle()
    assert fake.exists
    fake.now += timedelta(seconds=70)
    fake.settle()
    assert not fake.exists


def test_nothing_is_made_for_a_job_created_suspended_and_changes_meanwhile_count() -> None:
    fake = cluster({"spec.suspend": True})
    fake.settle()
    assert [kind for kind, _ in fake.objects] == ["RLJob"]
    assert (fake.status.attempt, ready(fake)) == (0, ("False", "Suspended"))
    pool = fake.job["spec"]["rolloutPools"][0]
    template = {"spec": {"nodeSelector": {"flavor": "h100"}, "containers": [{"name": "rollout"}]}}
    fake.edit(rolloutPools=[{**pool, "template": template}])
    fake.settle()
    fake.edit(suspend=False)
    fake.settle()
    assert (fake.status.attempt, ready(fake)) == (1, ("True", "Training"))
    (deployment,) = fake.of_kind("Deployment")
    assert deployment["spec"]["template"]["spec"]["nodeSelector"] == {"flavor": "h100"}


def test_a_lost_node_does_not_hold_the_job_for_ever() -> None:
    fake = running()
    pod = trainer_pod(fake)
    fake.edit(suspend=True)
    fake.reconcile()
    pod["metadata"] |= {"held": True, "deletionTimestamp": fake.now.strftime("%Y-%m-%dT%H:%M:%SZ")}
    for _ in range(10):
        fake.reconcile()
        fake.tick()
    assert ready(fake) == ("False", "Suspending")
    fake.now += timedelta(seconds=40)
    fake.reconcile()
    assert ready(fake) == ("False", "Suspended")


def deleted(fake: FakeKubernetes) -> FakeKubernetes:
    fake.delete_job()
    fake.settle()
    return fake


def test_deletion_leaves_nothing_in_any_state() -> None:
    starting = cluster()
    for _ in range(4):
        starting.reconcile()
    suspended = running()
    suspended.edit(suspend=True)
    suspended.settle()
    finished = running()
    finish(finished)
    finished.settle()
    for fake in (starting, suspended, finished, running()):
        assert not deleted(fake).exists
        assert fake.objects == {}
        assert fake.nats_deleted
    never_started = cluster({"spec.suspend": True})
    never_started.settle()
    assert deleted(never_started).objects == {}


def test_deletion_waits_for_nats_and_not_for_ever() -> None:
    fake = running()
    fake.progress = Progress(reachable=False, unreachable_since=fake.now)
    fake.delete_job()
    for _ in range(10):
        fake.reconcile()
        fake.tick()
    assert fake.exists and not fake.pods("main")
    assert FINALIZER in fake.job["metadata"]["finalizers"]
    fake.now += timedelta(seconds=120)
    fake.settle()
    assert not fake.exists
    assert fake.events[-1].reason is Reason.CLEANUP_ABANDONED


def test_another_ones_finalizer_is_kept() -> None:
    fake = running()
    fake.job["metadata"]["finalizers"].append("example.com/theirs")
    fake.delete_job()
    for _ in range(10):
        fake.reconcile()
        fake.tick()
    assert fake.job["metadata"]["finalizers"] == ["example.com/theirs"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Service", "job-trainer"),
        ("ConfigMap", "job-trainer-1"),
        ("Job", "job-trainer-1"),
        ("Deployment", "job-main"),
        ("PodDisruptionBudget", "job-main"),
    ],
)
def test_a_strangers_object_is_left_alone(kind: str, name: str) -> None:
    fake = cluster()
    template = {"metadata": {"annotations": {}}, "spec": {"containers": []}}
    mine = fake.add(
        {"kind": kind, "metadata": {"name": name}, "spec": {"replicas": 0, "completions": 0, "template": template}}
    )
    for _ in range(10):
        fake.reconcile()
        fake.tick()
    assert ready(fake) == ("False", "ChildConflict")
    assert condition(fake, ConditionType.READY).message.startswith(f"{kind} {name} is in the way")
    uid = mine["metadata"]["uid"]
    fake.delete_job()
    fake.settle()
    assert [item["metadata"]["uid"] for item in fake.objects.values()] == [uid]


@pytest.mark.parametrize(
    ("code", "message", "reason"),
    [
        (422, "spec.template.spec.containers[0].image: Required value", Reason.INVALID_TEMPLATE),
        (403, "exceeded quota: few, requested: pods=1, used: pods=4, limited: pods=4", Reason.PODS_REFUSED),
        (403, 'jobs.batch is forbidden: User "x" cannot create resource "jobs"', Reason.PERMISSION_MISSING),
    ],
)
def test_what_the_apiserver_refuses_is_said_and_not_tried_in_each_pass(code: int, message: str, reason: Reason) -> None:
    fake = cluster()
    fake.refusals = (Refusal("Job", "job-trainer-1", code, "", message),)
    for _ in range(6):
        fake.reconcile()
        fake.tick()
    assert ready(fake) == ("False", reason)
    assert message in condition(fake, ConditionType.READY).message
    assert not fake.of_kind("Job")
    assert fake.of_kind("Deployment"), "the other children are made"


def test_a_live_change_touches_no_child() -> None:
    fake = running()
    fake.edit(staleness={"maxVersions": 9}, weightSync={"timeoutSeconds": 60}, failurePolicy={"maxRestarts": 9})
    plan = fake.reconcile()
    assert plan.actions == ()
    assert fake.status.attempt == 1


def test_a_changed_template_rolls_that_pool_and_a_newer_operator_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = running()
    before = {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in fake.pods(pool)}
    from rljob_operator.core.builders import trainer_job, worker_deployment

    for module in (worker_deployment, trainer_job):
        monkeypatch.setattr(module, "pod_template", lambda *_: {"metadata": {}, "spec": {"changed": True}})
    fake.settle()
    assert {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in fake.pods(pool)} == before
    pool = fake.job["spec"]["rolloutPools"][0]
    fake.edit(rolloutPools=[{**pool, "engine": {"vllm": {"enforceEager": True}}}])
    assert [type(action) for action in fake.reconcile().actions if not hasattr(action, "body")] == [Replace]


def test_a_scale_down_marks_its_victims_first_the_latest_and_those_that_lag() -> None:
    fake = running({"spec.rolloutPools": [{"name": "main", "replicas": 3}]})
    fake.edit(rolloutPools=[{"name": "main", "replicas": 2}])
    merges = [action for action in fake.reconcile().actions if isinstance(action, Merge)]
    assert [action.kind for action in merges] == ["Pod", "Deployment"]
    assert "controller.kubernetes.io/pod-deletion-cost" in merges[0].body["metadata"]["annotations"]


def test_an_autoscaled_pool_keeps_the_number_that_it_has() -> None:
    fake = running({"spec.rolloutPools": [{"name": "main"}]})
    (deployment,) = fake.of_kind("Deployment")
    assert "replicas" not in deployment["spec"]
    deployment["spec"]["replicas"] = 5
    fake.settle()
    assert deployment["spec"]["replicas"] == 5
    assert len(fake.pods("main")) == 5
