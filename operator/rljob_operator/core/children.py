"""The objects of a running job: what is missing is made, what is no longer wanted goes, what differs is put right."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rljob_api import names
from rljob_api.failure_policy import FailureAction
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.config import config_map, pool_hash
from rljob_operator.core.builders.disruption import disruption_budget
from rljob_operator.core.builders.old_policy_deployment import old_policy_deployment
from rljob_operator.core.builders.rollout_deployment import rollout_deployment
from rljob_operator.core.builders.service import trainer_service
from rljob_operator.core.builders.trainer_job import trainer_job
from rljob_operator.core.failure_policy import judgements
from rljob_operator.core.observed import Deployment, Observed, Pod
from rljob_operator.core.plan import Action, Create, Delete, Merge, Replace
from rljob_operator.core.pods import living
from rljob_operator.core.worker_pools import worker_pools

_HASH_POINTER = "/metadata/annotations/" + names.ANNOTATION_HASH.replace("/", "~1")


def wanted_names(observed: Observed, spec: RLJobSpec) -> tuple[tuple[str, str], ...]:
    """(kind, name) of every child that the job has in its present attempt; the shell looks for strangers by these."""
    job, attempt = observed.identity.name, max(1, observed.status.attempt)
    found = [
        ("Service", names.trainer_service_name(job)),
        ("ConfigMap", names.config_name(job, names.TRAINER_POOL, attempt)),
        ("Job", names.trainer_job_name(job, attempt)),
    ]
    for pool in worker_pools(spec):
        found.append(("Deployment", names.pool_name(job, pool.name)))
        found.append(("ConfigMap", names.config_name(job, pool.name, pool_hash(spec, pool.name))))
    found += [("PodDisruptionBudget", names.pool_name(job, pool.name)) for pool in spec.rollout_pools]
    return tuple(found)


def actions(observed: Observed, spec: RLJobSpec) -> tuple[Action, ...]:
    """In order: the trainer, the pools, what is no longer wanted."""
    return (
        *_trainer(observed, spec),
        *_pools(observed, spec),
        *_unwanted(observed, spec),
        *_failing_pods(observed, spec),
    )


def _trainer(observed: Observed, spec: RLJobSpec) -> Iterator[Action]:
    identity, attempt = observed.identity, observed.status.attempt
    yield from _made(observed, trainer_service(observed))
    for job in observed.trainer_jobs:
        if job.attempt != attempt and not job.is_deleting:
            yield Delete("Job", job.name, job.uid)
    # Never two gangs: the Job comes when nothing of another attempt is left.
    if observed.trainer_jobs or living(observed.trainer_pods, observed.now):
        return
    name = names.config_name(identity.name, names.TRAINER_POOL, attempt)
    yield from _made(observed, config_map(observed, spec, name, pool=names.TRAINER_POOL, attempt=attempt))
    image = observed.status.runtime_image or observed.settings.runtime_image
    yield from _made(observed, trainer_job(observed, spec, attempt, image))


def _pools(observed: Observed, spec: RLJobSpec) -> Iterator[Action]:
    image = observed.status.runtime_image or observed.settings.runtime_image
    for pool in spec.rollout_pools:
        yield from _made(observed, disruption_budget(observed, pool))
        yield from _deployed(observed, spec, pool.name, rollout_deployment(observed, spec, pool, image))
    if spec.old_policy_pool is not None:
        body = old_policy_deployment(observed, spec, spec.old_policy_pool, image)
        yield from _deployed(observed, spec, names.OLD_POLICY_POOL, body)


def _deployed(observed: Observed, spec: RLJobSpec, pool: str, body: dict[str, Any]) -> Iterator[Action]:
    """A pool's Deployment, after the configuration that its pods mount."""
    hashed = pool_hash(spec, pool)
    name = names.config_name(observed.identity.name, pool, hashed)
    yield from _made(observed, config_map(observed, spec, name, pool=pool, attempt=None))
    deployment = next((item for item in observed.deployments if item.pool == pool), None)
    if deployment is None:
        yield from _made(observed, body)
    elif not deployment.is_deleting:
        yield from _brought_up_to_date(observed, deployment, body, hashed)


