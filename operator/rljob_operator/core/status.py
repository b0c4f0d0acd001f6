"""The status of one look: what is observed is summarised anew each time; attempt, restarts and conditions are carried on.

Each condition's message is a sentence, with the next action where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from rljob_api.conditions import Condition, condition_of, set_condition
from rljob_api.messages import StepReport
from rljob_api.names import OLD_POLICY_POOL, TRAINER_POOL, pool_name
from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_api.status import (
    MAX_LAGGARDS,
    MAX_SERVING_VERSIONS,
    ColumnStatus,
    CorrectionStatus,
    PoolStatus,
    RLJobStatus,
    ServingVersion,
    StalenessStatus,
    TokenCounts,
    WeightStatus,
)
from rljob_operator.core import stuck
from rljob_operator.core.observed import Observed, Pod
from rljob_operator.core.pods import living
from rljob_operator.core.worker_pools import WorkerPool, old_policy_pools, rollout_pools, worker_pools

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one condition shall say."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: str


def text_of(moment: datetime) -> str:
    """RFC 3339, UTC, whole seconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(text: str) -> datetime:
    """The inverse of `text_of`, with its time zone."""
    return datetime.fromisoformat(text)


def with_conditions(observed: Observed, status: RLJobStatus, *verdicts: Verdict) -> RLJobStatus:
    """The status with these conditions set, and observedGeneration."""
    conditions = status.conditions
    for verdict in verdicts:
        new = Condition(
            type=verdict.type,
            status=verdict.status,
            reason=verdict.reason,
            message=verdict.message,
            observed_generation=observed.identity.generation,
        )
        conditions = set_condition(conditions, new, text_of(observed.now))
    return changed(status, conditions=conditions, observed_generation=observed.identity.generation)


def changed(part: T, **fields: Any) -> T:
    """The status, or a part of it, with these fields replaced."""
    return part.model_copy(update=fields)


def is_urgent(before: RLJobStatus, after: RLJobStatus) -> bool:
    """Whether more than progress changed: a condition's status or reason, a counter, the generation, an end."""

    def gist(status: RLJobStatus) -> object:
        conditions = {condition.type: (condition.status, condition.reason) for condition in status.conditions}
        return (
            status.observed_generation,
            status.start_time,
            status.started_time,
            status.completion_time,
            status.attempt,
            status.runtime_image,
            status.restarts,
            status.final_model,
            conditions,
        )

    return gist(before) != gist(after)


def reason_of(status: RLJobStatus, kind: ConditionType) -> str | None:
    """Reason of a condition, where it is set."""
    condition = condition_of(status.conditions, kind)
    return None if condition is None else condition.reason


def holds(status: RLJobStatus, kind: ConditionType) -> bool:
    """Whether the condition is True."""
    condition = condition_of(status.conditions, kind)
    return condition is not None and condition.status == "True"


def running_parts(spec: RLJobSpec | None) -> tuple[ConditionType, ...]:
    """The conditions that all hold while the job runs as asked; once they did, it has started."""
    parts = (ConditionType.TRAINER_READY, ConditionType.ROLLOUTS_READY)
    return (*parts, ConditionType.OLD_POLICY_READY) if spec is not None and spec.old_policy_pool is not None else parts


# ------------------------------------------------------------------------------------------------------------ observing


