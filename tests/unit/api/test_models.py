"""What holds for every model of the API: described, frozen all the way down, dumped and read without loss."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from tests.unit.api.documents import changed

from rljob_api.base import FrozenObject, freeze, thaw
from rljob_api.spec import RLJob
from rljob_api.status import RLJobStatus
from rljob_api.validate import parse_job

NESTED = changed(
    {
        "metadata.labels": {"a": "b"},
        "metadata.annotations": {"a": "b"},
        "spec.environment.parameters": {"config": {"terms": [1, {"digits": 2}]}},
        "spec.trainer.template": {"metadata": {"labels": {"x": "y"}}, "spec": {"containers": [{"name": "trainer"}]}},
        "spec.sampling.logitBias": {},
    }
)


def models_below(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_below(field.annotation)
    for part in get_args(annotation):
        yield from models_below(part)


def containers_in(value: Any) -> Iterator[dict[str, Any] | list[Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from containers_in(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        if not isinstance(value, tuple):
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers_in(item)


def test_every_field_is_described_in_a_sentence() -> None:
    models = {*models_below(RLJob), *models_below(RLJobStatus)}
    assert len(models) > 40
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description and field.description.strip() == field.description, f"{model.__name__}.{name}"
            assert field.description.endswith((".", "`.")), f"{model.__name__}.{name}"


def test_every_model_is_frozen() -> None:
    assert all(model.model_config.get("frozen") for model in (*models_below(RLJob), *models_below(RLJobStatus)))


def test_no_container_inside_a_job_can_be_changed() -> None:
    job = parse_job(NESTED)
    found = list(containers_in(job))
    assert len(found) >= 10
    for container in found:
        assert isinstance(container, FrozenObject)
        attempts = [
            lambda c: c.__setitem__("x", 1),
            lambda c: c.__delitem__("x"),
            lambda c: c.__ior__({"x": 1}),
            lambda c: c.update(x=1),
            lambda c: c.setdefault("x", 1),
            lambda c: c.pop("x", None),
            lambda c: c.popitem(),
            lambda c: c.clear(),
        ]
        for attempt in attempts:
            with pytest.raises(TypeError, match="belongs to a frozen model"):
                attempt(container)
    with pytest.raises(ValidationError):
        job.spec.training.steps = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        job.spec.environment.parameters["config"]["terms"][0] = 2  # type: ignore[index, call-overload]


def test_every_way_to_change_a_dict_is_refused() -> None:
    harmless = {"copy", "fromkeys", "get", "items", "keys", "values"}
    public = {name for name in dir(dict) if not name.startswith("_")} - harmless
    assert all(getattr(FrozenObject, name) is not getattr(dict, name) for name in public)


def test_a_frozen_object_is_a_dict_to_json_copies_and_calls() -> None:
    frozen = freeze({"a": [1, {"b": None}]})
    assert json.dumps(frozen) == '{"a": [1, {"b": null}]}'
    assert copy.deepcopy(frozen) == frozen and isinstance(copy.deepcopy(frozen), FrozenObject)
    assert dict(**frozen) == frozen


def test_thawing_gives_fresh_plain_containers() -> None:
    frozen = freeze({"a": [1, {"b": [2]}]})
    thawed = thaw(frozen)
    thawed["a"][1]["b"].append(3)
    assert thawed == {"a": [1, {"b": [2, 3]}]} and thaw(frozen) == {"a": [1, {"b": [2]}]}
    assert type(thawed) is dict


def test_a_dump_holds_plain_json_that_can_be_changed() -> None:
    dumped = parse_job(NESTED).model_dump(by_alias=True)
    assert dumped["spec"]["environment"]["parameters"] == {"config": {"terms": [1, {"digits": 2}]}}
    dumped["spec"]["trainer"]["template"]["spec"]["containers"][0]["name"] = "other"
