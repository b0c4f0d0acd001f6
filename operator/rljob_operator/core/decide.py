"""One pass: what is seen in, what is to be done out. Read this first; each step is a file."""

from __future__ import annotations

from rljob_api.conditions import condition_of
from rljob_api.names import FINALIZER
from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_api.status import RLJobStatus
from rljob_operator.core import attempts, children, completion, deadlines, suspend
from rljob_operator.core.finalize import finalize
from rljob_operator.core.observed import Observed
from rljob_operator.core.plan import Event, Plan
from rljob_operator.core.status import (
    Verdict,
    changed,
    holds,
    is_urgent,
    ready_verdict,
    reason_of,
    running_parts,
    summarised,
    text_of,
    with_conditions,
)

LOOK_AGAIN_SECONDS = 5.0
"""While a job runs: progress comes from NATS, which triggers no pass."""


def decide(observed: Observed) -> Plan:
    """The plan of one pass."""
    if observed.unseen:
        return _blind(observed)
    if observed.identity.deleted_at is not None:
        return finalize(observed)
    if FINALIZER not in observed.identity.finalizers:
        return Plan(finalizers=(*observed.identity.finalizers, FINALIZER), requeue_after_seconds=0.0)
    if completion.is_finished(observed.status):
        return completion.after_the_end(observed)
    if observed.spec is None:
        return _refused(observed)
    spec = observed.spec
    if spec.suspend:
        return suspend.suspend(observed, spec)
    return (
        suspend.resume(observed)
        or attempts.first(observed)
        or completion.succeed(observed, spec)
        or deadlines.missed(observed, spec)
        or attempts.after_failure(observed, spec)
        or attempts.after_change(observed, spec)
        or _run(observed, spec)
    )


def _run(observed: Observed, spec: RLJobSpec) -> Plan:
    actions = children.actions(observed, spec)
    status = summarised(observed, spec, observed.status)
    verdict = _obstacle(observed) or ready_verdict(observed, spec, status)
    status = _restarting_stays(observed, with_conditions(observed, status, verdict), verdict)
    if status.started_time is None and all(holds(status, part) for part in running_parts(spec)):
        status = changed(status, started_time=text_of(observed.now))
    next_deadline = deadlines.seconds_to_next(observed, spec)
    return Plan(
        actions=actions,
        status=status if status != observed.status else None,
        status_is_urgent=is_urgent(observed.status, status),
        events=_events(observed.status, status, verdict),
        requeue_after_seconds=LOOK_AGAIN_SECONDS if next_deadline is None else min(LOOK_AGAIN_SECONDS, next_deadline),
        coordinate=True,
    )


def _restarting_stays(observed: Observed, status: RLJobStatus, verdict: Verdict) -> RLJobStatus:
    """Why a new attempt was begun stays readable until it runs."""
    before = condition_of(observed.status.conditions, ConditionType.READY)
    if before is None or before.reason != Reason.RESTARTING or verdict.reason is not Reason.RESTARTING:
        return status
    return with_conditions(observed, status, Verdict(ConditionType.READY, "False", Reason.RESTARTING, before.message))


def _obstacle(observed: Observed) -> Verdict | None:
    """What keeps the operator itself from making the children."""
    kind = ConditionType.READY
    if observed.strangers:
        stranger = observed.strangers[0]
        owner = f", which {stranger.owner} owns" if stranger.owner else ""
        return Verdict(
            kind,
            "False",
            Reason.CHILD_CONFLICT,
            f"{stranger.kind} {stranger.name} is in the way{owner}: the job needs an object of that name and does not touch "
            "those of others. Rename or delete it, or give the job another name.",
        )
    for refusal in observed.refusals:
        if refusal.code == 403 and "forbidden: User" in refusal.message:
            return Verdict(
                kind,
                "False",
                Reason.PERMISSION_MISSING,
                f"The operator may not write {refusal.kind} {refusal.name}: {refusal.message} Install the chart's role of "
                "this version.",
            )
        if refusal.code == 403:
            return Verdict(
                kind,
                "False",
                Reason.PODS_REFUSED,
                f"{refusal.kind} {refusal.name} is not admitted: {refusal.message} Raise the quota, or change the template.",
            )
        return Verdict(
            kind,
            "False",
            Reason.INVALID_TEMPLATE,
            f"The apiserver refuses {refusal.kind} {refusal.name}: {refusal.message} Correct the pool's template.",
        )
    return None


def _blind(observed: Observed) -> Plan:
    """The children cannot be seen: nothing is done to them."""
    if completion.is_finished(observed.status) or observed.identity.deleted_at is not None:
        return Plan(requeue_after_seconds=LOOK_AGAIN_SECONDS)
    verdict = Verdict(
        ConditionType.READY,
        "False",
        Reason.PERMISSION_MISSING,
        f"The operator may not look at the job's children: {observed.unseen.rstrip('.')}. Install the chart's role of this version.",
    )
    status = with_conditions(observed, observed.status, verdict)
    return Plan(
        status=status if status != observed.status else None,
        events=_events(observed.status, status, verdict),
        requeue_after_seconds=LOOK_AGAIN_SECONDS,
        coordinate=observed.status.attempt > 0,
    )


def _refused(observed: Observed) -> Plan:
    """A spec that the installed CRD let pass and this operator does not take: nothing is touched."""
    said = " ".join(str(violation) for violation in observed.violations[:5])
    verdict = Verdict(
        ConditionType.READY,
        "False",
        Reason.INVALID_CONFIGURATION,
        f"The spec is refused; the job's pods are left as they are. {said} If the CRD is older or newer than the operator, "
        "install those of one version.",
    )
    status = with_conditions(observed, observed.status, verdict)
    if status == observed.status:
        return Plan()
    return Plan(status=status, events=_events(observed.status, status, verdict))


def _events(before: RLJobStatus, after: RLJobStatus, ready: Verdict) -> tuple[Event, ...]:
    """An Event where Ready's reason moved, and where the job became degraded in another way."""
    found = []
    if reason_of(before, ConditionType.READY) != ready.reason:
        is_normal = ready.reason in (Reason.STARTING, Reason.TRAINING, Reason.RESTARTING)
        found.append(Event("Normal" if is_normal else "Warning", ready.reason, ready.message))
    degraded = condition_of(after.conditions, ConditionType.DEGRADED)
    was = condition_of(before.conditions, ConditionType.DEGRADED)
    is_new = was is None or degraded is None or (was.status, was.reason) != (degraded.status, degraded.reason)
    if degraded is not None and degraded.status == "True" and isinstance(degraded.reason, Reason) and is_new:
        found.append(Event("Warning", degraded.reason, degraded.message))
    return tuple(found)
