"""Admission: which groups may start, which train next, which are dropped, so that no token over the bound trains.

Pure: a ledger in, a ledger out, `now` in monotonic seconds. B is `tasks_per_step`, η is `max_versions`, s the steps
trained. The host's loop is: `on_sample` for what the stream brings, `expire`, `admit`, `take_batch`, train, publish,
`on_step_trained`.

Pacing. Every group holds an ordinal n, a slot of step ⌊n/B⌋. A drop frees it, training consumes it. Groups are admitted
while the lowest free ordinal is below (s + η + 1)·B and the job still needs them; at most (η + 1)·B are outstanding. An
engine may start a group only with at least the version of step ⌊n/B⌋ - η; for a freed slot whose step has passed, of
step s - η, since s is the earliest step that can train it.

Deadlines. The last step that trains a group within the bound is its oldest token's step + η. While it runs that is not
known, and its slot's step is never later: no token is older than the version that it may start with.

`Wait`. Call D(k) the number of groups outside the batch whose deadline is ≤ s + k. Step s starts only if D(k) ≤ k·B for
all k in 0..η.
- Strict: D(0) = 0 at step s, so whatever is left has its deadline at s + 1 or later, and a deadline only rises when its
  group becomes ready.
- Live: let A(k) count all outstanding groups with deadline ≤ s + k. A(k) ≤ (k + 1)·B always holds: admission moves a
  slot to the first later step that has room for it (only a freed slot ever needs that), a step turns
  D(k + 1) ≤ (k + 1)·B into the next A(k), and drops and readiness only lower A. Once every running group is ready, the
  B oldest leave D(k) = max(0, A(k) - B) ≤ k·B: the step starts.
A lowered η, a change to `Wait` or a version taken back can leave ready groups that no order of steps trains in time;
`expire` drops those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from rljob_api.spec import OnExceeded
from rljob_protocol import ledger as ledgers
from rljob_protocol.ledger import (
    Group,
    Ledger,
    SeenSample,
    cursor,
    ledger_from_json,
    ledger_to_json,
    new_ledger,
    on_resume,
    outstanding,
    staleness_of,
    step_of_version,
    version_of_step,
)

__all__ = [
    "AdmissionSettings",
    "Admitted",
    "BatchGroup",
    "DropReason",
    "DroppedGroup",
    "Ledger",
    "SampleSeen",
    "Verdict",
    "admit",
    "cursor",
    "expire",
    "ledger_from_json",
    "ledger_to_json",
    "min_version_of",
    "new_ledger",
    "on_resume",
    "on_sample",
    "on_step_trained",
    "outstanding",
    "staleness_of",
    "step_of_version",
    "take_batch",
    "version_of_step",
]


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """What the spec says about batches and staleness. `max_versions` and `on_exceeded` may change as the job runs."""

    tasks_per_step: int
    samples_per_task: int
    max_versions: int
    on_exceeded: OnExceeded
    min_group_size: int
    straggler_timeout_seconds: float
    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_group_size <= self.samples_per_task:
            raise ValueError(
                f"minGroupSize {self.min_group_size} must lie in 1..samplesPerTask ({self.samples_per_task}): "
                "no group could ever train"
            )


class Verdict(StrEnum):
    """What became of a trajectory that the stream brought."""

    ACCEPTED = "Accepted"  # held by its group until that trains or drops
    DUPLICATE = "Duplicate"  # this (task, sample) was seen before; the first one counts
    UNKNOWN = "Unknown"  # never admitted: the number lies ahead of a resumed ledger, or is nonsense
    LATE = "Late"  # its group is trained or dropped already
    REPLAYED = "Replayed"  # read again after a resume, but trained or dropped and counted before the checkpoint


class DropReason(StrEnum):
    """Why model tokens end without training; the keys of every count of dropped tokens that admission causes."""

    STALE = "Stale"  # older than staleness.maxVersions
    GROUP_TOO_SMALL = "GroupTooSmall"  # fewer than minGroupSize scored samples after stragglerTimeoutSeconds
    ENVIRONMENT_FAILED = "EnvironmentFailed"  # so many samples ended unscored that minGroupSize is out of reach
    DUPLICATE = "Duplicate"
    UNKNOWN = "Unknown"
    LATE = "Late"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A group that may start: publish its samples."""

    task: int
    ordinal: int
    min_version: int


