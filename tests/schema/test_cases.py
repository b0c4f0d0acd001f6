"""Every constraint of the CRD has a case: refused, with an accepted neighbour, by `rljob validate` as by the schema."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from tests.schema.bounds import BOUNDS, Bound
from tests.schema.structural import constraints, defaulted, parts, refused
from tests.schema.transitions import ACCEPTED, REFUSED, Transition
from tests.unit.api.documents import MINIMAL, changed
from tests.unit.api.rule_cases import CASES, CLUSTER_CASES, ON_A_CLUSTER, Case

from rljob_api.cel import CEL, IMMUTABLE, WITHOUT_CEL
from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.crd import object_schema
from rljob_api.documents import as_sent
from rljob_api.rules import RULES
from rljob_api.schema import path_of
from rljob_api.status import RLJobStatus
from rljob_api.validate import parse_job, violations_on_cluster

SCHEMA = object_schema()


def broken(document: dict[str, Any]) -> set[tuple[str, str]]:
    return set(refused(SCHEMA, defaulted(SCHEMA, document)))


def test_every_constraint_of_the_schema_has_a_case() -> None:
    assert {bound.constraint for bound in BOUNDS} == constraints(SCHEMA)


def test_a_schema_with_one_more_bound_lacks_a_case() -> None:
    larger = object_schema()
    larger["properties"]["spec"]["properties"]["training"]["properties"]["seed"]["maximum"] = 9
    assert constraints(larger) - {bound.constraint for bound in BOUNDS} == {("spec.training.seed", "maximum")}


def test_every_value_of_an_enum_is_accepted_by_a_case() -> None:
    said = Counter(bound.constraint for bound in BOUNDS if bound.keyword == "enum")
    assert sum(said.values()) == sum(len(bound_values(pattern)) for pattern, _ in said)


def bound_values(pattern: str) -> list[Any]:
    part: Any = SCHEMA
    for word in pattern.replace("[*]", ".*").split("."):
        part = part["items"] if word == "*" else part["properties"][word]
    values: list[Any] = part["enum"]
    return values


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound.id}={str(bound.accepted)[:12]}")
def test_a_bound_refuses_one_value_and_accepts_its_neighbour(bound: Bound) -> None:
    # A value may be too small for a rule of several fields as well; the schema itself refuses it for one reason.
    assert broken(bound.refused_document()) == {bound.constraint}
    assert broken(bound.accepted_document()) == set()


@pytest.mark.parametrize(
    "bound", [bound for bound in BOUNDS if not bound.path.startswith("status.")], ids=lambda b: b.id
)
def test_validate_gives_the_verdict_of_the_schema(bound: Bound) -> None:
    document = bound.refused_document()
    found = {violation.path for violation in violations_on_cluster(document)}
    assert any(path.startswith(place(bound)) or place(bound).startswith(path) for path in found), found
    assert violations_on_cluster(bound.accepted_document()) == ()


def place(bound: Bound) -> str:
    return path_of(tuple(int(part) if part.isdigit() else part for part in bound.path.split(".")))


@pytest.mark.parametrize(
    "bound",
    # That no pool and no condition comes twice is the work of set_condition, not of the model.
    [bound for bound in BOUNDS if bound.path.startswith("status.") and bound.keyword != "list-map"],
    ids=lambda bound: bound.id,
)
def test_the_status_model_gives_the_verdict_of_the_schema(bound: Bound) -> None:
    with pytest.raises(ValidationError):
        RLJobStatus.model_validate_json(json.dumps(bound.refused_document()["status"]))
    RLJobStatus.model_validate_json(json.dumps(bound.accepted_document()["status"]))


def test_the_apiserver_fills_in_the_defaults_of_the_models() -> None:
    document = changed({"spec.model": {"random": {}}, "spec.sampling.maxTrajectoryTokens": 512})
    document["spec"]["rolloutPools"][0]["engine"] = {"simulated": {}}
    document["spec"]["trainer"] = {"template": {"spec": {}}}
    document["spec"]["failurePolicy"] = {
        "rules": [{"name": "r", "onPodConditions": [{"type": "X"}], "action": "Ignore"}]
    }
    for sent in (document, MINIMAL):
        filled = defaulted(SCHEMA, sent)
        assert len(json.dumps(filled)) > 2 * len(json.dumps(sent))
        assert parse_job(filled) == parse_job(sent)
        assert list(left_to_the_models(parse_job(filled).spec)) == []


def left_to_the_models(model: BaseModel) -> Iterator[str]:
    """Fields whose default says something and that the filled document does not have."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if name not in model.model_fields_set and value not in (None, (), {}):
            yield f"{type(model).__name__}.{name}"
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from left_to_the_models(item)


