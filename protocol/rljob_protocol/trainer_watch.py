"""What a rollout worker knows of its trainer on the interruption route, pure (docs/design.md, section 5).

The barrier stops generation just before an update, so that all tokens of the resident version can be scored by it. A worker
that hears nothing of the trainer stops too: it could miss a barrier, and tokens that come after one are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rljob_api.messages import Barrier, BarrierState, PublishedVersion


@dataclass(frozen=True, slots=True)
class TrainerWatch:
    """The highest barrier, and when the trainer gave its last sign of life by this reader's clock."""

    timeout_seconds: float
    """correction.barrierTimeoutSeconds"""
    heard_at: float
    beat: tuple[int, int] = (0, 0)
    """(epoch, beat) of the last heartbeat."""
    barrier: Barrier | None = None

    def saw_beat(self, beat: tuple[int, int], now: float) -> TrainerWatch:
        """A heartbeat was read; it counts only when it is another one than before."""
        return self if beat == self.beat else replace(self, beat=beat, heard_at=now)

    def saw_barrier(self, barrier: Barrier, now: float) -> TrainerWatch:
        """A barrier was read; the highest counts, and RELEASED comes after QUIESCE of the same."""
        if self.barrier is not None and _rank(barrier) <= _rank(self.barrier):
            return self
        return replace(self, barrier=barrier, heard_at=now)

    def heard(self, now: float) -> TrainerWatch:
        """The trainer gave another sign of life."""
        return replace(self, heard_at=now)

    def is_silent(self, now: float) -> bool:
        """True once nothing was heard for the timeout."""
        return now - self.heard_at >= self.timeout_seconds

    def barrier_to_keep(self, serving: PublishedVersion | None) -> tuple[int, int] | None:
        """(epoch, version) of the barrier that holds for who serves this; None where there is none, or it is behind it."""
        barrier = self.barrier
        if barrier is None or barrier.state is BarrierState.RELEASED:
            return None
        held = (barrier.epoch, barrier.version)
        return None if serving is not None and (serving.epoch, serving.version) > held else held


def _rank(barrier: Barrier) -> tuple[int, int, bool]:
    return (barrier.epoch, barrier.version, barrier.state is BarrierState.RELEASED)
