"""The trainer's side of the old-policy pool: what it waits for, for how long, and whose value a score is."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from rljob_api.messages import DedicatedReport, OldPolicyState, Outcome, ScoreHeader, TrajectoryHeader
from rljob_runtime.correction.score_pool import ScorePool
from rljob_runtime.correction.sources import Known, Source
from rljob_runtime.score_codec import Scores, decode_scores, encode_scores
from rljob_runtime.trainer.dedicated import DedicatedWait
from rljob_runtime.trainer.intake import Taken
from rljob_runtime.trajectory_codec import Trajectory

VERSIONS = np.array([-1, 1, 2, -1, 3, 4], np.int32)
"""Of a trajectory that is trained at version 4 under a bound of 2: over it, two stale ones, resident."""
STALE = (2, 4)


class Streams:
    """Link and streams that are only ever cut."""

    class names:  # noqa: N801
        scores_stream = "scores"

    cut_up_to: int | None = None

    async def retry(self, what: str, attempt: Any, **_: Any) -> Any:
        return await attempt()

    @property
    def jetstream(self) -> Any:
        return self

    async def purge_stream(self, stream: str, *, seq: int) -> None:
        self.cut_up_to = seq - 1


def trajectory(task: int = 0, sample: int = 0, versions: np.ndarray[Any, np.dtype[np.int32]] = VERSIONS) -> Trajectory:
    header = TrajectoryHeader(
        task=task, sample=sample, attempt=1, epoch=1, worker="w", incarnation="i", outcome=Outcome.FINISHED
    )
    turn = np.where(versions >= 0, 0, -1).astype(np.int32)
    return Trajectory(
        header, np.arange(len(versions), dtype=np.int32), turn, versions, np.zeros(len(versions), np.float32)
    )


def message(
    sequence: int, positions: tuple[int, ...] = STALE, *, task: int = 0, sample: int = 0, version_shift: int = 0
) -> bytes:
    places = np.array(positions, np.int32)
    header = ScoreHeader(task=task, sample=sample, sequence=sequence, worker="p-0")
    return encode_scores(
        Scores(header, places, VERSIONS[places] + version_shift, (-places - sequence / 100).astype(np.float32))
    )


def taken(*trajectories: tuple[int, Trajectory], max_versions: int = 2) -> Taken:
    """(sequence, trajectory) of each."""
    return Taken(
        groups=(tuple(t for _, t in trajectories),),
        staleness={1: 3, 2: 2, 3: 1, 4: 0},
        max_versions=max_versions,
        sequences={(t.header.task, t.header.sample): sequence for sequence, t in trajectories},
    )


class Rank0:
    """The wait and the pool, fed as the intake and the reader of the score stream do."""

    def __init__(self, link: Any) -> None:
        self.pool = ScorePool(1 << 20)
        self.wait = DedicatedWait(link, self.pool, timeout_seconds=60, logger=logging.getLogger("test"))

    @property
    def report(self) -> DedicatedReport:
        return self.wait.report

    @property
    def message(self) -> str:
        return self.wait.message

    def add(self, place: int, data: bytes) -> None:
        scores = decode_scores(data)
        self.pool.accept(scores)
        self.wait.told(place, scores)

    def may_train(self, batch: Taken, now: float) -> bool:
        for sample, sequence in zip(batch.groups[0], batch.sequences.values(), strict=True):
            self.pool.complete(sample, sequence)
        return self.wait.may_train(batch, now)

    def known(self, sample: Trajectory, sequence: int) -> Known:
        self.pool.complete(sample, sequence)
        return self.pool.known(sample)


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def scores(streams: Streams) -> Rank0:
    return Rank0(streams)


def test_a_batch_waits_until_each_trajectory_with_stale_tokens_has_its_scores(scores: Rank0) -> None:
    batch = taken((5, trajectory()), (6, trajectory(sample=1)))
    assert not scores.may_train(batch, now=100.0)
    scores.add(1, message(6, sample=1))
    assert not scores.may_train(batch, now=103.0)
    assert "to score 1 trajectories of the next step: none is alive" in scores.message
    scores.add(2, message(5))
    assert scores.may_train(batch, now=107.0)
    assert scores.message == ""
    assert (scores.report.waiting_seconds, scores.report.tokens_scored, scores.report.tokens_late) == (7.0, 4, 0)
    known = scores.known(batch.groups[0][0], 5)
    assert known.source.tolist() == [
        Source.NONE,
        Source.NONE,
        Source.DEDICATED,
        Source.NONE,
        Source.DEDICATED,
        Source.NONE,
    ]
    np.testing.assert_array_equal(known.logprobs, np.array([0, 0, -2.05, 0, -4.05, 0], np.float32))


def test_resident_tokens_and_those_over_the_bound_are_not_waited_for(scores: Rank0) -> None:
    beyond = trajectory(versions=np.array([-1, 1, 1, -1, 4, 4], np.int32))
    assert scores.may_train(taken((5, beyond)), now=100.0)
    assert scores.report.waiting_seconds == 0.0
    assert scores.report.tokens_late == 0


def test_at_the_timeout_the_batch_goes_and_what_has_no_value_is_late(
    scores: Rank0, caplog: pytest.LogCaptureFixture
) -> None:
    batch = taken((5, trajectory()), (6, trajectory(sample=1)))
    scores.add(1, message(5))
    assert not scores.may_train(batch, now=100.0)
    assert not scores.may_train(batch, now=159.9)
    with caplog.at_level(logging.WARNING):
        assert scores.may_train(batch, now=160.0)
    assert [record.message for record in caplog.records] == ["old-policy scores were late"]
    assert (scores.report.tokens_scored, scores.report.tokens_late) == (2, 2)
    assert not scores.may_train(taken((7, trajectory(sample=2))), now=161.0), "the next step has a wait of its own"


def test_a_worker_that_could_not_score_a_token_ends_the_wait_for_it(scores: Rank0) -> None:
    """Its message without the token says that no value will come."""
    scores.add(1, message(5, (4,)))
    assert scores.may_train(taken((5, trajectory())), now=100.0)
    assert (scores.report.tokens_scored, scores.report.tokens_late) == (1, 1)


def test_scores_in_any_order_and_twice_give_the_same_values(scores: Rank0, streams: Streams) -> None:
    """Test 21 of docs/algorithms.md: keyed by (trajectory, version), whatever the order of arrival."""
    rows = [(sequence, trajectory(task=sequence)) for sequence in range(1, 6)]
    messages = [message(sequence, task=sequence) for sequence, _ in rows]
    values = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (1, 1, 3, 4, 0, 2, 2, 1)):
        held = Rank0(streams)
        for place, index in enumerate(order, 1):
            held.add(place, messages[index])
        values.append([held.known(t, s).logprobs.tolist() for s, t in rows])
    assert values[0] == values[1] == values[2]
    assert len(values[0]) == 5
    assert len({tuple(row) for row in values[0]}) == 5


def test_two_trajectories_of_one_sample_never_share_a_value(scores: Rank0, streams: Streams) -> None:
    """A sample that was rolled out twice. Keyed by the sample alone, the later message would stand for both."""
    other = Rank0(streams)
    for held in (scores, other):
        held.add(1, message(9))
        held.add(2, message(5))
    first, second = scores.known(trajectory(), 5), other.known(trajectory(), 9)
    assert first.logprobs[4] == np.float32(-4.05)
    assert second.logprobs[4] == np.float32(-4.09)
    by_sample = {(told.header.task, told.header.sample): told for told in map(decode_scores, (message(9), message(5)))}
    assert by_sample[0, 0].logprobs[1] != second.logprobs[4], "the negative control: such a key gives one the other's"


def test_a_value_of_another_version_place_or_sample_is_no_value(scores: Rank0) -> None:
    scores.add(1, message(5, version_shift=1))
    assert (scores.known(trajectory(), 5).source == Source.NONE).all()
    scores.add(2, message(6, sample=3))
    assert (scores.known(trajectory(task=1), 6).source == Source.NONE).all()
    scores.add(3, message(7, task=2))
    known = scores.known(trajectory(task=2, versions=VERSIONS[:4]), 7)
    assert np.flatnonzero(known.source == Source.DEDICATED).tolist() == [2]


def test_a_worker_is_alive_while_its_state_is_renewed_on_our_clock(scores: Rank0) -> None:
    state = OldPolicyState(worker="a", incarnation="1", revision=1)
    scores.add(1, message(9, task=9))
    batch = taken((5, trajectory()))

    def workers(now: float, *states: OldPolicyState) -> int:
        scores.wait.see(states, now)
        assert not scores.may_train(batch, now=0.0)
        return 0 if "none is alive" in scores.message else int(scores.message.split(": ")[1].split()[0])

    assert workers(0.0) == 0
    assert workers(1.0, state) == 1
    assert workers(10.9, state) == 1
    assert workers(11.0, state) == 0, "its key has not expired, but nothing renews it"
    assert workers(12.0, replace_revision(state, 2)) == 1
    assert workers(13.0, state.model_copy(update={"incarnation": "2"})) == 1


def replace_revision(state: OldPolicyState, revision: int) -> OldPolicyState:
    return state.model_copy(update={"revision": revision})


async def test_a_checkpoint_cuts_the_stream_below_what_a_replay_from_it_needs(scores: Rank0, streams: Streams) -> None:
    for place, sequence in enumerate((3, 8, 5, 9), 1):
        scores.add(place, message(sequence, task=sequence))
    await scores.wait.forget(5)
    assert streams.cut_up_to == 1, "the message about trajectory 8 is the second"
    await scores.wait.forget(9)
    assert streams.cut_up_to == 4
