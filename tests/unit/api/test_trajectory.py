"""Segments of a trajectory against their definition, applied to every interval."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rljob_api.trajectory import Segment, segments

TOKEN = st.tuples(st.integers(-1, 2), st.integers(0, 2))


def segments_by_definition(turn: list[int], weight_version: list[int]) -> tuple[Segment, ...]:
    """Every interval of model tokens with one turn and one version that no neighbour can join."""

    def is_one(start: int, end: int) -> bool:
        inside = range(start, end)
        return (
            all(turn[i] >= 0 for i in inside)
            and len({turn[i] for i in inside}) == 1
            and len({weight_version[i] for i in inside}) == 1
        )

    count = len(turn)
    return tuple(
        Segment(start, end, weight_version[start])
        for start in range(count)
        for end in range(start + 1, count + 1)
        if is_one(start, end)
        and not (start > 0 and is_one(start - 1, end))
        and not (end < count and is_one(start, end + 1))
    )


@given(st.lists(TOKEN, max_size=12))
def test_segments_are_the_maximal_runs_of_the_definition(tokens: list[tuple[int, int]]) -> None:
    turn = [t for t, _ in tokens]
    weight_version = [version if t >= 0 else -1 for t, version in tokens]
    assert segments(turn, weight_version) == segments_by_definition(turn, weight_version)


@given(st.lists(TOKEN, max_size=12))
def test_segments_hold_every_model_token_once_and_no_other(tokens: list[tuple[int, int]]) -> None:
    turn = [t for t, _ in tokens]
    weight_version = [version if t >= 0 else -1 for t, version in tokens]
    held = [i for segment in segments(turn, weight_version) for i in range(segment.start, segment.end)]
    assert held == [i for i, t in enumerate(turn) if t >= 0]


def test_the_example_of_the_docstring() -> None:
    found = segments([-1, 0, 0, 0, -1, 1], [-1, 4, 4, 5, -1, 5])
    assert found == (Segment(1, 3, 4), Segment(3, 4, 5), Segment(5, 6, 5))


def test_adjacent_turns_of_one_version_are_two_segments() -> None:
    assert segments([-1, 0, 1], [-1, 4, 4]) == (Segment(1, 2, 4), Segment(2, 3, 4))
