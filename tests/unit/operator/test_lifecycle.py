"""Deadlines, the end, the TTL, suspension, deletion, and what stands in the way."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.operator.scenarios import (
    DEDICATED,
    all_but_the_old_policy_pool,
    cluster,
    condition,
    finish,
    ready,
    running,
    trainer_pod,
)

from rljob_api.names import FINALIZER
from rljob_api.reasons import ConditionType, Reason
from rljob_operator.core.observed import Clue, Progress, Refusal
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
        ("Deployment", "job-old-policy"),
    ],
)
def test_a_strangers_object_is_left_alone(kind: str, name: str) -> None:
    fake = cluster(DEDICATED)
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


# ------------------------------------------------------------------------------------------------------ old-policy pool


def uids(fake: FakeKubernetes, pool: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in fake.pods(pool)}


def test_a_job_has_started_when_one_old_policy_worker_is_ready_too() -> None:
    fake = cluster(DEDICATED, {"spec.startDeadlineSeconds": 100})
    fake.schedulable = all_but_the_old_policy_pool
    fake.settle()
    assert ready(fake) == ("False", "Starting")
    assert condition(fake, ConditionType.ROLLOUTS_READY).status == "True"
    waiting = condition(fake, ConditionType.OLD_POLICY_READY)
    assert (waiting.status, waiting.reason) == ("False", Reason.PODS_NOT_READY)
    assert waiting.message == "Pool old-policy has 0 ready pods of the 1 that the job needs."
    assert fake.status.started_time is None
    first = fake.pods("old-policy")[0]["metadata"]["name"]
    fake.schedulable = lambda pod: pod["metadata"]["name"] == first
    fake.settle()
    assert ready(fake) == ("True", "Training")
    assert condition(fake, ConditionType.OLD_POLICY_READY).message == "1 old-policy worker is ready."
    assert fake.status.started_time is not None


def test_a_job_whose_old_policy_pool_never_runs_misses_its_start_deadline() -> None:
    fake = cluster(DEDICATED, {"spec.startDeadlineSeconds": 100})
    fake.schedulable = all_but_the_old_policy_pool
    fake.settle()
    fake.now += timedelta(seconds=105)
    fake.settle()
    failed = condition(fake, ConditionType.FAILED)
    assert failed.reason == Reason.START_DEADLINE_EXCEEDED
    assert failed.message.startswith("Trainer, minReplicas and an old-policy worker did not run within 100 s")
    assert "Pool old-policy has 0 ready pods of the 1 that the job needs." in failed.message


def test_a_job_without_an_old_policy_pool_has_no_condition_of_it() -> None:
    fake = running()
    finish(fake)
    fake.settle()
    assert ConditionType.OLD_POLICY_READY not in {item.type for item in fake.status.conditions}
    assert [pool.name for pool in fake.status.pools] == ["main"]


def test_the_status_lists_the_old_policy_pool_and_counts_no_worker_of_it_as_a_rollout() -> None:
    fake = running(DEDICATED | {"spec.oldPolicyPool": {"replicas": 3}})
    assert [(pool.name, pool.desired, pool.ready) for pool in fake.status.pools] == [
        ("main", 2, 2),
        ("old-policy", 3, 3),
    ]
    assert fake.status.columns.rollouts == "2/2"
    assert condition(fake, ConditionType.ROLLOUTS_READY).message == "2 rollout pods are ready."


def test_old_policy_workers_come_and_go_live() -> None:
    fake = running(DEDICATED)
    before = uids(fake, "main") | uids(fake, "trainer") | uids(fake, "old-policy")
    for replicas in (5, 1):
        fake.edit(oldPolicyPool={"replicas": replicas})
        fake.settle()
        assert len(fake.pods("old-policy")) == replicas
        assert fake.objects["Deployment", "job-old-policy"]["spec"]["replicas"] == replicas
    assert fake.status.attempt == 1
    assert uids(fake, "main") | uids(fake, "trainer") <= before
    assert uids(fake, "old-policy") <= before, "those that were there first stay, as the youngest go"


def test_a_changed_template_of_the_old_policy_pool_rolls_that_pool_alone() -> None:
    fake = running(DEDICATED)
    others, own = uids(fake, "main") | uids(fake, "trainer"), uids(fake, "old-policy")
    template = {"spec": {"containers": [{"name": "old-policy", "resources": {"limits": {"memory": "2Gi"}}}]}}
    fake.edit(oldPolicyPool={"replicas": 2, "template": template})
    (action,) = [action for action in fake.reconcile().actions if isinstance(action, Replace)]
    assert action.name == "job-old-policy"
    fake.settle()
    assert uids(fake, "main") | uids(fake, "trainer") == others
    assert len(uids(fake, "old-policy")) == 2 and not uids(fake, "old-policy") & own
    assert fake.status.attempt == 1
    configs = [name for kind, name in fake.objects if kind == "ConfigMap" and name.startswith("job-old-policy-")]
    assert len(configs) == 1, "the configuration of the old pods goes with the last of them"


def test_a_change_of_a_rollout_pool_or_the_trainer_leaves_the_old_policy_pool_alone() -> None:
    fake = running(DEDICATED)
    own = uids(fake, "old-policy")
    pool = fake.job["spec"]["rolloutPools"][0]
    fake.edit(rolloutPools=[{**pool, "engine": {"vllm": {"enforceEager": True}}}], trainer={"replicas": 2})
    fake.settle()
    assert fake.status.attempt == 2
    assert uids(fake, "old-policy") == own


def test_the_portions_that_are_scored_at_once_change_for_the_trainer_and_the_old_policy_pool() -> None:
    fake = running(DEDICATED)
    own, rollouts = uids(fake, "old-policy"), uids(fake, "main")
    fake.edit(training=fake.job["spec"]["training"] | {"tokensPerMicroBatch": 1024})
    fake.settle()
    assert fake.status.attempt == 2
    assert uids(fake, "main") == rollouts
    assert len(uids(fake, "old-policy")) == 2 and not uids(fake, "old-policy") & own


def test_suspension_takes_the_old_policy_pool_and_resumption_brings_it_back() -> None:
    fake = running(DEDICATED)
    fake.edit(suspend=True)
    fake.settle()
    assert not fake.pods("old-policy")
    assert fake.objects["Deployment", "job-old-policy"]["spec"]["replicas"] == 0
    assert condition(fake, ConditionType.OLD_POLICY_READY).reason == Reason.SUSPENDED
    fake.edit(suspend=False)
    fake.settle()
    assert len(fake.pods("old-policy")) == 2
    assert ready(fake) == ("True", "Training")


def test_the_end_of_a_job_takes_its_old_policy_pool_and_its_deletion_leaves_nothing_of_it() -> None:
    fake = running(DEDICATED)
    finish(fake)
    fake.settle()
    assert not fake.of_kind("Deployment") and not fake.pods("old-policy")
    ended = condition(fake, ConditionType.OLD_POLICY_READY)
    assert (ended.status, ended.reason) == ("False", Reason.SUCCEEDED)
    assert [(pool.name, pool.ready) for pool in fake.status.pools] == [("main", 0), ("old-policy", 0)]
    assert deleted(fake).objects == {}
    assert deleted(running(DEDICATED)).objects == {}


def test_a_job_that_trains_and_loses_its_last_old_policy_worker_says_so() -> None:
    fake = running(DEDICATED)
    for pod in fake.pods("old-policy"):
        pod["status"]["conditions"] = []
    fake.reconcile()
    assert ready(fake) == ("False", "PodsNotReady")
    assert fake.status.started_time is not None, "it is no start any more: no deadline runs"


def test_what_keeps_old_policy_workers_is_said_of_them_and_not_of_rollouts() -> None:
    fake = cluster(DEDICATED)
    fake.schedulable = lambda _: False
    fake.clues = (Clue("Deployment", "job-old-policy", "ReplicaFailure", "exceeded quota: few"),)
    fake.settle()
    assert condition(fake, ConditionType.OLD_POLICY_READY).reason == Reason.PODS_REFUSED
    assert condition(fake, ConditionType.ROLLOUTS_READY).reason == Reason.PODS_NOT_READY
    fake.clues = (Clue("Deployment", "job-main", "ReplicaFailure", "exceeded quota: few"),)
    fake.settle()
    assert condition(fake, ConditionType.OLD_POLICY_READY).reason == Reason.PODS_NOT_READY
    assert condition(fake, ConditionType.ROLLOUTS_READY).reason == Reason.PODS_REFUSED
