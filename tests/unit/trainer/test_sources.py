"""Each token's old log-probability comes from the right version, and versions are switched in lockstep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from rljob_api.correction import Fallback, OldLogprobs
from rljob_runtime.correction.published import PublishedParameters
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import OldRow, Source, assign_sources, interpolated, resolve

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
    assert [version for version, _ in scorer.calls] == [9, 7]


def test_only_rows_with_tokens_of_the_version_are_scored_and_only_as_far_as_needed() -> None:
    _, scorer = run(OldLogprobs.SNAPSHOT, range(len(ROWS)))
    assert scorer.calls == [(9, [4, 4, 4]), (7, [3, 2])]


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
        (OldLogprobs.DEDICATED, ["NONE", "MISSING", "MISSING", "MISSING", "NONE", "RESIDENT", "RESIDENT"]),
        (OldLogprobs.INTERRUPTION, ["NONE", "MISSING", "MISSING", "MISSING", "NONE", "RESIDENT", "RESIDENT"]),
        (OldLogprobs.ENGINE, ["NONE", "ENGINE", "ENGINE", "ENGINE", "NONE", "ENGINE", "ENGINE"]),
        (OldLogprobs.LINEAR, ["NONE", "LINEAR", "LINEAR", "LINEAR", "NONE", "LINEAR", "LINEAR"]),
        (OldLogprobs.LOG_LINEAR, ["NONE", *["LOG_LINEAR"] * 3, "NONE", *["LOG_LINEAR"] * 2]),
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


AHEAD = Row(
    np.array([-1, 8, 8, 9, 9, 10, 5], np.int32),
    np.array([np.nan, -0.1, np.nan, -0.3, np.nan, -0.5, -0.6], np.float32),
)
"""Tokens 1, 3, 5 and 6 were scored ahead; 5 is resident and 6 over the bound all the same."""


@pytest.mark.parametrize(
    ("route", "fallback", "expected"),
    [
        (OldLogprobs.SNAPSHOT, Fallback.DROP, ["POOL", "MISSING", "POOL", "SNAPSHOT", "RESIDENT", "NONE"]),
        (OldLogprobs.SNAPSHOT, Fallback.EWMA, ["POOL", "EWMA", "POOL", "SNAPSHOT", "RESIDENT", "NONE"]),
        (OldLogprobs.DEDICATED, Fallback.DROP, ["POOL", "MISSING", "POOL", "MISSING", "RESIDENT", "NONE"]),
        (OldLogprobs.INTERRUPTION, Fallback.EWMA, ["POOL", "EWMA", "POOL", "EWMA", "RESIDENT", "NONE"]),
        (OldLogprobs.EWMA, Fallback.DROP, ["EWMA", "EWMA", "EWMA", "EWMA", "RESIDENT", "NONE"]),
        (OldLogprobs.CURRENT, Fallback.EWMA, ["CURRENT", "CURRENT", "CURRENT", "CURRENT", "RESIDENT", "NONE"]),
    ],
)
def test_what_was_scored_ahead_comes_before_snapshots_and_the_fallback_last(
    route: OldLogprobs, fallback: Fallback, expected: list[str]
) -> None:
    assert [Source(code).name for code in assign_sources(AHEAD, route, (9,), fallback)] == ["NONE", *expected]


class Average:
    """Averaged weights whose name is 1000."""

    @contextmanager
    def held(self, policy: PublishedParameters) -> Iterator[None]:
        assert isinstance(policy, OneNumber)
        before = int(policy.weight.item())
        policy.hold(1000)
        yield
        policy.hold(before)


def test_each_source_keeps_its_own_value_and_the_average_is_held_once_after_the_snapshots() -> None:
    model, store = model_and_store(9)
    scorer = Scorer(model)
    resolved = resolve(
        [AHEAD],
        [0],
        route=OldLogprobs.SNAPSHOT,
        store=store,
        policy=model,
        score=scorer,
        fallback=Fallback.EWMA,
        averages=Average(),
    )
    expected = np.array([0, -0.1, -1000.02, -0.3, -9.04, np.nan, 0], np.float32)
    np.testing.assert_array_equal(resolved[0].logprobs, expected)
    assert scorer.calls == [(9, [5]), (1000, [3])]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_costs_its_own_token_and_no_other(broken: float) -> None:
    model, store = model_and_store(8, 9)

    def score(rows: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        scored = Scorer(model)(rows)
        if model.weight.item() == 8:
            scored[0][2] = broken
        return scored

    resolved = resolve([AHEAD], [0], route=OldLogprobs.SNAPSHOT, store=store, policy=model, score=score)
    named = [Source(code).name for code in resolved[0].source]
    assert named == ["NONE", "POOL", "MISSING", "POOL", "SNAPSHOT", "RESIDENT", "NONE"]
    assert resolved[0].logprobs[2] == 0


def test_an_interpolated_reference_is_mixed_by_staleness_and_leaves_other_sources_alone() -> None:
    behavior, target = torch.tensor([0.2, 0.5, 0.2, 0.3]).log(), torch.tensor([0.6, 0.1, 0.6, 0.4]).log()
    source = torch.tensor([Source.LINEAR, Source.LOG_LINEAR, Source.LINEAR, Source.SNAPSHOT])
    staleness = torch.tensor([1, 3, 0, 2])
    target.requires_grad_()
    mixed = interpolated(behavior, target, staleness, source, torch.full((4,), -7.0))
    expected = torch.tensor([0.5 * 0.2 + 0.5 * 0.6, 0.5**0.25 * 0.1**0.75, 0.2]).log()
    torch.testing.assert_close(mixed[:3], expected)
    assert mixed[3] == -7.0
    assert not mixed.requires_grad
