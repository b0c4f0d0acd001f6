"""Each rule over several fields: a case that it refuses, with the exact words, and the nearest one that it accepts."""

from __future__ import annotations

import pytest
from tests.unit.api.documents import changed
from tests.unit.api.rule_cases import CASES, CLUSTER_CASES, ON_A_CLUSTER, POOLS, TEMPLATE, Case

from rljob_api.cluster_rules import CLUSTER_RULES
from rljob_api.errors import Violation
from rljob_api.rules import RULES
from rljob_api.validate import cluster_violations, parse_job, violations_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}:{case.path}")
def test_a_rule_refuses_with_these_words_and_accepts_the_neighbour(case: Case) -> None:
    wanted = Violation(case.path, case.value, case.reason, case.remedy)
    assert violations_of(changed(case.refused)) == (wanted,)
    assert violations_of(changed(case.accepted)) == ()


@pytest.mark.parametrize("case", CLUSTER_CASES, ids=lambda case: f"{case.rule}:{case.path}")
def test_a_cluster_refuses_what_a_machine_of_ones_own_runs(case: Case) -> None:
    wanted = Violation(case.path, case.value, case.reason, case.remedy)
    assert cluster_violations(parse_job(changed(ON_A_CLUSTER | case.refused))) == (wanted,)
    assert cluster_violations(parse_job(changed(ON_A_CLUSTER | case.accepted))) == ()


def test_a_template_of_a_shape_that_kubernetes_refuses_is_left_to_kubernetes() -> None:
    odd = {f"{TEMPLATE}.initContainers": {"a": {"image": 1}}, f"{POOLS}.0.template.spec.volumes": ["rollout", 1]}
    assert cluster_violations(parse_job(changed(ON_A_CLUSTER | odd))) == ()


def test_every_rule_has_a_case_and_its_own_id() -> None:
    assert {case.rule for case in CASES} == {rule.id for rule in RULES}
    assert {case.rule for case in CLUSTER_CASES} == {rule.id for rule in CLUSTER_RULES}
    ids = [rule.id for rule in (*RULES, *CLUSTER_RULES)]
    assert len(ids) == len(set(ids))


def test_every_rule_says_what_to_do_in_a_sentence() -> None:
    for rule in (*RULES, *CLUSTER_RULES):
        assert rule.remedy.endswith(".") and not rule.reason.endswith("."), rule.id
