"""Staleness and admission rules, pure (docs/design.md, sections 4a and 4b).

B = groups a step, eta = the staleness bound. An admitted group takes the lowest free *ordinal* n, a pacing slot: it may
be admitted while n < (steps trained + eta + 1) * B, and a drop frees the slot again, else pacing would starve. Training
a group uses its slot up. Its *task* is a running number that is never reused. Arithmetic counts steps; versions are
turned into steps through anchors, because a resume re-publishes a step's weights under a new number.

A group's deadline is the last step that may train it: its oldest token's step + eta once it is finished, floor(n / B)
while it runs. The oldest deadline is trained first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from rljob_api.errors import MalformedMessage
from rljob_api.spec import OnExceeded


class DropReason(StrEnum):
    """Why a group, or a token of it, was not trained."""

    STALE = "Stale"  # over staleness.maxVersions
    GROUP_TOO_SMALL = "GroupTooSmall"  # fewer than minGroupSize scored samples after the straggler timeout
    NO_MODEL_TOKENS = "NoModelTokens"  # nothing was sampled in it


class Verdict(StrEnum):
    """What a trajectory message means to the ledger."""

    ACCEPTED = "Accepted"
    DUPLICATE = "Duplicate"  # this (task, sample) ended before; the first one counts
    LATE = "Late"  # its group was trained or dropped already
    UNKNOWN = "Unknown"  # never admitted


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """The knobs of the rules; maxVersions and onExceeded may change while the job runs."""

    tasks_per_step: int
    samples_per_task: int
    max_versions: int
    on_exceeded: OnExceeded
    min_group_size: int
    straggler_timeout_seconds: float
    steps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished sample that waits for its group."""

    sequence: int
    oldest_version: int | None
    scored: bool


@dataclass(frozen=True, slots=True)
class Group:
    """An admitted group: running, or finished and not yet trained."""

    ordinal: int
    samples: Mapping[int, Sample] = field(default_factory=lambda: MappingProxyType({}))
    first_finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything the rules know; goes into the checkpoint."""

    steps_trained: int = 0
    version: int = 0
    next_task: int = 0
    groups: Mapping[int, Group] = field(default_factory=lambda: MappingProxyType({}))
    used_ordinals: frozenset[int] = frozenset()
    """Slots of trained groups at or above `first_free_ordinal`."""
    first_free_ordinal: int = 0
    """All slots below were used up by trained groups."""
    anchors: tuple[tuple[int, int], ...] = ((0, 0),)
    """(first version, its step) of each stretch in which versions and steps rise together."""
    last_sequence: int = 0
    """Newest message of the trajectory stream seen."""


@dataclass(frozen=True, slots=True)
class Admitted:
    task: int
    ordinal: int
    min_version: int


@dataclass(frozen=True, slots=True)
class SampleSeen:
    """A trajectory message, as far as the rules care."""

    task: int
    sample: int
    sequence: int
    oldest_version: int | None
    """None without model tokens."""
    scored: bool
    """False for an infrastructure failure: it ends the sample and stays outside the group's statistics."""
    model_tokens: int


@dataclass(frozen=True, slots=True)
class DroppedGroup:
    task: int
    reason: DropReason
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchGroup:
    task: int
    samples: tuple[int, ...]
    """Scored samples, ascending."""


def new_ledger() -> Ledger:
    """The ledger of a job that has not trained yet."""
    return Ledger()


# ------------------------------------------------------------------------------------------------ versions and steps


def version_of_step(ledger: Ledger, step: int) -> int:
    """Version that a step starts from, by the present numbering; at least 0."""
    return max(0, ledger.version + step - ledger.steps_trained)


def step_of_version(ledger: Ledger, version: int) -> int:
    """Step that starts from a version; of a version that a resume rolled back, the step resumed from. Never falls.

    Which step a rolled-back version was made for is not known for sure: attempts that saved nothing left no anchor.
    """
    first_version, first_step = ledger.anchors[0]
    for next_version, next_step in ledger.anchors[1:]:
        if version < next_version:
            return min(first_step + version - first_version, next_step)
        first_version, first_step = next_version, next_step
    return first_step + version - first_version


