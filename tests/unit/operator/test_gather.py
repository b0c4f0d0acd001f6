"""One look at a job: what is its own, what only bears its label, what Events say of what is stuck, and /healthz."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry
from tests.unit.api.documents import changed

from rljob_operator.core.observed import Clue, Observed, Progress, Settings
from rljob_operator.shell import http
from rljob_operator.shell.api import NotFound, Unavailable
from rljob_operator.shell.clues import MAX_ASKED, Clues
from rljob_operator.shell.gather import Gather
from rljob_operator.shell.kinds import DEPLOYMENT, EVENT, JOB, POD, WATCHED, Kind
from rljob_protocol.server import free_port

NOW = datetime(2026, 11, 23, 1, 0, 0, tzinfo=UTC)
UID = "uid-1"
CLAIM = {"spec.storage.checkpoint.persistentVolumeClaim": {"claimName": "ckpt"}}


def rljob(status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    document = changed(CLAIM)
    document["metadata"] |= {
        "namespace": "team",
        "uid": UID,
        "generation": 1,
        "resourceVersion": "5",
        "creationTimestamp": NOW.isoformat(),
        **metadata,
    }
    return {**document, "status": status or {}}


def item(kind: str, name: str, *, uid: str = UID, age: float = 0, **fields: Any) -> dict[str, Any]:
    """An object with the job's label, controlled by `uid`."""
    return {
        "kind": kind,
        "metadata": {
            "namespace": "team",
            "name": name,
            "uid": f"{kind}-{name}",
            "resourceVersion": "1",
            "creationTimestamp": (NOW - timedelta(seconds=age)).isoformat(),
            "labels": {"rljob.dev/name": "job", "rljob.dev/pool": "main", "rljob.dev/attempt": "1"},
            "ownerReferences": [{"kind": "RLJob", "name": "job", "uid": uid, "controller": True}],
        },
        "spec": {},
        **fields,
    }


class FakeCache:
    def __init__(self, items: Iterable[dict[str, Any]] = (), error: str = "") -> None:
        self.items = list(items)
        self.error = error
        self.is_refused = bool(error)

    def in_namespace(self, namespace: str) -> list[dict[str, Any]]:
        return [found for found in self.items if found["metadata"]["namespace"] == namespace]


class FakeApi:
    def __init__(self, objects: Iterable[dict[str, Any]] = (), events: Iterable[dict[str, Any]] = ()) -> None:
        self.objects = {(found["kind"], found["metadata"]["name"]): found for found in objects}
        self.events = list(events)
        self.gets: list[tuple[str, str]] = []
        self.lists: list[str] = []
        self.is_away = False

    async def get(self, kind: Kind, _namespace: str, name: str) -> dict[str, Any]:
        self.gets.append((kind.name, name))
        if (kind.name, name) not in self.objects:
            raise NotFound(404, "NotFound", name)
        return copy.deepcopy(self.objects[(kind.name, name)])

    async def list_all(self, kind: Kind, namespace: str, *, fields: str) -> tuple[list[dict[str, Any]], str]:
        assert (kind, namespace) == (EVENT, "team")
        self.lists.append(fields)
        if self.is_away:
            raise Unavailable(0, "", "no answer")
        return [event for event in self.events if f"involvedObject.uid={event['uid']}," in fields], "1"


class FakeCoordination:
    def progress(self, uid: str) -> Progress:
        return Progress(known_since=NOW) if uid == UID else Progress()


async def look(
    document: dict[str, Any], caches: dict[Kind, FakeCache] | None = None, api: FakeApi | None = None
) -> Observed:
    all_caches: Any = {kind: FakeCache() for kind in WATCHED} | (caches or {})
    made: Any = api or FakeApi()
    gather = Gather(made, all_caches, Clues(made), FakeCoordination(), Settings("image:1", "nats://x"), lambda: NOW)  # type: ignore[arg-type]
    return await gather.observe(document)


async def test_an_object_with_our_label_and_anothers_uid_is_not_among_ours() -> None:
    caches = {JOB: FakeCache([item("Job", "job-trainer-1", uid="former"), item("Job", "job-trainer-2")])}
    seen = await look(rljob(), caches)
    assert [job.name for job in seen.trainer_jobs] == ["job-trainer-2"]
    assert seen.progress.known_since == NOW


async def test_a_wanted_name_that_a_stranger_holds_is_found_and_told_with_its_owner() -> None:
    theirs = {
        "metadata": {"name": "job-trainer", "ownerReferences": [{"kind": "Shop", "name": "a", "controller": True}]}
    }
    api = FakeApi([{"kind": "Service", **theirs}])
    seen = await look(rljob({"attempt": 1}), api=api)
    assert [(found.kind, found.name, found.owner) for found in seen.strangers] == [("Service", "job-trainer", "Shop a")]


