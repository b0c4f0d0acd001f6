"""What the trainer owes: groups on their way, pacing slots, and which step each weight version belongs to.

Values only. The rules that move a ledger on are in `admission.py`; a ledger is one of the things in a checkpoint.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rljob_api.errors import MalformedMessage


@dataclass(frozen=True, slots=True)
class SeenSample:
    """One finished trajectory that a group holds."""

    sample: int
    sequence: int
    """Sequence in the trajectory stream."""
    oldest_version: int | None
    """Oldest weight version among its model tokens; None without model tokens."""
    newest_version: int | None
    scored: bool
    model_tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one task, from admission until the group trains or drops."""

    task: int
    ordinal: int
    size: int
    """Samples that it was admitted with, numbered from 0."""
    min_step: int
    """No token of it is older than this step: no engine starts it with less. May be negative."""
    samples: tuple[SeenSample, ...] = ()
    """In the order of their sample numbers."""
    clock_started_at: float | None = None
    """When the first scored sample was seen, on this process's monotonic clock: starts the straggler timeout."""

    @property
    def scored(self) -> tuple[SeenSample, ...]:
        return tuple(sample for sample in self.samples if sample.scored)

    @property
    def is_complete(self) -> bool:
        """Whether every sample was seen, scored or not."""
        return len(self.samples) >= self.size


@dataclass(frozen=True, slots=True)
class Ledger:
    """Admission counters and every group that is admitted and neither trained nor dropped.

    An ordinal is used by at most one group at a time. Ordinals below `next_ordinal` that are neither in `freed` nor
    held by a group were consumed by training and never come back.
    """

    steps_trained: int = 0
    version: int = 0
    """The version that the trainer holds: the newest published one."""
    next_task: int = 0
    next_ordinal: int = 0
    freed: tuple[int, ...] = ()
    """Ordinals given back by drops, ascending."""
    groups: tuple[Group, ...] = ()
    """By task number, ascending."""
    last_sequence: int = 0
    """Largest stream sequence seen. Everything up to it that no group holds is trained or dropped."""
    anchors: tuple[tuple[int, int], ...] = ((0, 0),)
    """(version, step) pairs from which versions and steps run in parallel; a resume starts a new one."""


def new_ledger() -> Ledger:
    """The ledger of a job that has admitted nothing and trained nothing."""
    return Ledger()


def find_group(ledger: Ledger, task: int) -> Group | None:
    """The outstanding group of a task; None when it was never admitted, or is trained or dropped."""
    index = bisect_left(ledger.groups, task, key=lambda group: group.task)
    if index < len(ledger.groups) and ledger.groups[index].task == task:
        return ledger.groups[index]
    return None


def with_group(ledger: Ledger, group: Group) -> Ledger:
    """The ledger with the outstanding group of the same task replaced."""
    index = bisect_left(ledger.groups, group.task, key=lambda held: held.task)
    return replace(ledger, groups=(*ledger.groups[:index], group, *ledger.groups[index + 1 :]))


def without_groups(ledger: Ledger, tasks: set[int], *, free_ordinals: bool) -> Ledger:
    """The ledger without these groups; a drop frees their ordinals, training consumes them."""
    gone = [group for group in ledger.groups if group.task in tasks]
    freed = sorted([*ledger.freed, *(group.ordinal for group in gone)]) if free_ordinals else ledger.freed
    return replace(
        ledger, groups=tuple(group for group in ledger.groups if group.task not in tasks), freed=tuple(freed)
    )


def groups_consumed(ledger: Ledger) -> int:
    """Groups taken into batches so far: B for each step trained, and B more while a batch is under way."""
    return ledger.next_ordinal - len(ledger.freed) - len(ledger.groups)


def cursor(ledger: Ledger) -> int:
    """Largest stream sequence such that everything up to it is trained or dropped; it never falls.

    Read it between steps: a batch that was taken and is not trained yet counts as consumed.
    """
    held = [sample.sequence for group in ledger.groups for sample in group.samples]
    return min(held) - 1 if held else ledger.last_sequence


