"""What an old-policy worker scores next: pure.

A trajectory is cut into parts, one for each version in it; a pass scores parts of one version. Switching versions costs
two copies of the weights, so a version stays until all its parts that were in hand when it came are scored; the next one is
the oldest trajectory's. So no trajectory waits for ever behind newer ones, and every version in hand has its turn.

What a part's values are never depends on the plan: each is a forward of its own row under its own version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from rljob_api.messages import PublishedVersion
from rljob_runtime.trajectory_codec import Trajectory


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one version in one trajectory."""

    sequence: int
    """Of the trajectory on its stream: lower is older."""
    version: int
    length: int
    """Tokens that the forward sees: up to the last one of the version."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The version whose parts are scored now."""

    version: int
    until: int
    """Newest trajectory that was in hand when the version came; what is newer waits for another turn."""


class Standing(Enum):
    """What can be done with the tokens of a version."""

    READY = auto()  # its weights are here
    COMING = auto()  # published, or about to be: they will be here soon
    GONE = auto()  # its weights are no longer kept: the tokens cannot be scored
    OVER_BOUND = auto()  # no step will train the tokens any more


def parts_of(trajectory: Trajectory, sequence: int) -> tuple[Part, ...]:
    """The parts of a trajectory, by version."""
    return tuple(
        Part(
            sequence,
            version,
            1 + int(np.flatnonzero(trajectory.model_mask & (trajectory.weight_version == version))[-1]),
        )
        for version in trajectory.versions
    )


def next_pass(
    waiting: Sequence[Part], turn: Turn | None, *, ready: Collection[int], max_tokens: int
) -> tuple[Turn, tuple[Part, ...]] | None:
    """Whose turn it is and the parts to score together, oldest first; None when nothing that waits can be scored.

    Args:
        waiting: parts that are not scored yet, in any order.
        turn: that of the pass before.
        ready: versions whose weights are here.
        max_tokens: of a pass, without padding; a longer part is a pass of its own.
    """
    scorable = sorted(
        (part for part in waiting if part.version in ready), key=lambda part: (part.sequence, part.version)
    )
    if not scorable:
        return None
    if turn is None or not any(_has_turn(part, turn) for part in scorable):
        oldest = scorable[0].sequence
        versions = [part.version for part in scorable if part.sequence == oldest]
        held = turn is not None and turn.version in versions
        turn = Turn(turn.version if turn is not None and held else versions[0], scorable[-1].sequence)
    chosen: list[Part] = []
    tokens = 0
    for part in scorable:
        if not _has_turn(part, turn):
            continue
        tokens += part.length
        if chosen and tokens > max_tokens:
            break
        chosen.append(part)
    return turn, tuple(chosen)


def standing(
    version: int, *, retained: Mapping[int, PublishedVersion], held: Collection[int], max_versions: int
) -> Standing:
    """What can be done with a version's tokens, given the versions that the store keeps and those that are here.

    Staleness counts steps, and only grows: what is over the bound for the newest version is so for every step to come.
    """
    newest = max(retained, default=-1)
    if version in retained and retained[newest].step - retained[version].step > max_versions:
        return Standing.OVER_BOUND
    if version in held:
        return Standing.READY
    return Standing.COMING if version in retained or version > newest else Standing.GONE


def wanted_versions(retained: Mapping[int, PublishedVersion], max_versions: int) -> tuple[int, ...]:
    """Versions whose tokens may still be trained, newest first: those whose weights belong here."""
    return tuple(
        version
        for version in sorted(retained, reverse=True)
        if standing(version, retained=retained, held=(), max_versions=max_versions) is Standing.COMING
    )


def _has_turn(part: Part, turn: Turn) -> bool:
    return part.version == turn.version and part.sequence <= turn.until
