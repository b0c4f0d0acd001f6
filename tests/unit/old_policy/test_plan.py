"""What an old-policy worker scores next, and that what comes out never depends on it."""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise

import numpy as np
import pytest

from rljob_api.messages import Outcome, PublishedVersion, TrajectoryHeader
from rljob_api.weights import Blob
from rljob_runtime.old_policy.plan import Part, Standing, Turn, next_pass, parts_of, standing, wanted_versions
from rljob_runtime.trajectory_codec import Trajectory

BLOB = Blob(name="m", sha256="0" * 64, num_bytes=1)


def part(sequence: int, version: int, length: int = 10) -> Part:
    return Part(sequence, version, length)


def published(*steps: tuple[int, int]) -> dict[int, PublishedVersion]:
    return {
        version: PublishedVersion(epoch=1, version=version, step=step, manifest=BLOB, num_bytes=1)
        for version, step in steps
    }


def test_a_part_ends_at_the_last_token_of_its_version_and_observations_belong_to_none() -> None:
    header = TrajectoryHeader(
        task=0, sample=0, attempt=1, epoch=1, worker="w", incarnation="i", outcome=Outcome.FINISHED
    )
    turn = np.array([-1, 0, 0, -1, 1, 1, 1, -1], np.int32)
    versions = np.array([-1, 3, 3, -1, 3, 4, 4, -1], np.int32)
    zeros = np.zeros(8, np.float32)
    assert parts_of(Trajectory(header, np.arange(8, dtype=np.int32), turn, versions, zeros), 7) == (
        Part(sequence=7, version=3, length=5),
        Part(sequence=7, version=4, length=7),
    )


@pytest.mark.parametrize(
    ("waiting", "turn", "ready", "expected"),
    [
        pytest.param([], None, {1}, None, id="nothing waits"),
        pytest.param([part(1, 5)], None, {4}, None, id="its version is not here"),
        pytest.param([part(2, 5), part(1, 4)], None, {4, 5}, (Turn(4, 2), [(1, 4)]), id="the oldest trajectory begins"),
        pytest.param(
            [part(1, 4, 5), part(1, 3, 5), part(2, 3, 5)],
            None,
            {3, 4},
            (Turn(3, 2), [(1, 3), (2, 3)]),
            id="its oldest version",
        ),
        pytest.param(
            [part(1, 3), part(2, 5)], None, {5}, (Turn(5, 2), [(2, 5)]), id="what cannot be scored blocks nothing"
        ),
        pytest.param(
            [part(1, 3), part(2, 4)],
            Turn(4, 2),
            {3, 4},
            (Turn(4, 2), [(2, 4)]),
            id="a version stays while it has parts",
        ),
        pytest.param(
            [part(1, 3), part(9, 4)], Turn(4, 2), {3, 4}, (Turn(3, 9), [(1, 3)]), id="newer trajectories do not hold it"
        ),
        pytest.param(
            [part(3, 3), part(3, 4)], Turn(4, 2), {3, 4}, (Turn(4, 3), [(3, 4)]), id="held by the oldest: no switch"
        ),
        pytest.param(
            [part(1, 3, 6), part(2, 3, 4), part(3, 3, 1)],
            None,
            {3},
            (Turn(3, 3), [(1, 3), (2, 3)]),
            id="a pass is bounded",
        ),
        pytest.param([part(1, 3, 99), part(2, 3)], None, {3}, (Turn(3, 2), [(1, 3)]), id="a long part is alone"),
    ],
)
def test_next_pass(
    waiting: list[Part], turn: Turn | None, ready: Collection[int], expected: tuple[Turn, list[tuple[int, int]]] | None
) -> None:
    planned = next_pass(waiting, turn, ready=ready, max_tokens=10)
    if expected is None:
        assert planned is None
    else:
        assert planned is not None
        assert (planned[0], [(p.sequence, p.version) for p in planned[1]]) == expected


def test_all_that_is_in_hand_costs_one_switch_a_version() -> None:
    waiting = [part(sequence, version) for sequence in range(20) for version in (sequence % 4, sequence % 4 + 1)]
    versions = [version for version, _ in schedule([waiting], max_tokens=30)]
    switches = 1 + sum(one != other for one, other in pairwise(versions))
    assert switches == 5


def test_a_stream_of_newer_trajectories_never_keeps_an_older_one_waiting() -> None:
    arrivals = [[part(1, 0), part(2, 1)], *([part(sequence, 1)] for sequence in range(3, 40))]
    order = [(p.sequence, p.version) for _, parts in schedule(arrivals, max_tokens=10, held=1) for p in parts]
    assert order.index((1, 0)) <= 2


def test_each_part_is_scored_once_under_its_own_version_in_whatever_order_trajectories_come() -> None:
    """Test 21 of docs/algorithms.md, the plan's half: the values are those of scoring inline, one part after the other."""
    parts = [part(s, v, 3 + (7 * s + v) % 11) for s in range(12) for v in range(s % 3, 4)]
    inline = {(p.sequence, p.version): value(p.version, p) for p in parts}
    chance = random.Random(0)
    for _ in range(50):
        chance.shuffle(parts)
        cuts = sorted(chance.sample(range(1, len(parts)), 5))
        arrivals = [parts[a:b] for a, b in zip([0, *cuts], [*cuts, len(parts)], strict=True)]
        found: dict[tuple[int, int], float] = {}
        for version, scored in schedule(arrivals, max_tokens=chance.choice([1, 20, 1000])):
            for p in scored:
                assert (p.sequence, p.version) not in found
                found[p.sequence, p.version] = value(version, p)
        assert found == inline


def value(version: int, p: Part) -> float:
    """Stands for a forward: depends on the weights that are held and on the row, and on nothing else."""
    return hash((version, p.sequence, p.length)) / 7


def schedule(
    arrivals: list[list[Part]], *, max_tokens: int, held: int | None = None
) -> list[tuple[int, tuple[Part, ...]]]:
    """Passes until all is scored, with one arrival between two passes."""
    turn = None if held is None else Turn(held, 2)
    waiting: list[Part] = []
    passes = []
    while arrivals or waiting:
        if arrivals:
            waiting += arrivals[0]
            arrivals = arrivals[1:]
        planned = next_pass(waiting, turn, ready=range(10), max_tokens=max_tokens)
        assert planned is not None
        turn, parts = planned
        assert {p.version for p in parts} == {turn.version}
        waiting = [p for p in waiting if p not in parts]
        passes.append((turn.version, parts))
    return passes


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (9, Standing.COMING),  # published in a moment: a trajectory can be here before the pointer is read
        (8, Standing.READY),
        (7, Standing.COMING),
        (6, Standing.OVER_BOUND),
        (5, Standing.GONE),
        (4, Standing.READY),  # no longer kept by the store, still here
    ],
)
def test_the_standing_of_a_version(version: int, expected: Standing) -> None:
    retained = published((6, 10), (7, 12), (8, 14))
    assert standing(version, retained=retained, held=(8, 4), max_versions=2) is expected


def test_a_resume_rolls_steps_back_and_the_versions_after_it_are_within_the_bound_again() -> None:
    """Version 21 is step 10 once more: staleness counts steps, so that the versions of steps 9 to 13 are all wanted."""
    retained = published((8, 8), (9, 9), (12, 12), (13, 13), (21, 10))
    assert wanted_versions(retained, 1) == (21, 13, 12, 9)


def test_nothing_is_wanted_before_the_first_version() -> None:
    assert wanted_versions({}, 4) == ()
    assert standing(0, retained={}, held=(), max_versions=4) is Standing.COMING