def summarised(observed: Observed, spec: RLJobSpec, status: RLJobStatus) -> RLJobStatus:
    """The status with everything that can be seen again brought up to date; conditions of the parts included."""
    progress = observed.progress
    step = progress.step
    pools = tuple(_pool(observed, spec, pool) for pool in worker_pools(spec))
    rollouts = [pool for pool in pools if pool.name != OLD_POLICY_POOL]
    ready = sum(pool.ready for pool in rollouts)
    desired = sum(pool.desired for pool in rollouts)
    weights = _weights(observed, status)
    staleness = status.staleness
    correction = status.correction
    throughput = status.throughput
    if step is not None:
        staleness = StalenessStatus(p50=step.staleness.p50, p95=step.staleness.p95, max=step.staleness.max)
        seconds = step.seconds_total
        idle = 0 if seconds <= 0 else round(100 * step.seconds_waiting / seconds)
        throughput = changed(throughput, trainer_idle_percent=max(0, min(100, idle)))
        correction = _correction(observed, spec, status)
    coordination = progress.coordination
    if coordination is not None and coordination.workers:
        workers = coordination.workers
        throughput = changed(throughput, tokens_per_second=round(sum(worker.tokens_per_second for worker in workers)))
        if step is not None and step.step != status.step:
            # Only with a step: it is a mean over the worker's life, and would cost a write a minute where nothing moves.
            idle_share = sum(worker.idle_share for worker in workers) / len(workers)
            throughput = changed(throughput, rollout_idle_percent=max(0, min(100, round(100 * idle_share))))
    trainer = [pod for pod in observed.trainer_pods if pod.attempt == status.attempt]
    trainer_ready = sum(pod.is_ready for pod in trainer)
    live = len(coordination.workers) if coordination is not None else 0
    columns = ColumnStatus(
        converged=f"{weights.converged_pods}/{live}",
        staleness=f"{staleness.p50}/{staleness.p95}/{staleness.max}" if step is not None else "",
        rollouts=f"{ready}/{desired}",
        trainer=f"{trainer_ready}/{spec.trainer.replicas}",
    )
    result = changed(
        status,
        step=status.step if step is None else step.step,
        weights=weights,
        staleness=staleness,
        correction=correction,
        throughput=throughput,
        pools=pools,
        checkpoint=progress.checkpoint or status.checkpoint,
        columns=columns,
    )
    return with_conditions(
        observed,
        result,
        _trainer_verdict(observed, spec, trainer),
        _rollouts_verdict(observed, spec, pools),
        *_old_policy_verdict(observed, spec, pools),
        _converged_verdict(observed),
        _degraded_verdict(observed),
    )


def _pool(observed: Observed, spec: RLJobSpec, pool: WorkerPool) -> PoolStatus:
    pods = [pod for pod in observed.pods_of(pool.name) if pod.deleted_at is None]
    deployment = next((item for item in observed.deployments if item.pool == pool.name), None)
    desired = pool.replicas if pool.replicas is not None else (deployment.replicas if deployment is not None else 0)
    coordination = observed.progress.coordination
    late = coordination.laggards if coordination is not None else ()
    names = {pod.name for pod in pods}
    return PoolStatus(
        name=pool.name,
        desired=0 if spec.suspend else desired,
        ready=sum(pod.is_ready for pod in pods),
        restarts=sum(container.restarts for pod in pods for container in pod.containers),
        laggards=tuple(worker for worker in late if worker in names)[:MAX_LAGGARDS],
    )


def _weights(observed: Observed, status: RLJobStatus) -> WeightStatus:
    coordination = observed.progress.coordination
    if coordination is None:
        return status.weights
    published, desired = coordination.published, coordination.desired
    return WeightStatus(
        epoch=status.weights.epoch if published is None else published.epoch,
        published=None if published is None else published.version,
        desired=None if desired is None else desired.version,
        converged_pods=coordination.converged,
        serving_versions=tuple(
            ServingVersion(version=version, pods=pods) for version, pods in coordination.serving[:MAX_SERVING_VERSIONS]
        ),
    )


