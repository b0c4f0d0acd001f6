"""The places of a run's workers, rollout or old-policy: a process in each, started again within a budget when it ends."""

from __future__ import annotations

import textwrap
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rljob import processes

MIN_RESTARTS = 3
BACKOFF_SECONDS = (0.5, 2.0, 5.0, 10.0)


@dataclass(slots=True)
class Slot:
    """One worker's place: its process comes and goes."""

    worker: str
    pool: str
    child: processes.Child | None = None
    incarnation: str = ""
    restarts: int = 0
    start_at: float = 0.0


class WorkerSlots:
    """All places of pools of one kind. `start` starts the process of a slot, whose incarnation is a new one."""

    def __init__(
        self,
        kind: str,
        pools: Mapping[str, int],
        *,
        max_restarts: int,
        start: Callable[[Slot], processes.Child],
        say: Callable[[str], None],
    ) -> None:
        """`kind` is what messages call the workers, `pools` the number of them in each pool."""
        self._kind = kind
        self._slots = [Slot(f"{pool}-{index}", pool) for pool, replicas in pools.items() for index in range(replicas)]
        self._budget = max(MIN_RESTARTS, max_restarts)
        self._start = start
        self._say = say

    @property
    def restarts(self) -> int:
        """Of all slots."""
        return sum(slot.restarts for slot in self._slots)

    @property
    def children(self) -> list[processes.Child]:
        """Processes that were started and not seen to end."""
        return [slot.child for slot in self._slots if slot.child is not None]

    def tend(self) -> str | None:
        """Start workers that are due and note those that ended; the reason once a budget is spent."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.child is None:
                if now >= slot.start_at:
                    slot.incarnation = uuid.uuid4().hex[:8]
                    slot.child = self._start(slot)
                continue
            code = slot.child.exit_code()
            if code is None:
                continue
            slot.child.kill_group()  # what the worker started must not outlive it
            if slot.restarts >= self._budget:
                return (
                    f"{self._kind} {slot.worker} ended {slot.restarts + 1} times, the last time with {code}; the end of "
                    f"{slot.child.log}:\n{textwrap.indent(slot.child.tail(), '    ')}"
                )
            wait = BACKOFF_SECONDS[min(slot.restarts, len(BACKOFF_SECONDS) - 1)]
            slot.restarts += 1
            slot.child, slot.start_at = None, now + wait
            self._say(f"{self._kind} {slot.worker} ended with {code}: starting it again in {wait:g} s")
        return None

    def kill(self, worker: str, incarnation: str, reason: str) -> None:
        """End a worker's process, if that incarnation is still the one; `tend` starts it again."""
        for slot in self._slots:
            if slot.worker == worker and slot.incarnation == incarnation and slot.child is not None:
                self._say(f"{self._kind} {worker} is restarted: it {reason}")
                slot.child.kill_group()

    def forget(self) -> None:
        """All processes have ended."""
        for slot in self._slots:
            slot.child = None
