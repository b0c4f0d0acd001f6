"""Every route to old log-probabilities, as a job on the cluster: real torch in the trainer and in the old-policy pool."""

from __future__ import annotations

from typing import Any

import pytest

from rljob_api.correction import OldLogprobs
from tests.cluster.cluster import Namespace
from tests.cluster.rljobs import Job, quickstart

pytestmark = pytest.mark.timeout(900)

STEPS = 16
EXACT = (OldLogprobs.RESIDENT, OldLogprobs.SNAPSHOT, OldLogprobs.DEDICATED, OldLogprobs.INTERRUPTION)


def document(route: OldLogprobs, *, steps: int = STEPS) -> dict[str, Any]:
    made = quickstart(f"by-{route.value.lower()}", steps=steps, correction={"oldLogprobs": route.value})
    if route is OldLogprobs.RESIDENT:
        made["spec"]["staleness"] = {"maxVersions": 0}
    if route is OldLogprobs.DEDICATED:
        made["spec"]["oldPolicyPool"] = {"replicas": 1}
    return made


@pytest.mark.parametrize("route", OldLogprobs, ids=lambda route: route.value)
def test_a_job_trains_by_each_route_and_says_how_exact_it_was(team: Namespace, route: OldLogprobs) -> None:
    job = Job.apply(team, document(route))
    job.wait_for_condition("Succeeded", timeout_seconds=300)
    status = job.status
    print(f"seen: {route.value}: staleness {status['staleness']}, correction {status['correction']}")
    assert status["staleness"]["max"] <= 4
    if route in EXACT:
        assert status["correction"]["exactFraction"] == "1.000"
    else:
        assert float(status["correction"]["exactFraction"]) < 1
    job.delete()


def test_an_old_policy_worker_that_dies_delays_and_loses_nothing(team: Namespace) -> None:
    job = Job.apply(team, document(OldLogprobs.DEDICATED, steps=60))
    job.wait_for_condition("OldPolicyReady", timeout_seconds=240)
    job.wait("some steps", lambda status: status.get("step", 0) >= 10, timeout_seconds=180)
    (worker,) = job.pods("old-policy")
    trainer = job.trainer_pod()["metadata"]["uid"]
    job.kill(worker, "rljob_runtime.old_policy")
    job.wait_for_condition("OldPolicyReady", "False", timeout_seconds=60)
    job.wait_for_condition("OldPolicyReady", timeout_seconds=180)
    job.wait_for_condition("Succeeded", timeout_seconds=400)
    status = job.status
    print(f"seen: restarts {status['restarts']}, correction {status['correction']}")
    assert status["correction"]["exactFraction"] == "1.000"
    assert status["attempt"] == 1
    assert job.trainer_pod()["metadata"]["uid"] == trainer
    job.delete()