@dataclass(frozen=True, slots=True)
class SampleSeen:
    """A trajectory read from the stream, in stream order."""

    task: int
    sample: int
    sequence: int
    oldest_version: int | None
    """Oldest weight version among its model tokens; None without model tokens."""
    scored: bool
    model_tokens: int
    newest_version: int | None = None
    """Newest weight version among its model tokens; None where unknown: then it never counts as stale throughout."""


@dataclass(frozen=True, slots=True)
class DroppedGroup:
    """A group that will not train."""

    task: int
    reason: DropReason
    samples: tuple[int, ...]
    """Samples that had been seen; those still running end as late."""
    model_tokens: int
    """Model tokens of the seen samples."""


@dataclass(frozen=True, slots=True)
class BatchGroup:
    """A group of the batch."""

    task: int
    samples: tuple[int, ...]
    """Scored samples: these train."""
    unscored: tuple[int, ...] = ()
    """Samples that were seen and have no reward: dropped as `EnvironmentFailed`."""


def admit(ledger: Ledger, settings: AdmissionSettings) -> tuple[Ledger, tuple[Admitted, ...]]:
    """Admit every group that pacing allows, never more than the remaining steps need."""
    ordinals = _admissible_ordinals(ledger, settings)
    if not ordinals:
        return ledger, ()
    slots = _slot_steps(ledger, settings, ordinals)
    groups = tuple(
        Group(
            task=ledger.next_task + i,
            ordinal=ordinal,
            size=settings.samples_per_task,
            min_step=slot - settings.max_versions,
        )
        for i, (ordinal, slot) in enumerate(zip(ordinals, slots, strict=True))
    )
    taken = set(ordinals)
    ledger = replace(
        ledger,
        next_task=ledger.next_task + len(groups),
        next_ordinal=max(ledger.next_ordinal, ordinals[-1] + 1),
        freed=tuple(ordinal for ordinal in ledger.freed if ordinal not in taken),
        groups=ledger.groups + groups,
    )
    return ledger, tuple(Admitted(group.task, group.ordinal, _min_version(ledger, settings, group)) for group in groups)


def min_version_of(ledger: Ledger, settings: AdmissionSettings, task: int) -> int:
    """The version that an engine must at least serve to start an outstanding group now, for publishing it again.

    Raises:
        ValueError: the group is not outstanding.
    """
    group = ledgers.find_group(ledger, task)
    if group is None:
        raise ValueError(f"task {task} is not outstanding: it was trained, dropped or never admitted")
    return _min_version(ledger, settings, group)


def on_sample(ledger: Ledger, settings: AdmissionSettings, sample: SampleSeen, now: float) -> tuple[Ledger, Verdict]:
    """Account for one trajectory of the stream. Reading a sequence twice changes nothing the second time."""
    group = ledgers.find_group(ledger, sample.task)
    if sample.sequence <= ledger.last_sequence:
        held = group is not None and any(
            seen.sample == sample.sample and seen.sequence == sample.sequence for seen in group.samples
        )
        return ledger, Verdict.ACCEPTED if held else Verdict.REPLAYED
    ledger = replace(ledger, last_sequence=sample.sequence)
    size = settings.samples_per_task if group is None else group.size
    if not (0 <= sample.task < ledger.next_task and 0 <= sample.sample < size):
        return ledger, Verdict.UNKNOWN
    if group is None:
        return ledger, Verdict.LATE
    if any(seen.sample == sample.sample for seen in group.samples):
        return ledger, Verdict.DUPLICATE
    seen = SeenSample(
        sample=sample.sample,
        sequence=sample.sequence,
        oldest_version=sample.oldest_version,
        newest_version=sample.newest_version,
        scored=sample.scored,
        model_tokens=sample.model_tokens,
    )
    samples = tuple(sorted((*group.samples, seen), key=lambda held: held.sample))
    return ledgers.with_group(ledger, _with_clock(replace(group, samples=samples), now)), Verdict.ACCEPTED


