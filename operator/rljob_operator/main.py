"""The operator's process: `rljob operator`.

Every replica keeps its caches warm; only the holder of the lease runs passes and coordinators. A component that stops ends
the process: Kubernetes starts it again, and a standby has taken over by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from datetime import UTC, datetime

from rljob_api.errors import RljobError
from rljob_api.names import LABEL_MANAGED_BY, LABEL_NAME, MANAGED_BY
from rljob_operator.settings import OperatorSettings
from rljob_operator.shell import handlers, http
from rljob_operator.shell.api import Api, NotFound, Object
from rljob_operator.shell.apply import Apply
from rljob_operator.shell.cache import Cache
from rljob_operator.shell.clues import Clues
from rljob_operator.shell.coordination import Coordination
from rljob_operator.shell.events import Events
from rljob_operator.shell.gather import Gather, rljobs
from rljob_operator.shell.kinds import POD, RLJOB, WATCHED, Kind
from rljob_operator.shell.leader import Leader, LeadershipLost
from rljob_operator.shell.metrics import Metrics
from rljob_operator.shell.queue import WorkQueue
from rljob_operator.shell.reconciler import Reconciler
from rljob_protocol import logs

LEASE_NAME = "rljob-operator"
STUCK_QUEUE_SECONDS = 300.0
STUCK_WATCH_SECONDS = 180.0
STUCK_LOOP_SECONDS = 30.0
SWEEP_SECONDS = 300.0
STOP_SECONDS = 5.0


def main() -> int:
    """Run until told to stop; 0 then, 1 when the lease was lost or a component failed."""
    logger = logs.configure("rljob.operator")
    try:
        settings = OperatorSettings.from_environment(os.environ)
        asyncio.run(Operator(settings, logger).run())
    except RljobError as error:
        logger.error("operator ended", extra={"error": str(error)})
        return 1
    except ExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        level = logging.WARNING if isinstance(cause, LeadershipLost) else logging.ERROR
        logger.log(level, "operator ended", extra={"error": str(cause) or type(cause).__name__})
        return 1
    return 0


class Operator:
    """All parts, wired."""

    def __init__(self, settings: OperatorSettings, logger: logging.Logger) -> None:
        self._settings = settings
        self._logger = logger
        self._stop = asyncio.Event()
        self._beat = time.monotonic()
        self._metrics = Metrics()

    async def run(self) -> None:
        """Until SIGTERM.

        Raises:
            LeadershipLost, RljobError
        """
        loop = asyncio.get_running_loop()
        api = await Api.connect(self._metrics.called)
        queue = WorkQueue(random.random)
        caches = {kind: self._cache(api, kind, queue) for kind in WATCHED}
        leader = Leader(api, self._settings.namespace, LEASE_NAME, self._settings.identity, now, self._logger)

        async def restart_pod(namespace: str, pod: str, reason: str) -> None:
            del reason  # logged by the coordination
            held = caches[POD].get(namespace, pod)
            if held is not None and leader.is_leader():
                try:
                    await api.delete(POD, namespace, pod, held["metadata"]["uid"])
                except NotFound:
                    return

        coordination = Coordination(
            default_url=self._settings.core.nats_url,
            credentials=self._settings.nats_credentials,
            restart_pod=restart_pod,
            changed=lambda namespace, name: queue.add((namespace, name)),
            owner=lambda: leader.lease_uid,
            wall_clock=now,
            logger=self._logger,
        )
        reconciler = Reconciler(
            queue=queue,
            caches=caches,
            gather=Gather(api, caches, Clues(api), coordination, self._settings.core, now),
            apply=Apply(api, caches, Events(api, now, self._logger), coordination),
            coordination=coordination,
            leader=leader,
            metrics=self._metrics,
            logger=self._logger,
        )

        def refresh() -> None:
            self._metrics.queue_depth.set(queue.depth)
            self._metrics.queue_oldest.set(queue.oldest_seconds)
            self._metrics.is_leader.set(leader.is_leader())
            self._metrics.coordinators.set(coordination.running)
            for cache in caches.values():
                self._metrics.watch_age.labels(cache.kind.plural).set(cache.age_seconds)

        kopf_stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    *(tasks.create_task(cache.run(), name=f"cache {cache.kind.plural}") for cache in caches.values()),
                    tasks.create_task(self._beats(), name="beat"),
                    tasks.create_task(
                        http.serve(
                            self._settings.port, self._metrics.registry, lambda: self._stuck(queue, caches), refresh
                        ),
                        name="http",
                    ),
                    tasks.create_task(
                        handlers.run(
                            lambda namespace, name: queue.add((namespace, name)),
                            self._settings.watched_namespace,
                            kopf_stop,
                        ),
                        name="kopf",
                    ),
                ]
                # After kopf's: it installs its own.
                await asyncio.sleep(0.5)
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self._stop.set)
                running.append(
                    tasks.create_task(self._lead(leader, caches, queue, reconciler, coordination), name="lead")
                )
                await self._until_stopped(running)
                kopf_stop.set()
                try:
                    async with asyncio.timeout(STOP_SECONDS):
                        await coordination.stop()
                except TimeoutError:
                    self._logger.warning("coordinators did not stop in time", extra={"seconds": STOP_SECONDS})
                await leader.release()
                for task in running:
                    task.cancel()
        finally:
            await api.close()
        self._logger.info("operator stopped")

    async def _until_stopped(self, running: list[asyncio.Task[None]]) -> None:
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stop, *running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        ended = [task for task in running if task.done()]
        if ended and not self._stop.is_set():
            for task in ended:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
            raise RljobError(f"a part of the operator ended by itself: {ended[0].get_name()}")

    async def _lead(
        self,
        leader: Leader,
        caches: dict[Kind, Cache],
        queue: WorkQueue,
        reconciler: Reconciler,
        coordination: Coordination,
    ) -> None:
        for cache in caches.values():
            await cache.synced.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leader.run())
            await leader.acquired.wait()
            for rljob in rljobs(caches):
                queue.add((rljob["metadata"]["namespace"], rljob["metadata"]["name"]))
            for _ in range(self._settings.workers):
                tasks.create_task(reconciler.run())
            tasks.create_task(self._sweeps(leader, coordination, caches))

    async def _sweeps(self, leader: Leader, coordination: Coordination, caches: dict[Kind, Cache]) -> None:
        def known() -> frozenset[str]:
            return frozenset(rljob["metadata"]["uid"] for rljob in rljobs(caches))

        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if not leader.is_leader():
                continue
            try:
                await coordination.sweep(known)
            except RljobError as error:
                self._logger.warning("sweep failed", extra={"error": str(error)})

    def _cache(self, api: Api, kind: Kind, queue: WorkQueue) -> Cache:
        def changed(item: Object) -> None:
            meta = item["metadata"]
            name = meta["name"] if kind is RLJOB else (meta.get("labels") or {}).get(LABEL_NAME)
            if name:
                queue.add((meta["namespace"], name))

        labels = "" if kind is RLJOB else f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        return Cache(api, kind, self._settings.watched_namespace, labels, changed, self._logger)

    async def _beats(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1.0)

    def _stuck(self, queue: WorkQueue, caches: dict[Kind, Cache]) -> str:
        """What is stuck, as a sentence; empty while all is well."""
        if time.monotonic() - self._beat > STUCK_LOOP_SECONDS:
            return f"the event loop did not turn for {STUCK_LOOP_SECONDS:g} s"
        if queue.oldest_seconds > STUCK_QUEUE_SECONDS:
            return f"a job waits for its pass for {queue.oldest_seconds:.0f} s"
        for cache in caches.values():
            if cache.age_seconds > STUCK_WATCH_SECONDS and not cache.is_refused:  # a new start would not help that
                because = f": {cache.error}" if cache.error else ""
                return f"the watch of {cache.kind.plural} has been silent for {cache.age_seconds:.0f} s{because}"
        return ""


def now() -> datetime:
    """The wall clock, UTC."""
    return datetime.fromtimestamp(time.time(), UTC)
