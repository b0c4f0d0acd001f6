"""What the cluster holds of one kind, kept current by list and watch.

A list after a gap is compared with what is held: objects that went away in between are reported as deleted (kopf's own
index keeps them for ever). What the operator wrote itself is put in at once, so that no pass acts on a cache that is
older than its own last write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from rljob_operator.shell.api import OPENED, Api, ApiError, Gone, Object, Refused
from rljob_operator.shell.kinds import Kind

RELIST_SECONDS = (0.2, 30.0)
"""Pause before the next list after a failure: doubled from the first to the second."""

Changed = Callable[[Object], None]


class Cache:
    """One kind, in one namespace or all of them.

    produces    calls of `changed` with each object that came, changed or went
    consumes    lists and watches of the apiserver
    waits for   the next line of the watch, with a deadline that bookmarks keep alive
    unblocked by  the apiserver; a broken watch is followed by a new list after a pause
    """

    def __init__(
        self, api: Api, kind: Kind, namespace: str | None, labels: str, changed: Changed, logger: logging.Logger
    ) -> None:
        self._api = api
        self.kind = kind
        self._namespace = namespace
        self._labels = labels
        self._changed = changed
        self._logger = logger
        self._objects: dict[tuple[str, str], Object] = {}
        self._deleted: dict[str, float] = {}
        """uid -> when; a late line of the watch must not bring it back."""
        self.synced = asyncio.Event()
        self._heard_at = time.monotonic()
        self._pause = RELIST_SECONDS[0]
        self.error = ""
        """Why the last list or watch failed; empty while it works."""
        self.is_refused = False
        """Whether the apiserver refuses to list or to watch: what is held is not what there is, until a role changes."""

    @property
    def age_seconds(self) -> float:
        """Since the apiserver last said anything."""
        return time.monotonic() - self._heard_at

    def get(self, namespace: str, name: str) -> Object | None:
        return self._objects.get((namespace, name))

    def in_namespace(self, namespace: str) -> Iterator[Object]:
        return (item for (held, _), item in self._objects.items() if held == namespace)

    def all(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    def written(self, item: Object) -> None:
        """Put in what a write answered, unless something newer is held."""
        self._put({**item, "kind": self.kind.name, "apiVersion": self.kind.api_version})

    async def run(self) -> None:
        """Keep it current until cancelled."""
        while True:
            try:
                version = await self._list()
                while True:
                    version = await self._watch(version)
            except Gone:
                self._logger.info("list too old", extra={"kind": self.kind.name})
            except ApiError as error:
                self.error = str(error)
                if isinstance(error, Refused):
                    self.is_refused = True
                    self.synced.set()  # waiting would not help, and passes can say why they do nothing
                self._logger.warning("watch broke", extra={"kind": self.kind.name, "error": str(error)})
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, RELIST_SECONDS[1])

    async def _list(self) -> str:
        found, version = await self._api.list_all(self.kind, self._namespace, labels=self._labels)
        self._heard_at = time.monotonic()
        kept = {_key(item) for item in found}
        for key in [key for key in self._objects if key not in kept]:
            self._changed(self._objects.pop(key))
        for item in found:
            self._put(item)
        self.synced.set()
        return version

    async def _watch(self, version: str) -> str:
        async for event in self._api.watch(self.kind, self._namespace, version, labels=self._labels):
            self._heard_at = time.monotonic()
            self.error = ""
            if event.type == OPENED:
                self._opened()
                continue
            self._pause = RELIST_SECONDS[0]
            item = event.object
            version = item["metadata"]["resourceVersion"]
            if event.type == "BOOKMARK":
                continue
            item = {**item, "kind": self.kind.name, "apiVersion": self.kind.api_version}
            if event.type == "DELETED":
                held = self._objects.get(_key(item))
                self._forget_old_deletions()
                self._deleted[item["metadata"]["uid"]] = time.monotonic()
                if held is not None and held["metadata"]["uid"] == item["metadata"]["uid"]:
                    del self._objects[_key(item)]
                self._changed(item)
            else:
                self._put(item)
        return version

    def _opened(self) -> None:
        if self.is_refused:
            self.is_refused = False
            for item in self._objects.values():
                self._changed(item)

    def _put(self, item: Object) -> None:
        item["metadata"].pop("managedFields", None)
        if item["metadata"]["uid"] in self._deleted:
            return
        held = self._objects.get(_key(item))
        same = held is not None and held["metadata"]["uid"] == item["metadata"]["uid"]
        if held is not None and same and _version(held) >= _version(item):
            return
        self._objects[_key(item)] = item
        self._changed(item)

    def _forget_old_deletions(self) -> None:
        limit = time.monotonic() - 600
        self._deleted = {uid: when for uid, when in self._deleted.items() if when > limit}


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def _version(item: Object) -> int:
    """resourceVersions of one resource can be compared as numbers (promised since Kubernetes 1.35)."""
    return int(item["metadata"]["resourceVersion"])