def outstanding(ledger: Ledger) -> tuple[tuple[int, int], ...]:
    """Every (task, sample) admitted, not seen and not given up.

    On a resume, first feed the stream to its end, then publish these again; a task that is still queued stays as it is.
    """
    return tuple(
        (group.task, sample)
        for group in ledger.groups
        for sample in range(group.size)
        if all(seen.sample != sample for seen in group.samples)
    )


# --------------------------------------------------------------------------------------------- versions and steps


def step_of_version(ledger: Ledger, version: int) -> int:
    """Steps trained into a weight version, also across resumes.

    Versions published after the checkpoint that a resume went back to hold at least the checkpoint's training: they
    count as the checkpoint's step. Versions older than the oldest anchor come out too old, never too young.

    Example: trained to version 11, resumed from the checkpoint at step 8 as version 12. Versions 8 to 12 are step 8.
    """
    first_version, first_step = ledger.anchors[0]
    if version < first_version:
        return first_step - (first_version - version)
    for (from_version, from_step), (next_version, next_step) in pairwise(ledger.anchors):
        if from_version <= version < next_version:
            return min(from_step + version - from_version, next_step)
    last_version, last_step = ledger.anchors[-1]
    return last_step + version - last_version


def version_of_step(ledger: Ledger, step: int) -> int:
    """Lowest version that holds at least `step` steps of training, at least 0.

    Without a resume in between it is `version + (step - steps_trained)`.
    """
    first_version, first_step = ledger.anchors[0]
    if step <= first_step:
        return max(0, first_version - (first_step - step))
    for (from_version, from_step), (next_version, next_step) in pairwise(ledger.anchors):
        if step <= next_step:
            return min(from_version + step - from_step, next_version)
    last_version, last_step = ledger.anchors[-1]
    return last_version + step - last_step


def staleness_of(ledger: Ledger, version: int) -> int:
    """Steps trained since a token's weight version was made: its staleness if it trains in the next step."""
    return ledger.steps_trained - step_of_version(ledger, version)


def on_resume(ledger: Ledger, version: int) -> Ledger:
    """A checkpoint's ledger under the version that the resumed trainer republished; no step is counted.

    Straggler clocks start again: monotonic time does not outlive a process, and missing samples may have to be rolled
    out anew. Samples that groups already hold are accepted again when the stream is read from the cursor: read it up to
    `last_sequence` before taking a batch, so that their trajectories are at hand.

    Raises:
        ValueError: the version is older than the checkpoint's.
    """
    if version < ledger.version:
        raise ValueError(
            f"cannot resume as version {version}: the checkpoint holds version {ledger.version}; "
            "republish as published + 1"
        )
    groups = tuple(replace(group, clock_started_at=None) for group in ledger.groups)
    anchors = ledger.anchors
    if version > ledger.version:
        # A trainer that crashes before its next step must not grow the list: the later anchor says the same.
        repeated = len(anchors) > 1 and anchors[-1][1] == ledger.steps_trained
        anchors = (*(anchors[:-1] if repeated else anchors), (version, ledger.steps_trained))
    return replace(ledger, version=version, groups=groups, anchors=anchors)


# ----------------------------------------------------------------------------------------------------- checkpoint

_ADAPTER = TypeAdapter(Ledger)


def ledger_to_json(ledger: Ledger) -> dict[str, Any]:
    """The ledger as JSON values, for the checkpoint."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(ledger, mode="json")
    return dumped


def ledger_from_json(document: dict[str, Any]) -> Ledger:
    """The ledger that `ledger_to_json` wrote, equal in every field.

    Raises:
        MalformedMessage: the document is not a ledger.
    """
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(document)"
        raise MalformedMessage(f"ledger of the checkpoint: {where}: {first['msg']}") from error
