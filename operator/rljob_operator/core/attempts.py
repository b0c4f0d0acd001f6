"""When a new attempt of the trainer gang begins. Such a pass only writes status; the next one acts on it."""

from __future__ import annotations

from typing import Literal

from rljob_api.failure_policy import FailureAction
from rljob_api.names import TRAINER_POOL
from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_api.status import RestartStatus
from rljob_operator.core.builders.config import trainer_hash
from rljob_operator.core.completion import fail
from rljob_operator.core.failure_policy import HOPELESS, Judgement, judgements
from rljob_operator.core.observed import Observed
from rljob_operator.core.plan import Event, Plan
from rljob_operator.core.status import Verdict, changed, summarised, text_of, with_conditions


def first(observed: Observed) -> Plan | None:
    """Attempt 1 of a job, or the clocks of a resumed one; the runtime's image is pinned with the first."""
    before = observed.status
    if before.attempt and before.start_time is not None:
        return None
    message = "The operator makes the job's pods."
    status = changed(
        before,
        attempt=before.attempt or 1,
        start_time=text_of(observed.now),
        runtime_image=before.runtime_image or observed.settings.runtime_image,
    )
    status = with_conditions(observed, status, Verdict(ConditionType.READY, "False", Reason.STARTING, message))
    return Plan(status=status, events=(Event("Normal", Reason.STARTING, message),), requeue_after_seconds=0.0)


def after_failure(observed: Observed, spec: RLJobSpec) -> Plan | None:
    """What the failure policy says, where it concerns the whole job."""
    for judgement in judgements(observed, spec):
        match judgement.action:
            case FailureAction.FAIL_JOB:
                return fail(observed, observed.status, *_fatal(judgement))
            case FailureAction.RESTART_JOB:
                return _restart(observed, spec, judgement)
            case FailureAction.RESTART_POOL | FailureAction.IGNORE:
                continue
    return None


def after_change(observed: Observed, spec: RLJobSpec) -> Plan | None:
    """A new attempt, not counted, where the spec's trainer or training is no longer what the gang runs with."""
    job = next((job for job in observed.trainer_jobs if job.attempt == observed.status.attempt), None)
    if job is None or job.is_complete or job.is_deleting or job.config_hash == trainer_hash(spec):
        return None
    return _next(
        observed,
        observed.status.restarts,
        Reason.RESTARTING,
        "The spec's trainer, training or sampling changed: a new attempt begins from the last checkpoint.",
        "Normal",
    )


def _restart(observed: Observed, spec: RLJobSpec, judgement: Judgement) -> Plan:
    before = observed.status.restarts
    restarts = RestartStatus(total=before.total + 1, counted=before.counted + (1 if judgement.counts else 0))
    if restarts.counted > spec.failure_policy.max_restarts:
        return fail(
            observed,
            summarised(observed, spec, observed.status),
            Reason.MAX_RESTARTS_EXCEEDED,
            f"{_sentence(judgement)} {before.counted} counted restarts were made, and failurePolicy.maxRestarts is "
            f"{spec.failure_policy.max_restarts}. Look at the trainer's log, mend the cause and make a new job.",
        )
    stalled = judgement.failure.reason == Reason.TRAINER_STALLED
    by_rule = f" Rule {judgement.rule} of failurePolicy says so." if judgement.rule else ""
    counted = "" if judgement.counts else ", not counted"
    return _next(
        observed,
        restarts,
        Reason.TRAINER_STALLED if stalled else Reason.TRAINER_FAILED,
        f"{_sentence(judgement)} Attempt {observed.status.attempt + 1} begins from the last checkpoint (restart "
        f"{restarts.total}{counted}).{by_rule}",
        "Warning",
    )


def _next(
    observed: Observed, restarts: RestartStatus, reason: Reason, message: str, kind: Literal["Normal", "Warning"]
) -> Plan:
    status = changed(observed.status, attempt=observed.status.attempt + 1, restarts=restarts)
    status = with_conditions(observed, status, Verdict(ConditionType.READY, "False", Reason.RESTARTING, message))
    return Plan(status=status, events=(Event(kind, reason, message),), requeue_after_seconds=0.0, coordinate=True)


def _fatal(judgement: Judgement) -> tuple[Reason, str]:
    reason = judgement.failure.reason
    if judgement.rule:
        return Reason.FAILURE_POLICY, (
            f"{_sentence(judgement)} Rule {judgement.rule} of failurePolicy fails the job. Look at the pod's log, mend the "
            "cause and make a new job."
        )
    known = next((hopeless for hopeless in HOPELESS if hopeless == reason), Reason.FAILURE_POLICY)
    remedy = {
        Reason.INVALID_CONFIGURATION: "Trying again cannot help: correct the spec and make a new job.",
        Reason.ACCELERATOR_MISSING: "Check the node's driver and device plugin, and the image's CUDA version.",
    }.get(known, "")
    return known, f"{_sentence(judgement)} {remedy}".strip()


def _sentence(judgement: Judgement) -> str:
    pool = judgement.failure.pool
    where = "" if pool == TRAINER_POOL else f" (pool {pool})"
    text = " ".join(judgement.failure.message.split())[:1000]
    return f"{text.rstrip('.')}{where}."
