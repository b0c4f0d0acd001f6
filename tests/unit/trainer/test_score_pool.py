"""The pool of values scored ahead: each is that of its own token under its own version, whatever arrives in whatever order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.trajectories import finished

from rljob_api.messages import ScoreHeader, SegmentHeader
from rljob_runtime.correction.score_pool import TOKEN_BYTES, Discard, ScorePool, Wanted
from rljob_runtime.correction.sources import Source
from rljob_runtime.score_codec import Scores
from rljob_runtime.segment_codec import OpenSegment
from rljob_runtime.trajectory_codec import Trajectory

ENOUGH = 1 << 20


@dataclass(frozen=True)
class Attempt:
    """All that one attempt at a sample will ever make."""

    key: tuple[int, int]
    number: int
    tokens: tuple[int, ...]
    versions: tuple[int, ...]
    """-1 for prompt and observation tokens."""

    def segment(self, start: int, end: int) -> OpenSegment:
        header = SegmentHeader(
            task=self.key[0], sample=self.key[1], attempt=self.number, worker="w", incarnation="i", start=start
        )
        return OpenSegment(header, *self._arrays(start, end))

    def trajectory(self, end: int | None = None) -> Trajectory:
        header = finished(self.key[0], self.key[1], attempt=self.number)
        return Trajectory(header, *self._arrays(0, len(self.tokens) if end is None else end))

    def scores(self, sequence: int, positions: Sequence[int], worker: str = "o") -> Scores:
        header = ScoreHeader(task=self.key[0], sample=self.key[1], sequence=sequence, worker=worker)
        versions = [self.versions[position] for position in positions]
        values = [oracle(self.tokens[: position + 1], self.versions[position]) for position in positions]
        return Scores(header, np.array(positions, np.int32), np.array(versions, np.int32), np.array(values, np.float32))

    def _arrays(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        versions = np.array(self.versions[start:end], np.int32)
        turn = np.where(versions >= 0, 0, -1).astype(np.int32)
        # What stands at tokens that the model did not sample is nobody's business: make it look like a version.
        return np.array(self.tokens[start:end], np.int32), turn, np.abs(versions), np.zeros(end - start, np.float32)


def oracle(prefix: Sequence[int], version: int) -> float:
    """log pi_v of the prefix' last token: any function that tells prefixes and versions apart."""
    return float(np.float32(-1 - hash((tuple(int(token) for token in prefix), version)) % 99_991))


def score(rows: Sequence[Wanted]) -> list[np.ndarray]:
    """What a policy that holds the rows' version gives for each row's tokens."""
    return [
        np.array(
            [oracle(row.tokens[: end + 1], row.version) for end in range(len(row.tokens))],
            np.float32,
        )
        for row in rows
    ]


def score_all(pool: ScorePool, version: int) -> int:
    """Score what is wanted of a version; how many tokens that were."""
    rows = pool.wanted(version)
    for row, values in zip(rows, score(rows), strict=True):
        pool.store(row, values)
    return sum(len(row.positions) for row in rows)


def attempt(key: tuple[int, int] = (0, 0), number: int = 1, versions: Sequence[int] = (-1, 4, 4, 5, -1, 5)) -> Attempt:
    tokens = tuple(10 * number + position for position in range(len(versions)))
    return Attempt(key, number, tokens, tuple(versions))


def sources_of(pool: ScorePool, trajectory: Trajectory) -> list[int]:
    return pool.known(trajectory).source.tolist()


NONE, POOL, DEDICATED = Source.NONE, Source.POOL, Source.DEDICATED


# ------------------------------------------------------------------------------------------- against brute force


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Attempt], list[tuple[str, int, int]], int]:
    """Attempts at a few samples, and what happens to them in which order: (what, which attempt, a number)."""
    attempts = []
    for sample in range(draw(st.integers(1, 3))):
        for number in range(1, draw(st.integers(1, 2)) + 1):
            length = draw(st.integers(2, 8))
            versions = draw(st.lists(st.sampled_from((-1, 1, 2, 3)), min_size=length, max_size=length))
            # Few different tokens, so that two attempts may begin alike.
            tokens = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            attempts.append(Attempt((0, sample), number, tuple(tokens), (-1, *versions[1:])))
    happening = st.tuples(
        st.sampled_from(("extend", "extend", "extend", "score", "late", "complete", "scores", "hold", "forget")),
        st.integers(0, len(attempts) - 1),
        st.integers(0, 63),
    )
    return attempts, draw(st.lists(happening, max_size=40)), draw(st.sampled_from((ENOUGH, 20 * TOKEN_BYTES)))


