"""Kubernetes objects (JSON) to what `decide` looks at. Pure, and lenient: fields that are not there are empty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rljob_api import names
from rljob_operator.core.observed import (
    Child,
    Container,
    Deployment,
    Identity,
    Pod,
    PodCondition,
    Stranger,
    Termination,
    TrainerJob,
)

Object = Mapping[str, Any]


def identity(rljob: Object) -> Identity:
    """Of the RLJob itself."""
    meta = rljob["metadata"]
    return Identity(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta.get("generation", 0),
        resource_version=meta["resourceVersion"],
        created_at=_moment(meta["creationTimestamp"]),
        deleted_at=_maybe(meta.get("deletionTimestamp")),
        finalizers=tuple(meta.get("finalizers") or ()),
    )


def is_controlled_by(child: Object, uid: str) -> bool:
    """Whether the object's controller has this uid."""
    return any(
        owner.get("controller") and owner.get("uid") == uid for owner in child["metadata"].get("ownerReferences") or ()
    )


def stranger(found: Object) -> Stranger:
    """An object that is not ours, under a child's name."""
    owners = [owner for owner in found["metadata"].get("ownerReferences") or () if owner.get("controller")]
    owner = f"{owners[0].get('kind')} {owners[0].get('name')}" if owners else ""
    return Stranger(found["kind"], found["metadata"]["name"], owner)


def trainer_job(found: Object) -> TrainerJob:
    """One attempt of the gang."""
    meta = found["metadata"]
    conditions = {
        item["type"]: item for item in found.get("status", {}).get("conditions") or () if item.get("status") == "True"
    }
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    ended = conditions.get("Complete") or failed or {}
    return TrainerJob(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        attempt=_number(meta, names.LABEL_ATTEMPT),
        created_at=_moment(meta["creationTimestamp"]),
        config_hash=_annotation(meta, names.ANNOTATION_HASH),
        is_deleting="deletionTimestamp" in meta,
        is_complete="Complete" in conditions,
        is_failed=failed is not None,
        finished_at=_maybe(ended.get("lastTransitionTime")),
        # The Job's only rule of that kind looks for DisruptionTarget (builders/trainer_job.py).
        is_disrupted=failed is not None and failed.get("reason") == "PodFailurePolicy",
        message="" if failed is None else str(failed.get("message", "")),
    )


def deployment(found: Object) -> Deployment:
    """A pool of workers."""
    meta = found["metadata"]
    return Deployment(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        pool=(meta.get("labels") or {}).get(names.LABEL_POOL, ""),
        replicas=found["spec"].get("replicas", 1),
        template_hash=_annotation(meta, names.ANNOTATION_HASH),
        is_deleting="deletionTimestamp" in meta,
    )


def child(found: Object) -> Child:
    """Any other object of ours."""
    meta = found["metadata"]
    return Child(found["kind"], meta["name"], meta["uid"], meta["resourceVersion"], "deletionTimestamp" in meta)


def pod(found: Object) -> Pod:
    """A pod of the job."""
    meta, status = found["metadata"], found.get("status") or {}
    labels = meta.get("labels") or {}
    pool = labels.get(names.LABEL_POOL, "")
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        pool=pool,
        phase=status.get("phase", "Pending"),
        created_at=_moment(meta["creationTimestamp"]),
        attempt=_number(meta, names.LABEL_ATTEMPT) if pool == names.TRAINER_POOL else None,
        deleted_at=_maybe(meta.get("deletionTimestamp")),
        conditions=tuple(
            PodCondition(
                type=item["type"],
                status=item["status"],
                reason=item.get("reason") or "",
                message=item.get("message") or "",
                since=_maybe(item.get("lastTransitionTime")),
            )
            for item in status.get("conditions") or ()
        ),
        containers=tuple(
            _container(item)
            for kind in ("initContainerStatuses", "containerStatuses")
            for item in status.get(kind) or ()
        ),
        template_hash=_annotation(meta, names.ANNOTATION_HASH),
    )


def _container(status: Object) -> Container:
    state, before = status.get("state") or {}, status.get("lastState") or {}
    waiting = state.get("waiting") or {}
    return Container(
        name=status["name"],
        is_ready=bool(status.get("ready")),
        restarts=status.get("restartCount", 0),
        waiting=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        ended=_termination(state.get("terminated")),
        ended_before=_termination(before.get("terminated")),
    )


def _termination(terminated: Object | None) -> Termination | None:
    """How it ended. The runtime leaves {reason, rank, exitCode, time, message}; others leave the end of their log."""
    if terminated is None:
        return None
    reason, code = str(terminated.get("reason") or "Error"), int(terminated.get("exitCode", 0))
    finished_at = _maybe(terminated.get("finishedAt"))
    text = str(terminated.get("message") or "").strip()
    try:
        own = json.loads(text)
    except ValueError:
        own = None
    if not isinstance(own, dict) or not isinstance(own.get("reason"), str):
        return Termination(reason, code, finished_at, text.splitlines()[-1][:1000] if text else "")
    rank = f"rank {own['rank']}: " if isinstance(own.get("rank"), int) else ""
    return Termination(
        str(own["reason"]),
        int(own.get("exitCode", code)),
        _maybe(own.get("time")) or finished_at,
        f"{rank}{own.get('message', '')}"[:1000],
    )


def _annotation(meta: Object, name: str) -> str:
    return str((meta.get("annotations") or {}).get(name, ""))


def _number(meta: Object, label: str) -> int:
    text = str((meta.get("labels") or {}).get(label, ""))
    return int(text) if text.isascii() and text.isdigit() else 0


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _maybe(text: object) -> datetime | None:
    if not isinstance(text, str) or not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
