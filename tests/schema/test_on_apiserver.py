"""The cases of this folder on a real kube-apiserver: the same verdict, for the same reason, in the same words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.schema.apiserver import Apiserver, Verdict
from tests.schema.bounds import BOUNDS, Bound
from tests.schema.transitions import ACCEPTED, REFUSED, Transition
from tests.unit.api.documents import MINIMAL, changed
from tests.unit.api.rule_cases import CASES, CLUSTER_CASES, ON_A_CLUSTER, Case

from rljob_api.cel import CEL, WITHOUT_CEL, unchangeable
from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.rules import RULES
from rljob_api.validate import parse_job

MESSAGES = {rule.id: rule.message for rule in (*RULES, *CLUSTER_RULES)}
OF_SPEC = [bound for bound in BOUNDS if not bound.path.startswith("status.")]
OF_STATUS = [bound for bound in BOUNDS if bound.path.startswith("status.")]
BY_SCHEMA = {"unique-pool-names", *(f"{pool}-template-containers" for pool in ("trainer", "rollout", "old-policy"))}
"""Rules without an expression that the schema itself holds."""


def without_indexes(path: str) -> str:
    return re.sub(r"\[\d+\]|\.\d+|\[[a-z]\w*\]", "", path)


def assert_refused_at(verdict: Verdict, path: str) -> None:
    assert verdict.status == 422, json.dumps(verdict.body)[:500]
    wanted = without_indexes(path)
    found = [without_indexes(field) for field, _ in verdict.causes]
    # A missing field is a fault of the object that lacks it, in the words of some checks.
    assert any(field == wanted or field == wanted.rpartition(".")[0] for field in found), verdict.causes


@contextmanager
def job(apiserver: Apiserver, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An RLJob that exists for as long as the block."""
    created = apiserver.create(document, dry_run=False)
    assert created.accepted, created.body
    try:
        yield created.body
    finally:
        assert apiserver.delete(document["metadata"]["name"]).accepted


@pytest.mark.parametrize("bound", OF_SPEC, ids=lambda bound: f"{bound.id}={str(bound.accepted)[:12]}")
def test_a_bound_is_held(apiserver: Apiserver, bound: Bound) -> None:
    assert_refused_at(apiserver.create(bound.refused_document()), bound.path)
    accepted = apiserver.create(bound.accepted_document())
    assert accepted.accepted, accepted.causes


@pytest.mark.parametrize("bound", OF_STATUS, ids=lambda bound: f"{bound.id}={str(bound.accepted)[:12]}")
def test_a_bound_of_the_status_is_held(apiserver: Apiserver, bound: Bound) -> None:
    with job(apiserver, changed(ON_A_CLUSTER)) as existing:
        refused = apiserver.replace(existing | {"status": bound.refused_document()["status"]}, "/status")
        assert_refused_at(refused, bound.path)
        accepted = apiserver.replace(existing | {"status": bound.accepted_document()["status"]}, "/status")
        assert accepted.accepted, accepted.causes


def with_cel(cases: tuple[Case, ...]) -> list[Case]:
    return [case for case in cases if case.rule in CEL]


@pytest.mark.parametrize("case", with_cel(CASES) + with_cel(CLUSTER_CASES), ids=lambda case: f"{case.rule}:{case.path}")
def test_a_rule_refuses_in_the_words_of_validate(apiserver: Apiserver, case: Case) -> None:
    refused = apiserver.create(changed(ON_A_CLUSTER | case.refused))
    assert refused.status == 422, refused.body
    said = [(field, message) for field, message in refused.causes if MESSAGES[case.rule] in message]
    assert len(said) == 1 and len(refused.causes) == 1, refused.causes
    assert without_indexes(case.path).startswith(without_indexes(said[0][0]))
    accepted = apiserver.create(changed(ON_A_CLUSTER | case.accepted))
    assert accepted.accepted, accepted.causes


@pytest.mark.parametrize(
    "case",
    [case for case in (*CASES, *CLUSTER_CASES) if case.rule in WITHOUT_CEL and case.rule != "schema-is-named"],
    ids=lambda case: f"{case.rule}:{case.path}",
)
def test_a_rule_without_an_expression_is_held_by_the_schema_or_left_to_the_operator(
    apiserver: Apiserver, case: Case
) -> None:
    verdict = apiserver.create(changed(ON_A_CLUSTER | case.refused))
    repeated = case.rule.endswith("-container-names") and "initContainers" not in json.dumps(case.refused)
    # 400: a list that is written as a map is refused while it is decoded.
    assert verdict.status in ((400, 422) if case.rule in BY_SCHEMA or repeated else (201,)), verdict.body
    assert apiserver.create(changed(ON_A_CLUSTER | case.accepted)).accepted


