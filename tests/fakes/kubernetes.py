"""A small Kubernetes in memory, for the operator's core: objects, Job and Deployment controllers, a kubelet, and crashes.

Not an apiserver: no schema, no admission, no watches. What the operator writes is carried out as the shell does it, write
by write, and may be cut off after any of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rljob_api.names import LABEL_ATTEMPT
from rljob_api.status import RLJobStatus
from rljob_api.validate import parse_job
from rljob_operator.core import children, read
from rljob_operator.core.decide import decide
from rljob_operator.core.observed import Clue, Observed, Progress, Refusal, Settings
from rljob_operator.core.plan import Create, Delete, DeleteState, Event, Merge, Plan, Replace

START = datetime(2026, 11, 23, 1, 0, 0, tzinfo=UTC)
SETTINGS = Settings(runtime_image="image:1", nats_url="nats://nats:4222")


class Crash(Exception):
    """The operator was killed."""


class Refused(Exception):
    """A write that the apiserver does not take."""


class FakeKubernetes:
    """One namespace with one RLJob."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.now = START
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self._number = 0
        self.writes = 0
        self.crash_after: int | None = None
        self.was_cut_off = False
        self.events: list[Event] = []
        self.progress = Progress()
        self.known_since: datetime | None = START
        """None: the operator has just started, and has not read NATS yet."""
        self.clues: tuple[Clue, ...] = ()
        self.refusals: tuple[Refusal, ...] = ()
        self.settings = SETTINGS
        self.schedulable: Callable[[dict[str, Any]], bool] = lambda pod: True
        self.nats_deleted = False
        self.gangs: list[set[int]] = []
        """Attempts with a running trainer pod, tick by tick."""
        self.job = self._add({**copy.deepcopy(document), "status": {}})
        self.job["metadata"] |= {"namespace": "team", "generation": 1, "finalizers": []}

    # ------------------------------------------------------------------------------------------------------- the user

    def edit(self, **spec: Any) -> None:
        self.job["spec"] |= copy.deepcopy(spec)
        self.job["metadata"]["generation"] += 1
        self._touch(self.job)

    def delete_job(self) -> None:
        self._delete(self.job)

    # --------------------------------------------------------------------------------------------------- the operator

    @property
    def status(self) -> RLJobStatus:
        return RLJobStatus.model_validate(self.job["status"])

    @property
    def exists(self) -> bool:
        return ("RLJob", self.job["metadata"]["name"]) in self.objects

    def observe(self) -> Observed:
        identity = read.identity(self.job)
        document = {key: copy.deepcopy(self.job[key]) for key in ("apiVersion", "kind", "spec")}
        spec = parse_job({**document, "metadata": {"name": identity.name}}).spec
        ours = [item for item in self.objects.values() if read.is_controlled_by(item, identity.uid)]
        others = [item for item in ours if item["kind"] in ("Service", "ConfigMap", "PodDisruptionBudget")]
        observed = Observed(
            identity=identity,
            spec=spec,
            violations=(),
            status=self.status,
            settings=self.settings,
            now=self.now,
            trainer_jobs=tuple(read.trainer_job(item) for item in ours if item["kind"] == "Job"),
            deployments=tuple(read.deployment(item) for item in ours if item["kind"] == "Deployment"),
            pods=tuple(read.pod(item) for item in self.of_kind("Pod")),
            others=tuple(read.child(item) for item in others),
            clues=self.clues,
            refusals=self.refusals,
            progress=self._progress(),
        )
        strangers = [
            self.objects[key]
            for key in children.wanted_names(observed, spec)
            if key in self.objects and not read.is_controlled_by(self.objects[key], identity.uid)
        ]
        return Observed(
            **{name: getattr(observed, name) for name in observed.__slots__ if name != "strangers"},
            strangers=tuple(read.stranger(item) for item in strangers),
        )

    def _progress(self) -> Progress:
        if self.known_since is None:
            self.known_since = self.now  # by the next pass it will have read it
            return Progress()
        read_at = self.now if self.progress.reachable else None
        return replace(self.progress, known_since=self.known_since, read_at=read_at)

    def reconcile(self) -> Plan:
        """One pass; a crash in it leaves what was written before."""
        plan = decide(self.observe())
        self.was_cut_off = False
        try:
            self._carry_out(plan)
        except Crash:
            self.was_cut_off = True
            self.known_since = None
        except Refused:
            self.was_cut_off = True
        return plan

    def settle(self, *, passes: int = 40) -> None:
        """Passes and the cluster's own work in turn, until nothing moves any more."""
        for _ in range(passes):
            before, knows = self.writes, self.known_since is not None
            plan = self.reconcile()
            moved = self.tick()
            quiet = self.writes == before and not moved and not self.was_cut_off and plan.status is None and knows
            if not self.exists or quiet:
                return
        raise AssertionError(f"it did not settle within {passes} passes: {plan}")

    def _carry_out(self, plan: Plan) -> None:
        if plan.finalizers is not None:
            self._write()
            self.job["metadata"]["finalizers"] = list(plan.finalizers)
            self._touch(self.job)
            self._collect()
            self.events += plan.events
            return
        for action in plan.actions:
            self._write()
            match action:
                case Create(body):
                    key = (body["kind"], body["metadata"]["name"])
                    if key not in self.objects:
                        self._add(copy.deepcopy(dict(body)))
                case Replace(kind, name, uid, resource_version, parts):
                    found = self._found(kind, name, uid)
                    if found["metadata"]["resourceVersion"] != resource_version:
                        raise Refused("conflict")
                    for pointer, value in parts.items():
                        self._put(found, pointer, copy.deepcopy(value))
                    self._touch(found)
                case Merge(kind, name, uid, body):
                    found = self._found(kind, name, uid)
                    wanted = body["metadata"].get("resourceVersion", found["metadata"]["resourceVersion"])
                    if wanted != found["metadata"]["resourceVersion"]:
                        raise Refused("conflict")
                    _merge(found, {**body, "metadata": {**body["metadata"], "resourceVersion": wanted}})
                    self._touch(found)
                case Delete(kind, name, uid):
                    self._delete(self._found(kind, name, uid))
                case DeleteState():
                    self.nats_deleted = True
                    self.progress = Progress(state_is_gone=True)
        if plan.status is not None:
            self._write()
            self.job["status"] = plan.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            self._touch(self.job)
        self.events += plan.events

    def _write(self) -> None:
        if self.crash_after is not None and self.writes >= self.crash_after:
            self.crash_after = None
            raise Crash
        self.writes += 1

    # ------------------------------------------------------------------------------------------------ the cluster's work

    def tick(self, seconds: float = 1.0) -> bool:
        """The controllers and the kubelet do one round; whether anything moved."""
        self.now += timedelta(seconds=seconds)
        before = self._number
        self._collect()
        for job in self.of_kind("Job"):
            self._run_job(job)
        for deployment in self.of_kind("Deployment"):
            self._run_deployment(deployment)
        for pod in self.of_kind("Pod"):
            self._run_pod(pod)
        running = [pod for pod in self.of_kind("Pod") if pod["status"].get("phase") == "Running"]
        self.gangs.append({read.pod(pod).attempt or 0 for pod in running if LABEL_ATTEMPT in pod["metadata"]["labels"]})
        return self._number != before

    def pods(self, pool: str) -> list[dict[str, Any]]:
        return [pod for pod in self.of_kind("Pod") if read.pod(pod).pool == pool]

    def end(self, pod: dict[str, Any], code: int, message: str = "", *, reason: str = "Error") -> None:
        """The pod's container ends; the pod with it, where it is not started again."""
        terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": _text(self.now)}
        name = pod["spec"]["containers"][0]["name"]
        if pod["spec"]["restartPolicy"] == "Always":
            count = (pod["status"].get("containerStatuses") or [{}])[0].get("restartCount", 0) + 1
            status = {"name": name, "restartCount": count, "lastState": {"terminated": terminated}, "ready": True}
            pod["status"]["containerStatuses"] = [status]
        else:
            pod["status"] |= {"phase": "Succeeded" if code == 0 else "Failed", "conditions": []}
            pod["status"]["containerStatuses"] = [{"name": name, "state": {"terminated": terminated}}]
        self._touch(pod)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [item for (found, _), item in sorted(self.objects.items()) if found == kind]

    def _run_job(self, job: dict[str, Any]) -> None:
        pods = [pod for pod in self.of_kind("Pod") if read.is_controlled_by(pod, job["metadata"]["uid"])]
        status = job.setdefault("status", {})
        phases = [pod["status"].get("phase") for pod in pods]
        if status.get("conditions"):
            return
        wanted = job["spec"]["completions"]
        if "Failed" in phases:
            status["conditions"] = [
                {"type": "Failed", "status": "True", "message": "Job has reached the backoff limit"}
            ]
            for pod in pods:
                if pod["status"].get("phase") not in ("Succeeded", "Failed"):
                    self._delete(pod)
            self._touch(job)
        elif phases.count("Succeeded") == wanted:
            status["conditions"] = [{"type": "Complete", "status": "True", "lastTransitionTime": _text(self.now)}]
            self._touch(job)
        elif not pods:
            for index in range(wanted):
                self._add_pod(job, f"{job['metadata']['name']}-{index}")

    def _run_deployment(self, deployment: dict[str, Any]) -> None:
        spec = deployment["spec"]
        pods = [pod for pod in self.of_kind("Pod") if read.is_controlled_by(pod, deployment["metadata"]["uid"])]
        alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        wanted = spec.get("replicas", 1)
        hashed = spec["template"]["metadata"]["annotations"]
        old = [pod for pod in alive if pod["metadata"]["annotations"] != hashed]
        if old and len(pods) == len(alive):
            self._delete(old[0])
        alive.sort(key=lambda pod: int(_cost(pod)))
        for pod in alive[: max(0, len(alive) - wanted)]:
            self._delete(pod)
        for _ in range(wanted - len(pods)):
            self._number += 1
            self._add_pod(deployment, f"{deployment['metadata']['name']}-{self._number}")

    def _run_pod(self, pod: dict[str, Any]) -> None:
        if "phase" not in pod["status"]:
            pod["status"]["phase"] = "Pending"
            self._touch(pod)
        elif pod["status"]["phase"] == "Pending" and self.schedulable(pod):
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": _text(self.now)}
            pod["status"] |= {"phase": "Running", "conditions": [ready]}
            self._touch(pod)

    def _collect(self) -> None:
        """What is being deleted goes, and what its owner left behind."""
        while True:
            uids = {item["metadata"]["uid"] for item in self.objects.values()}
            gone = [
                key
                for key, item in self.objects.items()
                if self._is_gone(item)
                or (
                    any(owner["uid"] not in uids for owner in item["metadata"].get("ownerReferences") or ())
                    and not item["metadata"].get("held")
                )
            ]
            for key in gone:
                del self.objects[key]
                self._number += 1
            if not gone:
                return

    def _is_gone(self, item: dict[str, Any]) -> bool:
        meta = item["metadata"]
        return "deletionTimestamp" in meta and not meta.get("finalizers") and not meta.get("held")

    # ---------------------------------------------------------------------------------------------------------- objects

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """An object of somebody else's."""
        return self._add(copy.deepcopy(body))

    def _add_pod(self, owner: dict[str, Any], name: str) -> None:
        template = copy.deepcopy(owner["spec"]["template"])
        reference = {"kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        template["metadata"] |= {"name": name, "ownerReferences": [{**reference, "controller": True}]}
        self._add({"kind": "Pod", **template, "status": {}})

    def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        body["metadata"] = {**body["metadata"], "uid": f"uid-{self._number}", "creationTimestamp": _text(self.now)}
        self.objects[(body["kind"], body["metadata"]["name"])] = body
        self._touch(body)
        return body

    def _found(self, kind: str, name: str, uid: str) -> dict[str, Any]:
        found = self.objects.get((kind, name))
        if found is None or found["metadata"]["uid"] != uid:
            raise Refused(f"{kind} {name} of uid {uid} is not there")
        return found

    def _delete(self, item: dict[str, Any]) -> None:
        item["metadata"].setdefault("deletionTimestamp", _text(self.now))
        self._touch(item)

    def _touch(self, item: dict[str, Any]) -> None:
        self._number += 1
        item["metadata"]["resourceVersion"] = str(self._number)

    def _put(self, item: dict[str, Any], pointer: str, value: Any) -> None:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
        target = item
        for part in parents:
            target = target[part]
        assert last in target, f"a JSON patch cannot replace {pointer}, which is not there"
        target[last] = value


def crash_points(
    play: Callable[[FakeKubernetes], None], make: Callable[[], FakeKubernetes]
) -> Iterator[tuple[int, FakeKubernetes]]:
    """The play once without a crash (as number -1), then once for each write, with a crash right before it."""
    smooth = make()
    play(smooth)
    yield -1, smooth
    for number in range(smooth.writes):
        cluster = make()
        cluster.crash_after = number
        play(cluster)
        yield number, cluster


def _merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        elif value is None:
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(value)


def _cost(pod: dict[str, Any]) -> str:
    return str((pod["metadata"].get("annotations") or {}).get("controller.kubernetes.io/pod-deletion-cost", "0"))


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