def staleness_of(ledger: Ledger, version: int) -> int:
    """Steps between a token's version and the coming step; 0 for the present version only.

    A version that a resume rolled back may be numbered for the present step, and its weights are others all the same: it
    counts as one step old.
    """
    if version == ledger.version:
        return 0
    return max(1, ledger.steps_trained - step_of_version(ledger, version))


def on_resume(ledger: Ledger, version: int) -> Ledger:
    """The checkpointed ledger under a new version number for the same step; its samples are to be read again."""
    groups = {
        task: replace(group, samples=MappingProxyType({}), first_finished_at=None)
        for task, group in ledger.groups.items()
    }
    return replace(
        ledger,
        version=version,
        anchors=(*ledger.anchors, (version, ledger.steps_trained)),
        groups=MappingProxyType(groups),
        last_sequence=cursor(ledger),
    )


# -------------------------------------------------------------------------------------------------------- admission


def admit(ledger: Ledger, settings: AdmissionSettings) -> tuple[Ledger, tuple[Admitted, ...]]:
    """Admit as many groups as pacing allows, and no more than the remaining steps need."""
    limit = (ledger.steps_trained + settings.max_versions + 1) * settings.tasks_per_step
    # Slots are used up when a batch is taken: while its step is being trained it must not be admitted for again.
    used = ledger.first_free_ordinal + len(ledger.used_ordinals)
    wanted = settings.steps * settings.tasks_per_step - used - len(ledger.groups)
    groups = dict(ledger.groups)
    taken = {group.ordinal for group in groups.values()} | ledger.used_ordinals
    admitted: list[Admitted] = []
    task, ordinal = ledger.next_task, ledger.first_free_ordinal
    while len(admitted) < wanted:
        while ordinal in taken:
            ordinal += 1
        if ordinal >= limit:
            break
        groups[task] = Group(ordinal)
        admitted.append(Admitted(task, ordinal, _min_version(ledger, settings, ordinal)))
        task += 1
        ordinal += 1
    if not admitted:
        return ledger, ()
    return replace(ledger, groups=MappingProxyType(groups), next_task=task), tuple(admitted)


def min_version_of(ledger: Ledger, settings: AdmissionSettings, task: int) -> int:
    """Oldest version an engine may serve to start a sample of an admitted task."""
    return _min_version(ledger, settings, ledger.groups[task].ordinal)


