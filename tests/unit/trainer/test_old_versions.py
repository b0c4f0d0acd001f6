"""Which old versions the trainer holds: the bound, what waits, and what there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.e2e.running import job
from torch import nn

from rljob_api.errors import SpecError
from rljob_api.spec import RLJobSpec
from rljob_api.validate import parse_job
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.old_versions import capacity, make_room

ELEMENTS = 1000


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS))

    def published_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with distributed_world("cpu", timeout_seconds=30) as joined:
        yield joined


def spec(compute_type: str = "Float32", route: str = "Snapshot", **snapshots: Any) -> RLJobSpec:
    return parse_job(
        job(
            model={"path": "a-model-of-unknown-size"},  # the size of a random one is checked before a job starts
            staleness__maxVersions=4,
            training__computeType=compute_type,
            correction__oldLogprobs=route,
            correction__snapshots=snapshots,
        )
    ).spec


@pytest.mark.parametrize(("compute_type", "width"), [("Float32", 4), ("BFloat16", 2)])
def test_a_budget_below_all_versions_within_the_bound_is_refused_with_the_remedy(
    world: World, compute_type: str, width: int
) -> None:
    needed = 5 * ELEMENTS * width
    assert capacity(spec(compute_type, memoryBytes=needed), Weights(), world) == 5
    assert capacity(spec(compute_type, memoryBytes=2 * needed), Weights(), world) == 10
    with pytest.raises(SpecError) as refused:
        capacity(spec(compute_type, memoryBytes=needed - 1), Weights(), world)
    expected = (
        f"spec.correction.snapshots.memoryBytes: staleness.maxVersions 4 may need 5 weight versions of "
        f"{ELEMENTS * width:,} bytes each in a trainer process, {needed:,} bytes (got {needed - 1}). "
        f"Raise it to {needed}, set correction.snapshots.spill or lower staleness.maxVersions."
    )
    if compute_type == "BFloat16":
        expected += " BFloat16 versions usually take far less, as differences; spill makes that safe to rely on."
    assert str(refused.value) == expected


def test_nothing_bounds_versions_without_a_budget_with_spill_or_by_another_route(world: World) -> None:
    assert capacity(spec(), Weights(), world) is None
    assert capacity(spec(memoryBytes=1, spill=True), Weights(), world) is None
    assert capacity(spec(route="Engine", memoryBytes=1), Weights(), world) is None


def held(*versions: int) -> SnapshotStore:
    store, policy = SnapshotStore(torch.float32), Weights()
    for version in versions:
        store.save(version, policy)
    return store


@pytest.mark.parametrize(
    ("waiting", "room", "left"),
    [
        ({}, None, (8, 9, 10)),
        ({5: 3, 7: 0}, None, (5, 8, 9, 10)),  # one that waits keeps its version, one that does not goes
        ({5: 3, 6: 1}, 5, (6, 8, 9, 10)),  # with the new one five: the oldest goes although a token names it
        ({5: 3, 6: 1}, 4, (8, 9, 10)),
    ],
)
def test_what_is_within_the_bound_or_waits_stays_as_far_as_there_is_room(
    waiting: dict[int, int], room: int | None, left: tuple[int, ...]
) -> None:
    store = held(*range(5, 11))
    make_room(store, 11, max_versions=3, waiting=waiting, capacity=room)
    assert store.versions == left


def test_a_synchronous_job_keeps_only_the_version_that_comes() -> None:
    store = held(4)
    make_room(store, 5, max_versions=0, waiting={}, capacity=1)
    assert store.versions == ()
