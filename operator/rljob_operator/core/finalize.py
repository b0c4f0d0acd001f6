"""Deletion: stop what runs, then delete what Kubernetes does not know of (the NATS state), then let the object go."""

from __future__ import annotations

from datetime import timedelta

from rljob_api.names import FINALIZER
from rljob_api.reasons import Reason
from rljob_operator.core.observed import Observed
from rljob_operator.core.plan import Action, Delete, DeleteState, Event, Plan
from rljob_operator.core.pods import present

POLL_SECONDS = 2.0


def finalize(observed: Observed) -> Plan:
    """One step of the deletion."""
    identity = observed.identity
    if FINALIZER not in identity.finalizers:
        return Plan()
    actions: list[Action] = [
        Delete(kind, name, uid)
        for kind, name, uid, is_deleting in [
            *(("Job", job.name, job.uid, job.is_deleting) for job in observed.trainer_jobs),
            *(("Deployment", item.name, item.uid, item.is_deleting) for item in observed.deployments),
            *((child.kind, child.name, child.uid, child.is_deleting) for child in observed.others),
        ]
        if not is_deleting
    ]
    if actions or present(observed.pods, observed.now):
        # Streams that pods still write to would only come back.
        return Plan(actions=tuple(actions), requeue_after_seconds=POLL_SECONDS)
    without = tuple(name for name in identity.finalizers if name != FINALIZER)
    if observed.progress.state_is_gone or observed.status.attempt == 0:
        return Plan(finalizers=without)
    if observed.progress.reachable:
        return Plan(actions=(DeleteState(identity.uid),), requeue_after_seconds=0.0)
    assert identity.deleted_at is not None
    since = max(identity.deleted_at, observed.progress.unreachable_since or identity.deleted_at)
    left = since + timedelta(seconds=observed.settings.cleanup_timeout_seconds) - observed.now
    if left > timedelta(0):
        return Plan(requeue_after_seconds=min(POLL_SECONDS, left.total_seconds()))
    message = (
        f"NATS did not answer for {observed.settings.cleanup_timeout_seconds:g} s while the job was deleted: its streams are "
        "left behind. The operator's sweep removes them once the server is back; nothing needs to be done."
    )
    return Plan(finalizers=without, events=(Event("Warning", Reason.CLEANUP_ABANDONED, message),))