def play(history: tuple[list[Attempt], list[tuple[str, int, int]], int], pool: ScorePool | None = None) -> int:
    """Let it happen, and hold each known value against the oracle's; how many values were known."""
    attempts, happenings, max_bytes = history
    pool = pool or ScorePool(max_bytes)
    finished: dict[tuple[int, int], Trajectory] = {}
    pending: list[Wanted] = []
    values = 0
    for what, which, number in happenings:
        chosen = attempts[which]
        match what:
            case "extend":
                start, end = sorted((number // 8 % (len(chosen.tokens) + 1), number % 8 % (len(chosen.tokens) + 1)))
                if end > start:
                    pool.extend(chosen.segment(start, end))
            case "score":  # under version 1, 2 or 3
                rows = pool.wanted(1 + number % 3, number)
                # Some results come only after other things have happened.
                pending += rows[1:]
                for row, got in zip(rows[:1], score(rows[:1]), strict=True):
                    pool.store(row, got)
            case "late":
                for row, got in zip(pending, score(pending), strict=True):
                    pool.store(row, got)
                pending.clear()
            case "complete" if chosen.key not in finished:
                finished[chosen.key] = chosen.trajectory()
                pool.complete(finished[chosen.key], sequence=1 + which)
            case "scores":
                model = [position for position, version in enumerate(chosen.versions) if version >= 0]
                pool.accept(chosen.scores(1 + which, model[: number % 8]))
            case "hold":
                pool.resident = number % 4 or None
            case "forget":
                pool.forget([chosen.key])
                finished.pop(chosen.key, None)
        assert pool.num_bytes <= max_bytes
        for trajectory in finished.values():
            known = pool.known(trajectory)
            for position in np.flatnonzero(known.source != NONE).tolist():
                assert trajectory.turn[position] >= 0
                version = int(trajectory.weight_version[position])
                assert known.logprobs[position] == oracle(trajectory.tokens[: position + 1].tolist(), version)
                values += 1
    return values


@settings(deadline=None)
@given(histories())
def test_every_known_value_is_that_of_its_token_under_its_version(
    history: tuple[list[Attempt], list[tuple[str, int, int]], int],
) -> None:
    play(history)


class Forgetful(ScorePool):
    """A pool that lets the held version score the tokens of every version."""

    def wanted(
        self, version: int, token_budget: int | None = None, *, without: Collection[int] = frozenset()
    ) -> list[Wanted]:
        return [replace(row, version=version) for named in (1, 2, 3) for row in super(Forgetful, self).wanted(named)]


def test_the_comparison_notices_a_pool_that_forgets_the_version() -> None:
    chosen = attempt(versions=(-1, 1, 2, 2))
    history = ([chosen], [("extend", 0, 3), ("score", 0, 0), ("late", 0, 0), ("complete", 0, 0)], ENOUGH)
    assert play(history) > 0
    with pytest.raises(AssertionError):
        play(history, pool=Forgetful(ENOUGH))


# ------------------------------------------------------------------------------------------------- segments, tokens


def test_version_changes_inside_a_trajectory_are_kept_to_the_token() -> None:
    """An interruption after token k: the last token of v and the first of v+1 are scored by v and by v+1."""
    chosen = attempt(versions=(-1, 4, 4, 5, -1, 5))
    pool = ScorePool(ENOUGH)
    pool.extend(chosen.segment(0, 3))
    (row,) = pool.wanted(4)
    assert (row.tokens.tolist(), row.positions.tolist()) == (list(chosen.tokens[:3]), [1, 2])
    assert score_all(pool, 4) == 2
    pool.extend(chosen.segment(3, 6))
    assert pool.wanted(4) == []
    (row,) = pool.wanted(5)
    assert (row.tokens.tolist(), row.positions.tolist()) == (list(chosen.tokens), [3, 5])
    assert score_all(pool, 5) == 2
    pool.complete(chosen.trajectory(), 1)
    known = pool.known(chosen.trajectory())
    assert known.source.tolist() == [NONE, POOL, POOL, POOL, NONE, POOL]
    assert [value for value, source in zip(known.logprobs.tolist(), known.source, strict=True) if source == POOL] == [
        oracle(chosen.tokens[: end + 1], version) for end, version in enumerate(chosen.versions) if version >= 0
    ]


def test_segments_that_overlap_and_agree_are_one() -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    for start, end in ((0, 2), (0, 2), (1, 4), (0, 3), (4, 6)):
        pool.extend(chosen.segment(start, end))
    assert pool.num_bytes == 6 * TOKEN_BYTES and not pool.discarded
    assert score_all(pool, 4) == 2 and score_all(pool, 5) == 2


def test_a_gap_drops_what_was_known_and_the_attempt_is_not_picked_up_in_the_middle() -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    pool.extend(chosen.segment(0, 2))
    pool.extend(chosen.segment(3, 5))
    assert pool.num_bytes == 0 and pool.discarded == {Discard.GAP: 2}
    pool.extend(chosen.segment(5, 6))
    assert pool.num_bytes == 0 and pool.discarded == {Discard.GAP: 3}


def test_an_overlap_that_differs_drops_what_was_known() -> None:
    chosen = attempt()
    other_token = replace(chosen, tokens=(*chosen.tokens[:2], 99, *chosen.tokens[3:]))
    other_version = replace(chosen, versions=(-1, 4, 5, 5, -1, 5))
    for other in (other_token, other_version):
        pool = ScorePool(ENOUGH)
        pool.extend(chosen.segment(0, 3))
        pool.extend(other.segment(2, 5))
        assert pool.num_bytes == 0 and pool.discarded == {Discard.CONFLICT: 2}


def test_another_attempt_starts_anew_and_its_middle_alone_changes_nothing() -> None:
    first, second = attempt(number=1), attempt(number=2)
    pool = ScorePool(ENOUGH)
    pool.extend(first.segment(0, 3))
    assert score_all(pool, 4) == 2
    pool.extend(second.segment(2, 5))
    assert score_all(pool, 4) == 0 and pool.discarded == {Discard.GAP: 2}
    pool.extend(second.segment(0, 3))
    assert pool.discarded == {Discard.GAP: 2, Discard.OTHER_ATTEMPT: 2}
    assert score_all(pool, 4) == 2


def test_a_finished_trajectory_that_begins_otherwise_has_no_values_and_can_be_scored_itself() -> None:
    chosen = attempt()
    for other in (
        replace(chosen, tokens=(chosen.tokens[0], 99, *chosen.tokens[2:])),
        replace(chosen, versions=(-1, 5, 5, 5, -1, 5)),
    ):
        pool = ScorePool(ENOUGH)
        pool.extend(chosen.segment(0, 3))
        score_all(pool, 4)
        pool.complete(other.trajectory(), 1)
        assert sources_of(pool, other.trajectory()) == [NONE] * 6
        assert pool.discarded == {Discard.CONFLICT: 2}
        assert score_all(pool, 5) > 0
        assert POOL in sources_of(pool, other.trajectory())
    pool = ScorePool(ENOUGH)
    pool.extend(chosen.segment(0, 6))
    pool.complete(chosen.trajectory(4), 1)
    assert pool.discarded == {Discard.CONFLICT: 4}, "a trajectory that is shorter than its segments is another one"


def test_a_result_that_comes_after_its_tokens_were_replaced_is_dropped_and_after_they_grew_it_counts() -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    pool.extend(chosen.segment(0, 3))
    rows = pool.wanted(4)
    pool.complete(chosen.trajectory(), 1)
    pool.store(rows[0], score(rows)[0])
    assert sources_of(pool, chosen.trajectory()) == [NONE, POOL, POOL, NONE, NONE, NONE]
    rows = pool.wanted(5)
    pool.forget([chosen.key])
    again = attempt(number=1)
    pool.complete(again.trajectory(), 2)
    pool.store(rows[0], score(rows)[0])
    assert sources_of(pool, again.trajectory()) == [NONE] * 6
    assert pool.discarded == {Discard.LATE: 2}


# ---------------------------------------------------------------------------------------------------- what to score


def test_the_oldest_tasks_come_first_within_the_budget_and_one_row_may_exceed_it() -> None:
    pool = ScorePool(ENOUGH)
    for key, length in (((3, 0), 3), ((1, 1), 5), ((2, 0), 4), ((1, 0), 5)):
        pool.complete(attempt(key, versions=(-1, *[7] * (length - 1))).trajectory(), 1)
    assert [row.key for row in pool.wanted(7)] == [(1, 0), (1, 1), (2, 0), (3, 0)]
    assert [row.key for row in pool.wanted(7, 15)] == [(1, 0), (1, 1), (2, 0)]
    assert [row.key for row in pool.wanted(7, 14)] == [(1, 0), (1, 1)]
    assert [row.key for row in pool.wanted(7, 1)] == [(1, 0)]
    assert [row.key for row in pool.wanted(7, without={1})] == [(2, 0), (3, 0)]
    assert pool.wanted(6) == []


def test_versions_wanted_are_those_with_a_token_that_has_no_value() -> None:
    pool = ScorePool(ENOUGH)
    pool.complete(attempt(versions=(-1, 4, 5, 6)).trajectory(), 1)
    assert pool.versions_wanted((6, 4, 3)) == [4, 6]
    score_all(pool, 4)
    assert pool.versions_wanted((6, 4, 3)) == [6]
    assert pool.versions_wanted(()) == []


def test_a_value_that_is_not_finite_is_not_asked_for_again() -> None:
    chosen = attempt(versions=(-1, 4, 4))
    pool = ScorePool(ENOUGH)
    pool.complete(chosen.trajectory(), 1)
    (row,) = pool.wanted(4)
    pool.store(row, np.array([0, np.nan, -1], np.float32))
    assert pool.wanted(4) == []
    assert np.isnan(pool.known(chosen.trajectory()).logprobs[1])


# ------------------------------------------------------------------------------------------- old-policy workers


@pytest.mark.parametrize("first", ["scores", "trajectory"])
def test_scores_count_whether_they_come_before_or_after_their_trajectory(first: str) -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    parts = [chosen.scores(7, [2, 3]), chosen.scores(7, [1, 2])]
    if first == "trajectory":
        pool.complete(chosen.trajectory(), 7)
    pool.accept(parts[0])
    if first == "scores":
        pool.extend(chosen.segment(0, 3))
        pool.complete(chosen.trajectory(), 7)
    pool.accept(parts[1])
    known = pool.known(chosen.trajectory())
    assert known.source.tolist() == [NONE, DEDICATED, DEDICATED, DEDICATED, NONE, NONE]
    assert known.logprobs[1:4].tolist() == [
        oracle(chosen.tokens[: end + 1], version) for end, version in ((1, 4), (2, 4), (3, 5))
    ]
    assert not pool.discarded


def test_scores_of_another_trajectory_another_version_or_no_model_token_do_not_count() -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    pool.accept(chosen.scores(8, [1, 2]))
    pool.complete(chosen.trajectory(), 7)
    assert sources_of(pool, chosen.trajectory()) == [NONE] * 6
    assert pool.discarded == {Discard.OTHER_TRAJECTORY: 2}
    wrong = replace(attempt(versions=(-1, 4, 5, 5, 5, 5, 5)))
    pool.accept(wrong.scores(7, [1, 2, 4, 6]))
    assert sources_of(pool, chosen.trajectory()) == [NONE, DEDICATED, NONE, NONE, NONE, NONE]
    assert pool.discarded[Discard.OTHER_VERSION] == 3, "another version, an observation token, beyond the end"


# --------------------------------------------------------------------------------------------- bound and accounting


def test_at_the_bound_unfinished_samples_go_first_and_the_least_recently_grown_of_them() -> None:
    pool = ScorePool(12 * TOKEN_BYTES)
    finished, grown, idle = (attempt((0, sample), versions=(-1, 4, 4, 4)) for sample in range(3))
    pool.complete(finished.trajectory(), 1)
    pool.extend(grown.segment(0, 2))
    pool.extend(idle.segment(0, 4))
    pool.extend(grown.segment(2, 4))
    assert not pool.discarded
    pool.complete(attempt((0, 3), versions=(-1, 4, 4, 4)).trajectory(), 2)
    assert pool.discarded == {Discard.EVICTED: 3}
    assert [row.key for row in pool.wanted(4)] == [(0, 0), (0, 1), (0, 3)]
    pool.complete(attempt((0, 4), versions=[-1, *[4] * 7]).trajectory(), 3)
    assert [row.key for row in pool.wanted(4)] == [(0, 3), (0, 4)], "then the finished ones, the oldest first"
    pool.complete(attempt((0, 5), versions=[-1, *[4] * 12]).trajectory(), 3)
    assert pool.num_bytes == 0, "one that is larger than the bound is not kept at all"


def test_tokens_count_as_in_time_if_they_came_while_their_version_was_resident() -> None:
    chosen = attempt(versions=(-1, 4, 4, 5, -1, 5))
    pool = ScorePool(ENOUGH)
    pool.resident = 4
    pool.extend(chosen.segment(0, 2))
    pool.resident = None  # an update has begun: version 4 is gone
    pool.extend(chosen.segment(2, 3))
    pool.resident = 5
    pool.complete(chosen.trajectory(), 1)
    assert pool.in_time(chosen.trajectory()).tolist() == [False, True, False, True, False, True]


def test_what_is_forgotten_is_gone_and_what_is_unknown_has_no_values() -> None:
    chosen = attempt()
    pool = ScorePool(ENOUGH)
    pool.complete(chosen.trajectory(), 1)
    pool.accept(attempt((0, 1)).scores(2, [1]))
    score_all(pool, 4)
    pool.forget([(0, 0), (0, 1), (5, 5)])
    assert pool.num_bytes == 0
    assert sources_of(pool, chosen.trajectory()) == [NONE] * 6
    assert not pool.in_time(chosen.trajectory()).any()
