"""Status, conditions and reasons."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from rljob_api.conditions import Condition, condition_of, set_condition
from rljob_api.reasons import ConditionType, Reason
from rljob_api.status import PoolStatus, RLJobStatus

EARLY, LATE = "2026-11-23T01:00:00Z", "2026-11-23T02:00:00Z"
READY = Condition(type=ConditionType.READY, status="True", reason=Reason.TRAINING, message="Step 1 of 60.")

# the object of docs/design.md, section 7a
EXAMPLE: dict[str, Any] = {
    "observedGeneration": 3,
    "startTime": "2026-11-23T01:00:00Z",
    "attempt": 2,
    "runtimeImage": "reg/rljob-runtime@sha256:aa",
    "restarts": {"total": 1, "counted": 0},
    "step": 41,
    "weights": {
        "epoch": 2,
        "published": 41,
        "desired": 41,
        "convergedPods": 1,
        "servingVersions": [{"version": 41, "pods": 1}, {"version": 40, "pods": 1}],
    },
    "staleness": {"p50": 1, "p95": 3, "max": 4},
    "correction": {
        "route": "Snapshot",
        "exactFraction": "1.000",
        "interruptions": 210,
        "tokens": {"trained": 81234, "salvaged": 5120, "lost": 0, "dropped": 0},
    },
    "throughput": {"tokensPerSecond": 730, "trainerIdlePercent": 12, "rolloutIdlePercent": 4},
    "pools": [{"name": "main", "desired": 2, "ready": 2, "restarts": 0, "laggards": []}],
    "checkpoint": {"version": 40, "step": 40, "uri": "pvc://ckpt/sort-digits/2-40"},
    "columns": {"converged": "1/2", "staleness": "1/3/4", "rollouts": "2/2", "trainer": "1/1"},
    "conditions": [
        {
            "type": "Ready",
            "status": "True",
            "reason": "Training",
            "message": "Step 41 of 60; 1 of 2 rollout pods serves version 41.",
            "observedGeneration": 3,
        }
    ],
}


def leaf_types(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for field in annotation.model_fields.values():
            yield from leaf_types(field.annotation)
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from leaf_types(part)
    else:
        yield annotation


def test_the_status_of_the_design_is_read_and_written_back_as_it_is() -> None:
    status = RLJobStatus.model_validate_json(json.dumps(EXAMPLE), strict=True)
    assert status.model_dump(mode="json", by_alias=True, exclude_unset=True) == EXAMPLE


def test_no_field_of_the_status_is_a_float() -> None:
    assert float not in set(leaf_types(RLJobStatus))
    with pytest.raises(ValidationError):
        RLJobStatus.model_validate({"correction": {"exactFraction": 0.5}})
    with pytest.raises(ValidationError):
        RLJobStatus.model_validate({"correction": {"exactFraction": "half"}})


def test_fields_of_a_newer_operator_are_ignored_and_its_reasons_kept() -> None:
    condition = {"type": "Ready", "status": "False", "reason": "NewReason"}
    status = RLJobStatus.model_validate({"shiny": 1, "weights": {"shiny": 2}, "conditions": [condition]})
    assert status.conditions[0].reason == "NewReason"
    assert "shiny" not in status.model_dump_json()


def test_a_status_never_lists_more_than_ten_laggards() -> None:
    ten = tuple(f"main-{index}" for index in range(10))
    assert PoolStatus(name="main", laggards=ten).laggards == ten
    with pytest.raises(ValidationError):
        PoolStatus(name="main", laggards=(*ten, "main-10"))


def test_the_first_condition_of_a_type_is_stamped() -> None:
    (placed,) = set_condition((), READY, EARLY)
    assert placed == READY.model_copy(update={"last_transition_time": EARLY})


def test_the_transition_time_stays_while_only_reason_message_and_generation_change() -> None:
    before = set_condition((), READY, EARLY)
    news = READY.model_copy(update={"reason": Reason.STARTING, "message": "Other.", "observed_generation": 7})
    (after,) = set_condition(before, news, LATE)
    assert (after.last_transition_time, after.reason, after.message, after.observed_generation) == (
        EARLY,
        Reason.STARTING,
        "Other.",
        7,
    )


def test_the_transition_time_moves_when_the_status_changes_and_back_again() -> None:
    before = set_condition((), READY, EARLY)
    down = set_condition(before, READY.model_copy(update={"status": "False"}), LATE)
    assert down[0].last_transition_time == LATE
    again = "2026-11-23T03:00:00Z"
    assert set_condition(down, READY, again)[0].last_transition_time == again


def test_setting_the_same_condition_again_changes_nothing_and_others_keep_their_place() -> None:
    failed = Condition(type=ConditionType.FAILED, status="False", reason=Reason.HEALTHY)
    conditions = set_condition(set_condition((), READY, EARLY), failed, EARLY)
    assert set_condition(conditions, READY, LATE) == conditions
    assert [c.type for c in conditions] == [ConditionType.READY, ConditionType.FAILED]
    assert condition_of(conditions, ConditionType.FAILED) == conditions[1]
    assert condition_of(conditions, ConditionType.SUSPENDED) is None


@pytest.mark.parametrize("now", ["2026-11-23T01:00:00.5Z", "2026-11-23T01:00:00+01:00", "yesterday"])
def test_a_time_that_kubernetes_would_not_write_is_refused(now: str) -> None:
    with pytest.raises(ValidationError):
        set_condition((), READY, now)


def test_known_types_and_reasons_come_back_as_constants() -> None:
    read = Condition.model_validate_json(READY.model_dump_json(by_alias=True))
    assert read.type is ConditionType.READY and read.reason is Reason.TRAINING


@pytest.mark.parametrize("constant", [*ConditionType, *Reason])
def test_every_constant_is_one_word_that_kubernetes_takes_and_says_when_it_is_used(constant: Any) -> None:
    assert re.fullmatch(r"[A-Z][A-Za-z]*", constant.value)
    assert constant.meaning.endswith((".", "final."))
    assert constant.value.upper() == constant.name.replace("_", "")
