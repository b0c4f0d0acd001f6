"""How a job ends: succeeded or failed, and what is done with what is left of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from rljob_api.names import KIND
from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_api.status import RLJobStatus
from rljob_operator.core.observed import Observed, TrainerJob
from rljob_operator.core.plan import Action, Delete, DeleteState, Event, Plan
from rljob_operator.core.pods import living
from rljob_operator.core.status import Verdict, changed, holds, running_parts, text_of, time_of, with_conditions


def is_finished(status: RLJobStatus) -> bool:
    """Whether the job ended, either way. Final."""
    return holds(status, ConditionType.SUCCEEDED) or holds(status, ConditionType.FAILED)


def succeed(observed: Observed, spec: RLJobSpec) -> Plan | None:
    """Succeeded, once the gang ended well and the final model is durable outside NATS."""
    job = next((job for job in observed.trainer_jobs if job.attempt == observed.status.attempt), None)
    final = observed.progress.final_model
    if job is None or not job.is_complete or final is None:
        return None
    message = f"All {spec.training.steps} steps are trained. The final model is {final.uri}."
    if spec.storage.checkpoint.persistent_volume_claim is None:
        message = f"All {spec.training.steps} steps are trained. The final model was not kept: storage.checkpoint names no claim."
    status = changed(
        observed.status,
        completion_time=text_of(observed.now),
        final_model=final,
        step=max(spec.training.steps, observed.status.step),
    )
    return _end(observed, status, ConditionType.SUCCEEDED, Reason.SUCCEEDED, message, "Normal")


def fail(observed: Observed, status: RLJobStatus, reason: Reason, message: str) -> Plan:
    """Failed, for good. `status` may already carry raised counters."""
    ended = changed(status, completion_time=text_of(observed.now))
    return _end(observed, ended, ConditionType.FAILED, reason, message, "Warning")


def after_the_end(observed: Observed) -> Plan:
    """Free what the finished job holds; the trainer's ended pods stay for their logs, until the TTL or the deletion."""
    actions: list[Action] = []
    for job in observed.trainer_jobs:
        # One whose pod has ended will say so itself in a moment, and then its log can be read on.
        if not (job.is_complete or job.is_failed or job.is_deleting or _is_ending(observed, job)):
            actions.append(Delete("Job", job.name, job.uid))
    actions += [Delete("Deployment", item.name, item.uid) for item in observed.deployments if not item.is_deleting]
    actions += [
        Delete(child.kind, child.name, child.uid)
        for child in observed.others
        if child.kind == "PodDisruptionBudget" and not child.is_deleting
    ]
    if actions or living(observed.pods, observed.now):
        return Plan(actions=tuple(actions), requeue_after_seconds=5.0)
    if not observed.progress.state_is_gone and observed.progress.reachable and observed.status.attempt > 0:
        actions.append(DeleteState(observed.identity.uid))
    spec, ended = observed.spec, observed.status.completion_time
    if spec is None or spec.ttl_seconds_after_finished is None or ended is None:
        return Plan(actions=tuple(actions))
    left = time_of(ended) + timedelta(seconds=spec.ttl_seconds_after_finished) - observed.now
    if left > timedelta(0):
        return Plan(actions=tuple(actions), requeue_after_seconds=left.total_seconds())
    return Plan(actions=(*actions, Delete(KIND, observed.identity.name, observed.identity.uid)))


def _is_ending(observed: Observed, job: TrainerJob) -> bool:
    return any(
        container.ended is not None
        for pod in observed.trainer_pods
        if pod.attempt == job.attempt
        for container in pod.containers
    )


def _end(
    observed: Observed,
    status: RLJobStatus,
    kind: ConditionType,
    reason: Reason,
    message: str,
    event: Literal["Normal", "Warning"],
) -> Plan:
    # What ran does so no more; how far it got stays.
    pools = tuple(changed(pool, ready=0, laggards=()) for pool in status.pools)
    columns = changed(status.columns, converged="", rollouts="", trainer="")
    parts = (*running_parts(observed.spec), ConditionType.WEIGHTS_CONVERGED, ConditionType.DEGRADED)
    written = with_conditions(
        observed,
        changed(status, pools=pools, columns=columns),
        Verdict(kind, "True", reason, message),
        Verdict(ConditionType.READY, "False", reason, message),
        *(Verdict(part, "False", reason, "The job is finished.") for part in parts),
    )
    return Plan(status=written, events=(Event(event, reason, message),), requeue_after_seconds=0.0)