async def test_children_that_are_there_cost_no_call_and_a_job_that_never_started_none_at_all() -> None:
    api = FakeApi()
    await look(rljob({"attempt": 1}), {DEPLOYMENT: FakeCache([item("Deployment", "job-main")])}, api)
    assert ("Deployment", "job-main") not in api.gets and ("Service", "job-trainer") in api.gets
    before = FakeApi()
    await look(rljob(), api=before)
    assert before.gets == []
    leaving = FakeApi()
    await look(rljob({"attempt": 1}, deletionTimestamp=NOW.isoformat()), api=leaving)
    assert leaving.gets == []


async def test_a_kind_that_may_not_be_read_is_named_and_no_stranger_is_guessed() -> None:
    api = FakeApi()
    caches = {POD: FakeCache(error="pods is forbidden")}
    seen = await look(rljob({"attempt": 1}), caches, api)
    assert seen.unseen == "pods is forbidden" and api.gets == []


async def test_a_spec_that_is_refused_comes_with_its_violations() -> None:
    document = rljob()
    document["spec"]["training"]["steps"] = 0
    seen = await look(document)
    assert seen.spec is None
    assert [violation.path for violation in seen.violations] == ["spec.training.steps"]


PENDING = {"phase": "Pending"}
PULLING = {"phase": "Pending", "containerStatuses": [{"name": "rollout", "state": {"waiting": {"reason": "X"}}}]}
RUNNING = {"phase": "Running", "containerStatuses": [{"name": "rollout", "state": {"running": {}}}]}


def event(uid: str, reason: str, message: str, at: str = "2026-11-23T01:00:00Z") -> dict[str, Any]:
    return {"uid": uid, "reason": reason, "message": message, "lastTimestamp": at, "metadata": {}}


async def test_events_are_asked_for_only_of_what_is_stuck_for_a_while() -> None:
    pods = [
        item("Pod", "new", age=5, status=PENDING),
        item("Pod", "old", age=40, status=PENDING),
        item("Pod", "pulling", age=40, status=PULLING),
        item("Pod", "running", age=400, status=RUNNING),
    ]
    api = FakeApi(
        events=[
            event("Pod-old", "FailedMount", "no secret", "2026-11-23T00:59:00Z"),
            event("Pod-old", "FailedMount", 'secret "x" not found', "2026-11-23T01:00:00Z"),
            event("Pod-old", "BackOff", "told elsewhere", "2026-11-23T01:00:01Z"),
        ]
    )
    seen = await look(rljob(), {POD: FakeCache(pods)}, api)
    assert sorted(fields.split(",")[0] for fields in api.lists) == [
        "involvedObject.uid=Pod-old",
        "involvedObject.uid=Pod-pulling",
    ]
    assert seen.clues == (Clue("Pod", "old", "FailedMount", 'secret "x" not found'),)


async def test_a_deployment_that_cannot_make_pods_says_so_itself() -> None:
    failing = {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]}
    seen = await look(rljob(), {DEPLOYMENT: FakeCache([item("Deployment", "job-main", status=failing)])})
    assert seen.clues == (Clue("Deployment", "job-main", "ReplicaFailure", "exceeded quota"),)


async def test_events_are_asked_for_once_in_a_while_and_of_a_few() -> None:
    api = FakeApi()
    clues = Clues(api)  # type: ignore[arg-type]
    stuck = [item("Pod", f"p{number}") for number in range(20)]
    for _ in range(3):
        assert await clues.of(stuck) == ()
    assert len(api.lists) == MAX_ASKED
    api.is_away = True
    assert await Clues(api).of(stuck) == ()  # type: ignore[arg-type]


async def test_health_names_what_is_stuck_and_metrics_are_refreshed_on_each_look() -> None:
    port, words, refreshed = free_port(), [""], [0]

    def refresh() -> None:
        refreshed[0] += 1

    async def get(path: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        return answer

    serving = asyncio.create_task(http.serve(port, CollectorRegistry(), lambda: words[0], refresh))
    try:
        await asyncio.sleep(0.1)
        assert (await get("/healthz")).startswith("HTTP/1.1 200 OK")
        words[0] = "the watch of pods has been silent for 400 s"
        answer = await get("/healthz?verbose")
        assert answer.startswith("HTTP/1.1 503") and answer.endswith(words[0] + "\n")
        assert (await get("/metrics")).startswith("HTTP/1.1 200 OK") and refreshed == [1]
        assert (await get("/")).startswith("HTTP/1.1 404")
    finally:
        serving.cancel()