def expire(ledger: Ledger, settings: AdmissionSettings, now: float) -> tuple[Ledger, tuple[DroppedGroup, ...]]:
    """Drop every group that cannot train any more; each frees its ordinal."""
    ledger = replace(ledger, groups=tuple(_with_clock(group, now) for group in ledger.groups))
    reasons = {group.task: _drop_reason(ledger, settings, group, now) for group in ledger.groups}
    if settings.on_exceeded is OnExceeded.WAIT:
        ready = [group for group in _ready_groups(ledger, settings, now) if reasons[group.task] is None]
        reasons |= dict.fromkeys(_without_place(ledger, settings, ready), DropReason.STALE)
    dropped = tuple(
        DroppedGroup(
            task=group.task,
            reason=reason,
            samples=tuple(seen.sample for seen in group.samples),
            model_tokens=sum(seen.model_tokens for seen in group.samples),
        )
        for group in ledger.groups
        if (reason := reasons[group.task]) is not None
    )
    return ledgers.without_groups(ledger, {group.task for group in dropped}, free_ordinals=True), dropped


def take_batch(ledger: Ledger, settings: AdmissionSettings, now: float) -> tuple[Ledger, tuple[BatchGroup, ...] | None]:
    """The B groups of the next step, oldest deadline first; None while there are not enough or `Wait` says so.

    The groups leave the ledger: write a checkpoint before, or after `on_step_trained`. None while a batch is under way.
    """
    size = settings.tasks_per_step
    if ledger.steps_trained >= settings.steps or ledgers.groups_consumed(ledger) > ledger.steps_trained * size:
        return ledger, None
    ready = _ready_groups(ledger, settings, now)
    usable = [group for group in ready if _drop_reason(ledger, settings, group, now) is None]
    usable.sort(key=lambda group: (_deadline(ledger, settings, group, is_ready=True), group.task))
    batch = usable[:size]
    if len(batch) < size:
        return ledger, None
    tasks = {group.task for group in batch}
    if settings.on_exceeded is OnExceeded.WAIT and not _rest_can_wait(ledger, settings, ready, tasks):
        return ledger, None
    return ledgers.without_groups(ledger, tasks, free_ordinals=False), tuple(
        BatchGroup(
            task=group.task,
            samples=tuple(seen.sample for seen in group.scored),
            unscored=tuple(seen.sample for seen in group.samples if not seen.scored),
        )
        for group in batch
    )


def on_step_trained(ledger: Ledger, settings: AdmissionSettings, version: int) -> Ledger:
    """Count the step whose batch was taken, which published `version`.

    Raises:
        ValueError: no batch was taken, or the version does not rise.
    """
    if ledgers.groups_consumed(ledger) != (ledger.steps_trained + 1) * settings.tasks_per_step:
        raise ValueError(f"step {ledger.steps_trained} cannot be counted: its batch was not taken from this ledger")
    if version <= ledger.version:
        raise ValueError(f"step {ledger.steps_trained} published version {version}, not above {ledger.version}")
    step = ledger.steps_trained + 1
    anchors = ledger.anchors if version == ledger.version + 1 else (*ledger.anchors, (version, step))
    # What lies below an anchor that is itself over the bound is over the bound under any anchor.
    while len(anchors) > 1 and anchors[1][1] < step - settings.max_versions:
        anchors = anchors[1:]
    return replace(ledger, steps_trained=step, version=version, anchors=anchors)


# --------------------------------------------------------------------------------------------------------- pacing


def _admissible_ordinals(ledger: Ledger, settings: AdmissionSettings) -> list[int]:
    """Free ordinals inside the window, lowest first, as many as there is room for and the job still needs."""
    size = settings.tasks_per_step
    window_end = (ledger.steps_trained + settings.max_versions + 1) * size
    needed = settings.steps * size - (ledger.next_ordinal - len(ledger.freed))
    # Fewer than the free ordinals only after a lowered bound: ordinals beyond the smaller window are held or trained.
    room = (settings.max_versions + 1) * size - len(ledger.groups)
    count = max(0, min(needed, room))
    free = [ordinal for ordinal in ledger.freed if ordinal < window_end][:count]
    fresh = range(ledger.next_ordinal, min(window_end, ledger.next_ordinal + count - len(free)))
    return [*free, *fresh]