@pytest.mark.parametrize("transition", REFUSED, ids=lambda transition: transition.id)
def test_a_change_of_what_a_job_is_is_refused(apiserver: Apiserver, transition: Transition) -> None:
    before, after = transition.documents()
    with job(apiserver, before) as existing:
        refused = apiserver.replace(existing | {"spec": after["spec"]})
        assert refused.status == 422, refused.body
        ((field, message),) = refused.causes
        assert field == f"spec.{transition.field}"
        assert unchangeable(transition.field)["message"] in message


@pytest.mark.parametrize("transition", ACCEPTED, ids=lambda transition: transition.id)
def test_a_change_of_how_a_job_runs_passes(apiserver: Apiserver, transition: Transition) -> None:
    before, after = transition.documents()
    with job(apiserver, before) as existing:
        changed_job = apiserver.replace(existing | {"spec": after["spec"]})
        assert changed_job.accepted, changed_job.causes


def test_the_staleness_bound_of_a_job_is_raised_as_far_as_its_snapshots_memory_goes(apiserver: Apiserver) -> None:
    (case, *_) = [case for case in CASES if case.rule == "snapshots-fit-memory"]
    room_for_five = changed(ON_A_CLUSTER | case.accepted)
    with job(apiserver, room_for_five) as existing:
        lower = existing | {"spec": existing["spec"] | {"staleness": {"maxVersions": 3}}}
        assert apiserver.replace(lower).accepted
        higher = existing | {"spec": existing["spec"] | {"staleness": {"maxVersions": 5}}}
        ((field, message),) = apiserver.replace(higher).causes
        assert field == "spec.correction.snapshots.memoryBytes"
        assert "keep staleness.maxVersions at what the memory holds" in message


def test_defaults_are_filled_in_as_the_models_have_them(apiserver: Apiserver) -> None:
    created = apiserver.create(changed(ON_A_CLUSTER))
    sent = {"metadata": {"name": created.body["metadata"]["name"]}, "spec": created.body["spec"]}
    assert parse_job(MINIMAL | sent) == parse_job(changed(ON_A_CLUSTER))
    assert created.body["spec"]["training"]["stragglerTimeoutSeconds"] == 600
    assert "replicas" in created.body["spec"]["rolloutPools"][0]
    bare = apiserver.create(changed(ON_A_CLUSTER | {"spec.rolloutPools": [{"name": "main"}]}))
    assert "replicas" not in bare.body["spec"]["rolloutPools"][0]


def test_null_means_left_out(apiserver: Apiserver) -> None:
    document = changed(ON_A_CLUSTER | {"spec.suspend": None, "spec.activeDeadlineSeconds": None, "spec.sampling": None})
    created = apiserver.create(document)
    assert created.accepted, created.causes
    assert created.body["spec"]["suspend"] is False and "activeDeadlineSeconds" not in created.body["spec"]
    kept = apiserver.create(changed(ON_A_CLUSTER | {"spec.environment.parameters": {"limit": None}}))
    assert kept.body["spec"]["environment"]["parameters"] == {"limit": None}


@pytest.mark.parametrize(
    "path", ["spec.speed", "spec.training.step", "spec.rolloutPools.0.replica", "spec.trainer.template.specs"]
)
def test_an_unknown_field_is_refused_by_name(apiserver: Apiserver, path: str) -> None:
    refused = apiserver.create(changed(ON_A_CLUSTER | {path: 1}))
    assert refused.status == 400
    assert f'unknown field "{path.replace(".0", "[0]")}"' in refused.body["message"]


def test_a_pod_template_comes_back_as_it_was_sent(apiserver: Apiserver) -> None:
    template = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"note": "x"}},
        "spec": {
            "priorityClassName": "high",
            "containers": [{"name": "trainer", "resources": {"limits": {"nvidia.com/gpu": 8}}, "env": [{"name": "A"}]}],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        },
    }
    created = apiserver.create(changed(ON_A_CLUSTER | {"spec.trainer.template": template}))
    assert created.body["spec"]["trainer"]["template"] == template
