"""The operator's I/O parts alone: the queue's order, caches against late lines, the status patch, refusals, the lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from rljob_operator.core.observed import Refusal
from rljob_operator.shell.api import (
    AlreadyExists,
    Conflict,
    Gone,
    NotFound,
    Refused,
    Unavailable,
    WatchEvent,
    _error,
)
from rljob_operator.shell.apply import REFUSED_SECONDS, Memory, merge_patch
from rljob_operator.shell.cache import Cache
from rljob_operator.shell.kinds import POD
from rljob_operator.shell.leader import Leader, LeadershipLost
from rljob_operator.shell.queue import BACKOFF_SECONDS, WorkQueue

LOGGER = logging.getLogger("test")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------------------------------------------------------- queue


async def taken(queue: WorkQueue) -> tuple[str, str] | None:
    try:
        async with asyncio.timeout(0.02):
            return await queue.get()
    except TimeoutError:
        return None


async def test_a_key_is_once_in_the_queue_and_by_one_worker_at_a_time() -> None:
    queue = WorkQueue(lambda: 0.5)
    for _ in range(3):
        queue.add(("a", "x"))
    queue.add(("a", "y"))
    assert queue.depth == 2
    assert await taken(queue) == ("a", "x")
    queue.add(("a", "x"))
    queue.add(("a", "x"))
    assert await taken(queue) == ("a", "y")
    assert await taken(queue) is None, "x is being worked on"
    queue.done(("a", "x"))
    assert await taken(queue) == ("a", "x"), "it changed meanwhile"
    queue.done(("a", "x"))
    assert await taken(queue) is None


async def test_failures_come_again_after_growing_pauses_and_a_success_forgets_them() -> None:
    clock = Clock()
    queue = WorkQueue(lambda: 0.5, clock)
    pauses = []
    queue.add(("a", "x"))
    for _ in range(12):
        assert await taken(queue) == ("a", "x")
        pauses.append(queue.done(("a", "x"), failed=True))
        assert await taken(queue) is None
        clock.now += pauses[-1]
    assert pauses == sorted(pauses)
    assert pauses[0] == BACKOFF_SECONDS[0]
    assert pauses[-1] == BACKOFF_SECONDS[1]
    assert await taken(queue) == ("a", "x")
    queue.done(("a", "x"))
    queue.add(("a", "x"))
    await taken(queue)
    assert queue.done(("a", "x"), failed=True) == BACKOFF_SECONDS[0]


async def test_what_the_apiserver_asks_for_is_waited_for() -> None:
    queue = WorkQueue(lambda: 0.5)
    queue.add(("a", "x"))
    await taken(queue)
    assert queue.done(("a", "x"), failed=True, retry_after=30.0) == 30.0


async def test_of_several_moments_the_earliest_counts_and_each_once() -> None:
    clock = Clock()
    queue = WorkQueue(lambda: 0.5, clock)
    queue.add_after(("a", "x"), 50)
    queue.add_after(("a", "x"), 5)
    queue.add_after(("a", "x"), 500)
    clock.now += 4
    assert await taken(queue) is None
    clock.now += 1
    assert await taken(queue) == ("a", "x")
    queue.done(("a", "x"))
    clock.now += 1000
    assert await taken(queue) is None


async def test_the_oldest_key_is_known_while_it_waits_and_while_it_runs() -> None:
    clock = Clock()
    queue = WorkQueue(lambda: 0.5, clock)
    assert queue.oldest_seconds == 0
    queue.add(("a", "x"))
    clock.now += 7
    assert queue.oldest_seconds == 7
    await taken(queue)
    clock.now += 3
    assert queue.oldest_seconds == 3


# ---------------------------------------------------------------------------------------------------------------- cache


def pod(name: str, uid: str, version: int) -> dict[str, Any]:
    return {"metadata": {"namespace": "a", "name": name, "uid": uid, "resourceVersion": str(version)}}


class FakeApi:
    """Lists and lines of watches, in their order; then it is silent."""

    def __init__(self, lists: list[list[dict[str, Any]]], watches: list[list[WatchEvent | Exception]]) -> None:
        self.lists = lists
        self.watches = watches

    async def list_all(self, *_: Any, **__: Any) -> tuple[list[dict[str, Any]], str]:
        return self.lists.pop(0), "1"

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[WatchEvent]:
        if not self.watches:
            await asyncio.sleep(3600)
        for event in self.watches.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event


async def cached(api: FakeApi) -> tuple[Cache, list[str]]:
    seen: list[str] = []
    cache = Cache(api, POD, None, "", lambda item: seen.append(item["metadata"]["name"]), LOGGER)  # type: ignore[arg-type]
    task = asyncio.create_task(cache.run())
    await asyncio.sleep(0.05)
    task.cancel()
    return cache, seen


def names(cache: Cache) -> list[tuple[str, str]]:
    return sorted((item["metadata"]["name"], item["metadata"]["uid"]) for item in cache.all())


async def test_a_list_after_a_gap_finds_what_went_meanwhile() -> None:
    gone = Gone(410, "Expired", "too old")
    api = FakeApi([[pod("x", "1", 5), pod("y", "2", 6)], [pod("y", "2", 6), pod("z", "3", 9)]], [[gone]])
    cache, seen = await cached(api)
    assert names(cache) == [("y", "2"), ("z", "3")]
    assert seen == ["x", "y", "x", "z"], "each change once, the deletion too"


async def test_a_refused_list_is_no_reason_to_wait_and_no_hot_loop() -> None:
    class Forbidden(FakeApi):
        calls = 0

        async def list_all(self, *_: Any, **__: Any) -> tuple[list[dict[str, Any]], str]:
            self.calls += 1
            raise Refused(403, "Forbidden", "pods is forbidden: User x cannot list resource pods")

    api = Forbidden([], [])
    cache, _ = await cached(api)
    assert cache.synced.is_set() and cache.is_refused
    assert "cannot list resource pods" in cache.error
    assert api.calls == 1


async def test_a_watch_that_is_refused_is_waited_for_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rljob_operator.shell.cache.RELIST_SECONDS", (0.01, 1.0))
    refused = Refused(403, "Forbidden", "cannot watch")
    api = FakeApi([[pod("x", "1", 5)]] * 20, [[refused], [refused], [WatchEvent("OPENED", {})]])
    cache, seen = await cached(api)
    assert 20 - len(api.lists) == 3
    assert not cache.is_refused
    assert seen == ["x", "x"], "once when it is found, and once when the role is mended"


async def test_late_lines_bring_nothing_back() -> None:
    lines: list[WatchEvent | Exception] = [
        WatchEvent("MODIFIED", pod("x", "1", 8)),
        WatchEvent("MODIFIED", pod("x", "1", 7)),
        WatchEvent("DELETED", pod("x", "1", 9)),
    ]
    cache, _ = await cached(FakeApi([[pod("x", "1", 5)]], [lines]))
    assert names(cache) == []
    cache.written(pod("x", "1", 8))
    assert names(cache) == [], "the answer to a write that came before the deletion"
    cache.written(pod("x", "2", 10))
    assert names(cache) == [("x", "2")]


async def test_an_own_write_is_read_at_once_and_an_older_line_does_not_undo_it() -> None:
    cache, _ = await cached(FakeApi([[pod("x", "1", 5)]], []))
    cache.written({**pod("x", "1", 9), "spec": {"new": True}})
    held = cache.get("a", "x")
    assert held is not None and held["spec"] == {"new": True}


# ------------------------------------------------------------------------------------------------------ writes, errors


def test_a_status_patch_says_what_changed_and_takes_away_what_went() -> None:
    before = {"a": 1, "b": {"c": 1, "d": 2}, "list": [1, 2], "gone": 5}
    after = {"a": 1, "b": {"c": 1, "d": 3}, "list": [1], "new": {}}
    assert merge_patch(before, after) == {"b": {"d": 3}, "list": [1], "gone": None, "new": {}}
    assert merge_patch(after, after) == {}


def test_a_refusal_is_remembered_for_its_generation_and_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    refusal = Refusal("Job", "x", 422, "Invalid", "no")
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    memory.refusals["Job", "x"] = (refusal, 3, clock.now)
    assert memory.known(3) == (refusal,)
    clock.now += REFUSED_SECONDS + 1
    assert memory.known(3) == ()
    memory.refusals["Job", "x"] = (refusal, 3, clock.now)
    assert memory.known(4) == (), "the spec has changed"


@pytest.mark.parametrize(
    ("code", "reason", "message", "kind"),
    [
        (404, "NotFound", "", NotFound),
        (409, "AlreadyExists", "", AlreadyExists),
        (409, "Conflict", "", Conflict),
        (410, "Expired", "", Gone),
        (422, "Invalid", "", Refused),
        (403, "Forbidden", "exceeded quota", Refused),
        (403, "Forbidden", "cannot find RESTMapping for APIVersion rljob.dev/v1alpha1", Unavailable),
        (403, "Forbidden", "unable to create new content in namespace x because it is being terminated", Unavailable),
        (429, "TooManyRequests", "", Unavailable),
        (500, "InternalError", "", Unavailable),
        (503, "", "", Unavailable),
    ],
)
def test_what_may_succeed_later_is_told_from_what_will_not(code: int, reason: str, message: str, kind: type) -> None:
    assert type(_error({"reason": reason, "message": message}, code, "create", POD)) is kind


# ---------------------------------------------------------------------------------------------------------------- lease


class LeaseApi:
    """One Lease."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.is_down = False

    async def get(self, *_: Any) -> dict[str, Any]:
        if self.is_down:
            raise Unavailable(0, "Unavailable", "no answer")
        if self.lease is None:
            raise NotFound(404, "NotFound", "")
        return {"metadata": dict(self.lease["metadata"]), "spec": dict(self.lease["spec"])}

    async def create(self, kind: Any, namespace: str, body: Any) -> dict[str, Any]:
        if self.lease is not None:
            raise AlreadyExists(409, "AlreadyExists", "")
        self.lease = {"metadata": {"resourceVersion": "1", "uid": "lease"}, "spec": dict(body["spec"])}
        return self.lease

    async def replace(self, kind: Any, namespace: str, name: str, body: Any) -> dict[str, Any]:
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "")
        version = str(int(self.lease["metadata"]["resourceVersion"]) + 1)
        self.lease = {"metadata": {"resourceVersion": version, "uid": "lease"}, "spec": dict(body["spec"])}
        return self.lease