def _min_version(ledger: Ledger, settings: AdmissionSettings, ordinal: int) -> int:
    # A freed slot may belong to a step that is over: the present step is the first that can train its next group.
    step = max(ordinal // settings.tasks_per_step, ledger.steps_trained) - settings.max_versions
    return min(version_of_step(ledger, step), ledger.version)


def fits_slot(ledger: Ledger, settings: AdmissionSettings, task: int, oldest_version: int) -> bool:
    """Whether a sample that began under a version can be trained whole at the step of its admitted group's slot.

    A trainer that died leaves finished samples behind whose tasks its successor admits many steps later.
    """
    steps_ahead = max(0, ledger.groups[task].ordinal // settings.tasks_per_step - ledger.steps_trained)
    return staleness_of(ledger, oldest_version) + steps_ahead <= settings.max_versions


# ---------------------------------------------------------------------------------------------------------- samples


def on_sample(ledger: Ledger, settings: AdmissionSettings, seen: SampleSeen, now: float) -> tuple[Ledger, Verdict]:
    """Take in a trajectory message; the first one of a (task, sample) counts."""
    ledger = replace(ledger, last_sequence=max(ledger.last_sequence, seen.sequence))
    group = ledger.groups.get(seen.task)
    if group is None:
        known = 0 <= seen.task < ledger.next_task
        return ledger, Verdict.LATE if known else Verdict.UNKNOWN
    if not 0 <= seen.sample < settings.samples_per_task:
        return ledger, Verdict.UNKNOWN
    if seen.sample in group.samples:
        return ledger, Verdict.DUPLICATE
    samples = {**group.samples, seen.sample: Sample(seen.sequence, seen.oldest_version, seen.scored)}
    first = now if group.first_finished_at is None else group.first_finished_at
    changed = replace(group, samples=MappingProxyType(samples), first_finished_at=first)
    return _with_group(ledger, seen.task, changed), Verdict.ACCEPTED


def expire(ledger: Ledger, settings: AdmissionSettings, now: float) -> tuple[Ledger, tuple[DroppedGroup, ...]]:
    """Drop groups that can no longer be trained; each drop frees its slot."""
    dropped: list[DroppedGroup] = []
    groups = dict(ledger.groups)
    for task, group in ledger.groups.items():
        reason = _drop_reason(ledger, settings, group, now)
        if reason is not None:
            dropped.append(DroppedGroup(task, reason, tuple(sorted(group.samples))))
            del groups[task]
    if not dropped:
        return ledger, ()
    return replace(ledger, groups=MappingProxyType(groups)), tuple(dropped)


def _drop_reason(ledger: Ledger, settings: AdmissionSettings, group: Group, now: float) -> DropReason | None:
    if not _is_finished(settings, group, now):
        return None
    scored = [sample for sample in group.samples.values() if sample.scored]
    if len(scored) < settings.min_group_size:
        return DropReason.GROUP_TOO_SMALL
    versions = [sample.oldest_version for sample in scored if sample.oldest_version is not None]
    if not versions:
        return DropReason.NO_MODEL_TOKENS
    if settings.on_exceeded is OnExceeded.MASK_TOKENS:
        return None  # the trainer leaves single tokens out
    # Under Wait no token gets that old, unless the settings changed meanwhile or a resume shuffled the slots.
    if staleness_of(ledger, min(versions)) > settings.max_versions:
        return DropReason.STALE
    return None


def _is_finished(settings: AdmissionSettings, group: Group, now: float) -> bool:
    """All samples ended, or the stragglers' time is up."""
    if len(group.samples) >= settings.samples_per_task:
        return True
    if group.first_finished_at is None:
        return False
    return now - group.first_finished_at >= settings.straggler_timeout_seconds


# ---------------------------------------------------------------------------------------------------------- batches


def take_batch(ledger: Ledger, settings: AdmissionSettings, now: float) -> tuple[Ledger, tuple[BatchGroup, ...] | None]:
    """Take the next step's groups out of the ledger, oldest deadline first; None while they are not there.

    Under `Wait` the step starts only if no group can be left over the bound: for every k in 0..eta, the groups that the
    batch does not take and whose deadline is at most s + k fit into the k steps that follow. Where too many of them are
    finished already (the settings changed, or a resume shuffled the slots) waiting can't help: the step starts, and
    what gets over the bound is dropped.
    """
    if ledger.steps_trained >= settings.steps:
        return ledger, None
    ready = sorted(
        (_deadline(ledger, settings, group, now), task)
        for task, group in ledger.groups.items()
        if _is_finished(settings, group, now) and _drop_reason(ledger, settings, group, now) is None
    )
    if len(ready) < settings.tasks_per_step:
        return ledger, None
    taken = {task for _, task in ready[: settings.tasks_per_step]}
    left = {task for _, task in ready[settings.tasks_per_step :]}
    if settings.on_exceeded is OnExceeded.WAIT and not _rest_fits(ledger, settings, taken, left, now):
        return ledger, None
    batch = tuple(
        BatchGroup(
            task, tuple(sorted(number for number, sample in ledger.groups[task].samples.items() if sample.scored))
        )
        for _, task in ready[: settings.tasks_per_step]
    )
    used = set(ledger.used_ordinals) | {ledger.groups[task].ordinal for task in taken}
    first_free = ledger.first_free_ordinal
    while first_free in used:
        used.discard(first_free)
        first_free += 1
    groups = {task: group for task, group in ledger.groups.items() if task not in taken}
    changed = replace(
        ledger, groups=MappingProxyType(groups), used_ordinals=frozenset(used), first_free_ordinal=first_free
    )
    return changed, batch


def _deadline(ledger: Ledger, settings: AdmissionSettings, group: Group, now: float) -> int:
    """Last step that may train the group with all its tokens.

    A group counts as running while a straggler with older tokens may still come, and while it waits to be dropped: the
    next group in its slot will have the slot's deadline.
    """
    versions = [s.oldest_version for s in group.samples.values() if s.scored and s.oldest_version is not None]
    running = group.ordinal // settings.tasks_per_step
    finished = min((step_of_version(ledger, v) for v in versions), default=None)
    if finished is None:
        return running
    is_complete = len(group.samples) >= settings.samples_per_task
    if is_complete and _drop_reason(ledger, settings, group, now) is None:
        return finished + settings.max_versions
    return min(running, finished + settings.max_versions)


def _rest_fits(ledger: Ledger, settings: AdmissionSettings, taken: set[int], left_ready: set[int], now: float) -> bool:
    rest = [
        (_deadline(ledger, settings, group, now), task in left_ready)
        for task, group in ledger.groups.items()
        if task not in taken
    ]
    for k in range(settings.max_versions + 1):
        due = [is_ready for deadline, is_ready in rest if deadline <= ledger.steps_trained + k]
        if len(due) > k * settings.tasks_per_step and not all(due):
            return False
    return True


def on_step_trained(ledger: Ledger, settings: AdmissionSettings, version: int) -> Ledger:
    """One more step is trained and published as `version`."""
    trained = ledger.steps_trained + 1
    # A stretch of versions is forgotten once its newest one is over the bound.
    kept = tuple(
        anchor for anchor, (_, next_step) in pairwise(ledger.anchors) if trained - next_step <= settings.max_versions
    )
    return replace(ledger, steps_trained=trained, version=version, anchors=(*kept, ledger.anchors[-1]))


# ------------------------------------------------------------------------------------------------ resume, checkpoint


def cursor(ledger: Ledger) -> int:
    """Newest sequence such that every message up to it is trained, dropped or of no use."""
    waiting = [sample.sequence for group in ledger.groups.values() for sample in group.samples.values()]
    return min(waiting) - 1 if waiting else ledger.last_sequence


def outstanding(ledger: Ledger, settings: AdmissionSettings) -> tuple[tuple[int, int], ...]:
    """(task, sample) pairs that were admitted and have not ended."""
    return tuple(
        (task, sample)
        for task, group in sorted(ledger.groups.items())
        for sample in range(settings.samples_per_task)
        if sample not in group.samples
    )


def ledger_to_json(ledger: Ledger) -> dict[str, Any]:
    """JSON value for the checkpoint."""
    return {
        "stepsTrained": ledger.steps_trained,
        "version": ledger.version,
        "nextTask": ledger.next_task,
        "groups": {
            str(task): {
                "ordinal": group.ordinal,
                "firstFinishedAt": group.first_finished_at,
                "samples": {str(k): [s.sequence, s.oldest_version, s.scored] for k, s in group.samples.items()},
            }
            for task, group in ledger.groups.items()
        },
        "usedOrdinals": sorted(ledger.used_ordinals),
        "firstFreeOrdinal": ledger.first_free_ordinal,
        "anchors": [list(anchor) for anchor in ledger.anchors],
        "lastSequence": ledger.last_sequence,
    }


def ledger_from_json(value: Mapping[str, Any]) -> Ledger:
    """Inverse of `ledger_to_json`.

    Raises:
        MalformedMessage: the value is not a ledger.
    """
    try:
        groups = {
            int(task): Group(
                ordinal=int(group["ordinal"]),
                samples=MappingProxyType(
                    {
                        int(k): Sample(int(s[0]), None if s[1] is None else int(s[1]), bool(s[2]))
                        for k, s in group["samples"].items()
                    }
                ),
                first_finished_at=group["firstFinishedAt"],
            )
            for task, group in value["groups"].items()
        }
        return Ledger(
            steps_trained=int(value["stepsTrained"]),
            version=int(value["version"]),
            next_task=int(value["nextTask"]),
            groups=MappingProxyType(groups),
            used_ordinals=frozenset(int(n) for n in value["usedOrdinals"]),
            first_free_ordinal=int(value["firstFreeOrdinal"]),
            anchors=tuple((int(v), int(s)) for v, s in value["anchors"]),
            last_sequence=int(value["lastSequence"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise MalformedMessage(f"admission ledger of the checkpoint: {error!r}") from error


def _with_group(ledger: Ledger, task: int, group: Group) -> Ledger:
    return replace(ledger, groups=MappingProxyType({**ledger.groups, task: group}))