def test_a_default_that_the_apiserver_lacks_is_seen() -> None:
    assert list(left_to_the_models(parse_job(MINIMAL).spec.staleness)) == [
        "Staleness.max_versions",
        "Staleness.on_exceeded",
    ]


# ------------------------------------------------------------------------------------------------- rules and changes


@pytest.mark.parametrize("case", [*CASES, *CLUSTER_CASES], ids=lambda case: f"{case.rule}:{case.path}")
def test_a_case_of_a_rule_breaks_no_bound_so_that_the_apiserver_gets_to_the_rule(case: Case) -> None:
    assert violations_on_cluster(changed(ON_A_CLUSTER | case.refused))
    assert violations_on_cluster(changed(ON_A_CLUSTER | case.accepted)) == ()
    if case.rule in CEL:
        assert broken(changed(ON_A_CLUSTER | case.refused)) == set()
    assert broken(changed(ON_A_CLUSTER | case.accepted)) == set()


def test_every_rule_has_a_case() -> None:
    assert set(CEL) | set(WITHOUT_CEL) == {case.rule for case in (*CASES, *CLUSTER_CASES)}


def test_every_field_that_cannot_change_has_a_case_for_each_way_to_change_it() -> None:
    ways = {(transition.field, transition.kind) for transition in REFUSED}
    assert ways == {(field, kind) for field in IMMUTABLE for kind in ("change", "set", "unset")}


@pytest.mark.parametrize("transition", [*REFUSED, *ACCEPTED], ids=lambda transition: transition.id)
def test_a_change_is_judged_by_what_changes_for_both_jobs_are_valid(transition: Transition) -> None:
    before, after = transition.documents()
    assert violations_on_cluster(before) == () and violations_on_cluster(after) == ()
    same = [getattr(parse_job(before).spec, field) == getattr(parse_job(after).spec, field) for field in IMMUTABLE]
    assert same == [field != transition.field for field in IMMUTABLE]


# ------------------------------------------------------------------------------------------------------- any document

FIELDS = sorted(
    pattern.replace("[*]", ".0") for pattern, _ in parts(SCHEMA) if re.fullmatch(r"spec\.[^*]*(\[\*\])?[^*]*", pattern)
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 70000) | st.floats(-2, 2) | st.text("aZ-1", max_size=5)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(st.sampled_from(["name", "low", "x"]), SCALARS, max_size=2)
)


def put(document: Any, path: str, value: Any) -> None:
    """Set a value, unless an earlier one took its place away; items that are missing are made."""
    *before, last = path.split(".")
    for part, following in zip(before, [*before[1:], last], strict=True):
        if isinstance(document, list):
            document += [{}] if not document else []
            document = document[0]
        elif isinstance(document, dict):
            document = document.setdefault(part, [] if following == "0" else {})
    if isinstance(document, dict):
        document[last] = value


@settings(max_examples=400, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3))
def test_validate_and_the_schema_agree_on_any_document(changes: list[tuple[str, Any]]) -> None:
    document = changed(ON_A_CLUSTER)
    for path, value in changes:
        put(document, path, value)
    sent, _ = as_sent(document)
    by_schema, by_validate = broken(sent), violations_on_cluster(document)
    if not by_validate:
        assert by_schema == set()
    if by_schema:
        assert by_validate
    if by_validate and not by_schema:
        # What the schema lets pass is a rule's to refuse, and says so in the rule's own words.
        assert {violation.remedy for violation in by_validate} <= REMEDIES


REMEDIES = {rule.remedy for rule in (*RULES, *CLUSTER_RULES)}
