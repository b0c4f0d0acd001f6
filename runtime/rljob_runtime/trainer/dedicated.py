"""The trainer's side of the old-policy pool: what it has scored, and how long a step waits for the rest.

A step that is otherwise ready waits until every trajectory of its batch with stale tokens has its scores, at most
`correction.dedicatedTimeoutSeconds`; what is missing then is the fallback's, and counted as late. A message says that its
trajectory has all the scores that it will get, also where it leaves tokens out.

    produces    leave to train a batch; how the pool does, for the report and the heartbeat
    consumes    word of each score message (`ahead.py` reads them); the old-policy workers' states
    waits for   a timer that looks at the workers
    unblocked by  that timer

Lives on the background loop. The main thread reads only the report of the batch that was let through last, which nothing
changes before it asks for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rljob_api.errors import ProtocolError
from rljob_api.messages import DedicatedReport, OldPolicyState
from rljob_protocol.ahead import ScoreLog
from rljob_protocol.claims import TrajectoryClaims
from rljob_protocol.link import Link
from rljob_runtime.correction.score_pool import ScorePool
from rljob_runtime.correction.sources import Source
from rljob_runtime.score_codec import Scores
from rljob_runtime.trainer.intake import Taken
from rljob_runtime.trajectory_codec import Trajectory

WATCH_SECONDS = 2.0
SILENT_SECONDS = 10.0
"""A worker whose state has not been renewed for so long counts as dead."""


class DedicatedWait:
    """Decides how long a step waits for scores, and watches those who make them."""

    def __init__(self, link: Link, pool: ScorePool, *, timeout_seconds: float, logger: logging.Logger) -> None:
        self._link = link
        self._log = ScoreLog(link)
        self._claims = TrajectoryClaims(link)
        self._timeout_seconds = timeout_seconds
        self._logger = logger
        self._pool = pool
        self._told: dict[int, int] = {}
        self._last_place = 0
        self._lives: dict[str, tuple[str, int, float]] = {}
        self._workers = 0
        self._backlog = 0
        self._waiting_since: float | None = None
        self._awaited = 0
        self.report = DedicatedReport()
        """Of the batch that was let through last."""

    async def run(self) -> None:
        """Look at the workers and their backlog until cancelled."""
        while True:
            try:
                self.see(await self._link.live_old_policy_workers(), time.monotonic())
                self._backlog = await self._claims.backlog()
            except ProtocolError as error:  # an outage: what was seen last still stands
                self._logger.warning("the old-policy pool could not be looked at", extra={"error": str(error)})
            await asyncio.sleep(WATCH_SECONDS)

    def told(self, place: int, scores: Scores) -> None:
        """There is a message about a trajectory, in this place on the score stream."""
        self._told[scores.header.sequence] = place
        self._last_place = place

    async def forget(self, cursor: int) -> None:
        """Cut off the score stream below the first message that a replay from a checkpointed sequence needs."""
        self._told = {sequence: place for sequence, place in self._told.items() if sequence > cursor}
        first_needed = min(self._told.values(), default=self._last_place + 1)
        await self._log.cut(first_needed - 1)

    # ------------------------------------------------------------------------------------------------------ the wait

    def may_train(self, taken: Taken, now: float | None = None) -> bool:
        """Whether a batch that is otherwise ready has its scores, or has waited for them long enough."""
        now = time.monotonic() if now is None else now
        self._awaited = self._count_awaited(taken)
        if self._waiting_since is None:
            self._waiting_since = now
        waited = now - self._waiting_since
        if self._awaited and waited < self._timeout_seconds:
            return False
        scored, late = self._count_tokens(taken)
        self.report = DedicatedReport(
            waiting_seconds=waited,
            tokens_scored=scored,
            tokens_late=late,
            backlog=self._backlog,
            workers=self._workers,
        )
        if self._awaited:
            self._logger.warning(
                "old-policy scores were late",
                extra={
                    "trajectories": self._awaited,
                    "tokens": late,
                    "waited_seconds": round(waited, 1),
                    "backlog": self._backlog,
                    "workers": self._workers,
                },
            )
        self._waiting_since, self._awaited = None, 0
        return True

    @property
    def message(self) -> str:
        """What the step waits for, for the heartbeat; empty while it does not wait."""
        if not self._awaited:
            return ""
        pool = f"{self._workers} are alive, backlog {self._backlog}" if self._workers else "none is alive"
        return (
            f"waits for old-policy workers to score {self._awaited} trajectories of the next step: {pool}; the fallback "
            f"takes their stale tokens after {self._timeout_seconds:g} s"
        )

    def _count_awaited(self, taken: Taken) -> int:
        return sum(
            sequence not in self._told and bool(_stale(trajectory, taken.staleness, taken.max_versions).any())
            for trajectory, sequence in _with_sequences(taken)
        )

    def _count_tokens(self, taken: Taken) -> tuple[int, int]:
        """(stale tokens within the bound that have a value, those that have none)."""
        scored = late = 0
        for trajectory, _ in _with_sequences(taken):
            stale = _stale(trajectory, taken.staleness, taken.max_versions)
            known = self._pool.known(trajectory)
            valued = int((stale & (known.source == Source.DEDICATED)).sum())
            scored, late = scored + valued, late + int(stale.sum()) - valued
        return scored, late

    # ------------------------------------------------------------------------------------------------------ the pool

    def see(self, states: tuple[OldPolicyState, ...], now: float) -> None:
        """Judge by our own clock who is alive: a key that expires, or does not, says nothing by itself."""
        before, self._lives = self._lives, {}
        for state in states:
            life = (state.incarnation, state.revision)
            incarnation, revision, seen_at = before.get(state.worker, ("", -1, now))
            self._lives[state.worker] = (*life, seen_at if (incarnation, revision) == life else now)
        alive = sum(now - seen_at < SILENT_SECONDS for _, _, seen_at in self._lives.values())
        if alive != self._workers:
            log = self._logger.info if alive else self._logger.warning
            log("old-policy workers alive", extra={"workers": alive, "before": self._workers})
        self._workers = alive


def _with_sequences(taken: Taken) -> list[tuple[Trajectory, int]]:
    trajectories = [trajectory for group in taken.groups for trajectory in group]
    return [(t, taken.sequences[(t.header.task, t.header.sample)]) for t in trajectories]


def _stale(trajectory: Trajectory, staleness: Mapping[int, int], max_versions: int) -> NDArray[np.bool_]:
    """[T], tokens that need a value from elsewhere: neither the resident version's, nor over the bound."""
    wanted = [version for version in trajectory.versions if 0 < staleness[version] <= max_versions]
    mask: NDArray[np.bool_] = trajectory.model_mask & np.isin(trajectory.weight_version, wanted)
    return mask
