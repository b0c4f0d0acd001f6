"""What happens to a rollout worker's version machine, and what it orders its shell to do (see `worker.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from rljob_api.messages import Barrier, DesiredVersion, PublishedVersion

# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class DesiredSeen:
    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class PublishedSeen:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class CoordinatorBeat:
    beat: int


@dataclass(frozen=True, slots=True)
class BarrierSeen:
    barrier: Barrier


@dataclass(frozen=True, slots=True)
class TrainerBeat:
    beat: tuple[int, int]
    """(epoch, beat)"""


@dataclass(frozen=True, slots=True)
class Fetched:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class FetchFailed:
    published: PublishedVersion
    error: str
    corrupt: bool
    """The store does not give the bytes that were published: they were altered, cut off, or are gone."""


@dataclass(frozen=True, slots=True)
class GateShut:
    pass


@dataclass(frozen=True, slots=True)
class GateStuck:
    """The gate could not be shut: requests did not return."""

    error: str


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Every token of an unfinished trajectory is on the segment stream."""


@dataclass(frozen=True, slots=True)
class HandOverFailed:
    error: str


@dataclass(frozen=True, slots=True)
class Resumed:
    pass


@dataclass(frozen=True, slots=True)
class Applied:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    published: PublishedVersion
    error: str


@dataclass(frozen=True, slots=True)
class ProbePassed:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    published: PublishedVersion
    error: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    pass


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    DesiredSeen
    | PublishedSeen
    | CoordinatorBeat
    | BarrierSeen
    | TrainerBeat
    | Fetched
    | FetchFailed
    | GateShut
    | GateStuck
    | HandedOver
    | HandOverFailed
    | Resumed
    | Applied
    | ApplyFailed
    | ProbePassed
    | ProbeFailed
    | DrainRequested
    | Tick
)


# ----------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Fetch:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ShutGate:
    pass


@dataclass(frozen=True, slots=True)
class HandOver:
    """Store what unfinished trajectories hold on the segment stream. The gate is shut: nothing is added meanwhile."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Engine resume, with the version that it has: the gate stays shut."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Engine apply, then engine resume: the gate stays shut."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class Probe:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class OpenGate:
    pass


@dataclass(frozen=True, slots=True)
class Poison:
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Write the worker's own state now."""


Effect = Fetch | ShutGate | HandOver | Resume | Apply | Probe | OpenGate | Poison | Report
