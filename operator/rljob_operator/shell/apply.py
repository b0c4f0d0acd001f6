"""Carries out a plan, write by write, in its order, and stops at the first failure.

What the apiserver refuses for good (not admitted, forbidden, not valid) is kept as a `Refusal` for the next pass, which
says it in a condition and leaves that write out until the spec changes or a while has passed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rljob_api.names import KIND
from rljob_api.status import RLJobStatus
from rljob_operator.core import read
from rljob_operator.core.observed import Identity, Observed, Refusal
from rljob_operator.core.plan import Action, Create, Delete, DeleteState, Merge, Plan, Replace
from rljob_operator.shell.api import AlreadyExists, Api, Conflict, NotFound, Object, Refused
from rljob_operator.shell.coordination import Coordination
from rljob_operator.shell.events import Events
from rljob_operator.shell.gather import Caches
from rljob_operator.shell.kinds import BY_NAME, RLJOB

REFUSED_SECONDS = 60.0
"""After that the write is tried again: a quota may have been raised."""


@dataclass
class Memory:
    """What passes of one job remember. Lost at a restart: then it is learned anew."""

    refusals: dict[tuple[str, str], tuple[Refusal, int, float]] = field(default_factory=dict)
    """(kind, name) -> (refusal, generation, when)"""
    status_written_at: float = float("-inf")
    pruned: dict[str, float] = field(default_factory=dict)
    """Field of the status that the apiserver dropped -> when."""

    def dropped(self) -> tuple[str, ...]:
        """Fields that are not written again for now: the CRD does not know them."""
        now = time.monotonic()
        self.pruned = {path: when for path, when in self.pruned.items() if now - when < REFUSED_SECONDS}
        return tuple(sorted(self.pruned))

    def known(self, generation: int) -> tuple[Refusal, ...]:
        """Refusals that still count."""
        now = time.monotonic()
        self.refusals = {
            key: held
            for key, held in self.refusals.items()
            if held[1] == generation and now - held[2] < REFUSED_SECONDS
        }
        return tuple(held[0] for held in self.refusals.values())


class Apply:
    """Writes."""

    def __init__(self, api: Api, caches: Caches, events: Events, coordination: Coordination) -> None:
        self._api = api
        self._caches = caches
        self._events = events
        self._coordination = coordination

    async def carry_out(self, plan: Plan, observed: Observed, memory: Memory) -> float | None:
        """Do it; seconds after which a status that waits shall be written, or None.

        Raises:
            Conflict: something changed since it was observed: the next pass sees it.
            ApiError
        """
        identity = observed.identity
        if plan.finalizers is not None:
            await self._finalizers(identity, plan.finalizers)
        for action in plan.actions:
            try:
                await self._act(action, identity, observed)
            except Refused as error:
                kind, name = _target(action)
                refusal = Refusal(kind, name, error.code, error.reason, str(error))
                memory.refusals[kind, name] = (refusal, identity.generation, time.monotonic())
                return 0.0  # the next pass says it
        wait = None
        if plan.status is not None:
            wait = observed.settings.status_seconds - (time.monotonic() - memory.status_written_at)
            if plan.status_is_urgent or wait <= 0:
                await self._status(identity, observed.status, plan.status, memory)
                memory.status_written_at = time.monotonic()
                wait = None
        for event in plan.events:
            await self._events.emit(identity, event)
        return wait

    async def _act(self, action: Action, identity: Identity, observed: Observed) -> None:
        namespace = identity.namespace
        match action:
            case Create(body):
                await self._create(dict(body), identity)
            case Replace(kind, name, uid, resource_version, parts):
                operations: list[Object] = [
                    {"op": "test", "path": "/metadata/uid", "value": uid},
                    {"op": "test", "path": "/metadata/resourceVersion", "value": resource_version},
                ]
                operations += [{"op": "replace", "path": path, "value": value} for path, value in parts.items()]
                self._written(kind, await self._api.patch(BY_NAME[kind], namespace, name, operations))
            case Merge(kind, name, _, body):
                try:
                    self._written(kind, await self._api.merge(BY_NAME[kind], namespace, name, body))
                except NotFound:
                    return  # a pod that went by itself
            case Delete(kind, name, uid):
                await self._delete(kind, namespace, name, uid)
            case DeleteState():
                spec = observed.spec
                await self._coordination.delete_state(identity, None if spec is None else spec.messaging.url)

    async def _create(self, body: dict[str, Any], identity: Identity) -> None:
        kind, name = body["kind"], body["metadata"]["name"]
        try:
            made = await self._api.create(BY_NAME[kind], identity.namespace, body)
        except AlreadyExists:
            made = await self._api.get(BY_NAME[kind], identity.namespace, name)
            if not read.is_controlled_by(made, identity.uid):
                raise Conflict(409, "ChildConflict", f"{kind} {name} is not ours") from None
        self._written(kind, made)

    async def _delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        try:
            await self._api.delete(BY_NAME[kind], namespace, name, uid)
        except Conflict:
            return  # another object has the name by now: ours is gone
        if kind == KIND:
            return
        # Until the watch says more: a pass must not delete it again, nor count on it.
        held = self._caches[BY_NAME[kind]].get(namespace, name)
        if held is not None and held["metadata"]["uid"] == uid:
            held["metadata"].setdefault("deletionTimestamp", held["metadata"]["creationTimestamp"])

    async def _finalizers(self, identity: Identity, finalizers: tuple[str, ...]) -> None:
        patch = {
            "metadata": {
                "uid": identity.uid,
                "resourceVersion": identity.resource_version,
                "finalizers": list(finalizers) or None,
            }
        }
        try:
            self._written(KIND, await self._api.merge(RLJOB, identity.namespace, identity.name, patch))
        except NotFound:
            return

    async def _status(self, identity: Identity, before: RLJobStatus, after: RLJobStatus, memory: Memory) -> None:
        changes = merge_patch(_document(before, exclude_unset=True), _document(after))
        for path in memory.dropped():
            changes.pop(path, None)
        if not changes:
            return
        patch = {
            "metadata": {"uid": identity.uid, "resourceVersion": identity.resource_version},
            "status": changes,
        }
        written = await self._api.merge(RLJOB, identity.namespace, identity.name, patch, subresource="status")
        kept = written.get("status") or {}
        for path, value in changes.items():
            if value is not None and path not in kept:
                memory.pruned[path] = time.monotonic()
        self._written(KIND, written)

    def _written(self, kind: str, item: Object) -> None:
        cache = self._caches.get(BY_NAME[kind])
        if cache is not None and "metadata" in item and "deletionTimestamp" not in item["metadata"]:
            cache.written(item)


def merge_patch(before: Object, after: Object) -> Object:
    """What turns `before` into `after`: fields that went are null, lists are whole."""
    patch: Object = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            inner = merge_patch(old, value)
            if inner:
                patch[key] = inner
        elif value != old:
            patch[key] = value
    return patch


def _document(status: RLJobStatus, *, exclude_unset: bool = False) -> Object:
    """`exclude_unset`: only what the object has, without the model's defaults: those are still to be written."""
    document: Object = status.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=exclude_unset)
    return document


def _target(action: Action) -> tuple[str, str]:
    match action:
        case Create(body):
            return body["kind"], body["metadata"]["name"]
        case Replace(kind=kind, name=name) | Merge(kind=kind, name=name) | Delete(kind=kind, name=name):
            return kind, name
        case DeleteState():
            return "", ""
