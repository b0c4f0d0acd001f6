"""One look at everything that `decide` may see: caches, Events of what is stuck, what training reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from rljob_api.errors import SpecError, Violation
from rljob_api.names import LABEL_NAME
from rljob_api.spec import RLJobSpec
from rljob_api.status import RLJobStatus
from rljob_api.validate import parse_job, violations_on_cluster
from rljob_operator.core import children, read
from rljob_operator.core.observed import Clue, Observed, Refusal, Settings
from rljob_operator.shell.api import Api, NotFound, Object
from rljob_operator.shell.cache import Cache
from rljob_operator.shell.clues import STUCK_SECONDS, Clues
from rljob_operator.shell.coordination import Coordination
from rljob_operator.shell.kinds import BY_NAME, CHILDREN, POD, RLJOB, Kind

Caches = Mapping[Kind, Cache]


class Gather:
    """Looks; writes nothing."""

    def __init__(
        self,
        api: Api,
        caches: Caches,
        clues: Clues,
        coordination: Coordination,
        settings: Settings,
        wall_clock: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._caches = caches
        self._clues = clues
        self._coordination = coordination
        self._settings = settings
        self._wall_clock = wall_clock

    async def observe(
        self, rljob: Object, refusals: tuple[Refusal, ...] = (), pruned: tuple[str, ...] = ()
    ) -> Observed:
        """The job as it is now.

        Raises:
            ApiError: the apiserver does not answer.
        """
        identity = read.identity(rljob)
        spec, violations = _spec_of(rljob)
        ours = [item for kind in CHILDREN for item in self._of_job(kind, identity.namespace, identity.name)]
        ours = [item for item in ours if read.is_controlled_by(item, identity.uid)]
        jobs = [item for item in ours if item["kind"] == "Job"]
        deployments = [item for item in ours if item["kind"] == "Deployment"]
        pods = list(self._of_job(POD, identity.namespace, identity.name))
        observed = Observed(
            identity=identity,
            spec=spec,
            violations=violations,
            status=RLJobStatus.model_validate(rljob.get("status") or {}),
            settings=self._settings,
            now=self._wall_clock(),
            trainer_jobs=tuple(sorted(map(read.trainer_job, jobs), key=lambda job: job.attempt)),
            deployments=tuple(sorted(map(read.deployment, deployments), key=lambda item: item.name)),
            pods=tuple(sorted(map(read.pod, pods), key=lambda pod: pod.name)),
            others=tuple(read.child(item) for item in ours if item["kind"] not in ("Job", "Deployment")),
            clues=await self._told(pods, jobs, deployments),
            refusals=refusals,
            pruned=pruned,
            unseen=next((cache.error for cache in self._caches.values() if cache.is_refused), ""),
            progress=self._coordination.progress(identity.uid),
        )
        if spec is None or identity.deleted_at is not None or observed.unseen:
            return observed
        return replace(
            observed, strangers=tuple([read.stranger(item) for item in await self._strangers(observed, spec)])
        )

    def _of_job(self, kind: Kind, namespace: str, name: str) -> Iterable[Object]:
        for item in self._caches[kind].in_namespace(namespace):
            if (item["metadata"].get("labels") or {}).get(LABEL_NAME) == name:
                yield item

    async def _strangers(self, observed: Observed, spec: RLJobSpec) -> list[Object]:
        """Asked for only where a wanted child is not among ours: caches hold labelled objects, strangers have no label."""
        here = {(child.kind, child.name) for child in observed.others}
        here |= {("Job", job.name) for job in observed.trainer_jobs}
        here |= {("Deployment", item.name) for item in observed.deployments}
        found = []
        for kind, name in children.wanted_names(observed, spec):
            if (kind, name) in here or observed.status.attempt == 0:
                continue
            try:
                item = await self._api.get(BY_NAME[kind], observed.identity.namespace, name)
            except NotFound:
                continue
            if not read.is_controlled_by(item, observed.identity.uid):
                found.append({**item, "kind": kind})
        return found

    async def _told(self, pods: list[Object], jobs: list[Object], deployments: list[Object]) -> tuple[Clue, ...]:
        limit = self._wall_clock() - timedelta(seconds=STUCK_SECONDS)
        stuck = [item for item in pods if _is_stuck_pod(item) and _created(item) < limit]
        stuck += [item for item in jobs if not (item.get("status") or {}).get("active") and _created(item) < limit]
        clues = list(await self._clues.of(stuck))
        for item in deployments:
            for condition in (item.get("status") or {}).get("conditions") or ():
                if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
                    name = item["metadata"]["name"]
                    clues.append(Clue("Deployment", name, "ReplicaFailure", condition.get("message") or ""))
        return tuple(clues)


def rljobs(caches: Caches) -> Iterable[Object]:
    """All RLJobs."""
    return caches[RLJOB].all()


def _spec_of(rljob: Object) -> tuple[RLJobSpec | None, tuple[Violation, ...]]:
    document = {
        "apiVersion": rljob["apiVersion"],
        "kind": rljob["kind"],
        "metadata": {"name": rljob["metadata"]["name"]},
        "spec": rljob.get("spec"),
    }
    violations = violations_on_cluster(document)
    if violations:
        return None, violations
    try:
        return parse_job(document).spec, ()
    except SpecError as error:
        return None, error.violations


def _is_stuck_pod(pod: Object) -> bool:
    status = pod.get("status") or {}
    waits = any("waiting" in (item.get("state") or {}) for item in status.get("containerStatuses") or ())
    return status.get("phase") == "Pending" and (waits or not status.get("containerStatuses"))


def _created(item: Object) -> datetime:
    return datetime.fromisoformat(item["metadata"]["creationTimestamp"])
