from __future__ import annotations

from typing import Any

import pytest

from rljob.overrides import with_settings
from rljob_api.errors import BadInput


def document() -> dict[str, Any]:
    return {"spec": {"training": {"steps": 3}, "rolloutPools": [{"name": "main", "replicas": 2}], "model": None}}


def test_values_are_json_and_otherwise_text() -> None:
    changed: Any = with_settings(
        document(),
        ["spec.training.steps=40", "spec.a=true", "spec.b=1e-3", "spec.c=Snapshot", 'spec.d={"x": [1]}', "spec.e=a=b"],
    )
    assert changed["spec"]["training"] == {"steps": 40}
    assert [changed["spec"][key] for key in "abcde"] == [True, 0.001, "Snapshot", {"x": [1]}, "a=b"]


def test_list_items_are_named_by_number_and_missing_parents_are_made() -> None:
    changed: Any = with_settings(document(), ["spec.rolloutPools.0.replicas=4", "spec.storage.checkpoint.keep=1"])
    assert changed["spec"]["rolloutPools"] == [{"name": "main", "replicas": 4}]
    assert changed["spec"]["storage"] == {"checkpoint": {"keep": 1}}


def test_the_given_document_stays_as_it_is() -> None:
    given = document()
    with_settings(given, ["spec.training.steps=40", "spec.rolloutPools.0.replicas=4"])
    assert given == document()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("spec.training.steps", "write it as PATH=VALUE"),
        ("=3", "write it as PATH=VALUE"),
        ("spec..steps=3", "write it as PATH=VALUE"),
        ("spec.rolloutPools.1.replicas=3", "spec.rolloutPools is a list of 1, which has no '1'"),
        ("spec.training.steps.more=3", "spec.training.steps is 3, which has no 'more'"),
    ],
)
def test_a_setting_that_leads_nowhere_is_refused(setting: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        with_settings(document(), [setting])
