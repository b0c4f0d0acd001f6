"""The one operator that writes: holder of a Lease. Times as everywhere in Kubernetes: 15 s lease, 10 s to renew, every 2 s.

Only local monotonic clocks count: a holder that could not renew for 10 s stops by itself, 5 s before another may take over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import datetime

from rljob_api.errors import RljobError
from rljob_operator.shell.api import Api, ApiError, Conflict, NotFound, Object
from rljob_operator.shell.kinds import LEASE

LEASE_SECONDS = 15
RENEW_SECONDS = 10.0
RETRY_SECONDS = 2.0
RELEASE_TRIES = 5


class LeadershipLost(RljobError):
    """The lease could not be renewed in time, or another one holds it; the process must end."""


class Leader:
    """One candidate.

    produces    `is_leader`; raises LeadershipLost when it was lost
    consumes    the Lease
    waits for   the next try
    unblocked by  a timer
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        wall_clock: Callable[[], datetime],
        logger: logging.Logger,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._wall_clock = wall_clock
        self._logger = logger
        self._renewed_at: float | None = None
        self._seen: tuple[str, float] = ("", 0.0)
        """(resourceVersion of the lease, when it was first seen)"""
        self._is_released = False
        self.acquired = asyncio.Event()
        self.lease_uid = ""
        """Of the Lease object: the name of this installation, over restarts and upgrades."""

    def is_leader(self) -> bool:
        """Whether this process may write right now."""
        return self._renewed_at is not None and time.monotonic() - self._renewed_at < RENEW_SECONDS

    async def run(self) -> None:
        """Acquire, then renew, until cancelled.

        Raises:
            LeadershipLost
        """
        while not self._is_released:
            started = time.monotonic()
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    held = await self._try()
            except (ApiError, TimeoutError) as error:
                self._logger.warning("lease not reached", extra={"error": str(error)})
                held = None
            if held:
                self._renewed_at = started
                if not self.acquired.is_set():
                    self._logger.info("lease acquired", extra={"holder": self._identity})
                    self.acquired.set()
            elif self.acquired.is_set() and (held is False or not self.is_leader()):
                raise LeadershipLost(
                    f"the lease {self._name} could not be renewed within {RENEW_SECONDS:g} s or is another's: this operator "
                    "ends, and another one goes on"
                )
            await asyncio.sleep(RETRY_SECONDS)

    async def release(self) -> None:
        """Give it up, so that a successor need not wait for its end."""
        self._is_released = True
        if not self.is_leader():
            return
        self._renewed_at = None
        for _ in range(RELEASE_TRIES):
            try:
                lease = await self._api.get(LEASE, self._namespace, self._name)
                if lease["spec"].get("holderIdentity") != self._identity:
                    return
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": self._time()}
                await self._api.replace(LEASE, self._namespace, self._name, lease)
            except Conflict:
                continue  # the last renewal was still on its way
            except ApiError as error:
                self._logger.warning("lease not released", extra={"error": str(error)})
            else:
                self._logger.info("lease released", extra={"holder": self._identity})
            return

    async def _try(self) -> bool:
        """True: it is ours. False: another's. Raises where that is not known."""
        try:
            lease = await self._api.get(LEASE, self._namespace, self._name)
        except NotFound:
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
            made = await self._api.create(LEASE, self._namespace, {**body, "spec": self._spec(0)})
            self.lease_uid = made["metadata"]["uid"]
            return True
        if not self._may_take(lease):
            return False
        self.lease_uid = lease["metadata"]["uid"]
        spec = lease["spec"]
        changes = int(spec.get("leaseTransitions") or 0) + (0 if spec.get("holderIdentity") == self._identity else 1)
        acquired = spec.get("acquireTime") if spec.get("holderIdentity") == self._identity else None
        lease["spec"] = self._spec(changes) | ({"acquireTime": acquired} if acquired else {})
        await self._api.replace(LEASE, self._namespace, self._name, lease)
        return True

    def _may_take(self, lease: Object) -> bool:
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, time.monotonic())
            return False
        return time.monotonic() - self._seen[1] > float(spec.get("leaseDurationSeconds") or LEASE_SECONDS)

    def _spec(self, transitions: int) -> Object:
        now = self._time()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": LEASE_SECONDS,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }

    def _time(self) -> str:
        return self._wall_clock().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
