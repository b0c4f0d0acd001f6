"""Each token's old log-probability comes from the right version, and versions are switched in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from rljob_api.spec import OldLogprobs
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import OldRow, Source, assign_sources, resolve

BOUND = 3
VERSION = 10


class OneNumber(nn.Module):
    """A model whose only weight names the version it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(VERSION)]))

    def published_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight)]

    def hold(self, version: int) -> None:
        with torch.no_grad():
            self.weight.fill_(float(version))


@dataclass(frozen=True)
class Row:
    weight_version: NDArray[np.int32]
    known: NDArray[np.float32] | None = None
    """Scored ahead of the step; NaN where it was not."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        return np.arange(len(self.weight_version), dtype=np.int32)

    @property
    def behavior_logprobs(self) -> NDArray[np.float32]:
        return np.linspace(-1, -2, len(self.weight_version), dtype=np.float32)

    @property
    def staleness(self) -> NDArray[np.int32]:
        return np.where(self.weight_version >= 0, VERSION - self.weight_version, -1).astype(np.int32)

    @property
    def trainable(self) -> NDArray[np.bool_]:
        return (self.weight_version >= 0) & (self.staleness <= BOUND)

    @property
    def known_logprobs(self) -> NDArray[np.float32]:
        return np.zeros(len(self.weight_version), np.float32) if self.known is None else self.known

    @property
    def known_source(self) -> NDArray[np.int8]:
        is_known = np.zeros(len(self.weight_version), bool) if self.known is None else ~np.isnan(self.known)
        return np.where(is_known, Source.POOL, Source.NONE).astype(np.int8)


class Scorer:
    """log p of token t under version v is -(v + t / 100): says which version and position a value is of."""

    def __init__(self, model: OneNumber) -> None:
        self.model = model
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(self, rows: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        version = self.model.weight.item()
        self.calls.append((int(version), [len(row) for row in rows]))
        return [(-(version + row / 100)).astype(np.float32) for row in rows]


def rows_of(*versions: list[int]) -> list[Row]:
    return [Row(np.array(row, np.int32)) for row in versions]


ROWS = rows_of(
    [-1, 8, 8, 9, -1, 10, 10],  # three versions in one trajectory
    [-1, -1, 7, 9],
    [-1, 10],
    [-1, 5, 10],  # 5 is over the bound
    [-1, 7, 8, 9],
)


def model_and_store(*held: int) -> tuple[OneNumber, SnapshotStore]:
    model, store = OneNumber(), SnapshotStore(torch.float32)
    for version in held:
        model.hold(version)
        store.save(version, model)
    model.hold(VERSION)
    return model, store


def run(
    route: OldLogprobs, own: Sequence[int], rows: Sequence[Row] = ROWS, held: Sequence[int] = (7, 9)
) -> tuple[dict[int, OldRow], Scorer]:
    model, store = model_and_store(*held)
    scorer = Scorer(model)
    resolved = resolve(rows, own, route=route, store=store, policy=model, score=scorer)
    assert model.weight.item() == VERSION
    return resolved, scorer


def test_every_token_is_scored_by_the_version_that_sampled_it_or_dropped() -> None:
    resolved, _ = run(OldLogprobs.SNAPSHOT, range(len(ROWS)))
    for index, row in enumerate(ROWS):
        for position, version in enumerate(row.weight_version.tolist()):
            source, value = resolved[index].source[position], resolved[index].logprobs[position]
            if version == 10:
                assert source == Source.RESIDENT and np.isnan(value)
            elif version in (7, 9):
                assert source == Source.SNAPSHOT and value == np.float32(-(version + position / 100))
            else:
                assert source == (Source.MISSING if version == 8 else Source.NONE) and value == 0


@pytest.mark.parametrize("own", [(0, 1), (2, 3), ()])
def test_a_rank_makes_every_switch_although_it_has_no_token_of_the_version(own: tuple[int, ...]) -> None:
    _, scorer = run(OldLogprobs.SNAPSHOT, own)
    assert [version for version, _ in scorer.calls] == [7, 9]


def test_only_rows_with_tokens_of_the_version_are_scored_and_only_as_far_as_needed() -> None:
    _, scorer = run(OldLogprobs.SNAPSHOT, range(len(ROWS)))
    assert scorer.calls == [(7, [3, 2]), (9, [4, 4, 4])]


def test_a_version_that_nothing_trainable_names_is_not_switched_to() -> None:
    _, scorer = run(OldLogprobs.SNAPSHOT, range(len(ROWS)), held=(5, 6, 10))
    assert scorer.calls == []


def test_random_batches_resolve_as_by_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = rows_of(*([-1, *random.integers(5, VERSION + 1, random.integers(1, 12)).tolist()] for _ in range(6)))
        held = tuple(int(version) for version in random.choice(np.arange(5, VERSION), 3, replace=False))
        resolved, _ = run(OldLogprobs.SNAPSHOT, range(6), rows, held)
        for index, row in enumerate(rows):
            exact = row.trainable & np.isin(row.weight_version, held)
            expected = np.where(exact, -(row.weight_version + row.tokens / 100), 0).astype(np.float32)
            expected[row.weight_version == VERSION] = np.nan
            np.testing.assert_array_equal(resolved[index].logprobs, expected)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (OldLogprobs.SNAPSHOT, ["NONE", "MISSING", "MISSING", "SNAPSHOT", "NONE", "RESIDENT", "RESIDENT"]),
        (OldLogprobs.RESIDENT, ["NONE", "MISSING", "MISSING", "MISSING", "NONE", "RESIDENT", "RESIDENT"]),
        (OldLogprobs.CURRENT, ["NONE", "CURRENT", "CURRENT", "CURRENT", "NONE", "RESIDENT", "RESIDENT"]),
        (OldLogprobs.ENGINE, ["NONE", "ENGINE", "ENGINE", "ENGINE", "NONE", "ENGINE", "ENGINE"]),
    ],
)
def test_the_route_decides_the_source_of_each_token(route: OldLogprobs, expected: list[str]) -> None:
    assert [Source(code).name for code in assign_sources(ROWS[0], route, (7, 9))] == expected
    if route is not OldLogprobs.SNAPSHOT:
        resolved, scorer = run(route, range(len(ROWS)))
        assert scorer.calls == []
        if route is OldLogprobs.ENGINE:
            trainable = ROWS[0].trainable
            np.testing.assert_array_equal(resolved[0].logprobs, np.where(trainable, ROWS[0].behavior_logprobs, 0))


def test_a_version_that_is_not_held_is_refused_by_the_store() -> None:
    model, store = model_and_store(7)
    with pytest.raises(KeyError, match=r"version 8 is not among the snapshots \(7,\)"), store.held(8, model):
        raise AssertionError("nothing was switched")


def test_masters_come_back_when_the_block_fails() -> None:
    model, store = model_and_store(7, 9)
    with pytest.raises(ZeroDivisionError), store.held(7, model):
        1 / (model.weight.item() - 7)
    assert model.weight.item() == VERSION
    store.drop(7)
    store.drop(7)
    assert store.versions == (9,) and store.num_bytes == 4