def _correction(observed: Observed, spec: RLJobSpec, status: RLJobStatus) -> CorrectionStatus:
    step, coordination = observed.progress.step, observed.progress.coordination
    assert step is not None
    tokens = status.correction.tokens
    interruptions = status.correction.interruptions
    lost = tokens.lost
    salvaged = tokens.salvaged
    if coordination is not None:
        interruptions = coordination.totals.interruptions
        salvaged = coordination.totals.tokens_salvaged
        lost = coordination.totals.tokens_lost + coordination.crashed_tokens
    return CorrectionStatus(
        route=spec.correction.old_logprobs,
        exact_fraction=f"{step.exact_fraction:.3f}",
        keep_fraction=f"{step.keep_fraction:.3f}",
        clip_fraction=f"{step.clip_fraction:.3f}",
        pooled_fraction=_pooled(step),
        leak=status.correction.leak if step.audit is None else f"{step.audit.leak_rms:.7f}",
        interruptions=interruptions,
        tokens=TokenCounts(
            trained=step.tokens_trained,
            dropped=sum(step.tokens_dropped.values()),
            salvaged=salvaged,
            lost=lost,
        ),
    )


def _pooled(step: StepReport) -> str | None:
    pool = step.pool
    return None if pool is None or pool.stale_tokens == 0 else f"{pool.pooled_tokens / pool.stale_tokens:.3f}"


# ----------------------------------------------------------------------------------------------- conditions of the parts


def _trainer_verdict(observed: Observed, spec: RLJobSpec, pods: list[Pod]) -> Verdict:
    # Pods that have ended well are no gap: their Job is about to be complete.
    ready = sum(pod.is_ready or pod.has_ended_well for pod in pods)
    wanted = spec.trainer.replicas
    if ready >= wanted:
        return Verdict(
            ConditionType.TRAINER_READY, "True", Reason.RUNNING, _count(wanted, "trainer pod runs", "trainer pods run")
        )
    clues = [w for w in observed.clues if w.kind == "Job" or any(w.name == pod.name for pod in pods)]
    cause = stuck.cause(living(pods, observed.now), clues)
    if cause is not None:
        return Verdict(ConditionType.TRAINER_READY, "False", cause.reason, cause.message)
    return Verdict(
        ConditionType.TRAINER_READY, "False", Reason.PODS_NOT_READY, f"{ready} of {wanted} trainer pods run."
    )


def _rollouts_verdict(observed: Observed, spec: RLJobSpec, pools: tuple[PoolStatus, ...]) -> Verdict:
    kind, ready = ConditionType.ROLLOUTS_READY, {pool.name: pool.ready for pool in pools}
    missing = [pool for pool in rollout_pools(spec) if ready[pool.name] < pool.least]
    if not missing:
        number = sum(ready[pool.name] for pool in rollout_pools(spec))
        return Verdict(kind, "True", Reason.RUNNING, _count(number, "rollout pod is ready", "rollout pods are ready"))
    pods = [pod for pod in observed.pods if pod.pool not in (TRAINER_POOL, OLD_POLICY_POOL)]
    others = pool_name(observed.identity.name, OLD_POLICY_POOL)
    clues = [clue for clue in observed.clues if clue.kind != "Job" and clue.name != others]
    cause = stuck.cause([pod for pod in living(pods, observed.now) if not pod.is_ready], clues)
    if cause is not None:
        return Verdict(kind, "False", cause.reason, cause.message)
    first = missing[0]
    return Verdict(
        kind,
        "False",
        Reason.PODS_NOT_READY,
        f"Pool {first.name} has {ready[first.name]} ready pods of the {first.least} that minReplicas asks for.",
    )


def _old_policy_verdict(observed: Observed, spec: RLJobSpec, pools: tuple[PoolStatus, ...]) -> Iterator[Verdict]:
    """Of a job that has such a pool."""
    kind = ConditionType.OLD_POLICY_READY
    for pool in old_policy_pools(spec):
        ready = next(status.ready for status in pools if status.name == pool.name)
        if ready >= pool.least:
            said = _count(ready, "old-policy worker is ready", "old-policy workers are ready")
            yield Verdict(kind, "True", Reason.RUNNING, said)
            continue
        own = pool_name(observed.identity.name, pool.name)
        pods = [pod for pod in living(observed.pods_of(pool.name), observed.now) if not pod.is_ready]
        cause = stuck.cause(pods, [clue for clue in observed.clues if clue.kind == "Pod" or clue.name == own])
        if cause is not None:
            yield Verdict(kind, "False", cause.reason, cause.message)
        else:
            said = f"Pool {pool.name} has {ready} ready pods of the {pool.least} that the job needs."
            yield Verdict(kind, "False", Reason.PODS_NOT_READY, said)