def candidate(api: LeaseApi, identity: str) -> Leader:
    return Leader(api, "ns", "lease", identity, lambda: datetime(2026, 11, 23, tzinfo=UTC), LOGGER)  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rljob_operator.shell.leader.LEASE_SECONDS", 0.3)
    monkeypatch.setattr("rljob_operator.shell.leader.RENEW_SECONDS", 0.2)
    monkeypatch.setattr("rljob_operator.shell.leader.RETRY_SECONDS", 0.03)


@pytest.mark.usefixtures("quick")
async def test_one_leads_and_the_next_when_it_is_silent_for_a_lease() -> None:
    api = LeaseApi()
    first, second = candidate(api, "a"), candidate(api, "b")
    leading = asyncio.create_task(first.run())
    await first.acquired.wait()
    waiting = asyncio.create_task(second.run())
    await asyncio.sleep(0.5)
    assert first.is_leader() and not second.is_leader()
    leading.cancel()  # killed
    await asyncio.wait_for(second.acquired.wait(), 2)
    assert not first.is_leader(), "by its own clock, before another could take over"
    assert api.lease is not None and api.lease["spec"]["leaseTransitions"] == 1
    waiting.cancel()


@pytest.mark.usefixtures("quick")
async def test_who_cannot_renew_says_so_and_does_not_lead_meanwhile() -> None:
    api = LeaseApi()
    leader = candidate(api, "a")
    task = asyncio.create_task(leader.run())
    await leader.acquired.wait()
    api.is_down = True
    with pytest.raises(LeadershipLost):
        await asyncio.wait_for(task, 2)
    assert not leader.is_leader()


@pytest.mark.usefixtures("quick")
async def test_a_lease_that_is_given_up_is_taken_at_once_also_while_a_renewal_is_on_its_way() -> None:
    api = LeaseApi()
    first = candidate(api, "a")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    replace, conflicts = api.replace, [Conflict(409, "Conflict", "")] * 2

    async def contended(*arguments: Any) -> dict[str, Any]:
        if conflicts:
            raise conflicts.pop()
        return await replace(*arguments)

    api.replace = contended  # type: ignore[method-assign]
    await first.release()
    assert not first.is_leader()
    task.cancel()
    second = candidate(api, "b")
    task = asyncio.create_task(second.run())
    await asyncio.wait_for(second.acquired.wait(), 0.2)
    task.cancel()
