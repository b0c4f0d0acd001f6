"""Trajectories leased to old-policy workers on a real nats-server: none is lost, and the trainer's cut stops nobody."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import nats.js.errors
import pytest
from tests.integration.conftest import LIMITS, Connect

from rljob_api.messages import OldPolicyState
from rljob_api.names import JobNames, old_policy_key
from rljob_protocol.claims import ClaimedTrajectory, TrajectoryClaims
from rljob_protocol.link import Link
from rljob_protocol.server import NatsServer
from rljob_protocol.streams import TrajectoryLog

pytestmark = pytest.mark.timeout(180)

WITH_POOL = replace(LIMITS, old_policy_workers=2, ack_wait_seconds=1.0)


@pytest.fixture
async def scored(connect: Connect) -> Link:
    """A link to a job that has an old-policy pool, whose leases last a second."""
    made = await connect(names=JobNames("scored"))
    await made.ensure_state(WITH_POOL)
    return made


async def append(link: Link, *numbers: int) -> None:
    for number in numbers:
        await TrajectoryLog(link).append(number, 0, f"trajectory {number}".encode())


async def claimed_within(claims: TrajectoryClaims, count: int, seconds: float = 15.0) -> list[ClaimedTrajectory]:
    found: list[ClaimedTrajectory] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        found += await claims.claim(count - len(found), 0.5)
    return found


def sequences(claimed: list[ClaimedTrajectory]) -> list[int]:
    return [lease.sequence for lease in claimed]


async def test_a_job_without_the_pool_has_no_consumer_and_no_backlog(link: Link) -> None:
    await append(link, 1, 2)
    with pytest.raises(nats.js.errors.NotFoundError):
        await link.jetstream.consumer_info(link.names.trajectories_stream, link.names.old_policy_consumer)
    assert await TrajectoryClaims(link).backlog() == 0


async def test_workers_share_the_trajectories_oldest_first_and_each_is_leased_once(
    scored: Link, connect: Connect
) -> None:
    await append(scored, *range(6))
    one, other = TrajectoryClaims(scored), TrajectoryClaims(await connect(names=JobNames("scored")))
    first, second = await claimed_within(one, 3), await claimed_within(other, 3)
    assert (sequences(first), sequences(second)) == ([1, 2, 3], [4, 5, 6])
    assert first[0].data == b"trajectory 0"
    assert await one.backlog() == 6
    for lease in first:
        await lease.ack()
    assert await one.backlog() == 3
    assert {lease.attempt for lease in first + second} == {1}


async def test_a_lease_is_extended_given_back_or_runs_out_and_then_another_worker_has_it(
    scored: Link, connect: Connect
) -> None:
    await append(scored, 0, 1, 2)
    one, other = TrajectoryClaims(scored), TrajectoryClaims(await connect(names=JobNames("scored")))
    kept, released, left = await claimed_within(one, 3)
    await released.release()
    again = await claimed_within(other, 1)
    assert (sequences(again), again[0].attempt) == ([released.sequence], 2)
    deadline = time.monotonic() + 4.0
    late: list[ClaimedTrajectory] = []
    while time.monotonic() < deadline:
        await kept.extend()
        await again[0].extend()
        late += await other.claim(1, 0.25)
    assert set(sequences(late)) == {left.sequence}
    assert kept.sequence not in sequences(late), "an extended lease never runs out"


async def test_the_trainers_cut_takes_what_is_leased_and_what_waits_and_the_consumer_goes_on(scored: Link) -> None:
    log, claims = TrajectoryLog(scored), TrajectoryClaims(scored)
    await append(scored, *range(8))
    leased = await claimed_within(claims, 3)
    await log.cut(5)
    for lease in leased[:2]:
        await lease.ack()  # a trajectory that is gone: harmless
    await append(scored, 8, 9)
    rest = await claimed_within(claims, 5)
    assert sequences(rest) == [6, 7, 8, 9, 10]
    for lease in rest:
        await lease.ack()
    await asyncio.sleep(
        1.5
    )  # the third lease runs out: it must not come back as an empty message, nor stop the next one
    await append(scored, 10)
    assert sequences(await claimed_within(claims, 1)) == [11]
    assert await claims.claim(1, 0.5) == []


async def test_a_cut_of_everything_and_what_comes_after_it(scored: Link) -> None:
    log, claims = TrajectoryLog(scored), TrajectoryClaims(scored)
    await append(scored, 0, 1)
    await log.cut(2)
    assert await claims.claim(4, 0.3) == []
    assert await claims.backlog() == 0
    await append(scored, 2)
    assert sequences(await claimed_within(claims, 1)) == [3]


async def test_nothing_that_is_not_let_go_is_lost_over_a_kill_of_the_server(scored: Link, server: NatsServer) -> None:
    """A kill may take acknowledgements with it: what was let go just before can come again, and is scored twice."""
    claims = TrajectoryClaims(scored)
    await append(scored, *range(4))
    for lease in (await claimed_within(claims, 4))[:2]:
        await lease.ack()
    server.kill()
    server.restart()
    await append(scored, 4)
    found: set[int] = set()
    async with asyncio.timeout(40):
        while not found >= {3, 4, 5}:
            for lease in await claims.claim(4, 0.5):
                found.add(lease.sequence)
                await lease.ack()
    assert found <= {1, 2, 3, 4, 5}


async def test_the_state_is_made_twice_and_with_more_workers_without_a_word(scored: Link) -> None:
    await scored.ensure_state(WITH_POOL)
    await scored.ensure_state(replace(WITH_POOL, old_policy_workers=40))
    info = await scored.jetstream.consumer_info(scored.names.trajectories_stream, scored.names.old_policy_consumer)
    assert info.config.max_ack_pending == 40 * 64


async def test_old_policy_workers_and_rollout_workers_are_told_apart(scored: Link) -> None:
    state = OldPolicyState(worker="old-policy-0", incarnation="a", revision=3, version=7)
    await scored.beat(old_policy_key("old-policy-0"), state)
    assert await scored.live_old_policy_workers() == (state,)
    assert await scored.live_workers() == ()
