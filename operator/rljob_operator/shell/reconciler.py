"""The loop: key -> observe -> decide -> apply.

produces    writes; the next moment at which a key is due
consumes    the work queue
waits for   the lease, then keys
unblocked by  the queue
"""

from __future__ import annotations

import asyncio
import logging
import time

from rljob_api.errors import RljobError
from rljob_operator.core.decide import decide
from rljob_operator.shell.api import ApiError, Conflict
from rljob_operator.shell.apply import Apply, Memory
from rljob_operator.shell.coordination import Coordination
from rljob_operator.shell.gather import Caches, Gather
from rljob_operator.shell.kinds import RLJOB
from rljob_operator.shell.leader import Leader
from rljob_operator.shell.metrics import Metrics
from rljob_operator.shell.queue import Key, WorkQueue

RESYNC_SECONDS = 300.0
"""A key comes again after that long whatever happens: no trigger is so good that one may depend on it."""
PASS_SECONDS = 120.0


class Reconciler:
    """Workers over one queue; every key by one of them at a time."""

    def __init__(
        self,
        *,
        queue: WorkQueue,
        caches: Caches,
        gather: Gather,
        apply: Apply,
        coordination: Coordination,
        leader: Leader,
        metrics: Metrics,
        logger: logging.Logger,
    ) -> None:
        self._queue = queue
        self._caches = caches
        self._gather = gather
        self._apply = apply
        self._coordination = coordination
        self._leader = leader
        self._metrics = metrics
        self._logger = logger
        self._memories: dict[str, Memory] = {}
        self._uids: dict[Key, str] = {}

    async def run(self) -> None:
        """Work on keys until cancelled."""
        while True:
            key = await self._queue.get()
            started = time.monotonic()
            try:
                async with asyncio.timeout(PASS_SECONDS):
                    after = await self._pass(key)
            except Conflict as error:
                self._logger.info("observed too old", extra={"rljob": "/".join(key), "error": str(error)})
                self._queue.done(key, failed=True)
                self._metrics.passed("conflict", time.monotonic() - started)
            except (RljobError, TimeoutError) as error:
                wait = error.retry_after if isinstance(error, ApiError) else None
                pause = self._queue.done(key, failed=True, retry_after=wait)
                said = str(error) or f"the pass did not end within {PASS_SECONDS:g} s"
                self._logger.warning(
                    "pass failed", extra={"rljob": "/".join(key), "error": said, "again_seconds": round(pause, 1)}
                )
                self._metrics.passed("failed", time.monotonic() - started)
            except Exception:  # the top of the loop: one job's surprise must not stop the others
                pause = self._queue.done(key, failed=True)
                self._logger.exception("pass broke", extra={"rljob": "/".join(key), "again_seconds": round(pause, 1)})
                self._metrics.passed("broken", time.monotonic() - started)
            else:
                self._queue.done(key)
                if after is not None:
                    self._queue.add_after(key, after)
                self._metrics.passed("done", time.monotonic() - started)

    async def _pass(self, key: Key) -> float | None:
        """One pass; seconds until the next, None where the object is gone."""
        if not self._leader.is_leader():
            return 1.0
        rljob = self._caches[RLJOB].get(*key)
        if rljob is None:
            await self._gone(key)
            return None
        uid = rljob["metadata"]["uid"]
        if self._uids.get(key, uid) != uid:
            await self._gone(key)
        self._uids[key] = uid
        memory = self._memories.setdefault(uid, Memory())
        observed = await self._gather.observe(
            rljob, memory.known(rljob["metadata"].get("generation", 0)), memory.dropped()
        )
        plan = decide(observed)
        if not self._leader.is_leader():  # time has passed since it was asked
            return 1.0
        waiting = await self._apply.carry_out(plan, observed, memory)
        if plan.coordinate and observed.spec is not None:
            await self._coordination.want(observed.identity, observed.spec)
        else:
            await self._coordination.unwant(uid)
        self._metrics.job(observed, plan.status or observed.status)
        moments = [
            RESYNC_SECONDS,
            *(seconds for seconds in (plan.requeue_after_seconds, waiting) if seconds is not None),
        ]
        return max(0.0, min(moments))

    async def _gone(self, key: Key) -> None:
        self._queue.forget(key)
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._memories.pop(uid, None)
            await self._coordination.forget(uid)
        self._metrics.forget(key)
