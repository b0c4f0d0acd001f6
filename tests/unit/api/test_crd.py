"""The CustomResourceDefinition: structural, bounded, described, and the rules placed where they can be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.schema.structural import OPEN, parts, refused

from rljob_api.cel import CEL, IMMUTABLE, WITHOUT_CEL
from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.conditions import RFC3339_SECONDS
from rljob_api.crd import COLUMNS, custom_resource_definition, object_schema, schema_at
from rljob_api.openapi import structural_schema
from rljob_api.reasons import ConditionType
from rljob_api.rules import RULES

CRD = custom_resource_definition()
SCHEMA = object_schema()
PARTS = dict(parts(SCHEMA))
RULE_LIST, LIST_TYPE, LIST_KEYS = "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"
LARGEST_BYTES = 128 << 10
"""`kubectl apply` keeps the whole object in one annotation of at most 256 KiB; half of it is left to grow."""

ALLOWED = {"type", "description", "properties", "required", "items", "additionalProperties", "default", "nullable"}
ALLOWED |= {"enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
ALLOWED |= {"minItems", "maxItems", "maxProperties", OPEN, LIST_TYPE, LIST_KEYS, RULE_LIST}
"""Of JSON schema what a structural schema may say; not `$ref`, `title`, `const`, `anyOf`, `additionalProperties: false`."""


def faults(schema: dict[str, Any]) -> Iterator[str]:
    """What Kubernetes would refuse in a schema (its rules for structural schemas), or what we ask of ours."""
    for pattern, part in parts(schema):
        kind = part.get("type")
        if unknown := set(part) - ALLOWED:
            yield f"{pattern}: {unknown}"
        if kind is None and not part.get(OPEN):
            yield f"{pattern}: no type"
        if "properties" in part and "additionalProperties" in part:
            yield f"{pattern}: both properties and additionalProperties"
        if kind == "array" and ("items" not in part or "maxItems" not in part or LIST_TYPE not in part):
            yield f"{pattern}: a list without items, bound or list type"
        if part.get(LIST_TYPE) == "map":
            item = part["items"]
            scalar = all(item["properties"][key]["type"] == "string" for key in part[LIST_KEYS])
            if not scalar or not set(part[LIST_KEYS]) <= set(item["required"]):
                yield f"{pattern}: keys of a list map must be required texts"
        if "additionalProperties" in part and "maxProperties" not in part:
            yield f"{pattern}: a map without a bound"
        if kind == "string" and not {"maxLength", "enum"} & set(part) and part.get("pattern") != RFC3339_SECONDS:
            yield f"{pattern}: a text without a bound"
        for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if exclusive in part and (part[exclusive] is not True or bound not in part):
                yield f"{pattern}: {exclusive}"
        if "default" in part and list(refused(part, part["default"])):
            yield f"{pattern}: its own default is refused"
        if not set(part.get("required", ())) <= set(part.get("properties", ())):
            yield f"{pattern}: requires what it does not declare"


BOUNDLESS = ["apiVersion: a text without a bound", "kind: a text without a bound"]
"""The apiserver itself knows these two."""


def test_the_schema_is_structural_and_everything_in_it_has_a_bound() -> None:
    assert list(faults(SCHEMA)) == BOUNDLESS
    assert SCHEMA["type"] == "object" and SCHEMA["required"] == ["spec"]
    assert PARTS["metadata"] == {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}}


@pytest.mark.parametrize(
    ("path", "key", "value", "fault"),
    [
        ("spec.training", "title", "Training", "spec.training: {'title'}"),
        ("spec.training.steps", "type", None, "spec.training.steps: no type"),
        ("spec.rolloutPools", "maxItems", None, "spec.rolloutPools: a list without items, bound or list type"),
        ("spec.environment.name", "maxLength", None, "spec.environment.name: a text without a bound"),
        ("spec.environment.parameters", "maxProperties", None, "spec.environment.parameters: a map without a bound"),
        ("spec.training.seed", "default", -1, "spec.training.seed: its own default is refused"),
        ("spec.rolloutPools[*]", "required", [], "spec.rolloutPools: keys of a list map must be required texts"),
    ],
)
def test_the_check_sees_a_schema_that_is_not(path: str, key: str, value: Any, fault: str) -> None:
    schema = object_schema()
    part = schema_at(schema, path)
    part[key] = value
    if value is None:
        del part[key]
    assert list(faults(schema)) == [*BOUNDLESS, fault]


def test_every_field_is_described_in_sentences() -> None:
    fields = {pattern: part for pattern, part in PARTS.items() if pattern and not pattern.endswith(("*", "[*]"))}
    assert len(fields) > 200
    for pattern, part in fields.items():
        if not pattern.startswith("metadata"):
            assert re.fullmatch(r"[^ \n].*\.", part["description"], re.DOTALL), pattern


def test_values_are_explained_where_they_are_chosen() -> None:
    assert PARTS["spec.training.advantage.credit"]["description"] == (
        "Which tokens share an advantage.\n\n"
        "Possible values:\n"
        " - `Trajectory`: One advantage on all model tokens of a trajectory.\n"
        " - `Turn`: Turn j is compared with turn j of the group's other samples."
    )
    # A newer operator may know more types: they are named, and not the only ones that are taken.
    types = PARTS["status.conditions[*].type"]
    assert all(f" - `{kind}`: " in types["description"] for kind in ConditionType) and "enum" not in types


def test_nobody_else_may_be_asked_for_a_default_of_status() -> None:
    assert not [pattern for pattern, part in PARTS.items() if pattern.startswith("status") and "default" in part]


def test_replicas_have_no_default_for_an_autoscaler_may_own_them() -> None:
    assert "default" not in PARTS["spec.rolloutPools[*].replicas"]


def test_pod_templates_declare_metadata_and_containers_and_keep_the_rest() -> None:
    for template in ("spec.trainer.template", "spec.rolloutPools[*].template", "spec.oldPolicyPool.template"):
        assert set(PARTS[template]["properties"]) == {"metadata", "spec"} and OPEN not in PARTS[template]
        assert PARTS[f"{template}.metadata"][OPEN] and "properties" not in PARTS[f"{template}.metadata"]
        assert PARTS[f"{template}.spec"][OPEN] and set(PARTS[f"{template}.spec"]["properties"]) == {"containers"}
        assert PARTS[f"{template}.spec.containers"][LIST_KEYS] == ["name"]
        assert PARTS[f"{template}.spec.containers[*]"][OPEN]


def test_environment_parameters_are_compared_key_by_key() -> None:
    # An open object would not do: the apiserver holds {a: 1} and {b: 1} for equal, and lets the change pass.
    parameters = PARTS["spec.environment.parameters"]
    assert parameters["additionalProperties"] == {OPEN: True, "nullable": True} and OPEN not in parameters


def test_names_and_columns_are_those_of_the_design() -> None:
    assert CRD["metadata"]["name"] == "rljobs.rljob.dev" and CRD["spec"]["scope"] == "Namespaced"
    assert CRD["spec"]["names"] == {
        "kind": "RLJob",
        "listKind": "RLJobList",
        "plural": "rljobs",
        "singular": "rljob",
        "shortNames": ["rlj"],
        "categories": ["all"],
    }
    (version,) = CRD["spec"]["versions"]
    assert (version["name"], version["served"], version["storage"]) == ("v1alpha1", True, True)
    assert version["subresources"] == {"status": {}}
    shown = [column["name"].upper() for column in COLUMNS if "priority" not in column]
    assert shown == [
        "READY",
        "REASON",
        "STEP",
        "VERSION",
        "CONVERGED",
        "STALENESS",
        "ROLLOUTS",
        "TRAINER",
        "RESTARTS",
        "AGE",
    ]
    assert [column["name"].upper() for column in COLUMNS if column.get("priority")] == ["ROUTE", "EXACT", "TOKENS/S"]


def test_every_column_shows_a_field_of_its_type() -> None:
    for column in COLUMNS:
        path = column["jsonPath"].removeprefix(".").replace('[?(@.type=="Ready")]', "[*]")
        if path == "metadata.creationTimestamp":
            assert column["type"] == "date"
        else:
            assert PARTS[path]["type"] == column["type"], column["name"]


def test_the_object_is_small_enough_for_kubectl_apply() -> None:
    assert len(json.dumps(CRD)) < LARGEST_BYTES


# ---------------------------------------------------------------------------------------------------------------- rules

PLACED = [(pattern, rule) for pattern, part in PARTS.items() for rule in part.get(RULE_LIST, ())]


def test_every_rule_is_in_the_crd_with_its_own_words_or_says_why_not() -> None:
    rules = {rule.id: rule for rule in (*RULES, *CLUSTER_RULES)}
    assert set(CEL) | set(WITHOUT_CEL) == set(rules) and not set(CEL) & set(WITHOUT_CEL)
    messages = {(placed["rule"], placed["message"]) for _, placed in PLACED}
    assert {(CEL[id_].expression, rules[id_].message) for id_ in CEL} <= messages
    assert len(PLACED) == len(CEL) + len(IMMUTABLE)
    assert all(why.endswith(".") for why in WITHOUT_CEL.values())


def test_a_message_is_one_line_of_sentences_that_end_with_the_remedy() -> None:
    for _, placed in PLACED:
        assert re.fullmatch(r"[^\n]{10,2000}\. [A-Z][^\n]+\.", placed["message"]), placed["message"]


def test_a_rule_names_a_field_that_exists() -> None:
    for pattern, placed in PLACED:
        if "fieldPath" in placed:
            assert f"{pattern}{placed['fieldPath']}".lstrip(".") in PARTS


def unguarded(pattern: str, expression: str) -> Iterator[str]:
    """Fields that an expression reads although they may be absent, or that do not exist at all."""
    asked = set(re.findall(r"has\(((?:self|oldSelf)(?:\.\w+)+)\)", expression))
    for chain in set(re.findall(r"\b(?:self|oldSelf)(?:\.\w+(?!\w*\())+", expression)):
        place = pattern
        for depth, word in enumerate(chain.split(".")[1:], start=2):
            if place == "metadata":
                break  # the name is always there
            parent, place = PARTS[place], f"{place}.{word}".lstrip(".")
            if place not in PARTS:
                yield f"{chain} is not declared"
                break
            # The apiserver tries the rules of an object on its default as it stands, before that is filled in.
            filled = "default" in PARTS[place] and "default" not in PARTS[pattern]
            given = word in parent.get("required", ()) or filled or place == "metadata"
            if not given and ".".join(chain.split(".")[:depth]) not in asked:
                yield f"{chain} may be absent at {word}"


def test_no_rule_reads_a_field_that_may_be_absent_without_asking() -> None:
    assert [found for pattern, placed in PLACED for found in unguarded(pattern, placed["rule"])] == []


def test_the_check_for_absent_fields_sees_them() -> None:
    assert list(unguarded("spec", "self.model.random.heads > 1")) == ["self.model.random.heads may be absent at random"]
    assert list(unguarded("spec", "!has(self.model.random) || self.model.random.heads > 1")) == []
    assert list(unguarded("spec.sampling", "self.topK == 0")) == ["self.topK may be absent at topK"]
    assert list(unguarded("spec.training", "self.step > 1")) == ["self.step is not declared"]


def test_what_cannot_change_is_asked_on_the_parent_in_both_directions() -> None:
    rules = [placed for pattern, placed in PLACED if pattern == "spec" and "oldSelf" in placed["rule"]]
    assert [placed["fieldPath"] for placed in rules] == [f".{field}" for field in IMMUTABLE]
    assert IMMUTABLE == ("model", "environment", "correction", "storage", "messaging")
    assert all("has(self." in placed["rule"] and "has(oldSelf." in placed["rule"] for placed in rules)


def test_a_model_that_a_structural_schema_has_no_words_for_is_refused() -> None:
    class Union(BaseModel):
        either: int | str

    class Free(BaseModel):
        text: bytes | None = None
        multiple: int = 0

    with pytest.raises(TypeError, match=r"Union\.either: a structural schema has no union of"):
        structural_schema(Union, defaults=True)
    with pytest.raises(TypeError, match=r"Free\.text: a structural schema has no format"):
        structural_schema(Free, defaults=True)
