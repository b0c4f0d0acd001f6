"""What a user reads in `kubectl describe` in each state of a job: one golden text, to be read as prose.

After a change of a message: `RLJOB_WRITE_GOLDEN=1 python -m pytest tests/unit/operator/test_describe.py`, and read the
difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.operator.scenarios import DEDICATED, all_but_the_old_policy_pool, cluster, finish, running, trainer_pod

from rljob_api.errors import Violation
from rljob_api.messages import WorkerCounters
from rljob_operator.core.decide import decide
from rljob_operator.core.observed import Clue, Progress, Refusal
from rljob_operator.core.plan import Plan
from rljob_protocol.coordinator import CoordinationSummary

GOLDEN = Path(__file__).parent / "describe.golden.txt"

State = Callable[[], tuple[FakeKubernetes, Plan]]
STATES: dict[str, State] = {}


def state(function: Callable[[], FakeKubernetes]) -> Callable[[], FakeKubernetes]:
    def settled() -> tuple[FakeKubernetes, Plan]:
        fake = function()
        return fake, fake.reconcile()

    STATES[function.__name__.replace("_", " ")] = settled
    return function


def coordination(**fields: Any) -> CoordinationSummary:
    empty = CoordinationSummary(
        published=None,
        desired=None,
        workers=(),
        converged=0,
        serving=(),
        laggards=(),
        quarantined=(),
        restarts=0,
        totals=WorkerCounters(),
        crashed_tokens=0,
    )
    return replace(empty, **fields)


@state
def created_suspended() -> FakeKubernetes:
    fake = cluster({"spec.suspend": True})
    fake.settle()
    return fake


@state
def starting() -> FakeKubernetes:
    fake = cluster()
    fake.schedulable = lambda _: False
    fake.settle()
    return fake


@state
def training() -> FakeKubernetes:
    return running()


@state
def restarting_after_a_failure() -> FakeKubernetes:
    fake = running()
    fake.end(trainer_pod(fake), 137, reason="OOMKilled")
    fake.schedulable = lambda _: False
    fake.settle()
    return fake


@state
def stalled() -> FakeKubernetes:
    fake = running({"spec.trainer.stallSeconds": 60})
    fake.schedulable = lambda _: False
    fake.now += timedelta(seconds=90)
    fake.settle()
    return fake


@state
def suspending() -> FakeKubernetes:
    fake = running()
    for pod in fake.pods("main"):
        pod["metadata"]["held"] = True
    fake.edit(suspend=True)
    for _ in range(3):
        fake.reconcile()
        fake.tick()
    return fake


@state
def suspended() -> FakeKubernetes:
    fake = running()
    fake.edit(suspend=True)
    fake.settle()
    return fake


@state
def succeeded() -> FakeKubernetes:
    fake = running()
    finish(fake)
    fake.settle()
    return fake


def failed_by(code: int, message: str, *changes: dict[str, Any]) -> FakeKubernetes:
    fake = running(*changes)
    fake.end(trainer_pod(fake), code, message)
    fake.settle()
    return fake


@state
def failed_by_its_configuration() -> FakeKubernetes:
    return failed_by(3, '{"reason": "InvalidConfiguration", "message": "environment.parameters.novel is not known."}')


@state
def failed_for_want_of_a_gpu() -> FakeKubernetes:
    return failed_by(3, '{"reason": "AcceleratorMissing", "message": "the process finds no CUDA device"}')


@state
def failed_by_a_rule() -> FakeKubernetes:
    rule = {"name": "out-of-memory", "onReasons": ["OOMKilled"], "action": "FailJob"}
    fake = running({"spec.failurePolicy": {"rules": [rule]}})
    fake.end(trainer_pod(fake), 137, reason="OOMKilled")
    fake.settle()
    return fake


@state
def failed_after_too_many_restarts() -> FakeKubernetes:
    return failed_by(
        1, '{"reason": "TrainerFailed", "message": "loss is NaN"}', {"spec.failurePolicy": {"maxRestarts": 0}}
    )


@state
def failed_by_the_start_deadline() -> FakeKubernetes:
    fake = cluster({"spec.startDeadlineSeconds": 60})
    fake.schedulable = lambda _: False
    fake.settle()
    fake.now += timedelta(seconds=90)
    fake.settle()
    return fake


@state
def failed_by_the_active_deadline() -> FakeKubernetes:
    fake = running({"spec.activeDeadlineSeconds": 600})
    fake.now += timedelta(seconds=900)
    fake.settle()
    return fake


def waiting(reason: str, message: str) -> FakeKubernetes:
    fake = cluster()
    fake.schedulable = lambda _: False
    fake.settle()
    status = {"name": "trainer", "state": {"waiting": {"reason": reason, "message": message}}, "restartCount": 0}
    trainer_pod(fake)["status"]["containerStatuses"] = [status]
    return fake


@state
def without_its_image() -> FakeKubernetes:
    return waiting("ImagePullBackOff", 'Back-off pulling image "example.com/absent:1"')


@state
def without_a_secret() -> FakeKubernetes:
    return waiting("CreateContainerConfigError", 'secret "absent" not found')


@state
def without_a_node() -> FakeKubernetes:
    fake = cluster()
    fake.schedulable = lambda _: False
    fake.settle()
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    trainer_pod(fake)["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    ]
    return fake


@state
def without_a_volume() -> FakeKubernetes:
    fake = cluster()
    fake.schedulable = lambda _: False
    fake.settle()
    name = trainer_pod(fake)["metadata"]["name"]
    fake.clues = (Clue("Pod", name, "FailedMount", 'MountVolume.SetUp failed for volume "data": secret "a" not found'),)
    return fake


@state
def over_its_quota() -> FakeKubernetes:
    fake = cluster()
    fake.schedulable = lambda _: False
    fake.settle()
    fake.clues = (Clue("Job", "job-trainer-1", "FailedCreate", "pods is forbidden: exceeded quota: few"),)
    return fake


@state
def crashing() -> FakeKubernetes:
    fake = running()
    for pod in fake.pods("main"):
        terminated = {
            "exitCode": 1,
            "reason": "Error",
            "message": '{"reason": "WorkerFailed", "message": "the engine ran out of memory"}',
            "finishedAt": "2026-11-23T01:00:00Z",
        }
        pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
        pod["status"]["containerStatuses"] = [
            {
                "name": "rollout",
                "restartCount": 4,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": terminated},
            }
        ]
    return fake


def refused(code: int, message: str) -> FakeKubernetes:
    fake = cluster()
    fake.refusals = (Refusal("Job", "job-trainer-1", code, "", message),)
    for _ in range(6):
        fake.reconcile()
        fake.tick()
    return fake


@state
def with_a_template_that_is_not_valid() -> FakeKubernetes:
    return refused(422, 'Job.batch "job-trainer-1" is invalid: spec.template.spec.containers[0].image: Required value.')


@state
def without_a_permission() -> FakeKubernetes:
    return refused(403, 'jobs.batch is forbidden: User "operator" cannot create resource "jobs" in API group "batch".')


@state
def beside_a_strangers_object() -> FakeKubernetes:
    fake = cluster()
    fake.add({"kind": "Service", "metadata": {"name": "job-trainer"}, "spec": {}})
    for _ in range(6):
        fake.reconcile()
        fake.tick()
    return fake


@state
def without_nats() -> FakeKubernetes:
    fake = running()
    fake.progress = Progress(
        reachable=False,
        unreachable_since=fake.now,
        unreachable_because="no NATS server answered at nats://nats:4222 within 10 s: check messaging.url",
    )
    return fake


@state
def with_a_version_that_no_worker_can_load() -> FakeKubernetes:
    fake = running()
    fake.progress = Progress(coordination=coordination(quarantined=(7,)))
    return fake


@state
def with_workers_that_lag() -> FakeKubernetes:
    fake = running()
    late = tuple(pod["metadata"]["name"] for pod in fake.pods("main"))
    fake.progress = Progress(coordination=coordination(laggards=late))
    return fake


def _unknown_field() -> tuple[FakeKubernetes, Plan]:
    fake = running()
    observed = replace(
        fake.observe(),
        spec=None,
        violations=(
            Violation("spec.novel", "x", "is not a field", "Leave it out, or install the CRD of its version."),
        ),
    )
    plan = decide(observed)
    return fake, plan


def _older_crd() -> tuple[FakeKubernetes, Plan]:
    fake = running()
    return fake, decide(replace(fake.observe(), pruned=("throughput",)))


def _blind() -> tuple[FakeKubernetes, Plan]:
    fake = running()
    unseen = 'pods is forbidden: User "operator" cannot watch resource "pods" in API group "" at the cluster scope'
    return fake, decide(replace(fake.observe(), unseen=unseen))


STATES["without the permission to look"] = _blind
STATES["with a spec that the operator does not take"] = _unknown_field
STATES["under a CRD that is older"] = _older_crd


@state
def starting_with_an_old_policy_pool() -> FakeKubernetes:
    fake = cluster(DEDICATED)
    fake.schedulable = all_but_the_old_policy_pool
    fake.settle()
    return fake


@state
def training_with_an_old_policy_pool() -> FakeKubernetes:
    return running(DEDICATED)


@state
def without_a_node_for_the_old_policy_pool() -> FakeKubernetes:
    fake = starting_with_an_old_policy_pool()
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    for pod in fake.pods("old-policy"):
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        ]
    return fake


@state
def failed_by_the_start_deadline_of_the_old_policy_pool() -> FakeKubernetes:
    fake = starting_with_an_old_policy_pool()
    fake.now += timedelta(seconds=901)
    fake.settle()
    return fake


def described(fake: FakeKubernetes, plan: Plan) -> str:
    """Conditions and Events as `kubectl describe` shows them, without times."""
    status = plan.status or fake.status
    lines = [
        f"  {item.type:17} {item.status:8} {item.reason!s:24} {item.message}"
        for item in sorted(status.conditions, key=lambda item: item.type)
    ]
    events = [f"  {event.type:8} {event.reason.value:24} {event.message}" for event in fake.events[-4:]]
    columns = f"  attempt {status.attempt}, restarts {status.restarts.total} ({status.restarts.counted} counted)"
    return "\n".join(["Conditions", *lines, "Events", *events, columns])


def text() -> str:
    return "\n\n".join(f"=== {name}\n{described(*make())}" for name, make in STATES.items()) + "\n"


def test_each_state_is_described_in_the_words_that_were_agreed() -> None:
    now = re.sub(r"job-(main|old-policy)-\d+", r"job-\1-N", text())
    if os.environ.get("RLJOB_WRITE_GOLDEN"):
        GOLDEN.write_text(now)
    assert now == GOLDEN.read_text()


@pytest.mark.parametrize("name", STATES)
def test_every_message_is_a_sentence_and_trouble_names_the_next_action(name: str) -> None:
    fake, plan = STATES[name]()
    status = plan.status or fake.status
    for condition in status.conditions:
        assert re.match(r"[A-Z0-9].*[.…]$", condition.message), condition
    ready = next(item for item in status.conditions if item.type == "Ready")
    calm = {"Starting", "Training", "Restarting", "Suspending", "Succeeded", "PodsNotReady", "Resumed"}
    if str(ready.reason) not in calm:
        action = r"\b(Set|Add|Correct|Create|Raise|Look|Check|Rename|Install|Leave|correct|make|mend|lower|install)\b"
        assert re.search(action, ready.message), ready.message
