"""When the trainer stores its newest version again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest

from rljob_api.errors import DeadlineExceeded
from rljob_api.messages import WorkerPhase, WorkerState
from rljob_protocol.link import Link
from rljob_runtime.trainer.damage import DamageWatch


class Workers:
    """In place of a link: what the workers say, how often they were asked."""

    def __init__(self) -> None:
        self.said: tuple[WorkerState, ...] = ()
        self.asked = 0
        self.is_away = False

    async def live_workers(self) -> tuple[WorkerState, ...]:
        self.asked += 1
        if self.is_away:
            raise DeadlineExceeded("no server")
        return self.said

    def say(self, *unreadable: tuple[int, int] | None) -> None:
        self.said = tuple(
            WorkerState(worker=f"main-{n}", pool="main", incarnation="a", phase=WorkerPhase.SERVING, unreadable=version)
            for n, version in enumerate(unreadable)
        )


class Rig:
    """A watch with workers, clock and trainer of the test's."""

    def __init__(self, again_seconds: float = 60.0) -> None:
        self.workers = Workers()
        self.version: int | None = 7
        link = cast(Link, self.workers)
        self.watch = DamageWatch(
            link, 2, lambda: self.version, logging.getLogger("test"), look_seconds=0.005, again_seconds=again_seconds
        )

    async def look(self) -> tuple[str, ...]:
        """What is found about version 7 after a look or two."""
        running: asyncio.Task[Any] = asyncio.create_task(self.watch.run())
        await asyncio.sleep(0.05)
        running.cancel()
        return self.watch.workers_without(7)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_workers_that_cannot_read_the_newest_version_are_named(rig: Rig) -> None:
    rig.workers.say(None, (2, 7))
    assert await rig.look() == ("main-1",)
    assert rig.watch.workers_without(8) == ()


async def test_another_version_or_epoch_is_no_reason(rig: Rig) -> None:
    rig.workers.say((2, 6), (1, 7))
    assert await rig.look() == ()


async def test_a_trainer_that_works_asks_nobody_and_forgets(rig: Rig) -> None:
    rig.workers.say((2, 7))
    assert await rig.look() == ("main-0",)
    rig.version, asked = None, rig.workers.asked
    assert await rig.look() == ()
    assert rig.workers.asked == asked


async def test_after_it_was_stored_again_workers_get_time_to_try() -> None:
    for again_seconds, found in ((60.0, ()), (0.0, ("main-0",))):
        rig = Rig(again_seconds)
        rig.workers.say((2, 7))
        assert await rig.look() == ("main-0",)
        rig.watch.restored(7)
        assert rig.watch.workers_without(7) == ()
        assert await rig.look() == found


async def test_while_nats_is_away_the_watch_goes_on(rig: Rig) -> None:
    rig.workers.is_away = True
    assert await rig.look() == ()
    rig.workers.is_away = False
    rig.workers.say((2, 7))
    assert await rig.look() == ("main-0",)