def _brought_up_to_date(
    observed: Observed, deployment: Deployment, body: dict[str, Any], hashed: str
) -> Iterator[Action]:
    if deployment.template_hash != hashed and not _is_refused(observed, "Deployment", deployment.name):
        # The hash, not the template as it is: an operator that builds templates otherwise leaves running pods alone.
        parts = {"/spec/template": body["spec"]["template"], _HASH_POINTER: hashed}
        yield Replace("Deployment", deployment.name, deployment.uid, deployment.resource_version, parts)
        return  # its resourceVersion has moved on; the next pass scales
    replicas = body["spec"].get("replicas")
    if replicas is None or deployment.replicas == replicas:
        return
    for pod in _victims(observed, deployment.pool, deployment.replicas - replicas):
        cost = {"controller.kubernetes.io/pod-deletion-cost": "-100"}
        yield Merge("Pod", pod.name, pod.uid, {"metadata": {"uid": pod.uid, "annotations": cost}})
    version = {"uid": deployment.uid, "resourceVersion": deployment.resource_version}
    yield Merge("Deployment", deployment.name, deployment.uid, {"metadata": version, "spec": {"replicas": replicas}})


def _victims(observed: Observed, pool: str, number: int) -> tuple[Pod, ...]:
    """Pods that a scale-down takes: those late for their version first, then the youngest."""
    if number <= 0:
        return ()
    coordination = observed.progress.coordination
    late = set(coordination.laggards) if coordination is not None else set()
    pods = [pod for pod in observed.pods_of(pool) if pod.deleted_at is None]
    pods.sort(key=lambda pod: (pod.is_ready, pod.name not in late, -pod.created_at.timestamp(), pod.name))
    return tuple(pods[:number])


def _unwanted(observed: Observed, spec: RLJobSpec) -> Iterator[Action]:
    pools = {pool.name for pool in worker_pools(spec)}
    for deployment in observed.deployments:
        if deployment.pool not in pools and not deployment.is_deleting:
            yield Delete("Deployment", deployment.name, deployment.uid)
    kept = {*wanted_names(observed, spec), *_used_configs(observed)}
    for child in observed.others:
        if (child.kind, child.name) not in kept and not child.is_deleting:
            yield Delete(child.kind, child.name, child.uid)


def _used_configs(observed: Observed) -> Iterator[tuple[str, str]]:
    """Configurations that pods still mount: a container that is started again reads its volume again."""
    job = observed.identity.name
    for pod in observed.pods:
        distinction = pod.template_hash if pod.attempt is None else pod.attempt
        yield "ConfigMap", names.config_name(job, pod.pool, distinction)
    for trainer in observed.trainer_jobs:
        yield "ConfigMap", names.config_name(job, names.TRAINER_POOL, trainer.attempt)
    for deployment in observed.deployments:
        yield "ConfigMap", names.config_name(job, deployment.pool, deployment.template_hash)


def _failing_pods(observed: Observed, spec: RLJobSpec) -> Iterator[Action]:
    """Workers' pods that shall be made anew: those of a pool that a rule restarts, and those that keep crashing."""
    doomed: dict[str, Pod] = {}
    for judgement in judgements(observed, spec):
        failed = judgement.failure
        if judgement.action is FailureAction.RESTART_POOL and failed.at is not None:
            doomed |= {pod.uid: pod for pod in observed.pods_of(failed.pool) if pod.created_at <= failed.at}
    limit = timedelta(seconds=observed.settings.crash_loop_seconds)
    for pod in observed.pods:
        condition = pod.condition("Ready")
        since = None if condition is None else condition.since
        crashing = any(container.waiting == "CrashLoopBackOff" for container in pod.containers)
        if pod.attempt is None and crashing and since is not None and observed.now - since > limit:
            doomed[pod.uid] = pod
    for pod in doomed.values():
        if pod.deleted_at is None:
            yield Delete("Pod", pod.name, pod.uid)


def _made(observed: Observed, body: dict[str, Any]) -> Iterator[Action]:
    """Create it, unless it is there, the name is a stranger's, or the apiserver refused it as it is."""
    kind, name = body["kind"], body["metadata"]["name"]
    present = (
        any((child.kind, child.name) == (kind, name) for child in observed.others)
        or (kind == "Job" and any(job.name == name for job in observed.trainer_jobs))
        or (kind == "Deployment" and any(item.name == name for item in observed.deployments))
    )
    taken = any((stranger.kind, stranger.name) == (kind, name) for stranger in observed.strangers)
    if not (present or taken or _is_refused(observed, kind, name)):
        yield Create(body)


def _is_refused(observed: Observed, kind: str, name: str) -> bool:
    return any((refusal.kind, refusal.name) == (kind, name) for refusal in observed.refusals)