def _slot_steps(ledger: Ledger, settings: AdmissionSettings, ordinals: list[int]) -> list[int]:
    """The step that each new group is paced for: its ordinal's or, where that has passed, the present one.

    Under `Wait` the first such step that leaves A(k) ≤ (k + 1)·B: there is one while fewer than (η + 1)·B are held.
    """
    first, size = ledger.steps_trained, settings.tasks_per_step
    steps = [max(ordinal // size, first) for ordinal in ordinals]
    if settings.on_exceeded is not OnExceeded.WAIT:
        return steps
    deadlines = [_deadline(ledger, settings, group, is_ready=group.is_complete) for group in ledger.groups]
    due = [sum(deadline <= first + k for deadline in deadlines) for k in range(settings.max_versions + 1)]
    slots = []
    for step in steps:
        full = [k for k in range(settings.max_versions + 1) if due[k] >= (k + 1) * size]
        slot = max(step, first + full[-1] + 1 if full else first)
        for k in range(slot - first, settings.max_versions + 1):
            due[k] += 1
        slots.append(slot)
    return slots


def _min_version(ledger: Ledger, settings: AdmissionSettings, group: Group) -> int:
    step = max(group.min_step, ledger.steps_trained - settings.max_versions)
    return min(version_of_step(ledger, step), ledger.version)


# ----------------------------------------------------------------------------------------------- readiness, deadlines


def _with_clock(group: Group, now: float) -> Group:
    if group.clock_started_at is None and any(seen.scored for seen in group.samples):
        return replace(group, clock_started_at=now)
    return group


def _is_timed_out(settings: AdmissionSettings, group: Group, now: float) -> bool:
    started = group.clock_started_at
    return started is not None and now - started >= settings.straggler_timeout_seconds


def _ready_groups(ledger: Ledger, settings: AdmissionSettings, now: float) -> list[Group]:
    """Groups that wait for nothing more: all samples seen, or enough of them and the stragglers out of time."""
    return [
        group
        for group in ledger.groups
        if len(group.scored) >= settings.min_group_size and (group.is_complete or _is_timed_out(settings, group, now))
    ]


def _deadline(ledger: Ledger, settings: AdmissionSettings, group: Group, *, is_ready: bool) -> int:
    """Last step that trains the group within the bound; of a running one, the earliest that this can turn out to be."""
    oldest = [seen.oldest_version for seen in group.scored if seen.oldest_version is not None]
    step = step_of_version(ledger, min(oldest)) if is_ready and oldest else group.min_step
    return step + settings.max_versions


def _drop_reason(ledger: Ledger, settings: AdmissionSettings, group: Group, now: float) -> DropReason | None:
    unscored = len(group.samples) - len(group.scored)
    if group.size - unscored < settings.min_group_size:
        return DropReason.ENVIRONMENT_FAILED
    timed_out = _is_timed_out(settings, group, now)
    if timed_out and len(group.scored) < settings.min_group_size:
        return DropReason.GROUP_TOO_SMALL
    if settings.on_exceeded is not OnExceeded.MASK_TOKENS:
        is_stale = any(_is_over(ledger, settings, seen.oldest_version) for seen in group.scored)
        return DropReason.STALE if is_stale else None
    finished = timed_out or group.is_complete
    with_tokens = [seen for seen in group.scored if seen.oldest_version is not None]
    is_all_stale = bool(with_tokens) and all(_is_over(ledger, settings, seen.newest_version) for seen in with_tokens)
    return DropReason.STALE if finished and is_all_stale else None


def _is_over(ledger: Ledger, settings: AdmissionSettings, version: int | None) -> bool:
    return version is not None and staleness_of(ledger, version) > settings.max_versions


# ----------------------------------------------------------------------------------------------------------- Wait


def _rest_can_wait(ledger: Ledger, settings: AdmissionSettings, ready: list[Group], batch: set[int]) -> bool:
    """D(k) ≤ k·B for all k in 0..η: what this step leaves behind can still train within the bound."""
    ready_tasks = {group.task for group in ready}
    rest = [
        _deadline(ledger, settings, group, is_ready=group.task in ready_tasks)
        for group in ledger.groups
        if group.task not in batch
    ]
    return all(
        sum(deadline <= ledger.steps_trained + k for deadline in rest) <= k * settings.tasks_per_step
        for k in range(settings.max_versions + 1)
    )


def _without_place(ledger: Ledger, settings: AdmissionSettings, ready: list[Group]) -> list[int]:
    """Ready groups too many for the steps left before their deadlines: no waiting helps, the youngest give way."""
    by_deadline = sorted((_deadline(ledger, settings, group, is_ready=True), group.task) for group in ready)
    kept: list[int] = []
    without: list[int] = []
    for deadline, task in by_deadline:
        places = (deadline - ledger.steps_trained + 1) * settings.tasks_per_step
        if len(kept) < places:
            kept.append(task)
        else:
            without.append(task)
    return without
