"""Is this document an RLJob that can run? All reasons against it at once, in words.

The schema is applied strictly, as the apiserver would: text is no number, true is no integer, snake_case is no field.
An integer is a number, and a whole float an integer. Fields that failed are left out, and the rules over several fields
(rules.py) judge the rest, so that one answer holds everything there is to mend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from pydantic import ValidationError

from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.documents import as_sent, partial_model, without_nulls
from rljob_api.errors import SpecError, Violation
from rljob_api.rule import Finding, Rule
from rljob_api.rules import RULES
from rljob_api.schema import field_of, is_given, joined, places, shown
from rljob_api.schema_errors import distinct_errors, schema_violation
from rljob_api.spec import RLJob

_CLUSTER_ONLY = (
    "metadata.namespace",
    "metadata.labels",
    "metadata.annotations",
    "spec.suspend",
    "spec.activeDeadlineSeconds",
    "spec.startDeadlineSeconds",
    "spec.ttlSecondsAfterFinished",
    "spec.storage.checkpoint.persistentVolumeClaim",
    "spec.storage.weights.persistentVolumeClaim.claimName",
    "spec.messaging.credentialsSecretRef",
    "spec.trainer.stallSeconds",
    "spec.trainer.template",
    "spec.oldPolicyPool.template",
    "spec.rolloutPools[*].minReplicas",
    "spec.rolloutPools[*].template",
    "spec.failurePolicy.rules",
)


def parse_job(document: object) -> RLJob:
    """The job that a document declares.

    Raises:
        SpecError: it is not one; carries every violation.
    """
    violations, job = _judge(document)
    if violations or job is None:
        raise SpecError(violations)
    return job


def violations_of(document: object) -> tuple[Violation, ...]:
    """Every reason why a document (parsed YAML or JSON) is refused, anywhere; empty when it is a valid RLJob."""
    return _judge(document)[0]


def cluster_violations(job: RLJob) -> tuple[Violation, ...]:
    """Every reason why a valid job is refused on a cluster, although `rljob run` would run it."""
    document = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return tuple(_broken(CLUSTER_RULES, job, document, is_whole=True))


def violations_on_cluster(document: object) -> tuple[Violation, ...]:
    """Every reason why a document is refused on a cluster: by the apiserver, or by the operator that reads it."""
    violations, job = _judge(document)
    return violations if violations or job is None else cluster_violations(job)


def ignored_locally(job: RLJob) -> tuple[str, ...]:
    """Paths of the fields that are set to something and mean nothing to `rljob run`."""
    ignored = []
    for pattern in _CLUSTER_ONLY:
        parent, _, alias = pattern.rpartition(".")
        for place, target in places(job, parent):
            declared = field_of(type(target), alias)
            if declared is not None and declared[0] in target.model_fields_set:
                name, field = declared
                if getattr(target, name) != field.get_default(call_default_factory=True):
                    ignored.append(joined(place, alias))
    return tuple(ignored)


def _judge(document: object) -> tuple[tuple[Violation, ...], RLJob | None]:
    sent, violations = as_sent(document)
    sent = without_nulls(RLJob, sent)
    try:
        job = RLJob.model_validate_json(json.dumps(sent), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        details = distinct_errors(error)
        reported = {violation.path for violation in violations}
        found = (schema_violation(RLJob, detail) for detail in details)
        violations += tuple(violation for violation in found if violation.path not in reported)
        bad = frozenset(detail["loc"] for detail in details)
        if () in bad:
            return violations, None  # no object, or no JSON at all: nothing to judge
        partial = partial_model(RLJob, sent, bad)
        return violations + tuple(_broken(RULES, partial, sent, is_whole=False)), None
    return violations + tuple(_broken(RULES, job, sent, is_whole=True)), job


def _broken(rules: Iterable[Rule], job: RLJob, document: object, *, is_whole: bool) -> Iterable[Violation]:
    for rule in rules:
        for place, target in places(job, rule.scope):
            try:
                findings = tuple(rule.check(target))
            except AttributeError:
                if is_whole:
                    raise
                continue  # the rule reads a field that failed its own check, which is reported already
            for finding in findings:
                path = joined(place, finding.field)
                yield Violation(path, _evidence(finding, is_given(document, path)), rule.reason, rule.remedy)


def _evidence(finding: Finding, given: bool) -> str:
    """What the rule saw: the field's value, and the other values that it compared it with."""
    if finding.value is None:
        return f"nothing; {finding.note}" if finding.note else ""
    value = shown(finding.value) if given else f"{shown(finding.value)}, the default"
    return f"{value}; {finding.note}" if finding.note else value
