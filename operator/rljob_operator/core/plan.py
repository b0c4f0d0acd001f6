"""What one pass does: data only. The shell carries it out in the order of the fields and stops at the first failure.

1. `finalizers`   the new list, by a patch with the observed resourceVersion; nothing else happens in such a pass
2. `actions`      one after the other
3. `status`       one write with the observed resourceVersion; None when nothing changed
4. `events`       after the status was written, so that an Event never speaks of what was not recorded
5. `requeue_after_seconds`  the next pass even when nothing happens

A pass that raises `attempt` or `restarts` has no actions: it only writes status, and the next pass acts on what was
written. So a crash after any single write leaves nothing that the next pass counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rljob_api.reasons import Reason
from rljob_api.status import RLJobStatus

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Create:
    """POST; an object of that name that is ours counts as done, another one is a ChildConflict of the next pass."""

    body: Body


@dataclass(frozen=True, slots=True)
class Replace:
    """Put parts of a child in the place of what is there, by a JSON patch that first tests uid and resourceVersion.

    Not server-side apply: that keeps what another manager's create put there, so a field that the user took out of a
    template would stay; and without the test it would adopt a stranger's object.
    """

    kind: str
    name: str
    uid: str
    resource_version: str
    parts: Mapping[str, Any]
    """JSON pointer -> value; every pointer exists in the object."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge patch, with metadata.uid as the precondition."""

    kind: str
    name: str
    uid: str
    body: Body


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete exactly what was seen: uid is a precondition. Dependents go in the background."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class DeleteState:
    """Delete the job's streams, buckets and objects in NATS."""

    uid: str


Action = Create | Replace | Merge | Delete | DeleteState


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes Event on the RLJob, on a transition only."""

    type: Literal["Normal", "Warning"]
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...] = ()
    finalizers: tuple[str, ...] | None = None
    """None leaves them as they are."""
    status: RLJobStatus | None = None
    status_is_urgent: bool = True
    """False: only progress moved; it may wait until `Settings.status_seconds` after the last write."""
    events: tuple[Event, ...] = ()
    requeue_after_seconds: float | None = None
    coordinate: bool = False
    """Whether a protocol coordinator of the job shall run in this operator."""
