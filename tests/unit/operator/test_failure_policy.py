"""Failures and what is done about them: by default, by rules, and when it is too much."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.operator.scenarios import DEDICATED, condition, finish, ready, running, trainer_pod

from rljob_api.reasons import ConditionType, Reason
from rljob_operator.core.observed import Progress
from rljob_operator.core.plan import Delete

FAILED = '{"reason": "TrainerFailed", "message": "loss is NaN"}'
BAD_CONFIG = '{"reason": "InvalidConfiguration", "message": "no such dataset"}'
NO_GPU = '{"reason": "AcceleratorMissing", "message": "the process finds no CUDA device"}'


def rule(action: str, **fields: Any) -> dict[str, Any]:
    return {"name": "mine", "action": action, **fields}


def with_rules(*rules: dict[str, Any], max_restarts: int = 3) -> FakeKubernetes:
    return running({"spec.failurePolicy": {"maxRestarts": max_restarts, "rules": list(rules)}})


def restarts(fake: FakeKubernetes) -> tuple[int, int, int]:
    """(attempt, total, counted)"""
    return fake.status.attempt, fake.status.restarts.total, fake.status.restarts.counted


@pytest.mark.parametrize(
    ("rules", "message", "after", "end"),
    [
        ((), FAILED, (2, 1, 1), None),
        ((), BAD_CONFIG, (1, 0, 0), "InvalidConfiguration"),
        ((), NO_GPU, (1, 0, 0), "AcceleratorMissing"),
        ((rule("FailJob", pools=["main", "trainer"]),), FAILED, (1, 0, 0), "FailurePolicy"),
        ((rule("FailJob", onReasons=["TrainerFailed"]),), FAILED, (1, 0, 0), "FailurePolicy"),
        ((rule("FailJob", onReasons=["OOMKilled"]),), FAILED, (2, 1, 1), None),
        ((rule("FailJob", pools=["main"]),), FAILED, (2, 1, 1), None),
        ((rule("FailJob", pools=["trainer"]),), FAILED, (1, 0, 0), "FailurePolicy"),
        ((rule("RestartJob", pools=["trainer"], countsTowardMax=False),), FAILED, (2, 1, 0), None),
        ((rule("RestartJob", pools=["trainer"]),), BAD_CONFIG, (2, 1, 1), None),  # the user knows better
        ((rule("Ignore", pools=["trainer"]),), FAILED, (2, 1, 0), None),  # nothing else would start a gang again
        ((rule("RestartPool", pools=["trainer"]),), FAILED, (2, 1, 1), None),
        (
            (rule("FailJob", onReasons=["OOMKilled"]), {**rule("Ignore", pools=["trainer"]), "name": "rest"}),
            FAILED,
            (2, 1, 0),
            None,
        ),
    ],
)
def test_what_a_failed_trainer_does(
    rules: tuple[dict[str, Any], ...], message: str, after: tuple[int, int, int], end: str | None
) -> None:
    fake = with_rules(*rules)
    fake.end(trainer_pod(fake), 1, message)
    fake.settle()
    assert restarts(fake) == after
    if end is None:
        assert ready(fake)[1] in ("Training", "Starting")
        assert [job["metadata"]["name"] for job in fake.of_kind("Job")] == ["job-trainer-2"]
    else:
        failed = condition(fake, ConditionType.FAILED)
        assert (failed.status, failed.reason) == ("True", end)
        assert not fake.pods("main")


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_so_many_counted_restarts_and_no_more(allowed: int) -> None:
    fake = with_rules(max_restarts=allowed)
    for _ in range(allowed):
        fake.end(trainer_pod(fake), 1, FAILED)
        fake.settle()
    assert restarts(fake) == (allowed + 1, allowed, allowed)
    fake.end(trainer_pod(fake), 1, FAILED)
    fake.settle()
    failed = condition(fake, ConditionType.FAILED)
    assert failed.reason == Reason.MAX_RESTARTS_EXCEEDED
    assert f"{allowed} counted restarts were made, and failurePolicy.maxRestarts is {allowed}" in failed.message
    assert restarts(fake) == (allowed + 1, allowed, allowed), "a restart that is not made is not counted"


def test_the_earliest_failure_of_a_gang_is_its_cause() -> None:
    fake = running({"spec.trainer": {"replicas": 2}})
    first, second = sorted(fake.pods("trainer"), key=lambda pod: pod["metadata"]["name"])
    fake.end(second, 137, reason="OOMKilled")
    fake.now += timedelta(seconds=3)
    fake.end(first, 1, '{"reason": "RendezvousFailed", "message": "a peer is gone"}')
    fake.settle()
    (event,) = [event for event in fake.events if event.reason is Reason.TRAINER_FAILED]
    assert "ended with OOMKilled (exit code 137)" in event.message
    assert restarts(fake) == (2, 1, 1)


@pytest.mark.parametrize(
    ("rules", "counted"), [((), 1), ((rule("Ignore", onPodConditions=[{"type": "DisruptionTarget"}]),), 0)]
)
def test_an_eviction_is_known_by_the_job_when_the_pod_is_gone(rules: tuple[dict[str, Any], ...], counted: int) -> None:
    fake = with_rules(*rules)
    (job,) = fake.of_kind("Job")
    job["status"] = {
        "conditions": [
            {
                "type": "Failed",
                "status": "True",
                "reason": "PodFailurePolicy",
                "message": "Pod has condition DisruptionTarget",
            }
        ]
    }
    del fake.objects["Pod", trainer_pod(fake)["metadata"]["name"]]
    fake.settle()
    assert restarts(fake) == (2, 1, counted)


def test_a_trainer_on_a_node_that_is_lost_is_given_up_after_its_grace_period() -> None:
    rules = (rule("Ignore", onPodConditions=[{"type": "DisruptionTarget"}]),)
    fake = with_rules(*rules)
    pod = trainer_pod(fake)
    pod["metadata"] |= {"held": True, "deletionTimestamp": fake.now.strftime("%Y-%m-%dT%H:%M:%SZ")}
    pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True"})
    for _ in range(20):
        fake.reconcile()
        fake.tick()
    assert restarts(fake) == (1, 0, 0), "it may still be writing its checkpoint"
    fake.now += timedelta(seconds=15)
    fake.settle()
    assert restarts(fake) == (2, 1, 0)
    assert any("its node does not answer" in event.message for event in fake.events)
    assert [pod["metadata"]["name"] for pod in fake.pods("trainer") if not pod["metadata"].get("held")] == [
        "job-trainer-2-0"
    ]


def test_a_trainer_that_stops_before_the_last_step_is_started_again() -> None:
    fake = running()
    fake.end(trainer_pod(fake), 0)
    fake.settle()
    assert restarts(fake) == (1, 0, 0), "what it left in NATS is looked for once more"
    fake.now += timedelta(seconds=5)
    fake.settle()
    assert restarts(fake) == (2, 1, 1)
    assert any("ended without an error before all steps were trained" in event.message for event in fake.events)


def test_a_stall_is_counted_from_when_the_gang_ran_and_from_its_last_heartbeat() -> None:
    fake = running({"spec.trainer.stallSeconds": 60})
    fake.now += timedelta(seconds=50)
    fake.settle()
    assert fake.status.attempt == 1, "it may still be loading its model"
    fake.progress = Progress(heartbeat_at=fake.now)
    fake.now += timedelta(seconds=50)
    fake.settle()
    assert fake.status.attempt == 1
    fake.now += timedelta(seconds=20)
    fake.settle()
    assert restarts(fake) == (2, 1, 1)
    assert any(event.reason is Reason.TRAINER_STALLED for event in fake.events)


def test_an_operator_that_has_just_started_judges_nothing_by_what_it_has_not_read() -> None:
    """Negative control of the two rules that look for what is missing in NATS."""
    fake = running({"spec.trainer.stallSeconds": 60})
    fake.now += timedelta(seconds=5000)
    fake.known_since = None
    fake.reconcile()
    assert fake.status.attempt == 1, "a trainer that ran for long is not stalled because the operator is new"
    fake.now += timedelta(seconds=50)
    fake.reconcile()
    assert fake.status.attempt == 1
    ended = running()
    ended.end(trainer_pod(ended), 0)
    ended.tick()
    ended.known_since = None
    ended.reconcile()
    assert ended.status.attempt == 1, "the final model may be there"
    finish(ended)
    ended.settle()
    assert condition(ended, ConditionType.SUCCEEDED).status == "True"


def test_no_heartbeat_can_be_seen_while_nats_is_away() -> None:
    fake = running({"spec.trainer.stallSeconds": 60})
    fake.progress = Progress(reachable=False, unreachable_since=fake.now)
    fake.now += timedelta(seconds=500)
    fake.settle()
    assert fake.status.attempt == 1


def test_a_failed_rollout_worker_is_left_to_kubernetes() -> None:
    fake = running()
    writes = fake.writes
    fake.end(fake.pods("main")[0], 1, '{"reason": "WorkerFailed", "message": "poisoned"}')
    fake.settle()
    assert len(fake.pods("main")) == 2
    assert restarts(fake) == (1, 0, 0)
    assert fake.writes - writes <= 2, "the status says it; nothing else is written"


def test_a_rule_restarts_the_whole_pool_and_only_those_that_were_there() -> None:
    fake = with_rules(rule("RestartPool", pools=["main"]))
    before = {pod["metadata"]["uid"] for pod in fake.pods("main")}
    fake.now += timedelta(seconds=5)
    fake.end(fake.pods("main")[0], 1)
    fake.settle()
    after = {pod["metadata"]["uid"] for pod in fake.pods("main")}
    assert len(after) == 2 and not after & before
    fake.settle()
    assert {pod["metadata"]["uid"] for pod in fake.pods("main")} == after, "once"


def test_a_hopeless_rollout_fails_the_job() -> None:
    fake = running()
    fake.now += timedelta(seconds=5)
    fake.end(fake.pods("main")[0], 3, BAD_CONFIG)
    fake.settle()
    failed = condition(fake, ConditionType.FAILED)
    assert failed.reason == Reason.INVALID_CONFIGURATION
    assert "(pool main)" in failed.message


def test_a_worker_that_was_told_to_go_did_not_fail() -> None:
    fake = with_rules(rule("FailJob", pools=["main"]))
    pod = fake.pods("main")[0]
    fake.now += timedelta(seconds=5)
    fake.end(pod, 143)
    pod["metadata"] |= {"deletionTimestamp": pod["metadata"]["creationTimestamp"], "held": True}
    fake.reconcile()
    assert not any(event.reason is Reason.FAILURE_POLICY for event in fake.events)


def test_a_worker_that_crashes_for_a_minute_is_made_anew_elsewhere() -> None:
    fake = running()
    pod = fake.pods("main")[0]
    since = fake.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    pod["status"]["conditions"] = [{"type": "Ready", "status": "False", "lastTransitionTime": since}]
    pod["status"]["containerStatuses"] = [
        {"name": "rollout", "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    ]
    fake.now += timedelta(seconds=59)
    assert not [action for action in fake.reconcile().actions if isinstance(action, Delete)]
    fake.now += timedelta(seconds=5)
    (deleted,) = [action for action in fake.reconcile().actions if isinstance(action, Delete)]
    assert (deleted.kind, deleted.uid) == ("Pod", pod["metadata"]["uid"])


def test_a_failed_old_policy_worker_is_left_to_kubernetes_and_counts_for_nobody_else() -> None:
    fake = running(DEDICATED, {"spec.failurePolicy": {"maxRestarts": 0}})
    fake.now += timedelta(seconds=5)
    for pod in fake.pods("old-policy"):
        fake.end(pod, 1, '{"reason": "WorkerFailed", "message": "out of memory"}')
    fake.settle()
    assert restarts(fake) == (1, 0, 0)
    assert not fake.status.completion_time
    assert [(pool.name, pool.restarts) for pool in fake.status.pools] == [("main", 0), ("old-policy", 2)]


@pytest.mark.parametrize(("message", "reason"), [(NO_GPU, "AcceleratorMissing"), (BAD_CONFIG, "InvalidConfiguration")])
def test_a_hopeless_old_policy_worker_fails_the_job(message: str, reason: str) -> None:
    fake = running(DEDICATED)
    fake.now += timedelta(seconds=5)
    fake.end(fake.pods("old-policy")[0], 3, message)
    fake.settle()
    failed = condition(fake, ConditionType.FAILED)
    assert failed.reason == reason
    assert "(pool old-policy)" in failed.message


def test_a_rule_may_name_the_old_policy_pool() -> None:
    rules = [rule("RestartPool", pools=["old-policy"], onReasons=["WorkerFailed"])]
    fake = running(DEDICATED, {"spec.failurePolicy": {"rules": rules}})
    before = {pool: {pod["metadata"]["uid"] for pod in fake.pods(pool)} for pool in ("main", "old-policy")}
    fake.now += timedelta(seconds=5)
    fake.end(fake.pods("old-policy")[0], 1, '{"reason": "WorkerFailed", "message": "out of memory"}')
    fake.settle()
    after = {pool: {pod["metadata"]["uid"] for pod in fake.pods(pool)} for pool in ("main", "old-policy")}
    assert after["main"] == before["main"]
    assert len(after["old-policy"]) == 2 and not after["old-policy"] & before["old-policy"]
