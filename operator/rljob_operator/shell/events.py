"""Kubernetes Events on the RLJob. They help people; a lost one is no reason to fail a pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from rljob_api.names import API_VERSION, FIELD_MANAGER, KIND
from rljob_operator.core.observed import Identity
from rljob_operator.core.plan import Event
from rljob_operator.shell.api import Api, ApiError
from rljob_operator.shell.kinds import EVENT

MAX_NOTE = 1024
"""Bytes that the apiserver takes."""


class Events:
    """Writes them."""

    def __init__(self, api: Api, wall_clock: Callable[[], datetime], logger: logging.Logger) -> None:
        self._api = api
        self._wall_clock = wall_clock
        self._logger = logger

    async def emit(self, identity: Identity, event: Event) -> None:
        """One Event; the same sentence goes to the log."""
        where = f"{identity.namespace}/{identity.name}"
        level = logging.INFO if event.type == "Normal" else logging.WARNING
        self._logger.log(level, event.message, extra={"rljob": where, "reason": event.reason.value})
        now = self._wall_clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        reference = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": identity.namespace,
            "name": identity.name,
            "uid": identity.uid,
            "resourceVersion": identity.resource_version,
        }
        message = event.message if len(event.message) <= MAX_NOTE else f"{event.message[: MAX_NOTE - 2]} …"
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{identity.name}.", "namespace": identity.namespace},
            "involvedObject": reference,
            "type": event.type,
            "reason": event.reason.value,
            "message": message,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._api.create(EVENT, identity.namespace, body)
        except ApiError as error:
            self._logger.warning("event not written", extra={"rljob": where, "error": str(error)})
