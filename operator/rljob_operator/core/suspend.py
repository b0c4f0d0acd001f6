"""Suspend and resume. A resume is a new attempt from the checkpoint, not counted; its clocks start anew."""

from __future__ import annotations

from rljob_api.conditions import condition_of
from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_api.status import RLJobStatus
from rljob_operator.core.observed import Observed
from rljob_operator.core.plan import Action, Delete, Event, Merge, Plan
from rljob_operator.core.pods import present
from rljob_operator.core.status import Verdict, changed, holds, is_urgent, running_parts, summarised, with_conditions

_SUSPENDED = "The job is suspended and has no pods. Set spec.suspend to false to go on from the last checkpoint."
_NOT_STARTED = "The job is suspended and has not begun. Set spec.suspend to false to start it."
_SUSPENDING = "The trainer checkpoints and the pods are going away."


def suspend(observed: Observed, spec: RLJobSpec) -> Plan:
    """Stop all pods, the trainer by the SIGTERM on which it checkpoints; nothing is made for a job created suspended."""
    actions: list[Action] = [Delete("Job", job.name, job.uid) for job in observed.trainer_jobs if not job.is_deleting]
    actions += [
        Merge("Deployment", item.name, item.uid, {"metadata": {"uid": item.uid}, "spec": {"replicas": 0}})
        for item in observed.deployments
        if item.replicas != 0 and not item.is_deleting
    ]
    gone = not actions and not observed.trainer_jobs and not present(observed.pods, observed.now)
    seen = summarised(observed, spec, observed.status) if observed.status.attempt else observed.status
    message = _SUSPENDED if observed.status.attempt else _NOT_STARTED
    if gone:
        status = with_conditions(
            observed,
            changed(seen, conditions=observed.status.conditions, start_time=None, started_time=None),
            Verdict(ConditionType.SUSPENDED, "True", Reason.SUSPENDED, message),
            Verdict(ConditionType.READY, "False", Reason.SUSPENDED, message),
            *(
                Verdict(part, "False", Reason.SUSPENDED, "The job is suspended.")
                for part in (*running_parts(spec), ConditionType.WEIGHTS_CONVERGED)
                if observed.status.attempt
            ),
        )
    else:
        status = with_conditions(
            observed,
            seen,
            Verdict(ConditionType.SUSPENDED, "False", Reason.SUSPENDING, _SUSPENDING),
            Verdict(ConditionType.READY, "False", Reason.SUSPENDING, _SUSPENDING),
        )
    events: tuple[Event, ...] = ()
    if gone and not holds(observed.status, ConditionType.SUSPENDED):
        events = (Event("Normal", Reason.SUSPENDED, message),)
    return Plan(
        actions=tuple(actions),
        status=status if status != observed.status else None,
        status_is_urgent=is_urgent(observed.status, status),
        events=events,
        requeue_after_seconds=None if gone else 5.0,
        coordinate=not gone,
    )


def resume(observed: Observed) -> Plan | None:
    """The status of a resumed job, where one was suspended or on its way there."""
    condition = condition_of(observed.status.conditions, ConditionType.SUSPENDED)
    if condition is None or not (condition.status == "True" or condition.reason == Reason.SUSPENDING):
        return None
    before = observed.status
    message = "The job goes on from its last checkpoint." if before.attempt else "The job starts."
    status: RLJobStatus = changed(
        before, attempt=before.attempt + 1 if before.attempt else 0, start_time=None, started_time=None
    )
    status = with_conditions(
        observed,
        status,
        Verdict(ConditionType.SUSPENDED, "False", Reason.RESUMED, message),
        Verdict(ConditionType.READY, "False", Reason.RESUMED, message),
    )
    return Plan(status=status, events=(Event("Normal", Reason.RESUMED, message),), requeue_after_seconds=0.0)
