"""Validation: strict types, all violations at once, and words for each kind of error."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tests.unit.api.documents import MINIMAL, REMOVE, changed

from rljob_api.errors import SpecError, Violation
from rljob_api.schema import is_given, loc_of, path_of, shown
from rljob_api.spec import RLJob
from rljob_api.validate import ignored_locally, parse_job, violations_of, violations_on_cluster

NUMBER = "Write a number without quotes."
WHOLE = "Write a whole number without quotes."
TRUTH = "Write true or false without quotes."
TEXT = "Put it in quotes."
OBJECT = "Write its fields below it, indented."
LIST = "Write one item a line, each after `- `."
LARGER, SMALLER = "Choose a larger value.", "Choose a smaller value."
STEPS = "Add it: Steps to train. One step is one batch and one published weight version."

# (path to set, value, shown, reason, remedy, neighbour that is accepted); the violation's path is that of the document
FIELDS: tuple[tuple[str, Any, str, str, str, Any], ...] = (
    ("spec.training.steps", "10", '"10"', "must be an integer", WHOLE, 10),
    ("spec.training.steps", True, "true", "must be an integer", WHOLE, 1),
    ("spec.training.steps", 10.5, "10.5", "must be an integer", WHOLE, 10.0),
    ("spec.training.steps", REMOVE, "", "is required", STEPS, 1),
    ("spec.training.learningRate", "1e-3", '"1e-3"', "must be a number", NUMBER, 1e-3),
    ("spec.training.learningRate", True, "true", "must be a number", NUMBER, 1),
    ("spec.training.learningRate", 0, "0", "must be greater than 0", LARGER, 1e-9),
    ("spec.training.learningRate", 1.5, "1.5", "must be at most 1", SMALLER, 1),
    ("spec.training.beta1", 1, "1", "must be less than 1", SMALLER, 0.999),
    ("spec.sampling.temperature", 0, "0", "must be greater than 0", LARGER, 0.1),
    ("spec.staleness.maxVersions", -1, "-1", "must be at least 0", LARGER, 0),
    ("spec.correction.discrepancy.low", 1.01, "1.01", "must be at most 1", SMALLER, 1),
    ("spec.correction.discrepancy.high", 0.99, "0.99", "must be at least 1", LARGER, 1),
    ("spec.suspend", "yes", '"yes"', "must be true or false", TRUTH, True),
    ("spec.suspend", 1, "1", "must be true or false", TRUTH, False),
    ("spec.environment.name", 5, "5", "must be text", TEXT, "5"),
    (
        "spec.environment.name",
        "",
        '""',
        "must have at least 1 character(s)",
        "Write more, or leave the field out.",
        "a",
    ),
    ("spec.environment.name", "a" * 64, f'"{"a" * 64}"', "must have at most 63 character(s)", "Shorten it.", "a" * 63),
    ("spec.environment.parameters", [], "[]", "must be an object", OBJECT, {}),
    ("spec.sampling", [], "[]", "must be an object", OBJECT, {}),
    ("spec.sampling.badWords", {}, "{}", "must be a list", LIST, []),
    ("spec.rolloutPools", [], "[]", "must have at least 1 item(s)", "Add items.", [{"name": "a"}]),
    (
        "spec.training.computeType",
        "float32",
        '"float32"',
        "must be Float32 or BFloat16",
        "Write it exactly so.",
        "Float32",
    ),
    ("spec.model.random.headDim", 48, "48", "must be 32, 64, 96, 128 or 256", "Write it exactly so.", None),
    ("apiVersion", "v1", '"v1"', "must be rljob.dev/v1alpha1", "Write it exactly so.", "rljob.dev/v1alpha1"),
    ("spec.sampling.maxTokns", 5, "5", "is not a known field", "Did you mean `maxTokens`?", None),
    ("spec.sampling.max_tokens", 5, "5", "is not a known field", "Did you mean `maxTokens`?", None),
    (
        "spec.storage.quota",
        5,
        "5",
        "is not a known field",
        "Known fields: checkpoint, weights.",
        None,
    ),
    ("spec.training.seed", 1 << 63, str(1 << 63), "must fit into 64 bits", "Choose a smaller number.", (1 << 63) - 1),
    (
        "spec.training.learningRate",
        float("nan"),
        "nan",
        "must be a finite number",
        "JSON has no infinity and no NaN.",
        0.5,
    ),
    (
        "spec.environment.parameters",
        {"x": "\ud800"},
        "'\\ud800'",
        "is not valid Unicode",
        "Write the character itself, not half of an escape.",
        {"x": "\U0001f600"},
    ),
    ("spec.environment.parameters", {"x": {1}}, "{1}", "is a set, which JSON cannot hold", TEXT, {"x": [1]}),
)


@pytest.mark.parametrize(
    ("path", "value", "text", "reason", "remedy", "neighbour"), FIELDS, ids=[f"{f[0]}={f[2]}" for f in FIELDS]
)
def test_a_field_is_refused_with_these_words_and_its_neighbour_accepted(
    path: str, value: Any, text: str, reason: str, remedy: str, neighbour: Any
) -> None:
    base = {"spec.model": {"random": {}}, "spec.sampling": {"maxTrajectoryTokens": 512}} if "random" in path else {}
    inner = f"{path}.x" if isinstance(value, dict) and "x" in value else path
    assert violations_of(changed(base | {path: value})) == (Violation(inner, text, reason, remedy),)
    if neighbour is not None:
        assert violations_of(changed(base | {path: neighbour})) == ()


def test_a_violation_reads_as_one_sentence_and_a_remedy() -> None:
    (violation,) = violations_of(changed({"spec.training.steps": "10"}))
    assert str(violation) == (
        'spec.training.steps: must be an integer (got "10"). Write a whole number without quotes.'
    )


def test_everything_wrong_is_said_at_once_and_in_no_other_words() -> None:
    document = changed(
        {
            "metadata.name": "Job",
            "spec.training.steps": "many",
            "spec.training.miniBatches": 9,
            "spec.sampling": {"topP": 0.9, "maxTokens": "x", "maxTrajectoryTokens": 100},
            "spec.rolloutPools": [{"name": "a", "replicas": -1}, {"name": "a", "replica": 3}, 7],
            "spec.model": {},
        }
    )
    assert [(v.path, v.reason) for v in violations_of(document)] == [
        ("spec.sampling.maxTokens", "must be an integer"),
        ("spec.training.steps", "must be an integer"),
        ("spec.rolloutPools[0].replicas", "must be at least 0"),
        ("spec.rolloutPools[1].replica", "is not a known field"),
        ("spec.rolloutPools[2]", "must be an object"),
        ("metadata.name", "must be an RFC 1035 label of at most 40 characters"),
        ("spec.model", "must have exactly one source"),
        ("spec.sampling.topP", "the trainer cannot score it"),
        ("spec.training.miniBatches", "must be at most tasksPerStep"),
    ]


def test_a_rule_keeps_quiet_about_a_field_that_failed_and_does_not_judge_its_default() -> None:
    # maxTokens' default of 256 would not fit the trajectory, but the user wrote something else
    document = changed({"spec.sampling": {"maxTokens": "64", "maxTrajectoryTokens": 100}})
    assert [v.path for v in violations_of(document)] == ["spec.sampling.maxTokens"]
    left_out = changed({"spec.sampling": {"maxTrajectoryTokens": 100}})
    assert [v.value for v in violations_of(left_out)] == ["256, the default; maxTrajectoryTokens is 100"]


def test_a_list_with_a_bad_item_is_not_also_called_too_short() -> None:
    assert [v.path for v in violations_of(changed({"spec.rolloutPools": [7]}))] == ["spec.rolloutPools[0]"]


@pytest.mark.parametrize("document", [None, [], "job", 7, True])
def test_what_is_no_object_is_refused_as_a_whole(document: object) -> None:
    (violation,) = violations_of(document)
    assert (violation.path, violation.reason) == ("(document)", "must be an object")


def test_keys_that_are_no_text_are_refused_where_they_stand() -> None:
    (violation,) = violations_of(changed({"spec.environment.parameters": {7: "x"}}))
    assert violation == Violation(
        "spec.environment.parameters", "7", "has a key that is not text", "Put the key in quotes."
    )


def test_a_document_that_contains_itself_is_refused() -> None:
    parameters: dict[str, Any] = {}
    parameters["again"] = parameters
    (violation,) = violations_of(changed({"spec.environment.parameters": parameters}))
    assert violation.reason == "is nested more than 64 levels deep"


def test_parsing_raises_every_violation_and_otherwise_gives_the_job() -> None:
    with pytest.raises(SpecError) as refused:
        parse_job(changed({"spec.training.steps": 0, "metadata.name": "X"}))
    assert refused.value.violations == violations_of(changed({"spec.training.steps": 0, "metadata.name": "X"}))
    assert len(refused.value.violations) == 2
    assert parse_job(MINIMAL).spec.training.steps == 10


def test_whole_floats_are_integers_as_kubectl_sends_them_and_integers_are_numbers() -> None:
    job = parse_job(changed({"spec.training.steps": 60.0, "spec.training.learningRate": 1}))
    assert job.spec.training.steps == 60 and isinstance(job.spec.training.steps, int)
    assert job.spec.training.learning_rate == 1.0 and isinstance(job.spec.training.learning_rate, float)


def test_the_document_itself_is_left_as_it_was() -> None:
    document = changed({"spec.environment.parameters": {"a": [1, {"b": 2.0}]}})
    before = copy.deepcopy(document)
    parse_job(document)
    assert document == before


def test_fields_for_a_cluster_are_named_when_they_are_set_to_something() -> None:
    assert ignored_locally(parse_job(MINIMAL)) == ()
    defaults = changed({"spec.suspend": False, "spec.startDeadlineSeconds": 900, "spec.failurePolicy.maxRestarts": 5})
    assert ignored_locally(parse_job(defaults)) == ()
    document = changed(
        {
            "metadata.namespace": "team-a",
            "spec.suspend": True,
            "spec.ttlSecondsAfterFinished": 0,
            "spec.trainer": {"replicas": 2, "template": {}},
            "spec.correction.oldLogprobs": "Dedicated",
            "spec.oldPolicyPool": {"replicas": 2, "template": {}},
            "spec.storage.weights.persistentVolumeClaim.claimName": "weights",
            "spec.rolloutPools": [{"name": "a"}, {"name": "b", "template": {"spec": {}}, "minReplicas": 0}],
            "spec.failurePolicy.rules": [{"name": "r", "onReasons": ["X"], "action": "FailJob"}],
        }
    )
    assert ignored_locally(parse_job(document)) == (
        "metadata.namespace",
        "spec.suspend",
        "spec.ttlSecondsAfterFinished",
        "spec.storage.weights.persistentVolumeClaim.claimName",
        "spec.trainer.template",
        "spec.oldPolicyPool.template",
        "spec.rolloutPools[1].minReplicas",
        "spec.rolloutPools[1].template",
        "spec.failurePolicy.rules",
    )


def test_paths_are_written_as_kubectl_writes_them_and_read_back() -> None:
    loc = ("spec", "rolloutPools", 3, "labels", "app.kubernetes.io/name")
    assert path_of(loc) == "spec.rolloutPools[3].labels[app.kubernetes.io/name]"
    assert loc_of(path_of(loc)) == loc
    assert is_given({"a": [{"b": None}]}, "a[0].b") and not is_given({"a": [{"b": None}]}, "a[1].b")


def test_a_key_with_a_line_break_does_not_break_the_line() -> None:
    (violation,) = violations_of(changed({"metadata.labels": {"a\nb": 1}}))
    assert violation.path == "metadata.labels[a\\nb]"


def test_long_values_are_shortened() -> None:
    assert shown("x" * 100) == '"' + "x" * 78 + "…"
    assert shown("x" * 78) == '"' + "x" * 78 + '"'


# --------------------------------------------------------------------------------------------------------- properties

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
PATHS = (
    "metadata",
    "metadata.name",
    "metadata.labels",
    "spec",
    "spec.model",
    "spec.model.random",
    "spec.model.random.heads",
    "spec.environment.parameters",
    "spec.sampling",
    "spec.sampling.maxTokens",
    "spec.sampling.logitBias",
    "spec.training",
    "spec.training.steps",
    "spec.training.advantage",
    "spec.rolloutPools",
    "spec.rolloutPools.0",
    "spec.rolloutPools.0.engine",
    "spec.rolloutPools.0.replicas",
    "spec.storage.checkpoint",
    "spec.messaging.credentialsSecretRef",
    "spec.failurePolicy.rules",
)


def put(document: Any, path: str, value: Any) -> None:
    """Set a value, unless an earlier one took its place away."""
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(document, dict):
            document = document.setdefault(part, {})
        elif isinstance(document, list) and document and part == "0":
            document = document[0]
    if isinstance(document, dict):
        document[last] = value


@settings(max_examples=200, deadline=None)
@given(first=st.sampled_from(PATHS), one=VALUES, second=st.sampled_from(PATHS), two=VALUES)
def test_whatever_stands_in_a_document_the_verdict_is_a_job_or_violations(
    first: str, one: Any, second: str, two: Any
) -> None:
    document = copy.deepcopy(MINIMAL)
    put(document, first, one)
    put(document, second, two)
    violations = violations_of(document)
    if violations:
        assert all(v.path and v.reason and "\n" not in str(v) for v in violations)
        with pytest.raises(SpecError):
            parse_job(document)
    else:
        assert json.loads(parse_job(document).model_dump_json(by_alias=True))["kind"] == "RLJob"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    parameters=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    template=st.none() | st.fixed_dictionaries({}, optional={"spec": st.dictionaries(st.text(max_size=5), JSON)}),
    rate=st.floats(1e-9, 1),
    steps=st.integers(1, 10**7),
    labels=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    old=st.sampled_from(["Snapshot", "Current", "Engine"]),
    low=st.none() | st.floats(0.01, 1),
    pools=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
)
def test_a_job_survives_json_and_the_strict_reader_takes_what_it_wrote(
    parameters: Any, template: Any, rate: float, steps: int, labels: Any, old: str, low: float | None, pools: list[int]
) -> None:
    job = RLJob.model_validate(
        changed(
            {
                "metadata.labels": labels,
                "spec.environment.parameters": parameters,
                "spec.trainer.template": template,
                "spec.training.learningRate": rate,
                "spec.training.steps": steps,
                "spec.correction": {"oldLogprobs": old, "discrepancy": {"low": low}},
                "spec.rolloutPools": [{"name": f"p{index}", "replicas": index, "minReplicas": 0} for index in pools],
            }
        )
    )
    text = job.model_dump_json(by_alias=True)
    assert RLJob.model_validate_json(text) == job
    assert TypeAdapter(RLJob).validate_python(job.model_dump()) == job
    assert parse_job(json.loads(text)) == job


# ------------------------------------------------------------------------------------- the verdict of the apiserver


def test_a_null_is_a_field_left_out_as_the_apiserver_takes_it() -> None:
    nulls = changed({"spec.suspend": None, "spec.sampling": None, "spec.training.seed": None, "spec.trainer": {}})
    assert parse_job(nulls) == parse_job(MINIMAL | {"spec": MINIMAL["spec"] | {"trainer": {}}})
    assert ignored_locally(parse_job(nulls)) == ()


def test_a_null_does_not_stand_in_for_a_required_field_an_item_or_an_unknown_field() -> None:
    document = changed({"spec.training.steps": None, "spec.rolloutPools": [None], "spec.speed": None})
    assert [(v.path, v.reason) for v in violations_of(document)] == [
        ("spec.training.steps", "is required"),
        ("spec.rolloutPools[0]", "must be an object"),
        ("spec.speed", "is not a known field"),
    ]


def test_a_null_inside_free_json_is_a_value() -> None:
    job = parse_job(changed({"spec.environment.parameters": {"limit": None}}))
    assert job.spec.environment.parameters == {"limit": None}


def test_a_cluster_judges_what_this_machine_would_run() -> None:
    assert violations_of(MINIMAL) == ()
    assert [v.path for v in violations_on_cluster(MINIMAL)] == ["spec.storage.checkpoint.persistentVolumeClaim"]
    assert violations_on_cluster(changed({"spec.failurePolicy.maxRestarts": 0})) == ()
    assert [v.path for v in violations_on_cluster(changed({"spec.training.steps": 0}))] == ["spec.training.steps"]
