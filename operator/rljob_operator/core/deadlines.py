"""startDeadlineSeconds and activeDeadlineSeconds; both clocks start anew on resume."""

from __future__ import annotations

from datetime import datetime, timedelta

from rljob_api.reasons import ConditionType, Reason
from rljob_api.spec import RLJobSpec
from rljob_operator.core.completion import fail
from rljob_operator.core.observed import Observed
from rljob_operator.core.plan import Plan
from rljob_operator.core.status import holds, running_parts, summarised, time_of


def missed(observed: Observed, spec: RLJobSpec) -> Plan | None:
    """The failure, where a deadline has passed."""
    status, start = observed.status, observed.status.start_time
    if start is None:
        return None
    if spec.active_deadline_seconds is not None and observed.now >= _after(start, spec.active_deadline_seconds):
        return fail(
            observed,
            status,
            Reason.ACTIVE_DEADLINE_EXCEEDED,
            f"The job ran for {spec.active_deadline_seconds} s (activeDeadlineSeconds) without being done. Its last "
            "checkpoint is kept: make a new job with a longer deadline.",
        )
    if status.started_time is None and observed.now >= _after(start, spec.start_deadline_seconds):
        seen = summarised(observed, spec, status)
        missing = [
            condition.message
            for condition in seen.conditions
            if condition.type in running_parts(spec) and condition.status != "True"
        ]
        if not missing and holds(seen, ConditionType.TRAINER_READY):
            return None  # they run by now: this pass records it
        who = (
            "Trainer and minReplicas"
            if spec.old_policy_pool is None
            else "Trainer, minReplicas and an old-policy worker"
        )
        return fail(
            observed,
            seen,
            Reason.START_DEADLINE_EXCEEDED,
            f"{who} did not run within {spec.start_deadline_seconds} s (startDeadlineSeconds). "
            + " ".join([*missing, "Correct what keeps them, or give startDeadlineSeconds more, and make a new job."]),
        )
    return None


def seconds_to_next(observed: Observed, spec: RLJobSpec) -> float | None:
    """Until the next deadline can pass."""
    status, start = observed.status, observed.status.start_time
    if start is None:
        return None
    moments = [] if spec.active_deadline_seconds is None else [_after(start, spec.active_deadline_seconds)]
    if status.started_time is None:
        moments.append(_after(start, spec.start_deadline_seconds))
    if not moments:
        return None
    return max(0.0, (min(moments) - observed.now).total_seconds())


def _after(start: str, seconds: int) -> datetime:
    return time_of(start) + timedelta(seconds=seconds)
