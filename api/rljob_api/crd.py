"""The CustomResourceDefinition of the RLJob, made from the models and the rules; plain data, for `rljob crd` to print."""

from __future__ import annotations

from typing import Any

from rljob_api.cel import CEL, IMMUTABLE, unchangeable
from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.names import API_VERSION, KIND
from rljob_api.openapi import Schema, structural_schema
from rljob_api.rules import RULES
from rljob_api.spec import RLJob, RLJobSpec
from rljob_api.status import RLJobStatus

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "rljobs"
SINGULAR = "rljob"
SHORT_NAMES = ["rlj"]
CATEGORIES = ["all"]


def _column(name: str, path: str, kind: str, description: str, *, wide: bool = False) -> dict[str, Any]:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return column | {"priority": 1} if wide else column


_READY = '.status.conditions[?(@.type=="Ready")]'

COLUMNS: list[dict[str, Any]] = [
    _column("Ready", f"{_READY}.status", "string", "True while the job trains."),
    _column("Reason", f"{_READY}.reason", "string", "Why, in one word; `kubectl describe` has the sentence."),
    _column("Step", ".status.step", "integer", "Steps trained."),
    _column("Version", ".status.weights.published", "integer", "Newest weight version that the trainer published."),
    _column("Converged", ".status.columns.converged", "string", "Rollout pods that serve the desired version, of all."),
    _column("Staleness", ".status.columns.staleness", "string", "Staleness of the last batch: p50/p95/max."),
    _column("Rollouts", ".status.columns.rollouts", "string", "Ready rollout pods of those wanted."),
    _column("Trainer", ".status.columns.trainer", "string", "Ready trainer pods of those wanted."),
    _column("Restarts", ".status.restarts.total", "integer", "Restarts of the whole job."),
    _column("Age", ".metadata.creationTimestamp", "date", "Time since the job was created."),
    _column("Route", ".status.correction.route", "string", "Where old log-probabilities come from.", wide=True),
    _column("Exact", ".status.correction.exactFraction", "string", "Share of tokens with an exact one.", wide=True),
    _column("Tokens/s", ".status.throughput.tokensPerSecond", "integer", "Model tokens trained a second.", wide=True),
]


def custom_resource_definition() -> dict[str, Any]:
    """The whole object, as `kubectl apply` takes it."""
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": SINGULAR,
        "shortNames": SHORT_NAMES,
        "categories": CATEGORIES,
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
        "schema": {"openAPIV3Schema": object_schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def object_schema() -> Schema:
    """The structural schema of an RLJob, with its rules."""
    spec = structural_schema(RLJobSpec, defaults=True)
    status = structural_schema(RLJobStatus, defaults=False)
    fields = RLJob.model_fields
    schema: Schema = {
        "description": RLJob.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": fields["api_version"].description, "type": "string"},
            "kind": {"description": fields["kind"].description, "type": "string"},
            # A rule can only name fields that are declared; the bound is the one that Kubernetes has for every name.
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}},
            "spec": {"description": fields["spec"].description} | spec,
            "status": {"description": "What the operator observed; written by it alone."} | status,
        },
    }
    for rule in (*RULES, *CLUSTER_RULES):
        if rule.id in CEL:
            cel = CEL[rule.id]
            scope = rule.scope if cel.scope is None else cel.scope
            _add(schema_at(schema, scope), cel.placed(rule.message))
    for field in IMMUTABLE:
        _add(schema["properties"]["spec"], unchangeable(field))
    return schema


def schema_at(schema: Schema, pattern: str) -> Schema:
    """The part of a schema that a pattern such as `spec.rolloutPools[*].engine` names; empty is the whole.

    Raises:
        KeyError: nothing is declared there.
    """
    for part in pattern.replace("[*]", ".*").split(".") if pattern else ():
        schema = schema["items"] if part == "*" else schema["properties"][part]
    return schema


def _add(schema: Schema, validation: dict[str, Any]) -> None:
    schema.setdefault("x-kubernetes-validations", []).append(validation)
