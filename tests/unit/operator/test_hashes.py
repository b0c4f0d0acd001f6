"""What makes a new attempt or rolls a pool, and that an operator with a larger API does neither."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.api.documents import changed
from tests.unit.api.rule_cases import ON_A_CLUSTER

from rljob_api.spec import RLJobSpec
from rljob_api.validate import parse_job
from rljob_operator.core.builders.config import pool_hash, trainer_hash


def spec(*changes: dict[str, Any]) -> RLJobSpec:
    return parse_job(changed(ON_A_CLUSTER, *changes)).spec


def hashes(job: RLJobSpec) -> tuple[str, str]:
    return trainer_hash(job), pool_hash(job, job.rollout_pools[0].name)


def test_hashes_are_those_of_every_version_of_the_operator() -> None:
    """Frozen: another value restarts the trainers and rolls the pools of every running job at an upgrade.

    A new field with a default must leave them as they are; only the meaning of what the user wrote may change them.
    """
    assert hashes(spec()) == ("f43d641966", "abaf7641f3")


@pytest.mark.parametrize(
    ("change", "attempt", "rolls"),
    [
        ({"spec.training.learningRate": 0.5}, True, False),
        ({"spec.sampling.temperature": 0.5}, True, True),
        ({"spec.correction.clip.low": 0.1}, True, True),
        ({"spec.training.computeType": "Float32"}, True, True),
        ({"spec.storage.weights": {"nats": {}}}, True, True),
        ({"spec.trainer.stallSeconds": 60}, True, False),
        ({"spec.rolloutPools.0.engine": {"simulated": {}}}, False, True),
        ({"spec.rolloutPools.0.replicas": 7}, False, False),
        ({"spec.staleness.maxVersions": 1}, False, False),
        ({"spec.failurePolicy.maxRestarts": 1}, False, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_change_makes_an_attempt_or_rolls_a_pool_or_neither(
    change: dict[str, Any], attempt: bool, rolls: bool
) -> None:
    before, after = hashes(spec()), hashes(spec(change))
    assert (before[0] != after[0], before[1] != after[1]) == (attempt, rolls)
