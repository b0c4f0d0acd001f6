"""What a step's report says, put together from the update's statistics and the intake's counters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rljob_api.diagnostics import AuditReport, Diagnostics
from rljob_api.messages import BarrierReport, DedicatedReport, EwmaReport, PoolReport, StepReport
from rljob_runtime.trainer.intake import IntakeTotals, Taken
from rljob_runtime.trainer.update import UpdateReport

BASELINE = "constantBaseline"


@dataclass(slots=True)
class Seconds:
    """Where a step's wall time went."""

    waiting: float = 0.0
    eager: float = 0.0
    """Of the waiting: scoring ahead. Not on the critical path, but for what is left of a forward when a batch gets ready."""
    scoring: float = 0.0
    auditing: float = 0.0
    training: float = 0.0
    publishing: float = 0.0
    checkpointing: float = 0.0

    @property
    def total(self) -> float:
        return self.waiting + self.scoring + self.auditing + self.training + self.publishing + self.checkpointing


def step_report(
    *,
    epoch: int,
    step: int,
    version: int,
    route: str,
    rate: float,
    taken: Taken,
    update: UpdateReport,
    ewma: EwmaReport | None,
    audit: AuditReport | None,
    diagnostics: Diagnostics,
    groups_without_variance: int,
    tokens_trained: int,
    totals: IntakeTotals,
    queues: tuple[int, int],
    seconds: Seconds,
    pool: PoolReport | None = None,
    barrier: BarrierReport | None = None,
    now: float,
    dedicated: DedicatedReport | None = None,
) -> StepReport:
    """The report of a finished step; `tokens_trained` and `totals` are cumulative."""
    trajectories = [trajectory for group in taken.groups for trajectory in group]
    baselines = [t.header.info[BASELINE] for t in trajectories if BASELINE in t.header.info]
    return StepReport(
        epoch=epoch,
        step=step,
        version=version,
        reward=float(np.mean([t.header.reward for t in trajectories])),
        baseline=float(np.mean(baselines)) if baselines else None,
        loss=update.loss,
        entropy=update.entropy,
        gradient_norm=update.gradient_norm,
        learning_rate=rate,
        route=route,
        exact_fraction=update.exact_fraction,
        sources=update.sources,
        staleness=update.staleness,
        discrepancy_by_staleness=update.discrepancy_by_staleness,
        ewma=ewma,
        audit=audit,
        diagnostics=diagnostics,
        keep_fraction=update.keep_fraction,
        clip_fraction=update.clip_fraction,
        active_fraction=update.active_fraction,
        trajectories=len(trajectories),
        trajectories_spanning_versions=sum(len(t.versions) > 1 for t in trajectories),
        mean_trajectory_tokens=float(np.mean([t.num_tokens for t in trajectories])),
        tokens_trained=tokens_trained,
        tokens_dropped=totals.dropped,
        tokens_received=totals.received,
        tokens_pending=totals.pending,
        last_sequence=totals.last_sequence,
        groups_without_variance=groups_without_variance,
        seconds_waiting=seconds.waiting,
        seconds_eager=seconds.eager,
        seconds_scoring=seconds.scoring,
        seconds_auditing=seconds.auditing,
        seconds_training=seconds.training,
        seconds_publishing=seconds.publishing,
        seconds_checkpointing=seconds.checkpointing,
        seconds_total=seconds.total,
        dedicated=dedicated,
        pool=pool,
        barrier=barrier,
        queue_tasks=queues[0],
        queue_trajectories=queues[1],
        finished_at=now,
    )
