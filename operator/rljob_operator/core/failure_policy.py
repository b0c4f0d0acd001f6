"""What a failure does: the first rule of spec.failurePolicy that matches, else the default.

By default a failed trainer means a new attempt of the whole gang, counted. Configurations that cannot work and missing
accelerators fail the job at once, of whatever pool: trying again cannot help. A failed rollout or old-policy worker is left to
Kubernetes, which starts its container again. For the trainer RestartPool is RestartJob, and Ignore is RestartJob without counting: nothing
else starts a gang again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from rljob_api.failure_policy import FailureAction, FailureRule
from rljob_api.names import TRAINER_POOL
from rljob_api.reasons import Reason
from rljob_api.spec import RLJobSpec
from rljob_operator.core.observed import Container, Observed, Pod, PodCondition, Termination, TrainerJob
from rljob_operator.core.pods import is_lost
from rljob_operator.core.worker_pools import worker_pools

EXIT_SIGTERM = 143
CLOCK_SKEW = timedelta(seconds=3)
"""Between the apiserver's clock and the operator's."""
HOPELESS = (Reason.INVALID_CONFIGURATION, Reason.ACCELERATOR_MISSING)


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure that has not been acted on yet."""

    pool: str
    reason: str
    message: str
    at: datetime | None = None
    pod: str = ""
    pod_conditions: tuple[PodCondition, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    failure: Failure
    action: FailureAction
    counts: bool
    rule: str = ""
    """Name of the rule; empty for the default."""


def judgements(observed: Observed, spec: RLJobSpec) -> tuple[Judgement, ...]:
    """What is to be done about each failure since the present attempt began, the trainer's first.

    Failures are judged only while the Job of the present attempt is there: between raising the attempt and making its
    Job, the old failure is still visible and must not count twice.
    """
    job = next((job for job in observed.trainer_jobs if job.attempt == observed.status.attempt), None)
    if job is None or job.is_deleting:
        return ()
    trainer = _trainer_failure(observed, spec, job)
    found = [trainer] if trainer is not None else []
    found += [failure for pool in worker_pools(spec) for failure in _worker_failures(observed, pool.name, job)]
    return tuple(_judge(failure, spec) for failure in found)


def _judge(failure: Failure, spec: RLJobSpec) -> Judgement:
    is_trainer = failure.pool == TRAINER_POOL
    for rule in spec.failure_policy.rules:
        if not _matches(rule, failure):
            continue
        action, counts = rule.action, rule.counts_toward_max
        if is_trainer and action is FailureAction.IGNORE:
            action, counts = FailureAction.RESTART_JOB, False
        if is_trainer and action is FailureAction.RESTART_POOL:
            action = FailureAction.RESTART_JOB
        return Judgement(failure, action, counts, rule.name)
    if failure.reason in HOPELESS:
        return Judgement(failure, FailureAction.FAIL_JOB, counts=False)
    if not is_trainer:
        return Judgement(failure, FailureAction.IGNORE, counts=False)
    return Judgement(failure, FailureAction.RESTART_JOB, counts=True)


def _matches(rule: FailureRule, failure: Failure) -> bool:
    """Every criterion that is given must hold."""
    if rule.pools and failure.pool not in rule.pools:
        return False
    if rule.on_reasons and failure.reason not in rule.on_reasons:
        return False
    return not rule.on_pod_conditions or any(
        wanted.type == condition.type and wanted.status == condition.status
        for wanted in rule.on_pod_conditions
        for condition in failure.pod_conditions
    )


def _trainer_failure(observed: Observed, spec: RLJobSpec, job: TrainerJob) -> Failure | None:
    pods = [pod for pod in observed.trainer_pods if pod.attempt == job.attempt]
    ended = [(pod, container.ended) for pod in pods for container in pod.containers if _failed(container)]
    if ended:
        # The others of the gang fail because the first did.
        pod, termination = min(
            ((pod, end) for pod, end in ended if end is not None),
            key=lambda found: (found[1].finished_at is None, found[1].finished_at or observed.now, found[0].name),
        )
        return Failure(
            TRAINER_POOL, termination.reason, _how(pod, termination), termination.finished_at, pod.name, pod.conditions
        )
    lost = next((pod for pod in pods if is_lost(pod, observed.now)), None)
    if lost is not None:
        message = f"Pod {lost.name} was told to end and its node does not answer"
        return Failure(TRAINER_POOL, Reason.TRAINER_FAILED, message, None, lost.name, lost.conditions)
    disrupted = next((pod for pod in pods if pod.phase == "Failed"), None)
    if job.is_failed or disrupted is not None:
        conditions = disrupted.conditions if disrupted is not None else ()
        if disrupted is None and job.is_disrupted:
            conditions = (PodCondition("DisruptionTarget", "True", message=job.message),)
        because = next(
            (c.message for c in conditions if c.type == "DisruptionTarget" and c.status == "True"), job.message
        )
        said = f": {because}" if because else ""
        return Failure(
            TRAINER_POOL,
            Reason.TRAINER_FAILED,
            f"The trainer's Job {job.name} failed{said}",
            None,
            disrupted.name if disrupted is not None else "",
            conditions,
        )
    if job.is_complete and observed.progress.final_model is None and _was_read_after(observed, job.finished_at):
        return Failure(
            TRAINER_POOL,
            Reason.TRAINER_FAILED,
            f"The trainer's Job {job.name} ended without an error before all steps were trained",
        )
    return _stall(observed, spec, job, pods)


def _was_read_after(observed: Observed, moment: datetime | None) -> bool:
    """Whether what the trainer left in NATS at its end has been looked for since."""
    progress = observed.progress
    if moment is None or progress.read_at is None or not progress.reachable:
        return False
    return progress.read_at >= moment + CLOCK_SKEW


def _stall(observed: Observed, spec: RLJobSpec, job: TrainerJob, pods: list[Pod]) -> Failure | None:
    """No heartbeat since long enough, counted from when the whole gang ran."""
    running = [pod.condition("Ready") for pod in pods if pod.is_ready]
    progress = observed.progress
    if not progress.reachable or progress.known_since is None:
        return None
    if len(running) < spec.trainer.replicas or job.is_complete:
        return None
    times = [condition.since for condition in running if condition is not None and condition.since is not None]
    since = max([*times, progress.heartbeat_at or job.created_at, job.created_at, progress.known_since])
    if observed.now - since < timedelta(seconds=spec.trainer.stall_seconds):
        return None
    return Failure(
        TRAINER_POOL,
        Reason.TRAINER_STALLED,
        f"The trainer gave no heartbeat for {spec.trainer.stall_seconds} s (trainer.stallSeconds)",
    )


def _worker_failures(observed: Observed, pool: str, job: TrainerJob) -> list[Failure]:
    found = []
    for pod in observed.pods_of(pool):
        for container in pod.containers:
            for termination in (container.ended, container.ended_before):
                if termination is None or termination.exit_code == 0:
                    continue
                if pod.deleted_at is not None and termination.exit_code == EXIT_SIGTERM:
                    continue  # told to go before it could say how
                if termination.finished_at is None or termination.finished_at < job.created_at:
                    continue
                how = _how(pod, termination)
                found.append(Failure(pool, termination.reason, how, termination.finished_at, pod.name, pod.conditions))
    return found


def _failed(container: Container) -> bool:
    return container.ended is not None and container.ended.exit_code != 0


def _how(pod: Pod, termination: Termination) -> str:
    said = f": {termination.message}" if termination.message else ""
    return f"Pod {pod.name} ended with {termination.reason} (exit code {termination.exit_code}){said}"