def _converged_verdict(observed: Observed) -> Verdict:
    kind, coordination = ConditionType.WEIGHTS_CONVERGED, observed.progress.coordination
    if coordination is None or coordination.desired is None:
        return Verdict(kind, "Unknown", Reason.PENDING, "No weight version has been published yet.")
    live = len(coordination.workers)
    if live and coordination.converged >= live:
        return Verdict(kind, "True", Reason.CONVERGED, "Every live rollout worker serves the desired version.")
    if coordination.laggards:
        named = ", ".join(coordination.laggards[:MAX_LAGGARDS])
        return Verdict(
            kind,
            "False",
            Reason.LAGGING_WORKERS,
            f"Workers are late for their version (weightSync.timeoutSeconds) and are started again: {named}.",
        )
    if not live:
        return Verdict(kind, "False", Reason.SYNCING, "No rollout worker is there yet.")
    # No numbers that change with each version: a message must not cost a write.
    return Verdict(kind, "False", Reason.SYNCING, "Rollout workers are on their way to the desired version.")


def _degraded_verdict(observed: Observed) -> Verdict:
    kind, progress = ConditionType.DEGRADED, observed.progress
    if observed.pruned:
        return Verdict(
            kind,
            "True",
            Reason.CRD_OUTDATED,
            f"The installed CRD does not know {', '.join(observed.pruned[:MAX_LAGGARDS])} of the status: it is older than "
            "the operator. Install the CRD of the operator's version.",
        )
    if not progress.reachable:
        because = f": {progress.unreachable_because}" if progress.unreachable_because else ""
        return Verdict(
            kind,
            "True",
            Reason.MESSAGING_UNAVAILABLE,
            f"The operator cannot reach the job's NATS server{because}. Check messaging.url, the server and its credentials; "
            "pods go on by themselves as long as they reach it.",
        )
    coordination = progress.coordination
    if coordination is not None and coordination.quarantined:
        versions = ", ".join(str(version) for version in coordination.quarantined[:MAX_LAGGARDS])
        return Verdict(
            kind,
            "True",
            Reason.VERSION_QUARANTINED,
            f"No worker could load version {versions}; workers stay on the one before. Look at the workers' logs.",
        )
    if coordination is not None and coordination.laggards:
        return Verdict(
            kind,
            "True",
            Reason.LAGGING_WORKERS,
            f"{len(coordination.laggards)} rollout workers have not converged within weightSync.timeoutSeconds and are started "
            "again. Look at their logs; a longer timeout helps where loading a version takes so long.",
        )
    return Verdict(kind, "False", Reason.HEALTHY, "Nothing is degraded.")


def ready_verdict(observed: Observed, spec: RLJobSpec, status: RLJobStatus) -> Verdict:
    """The summary, from the conditions of the parts."""
    kind = ConditionType.READY
    parts = [condition_of(status.conditions, part) for part in running_parts(spec)]
    for part in parts:
        if part is not None and part.status != "True" and part.reason != Reason.PODS_NOT_READY:
            return Verdict(
                kind, "False", part.reason if isinstance(part.reason, Reason) else Reason.STARTING, part.message
            )
    if any(part is None or part.status != "True" for part in parts):
        if observed.status.started_time is not None:
            trains = holds(status, ConditionType.TRAINER_READY)
            reason = Reason.PODS_NOT_READY if trains else Reason.RESTARTING
        else:
            reason = Reason.STARTING
        said = " ".join(part.message for part in parts if part is not None and part.status != "True")
        return Verdict(kind, "False", reason, said or "Children are being made.")
    return Verdict(kind, "True", Reason.TRAINING, f"The job trains; {spec.training.steps} steps are asked for.")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one}." if number == 1 else f"{number} {many}."
