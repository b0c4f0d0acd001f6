"""What a worker sends of unfinished trajectories: in order, whole, and never in the way of generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import numpy as np
import pytest
from tests.fakes.messaging import FakeLink, FakeSegments

from rljob_api.errors import DeadlineExceeded
from rljob_api.messages import Task, TrajectoryHeader
from rljob_runtime.rollout import prefixes as module
from rljob_runtime.rollout.engine import Sampled, VersionSpan
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.prefixes import PrefixSender
from rljob_runtime.rollout.tally import Tally


def sampled(first: int, count: int, version: int = 0) -> Sampled:
    tokens = tuple(range(first, first + count))
    return Sampled(tokens, tuple(-0.5 - token / 64 for token in tokens), (VersionSpan(version, 0, count),))


class Rig:
    def __init__(self, every_tokens: int) -> None:
        self.link = FakeLink()
        self.log = FakeSegments(self.link)
        self.tally = Tally()
        self.sender = PrefixSender(self.log, self.tally, worker="w", incarnation="i", every_tokens=every_tokens)
        self.stack = ExitStack()

    def begin(self, task: int = 0) -> PartialRollout:
        partial = PartialRollout()
        self.stack.enter_context(
            self.sender.following(Task(task=task, sample=1, epoch=1, min_version=0, seed=0), 2, partial)
        )
        partial.observe((1, 2))
        partial.begin_turn()
        return partial

    def received(self, task: int = 0) -> list[tuple[int, int]]:
        """(start, tokens) of each message, in order."""
        return [(s.header.start, s.num_tokens) for s in self.log.segments if s.header.task == task]

    def is_whole(self, partial: PartialRollout, task: int = 0) -> bool:
        """The messages, put together, are the trajectory up to its last model token or farther."""
        whole = partial.trajectory(TrajectoryHeader.model_construct())
        length = 0
        for segment in (s for s in self.log.segments if s.header.task == task):
            if segment.header.start > length:
                return False
            end = segment.header.start + segment.num_tokens
            for name in ("tokens", "turn", "weight_version", "behavior_logprobs"):
                if not np.array_equal(getattr(segment, name), getattr(whole, name)[segment.header.start : end]):
                    return False
            length = max(length, end)
        return not (whole.turn[length:] >= 0).any()


@asynccontextmanager
async def running(every_tokens: int) -> AsyncIterator[Rig]:
    rig = Rig(every_tokens)
    task = asyncio.create_task(rig.sender.run())
    try:
        yield rig
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_idle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_message_goes_out_whenever_enough_model_tokens_are_new_and_holds_all_since_the_last() -> None:
    async with running(4) as rig:
        partial = rig.begin()
        for count, expected in ((3, []), (1, [(0, 6)]), (3, [(0, 6)])):
            partial.take(sampled(10, count))
            await until_idle()
            assert rig.received() == expected
        partial.observe((3, 4, 5))
        partial.begin_turn()
        await until_idle()
        assert rig.received() == [(0, 6)], "observations alone are nothing to score"
        partial.take(sampled(20, 2, version=1))
        await until_idle()
        assert rig.received() == [(0, 6), (6, 8)]
        assert rig.is_whole(partial)
        assert rig.log.segments[1].turn.tolist() == [0, 0, 0, -1, -1, -1, 1, 1]
        assert rig.log.segments[1].weight_version.tolist() == [0, 0, 0, -1, -1, -1, 1, 1]
        header = rig.log.segments[1].header
        assert (header.sample, header.attempt, header.worker, header.incarnation) == (1, 2, "w", "i")
        assert (rig.sender.last_sequence, rig.tally.segments_sent) == (2, 2)


async def test_when_the_version_changes_all_that_is_unsent_goes_out_however_little() -> None:
    async with running(100) as rig:
        first, second, empty = rig.begin(0), rig.begin(1), rig.begin(2)
        first.take(sampled(10, 3))
        second.take(sampled(10, 1))
        await until_idle()
        assert rig.log.segments == []
        rig.sender.version_changed()
        await until_idle()
        assert (rig.received(0), rig.received(1), rig.received(2)) == ([(0, 5)], [(0, 3)], [])
        first.take(sampled(20, 1, version=1))
        rig.sender.version_changed()
        await until_idle()
        assert (rig.received(0), rig.received(1)) == ([(0, 5), (5, 1)], [(0, 3)])
        assert rig.is_whole(first) and rig.is_whole(second, 1) and len(empty) == 2
    async with running(0) as rig:
        partial = rig.begin()
        partial.take(sampled(10, 3))
        rig.sender.version_changed()
        await until_idle()
        assert rig.log.segments == [], "0: only at a hand-over"


async def test_while_the_server_is_slow_generation_goes_on_and_messages_get_longer() -> None:
    async with running(2) as rig:
        gate = asyncio.Event()
        append = rig.log.append

        async def slow(task: int, sample: int, data: bytes, *, deadline_seconds: float) -> int:
            await gate.wait()
            return await append(task, sample, data, deadline_seconds=deadline_seconds)

        rig.log.append = slow  # type: ignore[method-assign]
        partial = rig.begin()
        for _ in range(50):
            partial.take(sampled(10, 2))
            await until_idle()
        gate.set()
        await until_idle()
        assert rig.received() == [(0, 4), (4, 98)]
        assert rig.is_whole(partial)


async def test_a_trajectory_that_has_ended_is_sent_no_more() -> None:
    async with running(2) as rig:
        partial = rig.begin()
        partial.take(sampled(10, 4))
        rig.stack.close()
        partial.take(sampled(20, 4))
        await until_idle()
        assert rig.received() == []


async def test_a_message_whose_answer_was_lost_is_sent_again_as_it_was_and_leaves_no_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PAUSE_AFTER_FAILURE_SECONDS", 0.0)
    async with running(2) as rig:
        partial = rig.begin()
        rig.log.loses = 1
        partial.take(sampled(10, 2))
        await until_idle()
        partial.take(sampled(12, 3))
        await until_idle()
        assert rig.received() == [(0, 4), (0, 4), (4, 3)]
        assert rig.is_whole(partial)
        assert (rig.tally.segments_sent, rig.tally.segments_failed) == (2, 1)


async def test_an_outage_delays_and_leaves_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_AFTER_FAILURE_SECONDS", 0.0)
    async with running(2) as rig:
        partial = rig.begin()
        for rig.link.is_down in (False, True, True, False):
            partial.take(sampled(10, 2))
            await until_idle()
        assert rig.received() == [(0, 4), (4, 2), (6, 4)]
        assert rig.is_whole(partial)
        assert rig.tally.segments_failed == 2


async def test_a_hand_over_sends_all_that_is_unsent_of_every_open_trajectory() -> None:
    rig = Rig(0)
    partials = [rig.begin(number) for number in range(40)]
    for number, partial in enumerate(partials):
        partial.take(sampled(10, number))
    await until_idle()
    assert rig.log.segments == [], "with an interval of 0 nothing goes out by itself"
    await rig.sender.hand_over()
    assert all(rig.is_whole(partial, number) for number, partial in enumerate(partials))
    assert rig.received(0) == [], "a prompt alone is nothing to score"
    assert rig.sender.last_sequence == len(rig.log.segments) == 39
    await rig.sender.hand_over()
    assert len(rig.log.segments) == 39


async def test_a_hand_over_waits_for_what_is_being_sent_and_follows_it() -> None:
    async with running(4) as rig:
        partial = rig.begin()
        partial.take(sampled(10, 5))
        await asyncio.sleep(0)
        partial.take(sampled(15, 1))
        await rig.sender.hand_over()
        assert rig.is_whole(partial)
        assert [start for start, _ in rig.received()] == sorted({start for start, _ in rig.received()})


async def test_a_hand_over_that_failed_says_so_and_is_whole_when_it_succeeds() -> None:
    rig = Rig(0)
    partials = [rig.begin(number) for number in range(3)]
    for partial in partials:
        partial.take(sampled(10, 3))
    rig.log.loses = 2
    with pytest.raises(DeadlineExceeded, match="the answer was lost"):
        await rig.sender.hand_over()
    await rig.sender.hand_over()
    assert all(rig.is_whole(partial, number) for number, partial in enumerate(partials))
    assert len(rig.log.segments) == 5


async def test_a_hand_over_that_nobody_answers_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAND_OVER_SECONDS", 0.02)
    rig = Rig(0)
    rig.begin().take(sampled(10, 3))
    rig.log.append = lambda *_, **__: asyncio.sleep(60)  # type: ignore[method-assign, assignment]
    with pytest.raises(DeadlineExceeded, match=r"did not take 1 open trajectories within 0.02 s"):
        await rig.sender.hand_over()


async def test_a_malformed_part_is_never_sent_and_does_not_keep_the_others_back() -> None:
    rig = Rig(0)
    broken, partial = rig.begin(0), rig.begin(1)
    broken.take(Sampled((7,), (float("nan"),), (VersionSpan(0, 0, 1),)))
    partial.take(sampled(10, 3))
    await rig.sender.hand_over()
    assert rig.received(0) == []
    assert rig.is_whole(partial, 1)
