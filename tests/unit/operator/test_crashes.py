"""The operator killed before any single write of any pass: the end is the one it would have been, and no counter is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.kubernetes import FakeKubernetes, crash_points
from tests.unit.operator.scenarios import DEDICATED, cluster, finish, trainer_pod

from rljob_operator.core import attempts
from rljob_operator.core.plan import Plan

Play = Callable[[FakeKubernetes], None]


def create(fake: FakeKubernetes) -> None:
    fake.settle()


def trainer_fails(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.end(trainer_pod(fake), 1)
    fake.settle()


def trainer_fails_twice(fake: FakeKubernetes) -> None:
    trainer_fails(fake)
    fake.end(trainer_pod(fake), 137, reason="OOMKilled")
    fake.settle()


def training_changes(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.edit(training={"steps": 10, "tasksPerStep": 4, "learningRate": 0.002})
    fake.settle()


def suspend_and_resume(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.edit(suspend=True)
    fake.settle()
    fake.edit(suspend=False)
    fake.settle()


def scale(fake: FakeKubernetes) -> None:
    fake.settle()
    for replicas in (4, 1):
        fake.edit(rolloutPools=[{"name": "main", "replicas": replicas}])
        fake.settle()


def pool_replaced_by_another(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.edit(rolloutPools=[{"name": "other", "replicas": 1}])
    fake.settle()


def succeed(fake: FakeKubernetes) -> None:
    fake.settle()
    finish(fake)
    fake.settle()


def fail_for_good(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.end(trainer_pod(fake), 3, '{"reason": "InvalidConfiguration", "message": "no such dataset"}')
    fake.settle()


def delete(fake: FakeKubernetes) -> None:
    fake.settle()
    fake.delete_job()
    fake.settle()


def dedicated() -> FakeKubernetes:
    return cluster(DEDICATED)


def old_policy_pool(fake: FakeKubernetes) -> None:
    """It is made, scaled, rolled, suspended, brought back, and taken at the end."""
    fake.settle()
    template = {"spec": {"priorityClassName": "high"}}
    for pool in ({"replicas": 3}, {"replicas": 1}, {"replicas": 1, "template": template}):
        fake.edit(oldPolicyPool=pool)
        fake.settle()
    suspend_and_resume(fake)
    succeed(fake)


PLAYS = [
    create,
    trainer_fails,
    trainer_fails_twice,
    training_changes,
    suspend_and_resume,
    scale,
    pool_replaced_by_another,
    succeed,
    fail_for_good,
    delete,
]


def gist(fake: FakeKubernetes) -> dict[str, Any]:
    """What must not depend on crashes."""
    status = fake.status
    return {
        "exists": fake.exists,
        "objects": sorted((kind, name) for kind, name in fake.objects if kind != "Pod"),
        "pods": sorted(
            (pod["metadata"]["labels"]["rljob.dev/pool"], pod["status"].get("phase")) for pod in fake.of_kind("Pod")
        ),
        "replicas": [item["spec"].get("replicas") for item in fake.of_kind("Deployment")],
        "attempt": status.attempt,
        "restarts": status.restarts,
        "conditions": {item.type: (item.status, item.reason) for item in status.conditions},
        "nats": fake.nats_deleted,
    }


@pytest.mark.parametrize(
    ("play", "make"),
    [*((play, cluster) for play in PLAYS), *((play, dedicated) for play in (create, old_policy_pool, delete))],
    ids=lambda function: function.__name__,
)
def test_a_crash_before_any_write_changes_nothing_in_the_end(play: Play, make: Callable[[], FakeKubernetes]) -> None:
    (_, smooth), *crashed = list(crash_points(play, make))
    assert smooth.writes > 3
    assert len(crashed) == smooth.writes
    for number, fake in crashed:
        assert fake.crash_after is None, f"write {number} was never reached"
        assert gist(fake) == gist(smooth), f"killed before write {number}"
        assert all(len(gang) <= 1 for gang in fake.gangs), f"two gangs, killed before write {number}"
        children = [(item["metadata"]["name"], item["metadata"]["uid"]) for item in fake.of_kind("Deployment")]
        assert len(children) == len(set(children))


def test_the_plays_do_what_their_names_say() -> None:
    ends = {play.__name__: gist(next(iter(crash_points(play, cluster)))[1]) for play in PLAYS}
    assert ends["create"]["attempt"] == 1
    assert (ends["trainer_fails"]["attempt"], ends["trainer_fails"]["restarts"].counted) == (2, 1)
    assert (ends["trainer_fails_twice"]["attempt"], ends["trainer_fails_twice"]["restarts"].counted) == (3, 2)
    assert (ends["training_changes"]["attempt"], ends["training_changes"]["restarts"].total) == (2, 0)
    assert (ends["suspend_and_resume"]["attempt"], ends["suspend_and_resume"]["restarts"].total) == (2, 0)
    assert ends["scale"]["replicas"] == [1]
    assert ("Deployment", "job-other") in ends["pool_replaced_by_another"]["objects"]
    assert ("Deployment", "job-main") not in ends["pool_replaced_by_another"]["objects"]
    assert ends["succeed"]["conditions"]["Succeeded"] == ("True", "Succeeded") and ends["succeed"]["nats"]
    assert ends["fail_for_good"]["conditions"]["Failed"] == ("True", "InvalidConfiguration")
    made = gist(next(iter(crash_points(create, dedicated)))[1])
    assert ("Deployment", "job-old-policy") in made["objects"] and made["conditions"]["OldPolicyReady"][0] == "True"
    ended = gist(next(iter(crash_points(old_policy_pool, dedicated)))[1])
    assert (ended["attempt"], ended["conditions"]["Succeeded"], ended["replicas"]) == (2, ("True", "Succeeded"), [])
    assert ends["delete"]["exists"] is False and ends["delete"]["nats"] and ends["delete"]["objects"] == []


def test_acting_in_the_pass_that_counts_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: delete the old gang and raise the attempt in one pass, and a crash between the two restarts twice."""
    count = attempts.after_failure

    def hasty(*arguments: Any) -> Plan | None:
        plan = count(*arguments)
        if plan is None or plan.status is None:
            return plan
        from dataclasses import replace

        from rljob_operator.core.plan import Delete

        jobs = arguments[0].trainer_jobs
        return replace(plan, actions=tuple(Delete("Job", job.name, job.uid) for job in jobs))

    monkeypatch.setattr(attempts, "after_failure", hasty)
    (_, smooth), *crashed = list(crash_points(trainer_fails, cluster))
    assert any(gist(fake) != gist(smooth) for _, fake in crashed)
