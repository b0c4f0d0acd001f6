"""Running totals of one worker incarnation, kept so that they add up at every moment.

Conservation: tokens_generated = tokens_delivered + sum of tokens_dropped + tokens_in_flight (design, invariant 6).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rljob_api.messages import WorkerCounters


class Reason(StrEnum):
    """Why model tokens ended at the worker without being delivered."""

    ENVIRONMENT_FAILED = "EnvironmentFailed"  # the environment raised or timed out; the sample is tried again
    MALFORMED = "Malformed"  # the trajectory broke an invariant of its format; the sample is tried again
    DRAINED = "Drained"  # the worker was told to stop
    ENGINE_FAILED = "EngineFailed"  # the engine died or was poisoned


@dataclass(slots=True)
class Tally:
    """Mutable counterpart of WorkerCounters; tokens in flight and the barrier's time are measured, not counted."""

    tokens_generated: int = 0
    tokens_delivered: int = 0
    tokens_dropped: dict[str, int] = field(default_factory=dict)
    tokens_salvaged: int = 0
    tokens_lost: int = 0
    interruptions: int = 0
    partials_continued: int = 0
    trajectories: int = 0
    environment_failures: int = 0
    malformed: int = 0
    swaps_failed: int = 0
    spurious_aborts: int = 0
    """Generations that the engine aborted though nobody had paused it; they were resubmitted."""
    segments_sent: int = 0
    segments_failed: int = 0

    def drop(self, reason: Reason, tokens: int) -> None:
        """Count model tokens that end here."""
        if tokens:
            self.tokens_dropped[reason.value] = self.tokens_dropped.get(reason.value, 0) + tokens

    def counters(self, tokens_in_flight: int, barrier_seconds: float) -> WorkerCounters:
        """The totals as they go on the wire."""
        return WorkerCounters(
            tokens_generated=self.tokens_generated,
            tokens_delivered=self.tokens_delivered,
            tokens_dropped=dict(self.tokens_dropped),
            tokens_in_flight=tokens_in_flight,
            tokens_salvaged=self.tokens_salvaged,
            tokens_lost=self.tokens_lost,
            interruptions=self.interruptions,
            barrier_seconds=barrier_seconds,
            partials_continued=self.partials_continued,
            trajectories=self.trajectories,
            environment_failures=self.environment_failures,
            malformed=self.malformed,
            swaps_failed=self.swaps_failed,
            segments_sent=self.segments_sent,
            segments_failed=self.segments_failed,
        )
