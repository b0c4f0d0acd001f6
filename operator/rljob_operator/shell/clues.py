"""Kubernetes Events that say why a pod or a Job is stuck: FailedMount and FailedCreate are told nowhere else.

Asked for by the uid of what is stuck, and only when it is so for a while: Events are many.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from rljob_operator.core.observed import Clue
from rljob_operator.shell.api import Api, ApiError, Object
from rljob_operator.shell.kinds import EVENT

REASONS = ("FailedMount", "FailedAttachVolume", "FailedCreate")
ASK_AGAIN_SECONDS = 30.0
STUCK_SECONDS = 30.0
MAX_ASKED = 5
"""Objects a pass asks for: one cause is enough for a sentence."""


class Clues:
    """What Events said, by uid."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._held: dict[str, tuple[float, tuple[Clue, ...]]] = {}

    async def of(self, stuck: Iterable[Object]) -> tuple[Clue, ...]:
        """About these objects; an apiserver that does not answer tells nothing."""
        found: list[Clue] = []
        for item in list(stuck)[:MAX_ASKED]:
            uid = item["metadata"]["uid"]
            asked_at, known = self._held.get(uid, (float("-inf"), ()))
            if time.monotonic() - asked_at > ASK_AGAIN_SECONDS:
                known = await self._ask(item, uid)
                self._held[uid] = (time.monotonic(), known)
            found += known
        limit = time.monotonic() - 10 * ASK_AGAIN_SECONDS
        self._held = {uid: held for uid, held in self._held.items() if held[0] > limit}
        return tuple(found)

    async def _ask(self, item: Object, uid: str) -> tuple[Clue, ...]:
        try:
            events, _ = await self._api.list_all(
                EVENT, item["metadata"]["namespace"], fields=f"involvedObject.uid={uid},type=Warning"
            )
        except ApiError:
            return ()
        told = [event for event in events if event.get("reason") in REASONS]
        told.sort(key=lambda event: str(event.get("lastTimestamp") or event["metadata"]["creationTimestamp"]))
        return tuple(
            Clue(item["kind"], item["metadata"]["name"], event["reason"], event.get("message") or "")
            for event in told[-1:]
        )
