"""A rollout worker's version machine, pure (docs/design.md, section 5).

`step(state, event, now) -> (state, effects)`; the shell performs effects and feeds their results back as events.

Invariants:
- At most one fetch and at most one swap are under way; fetching goes on beside serving, swapping does not.
- A swap is exactly ShutGate, Apply, Probe, OpenGate in this order; no token is generated from the first to the last.
- A version is applied only after its bytes were verified, and served only after its probe passed.
- The highest (term, generation) counts: a replayed lower order changes nothing; a higher one may name a lower version.
- What fails after the gate was shut poisons the engine: it is restarted, never served on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerPhase

FETCH_BACKOFF_SECONDS = 1.0
FETCH_BACKOFF_MAX_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Deadlines of the waits."""

    coordinator_timeout_seconds: float = 30.0
    fetch_timeout_seconds: float = 600.0
    gate_timeout_seconds: float = 60.0
    apply_timeout_seconds: float = 600.0
    probe_timeout_seconds: float = 120.0


class Swap(StrEnum):
    """Where a swap is; each state waits for one event."""

    NONE = "None"
    SHUTTING = "Shutting"
    APPLYING = "Applying"
    PROBING = "Probing"


@dataclass(frozen=True, slots=True)
class Target:
    """What the worker should serve, and who said so."""

    published: PublishedVersion
    order: tuple[int, int] | None
    """None when it was taken from `published` itself (degraded)."""
    past: tuple[int, int] | None = None
    """Degraded: the order that was known then. It stays passed over; a new one counts again."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The machine's memory."""

    settings: WorkerSettings
    started_at: float
    serving: PublishedVersion | None = None
    order: tuple[int, int] | None = None
    """Order under which `serving` is served."""
    desired: DesiredVersion | None = None
    published: PublishedVersion | None = None
    target: Target | None = None
    fetching: PublishedVersion | None = None
    fetch_started_at: float = 0.0
    fetched: PublishedVersion | None = None
    fetch_failures: int = 0
    corrupt_fetches: int = 0
    retry_at: float | None = None
    swap: Swap = Swap.NONE
    swapping: PublishedVersion | None = None
    swap_deadline: float = 0.0
    beat: int = -1
    beat_seen_at: float | None = None
    draining: bool = False
    poisoned: str | None = None

    last_error: str = ""
    """Why the last fetch failed; empty once one succeeded."""

    @property
    def degraded(self) -> bool:
        """True while the worker follows `published` by itself."""
        return self.target is not None and self.target.order is None

    @property
    def failed_version(self) -> int | None:
        """The version that poisoned the engine."""
        return self.swapping.version if self.poisoned is not None and self.swapping is not None else None

    @property
    def is_swapping(self) -> bool:
        return self.swap is not Swap.NONE

    @property
    def phase(self) -> WorkerPhase:
        if self.poisoned is not None:
            return WorkerPhase.POISONED
        if self.draining:
            return WorkerPhase.DRAINING
        if self.serving is None:
            return WorkerPhase.STARTING
        return WorkerPhase.SWAPPING if self.is_swapping else WorkerPhase.SERVING


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
class Fetched:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class FetchFailed:
    published: PublishedVersion
    error: str
    corrupt: bool


@dataclass(frozen=True, slots=True)
class GateShut:
    pass


@dataclass(frozen=True, slots=True)
class GateStuck:
    """The gate could not be shut: requests did not return."""

    error: str


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
    | Fetched
    | FetchFailed
    | GateShut
    | GateStuck
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


Effect = Fetch | ShutGate | Apply | Probe | OpenGate | Poison | Report


def new_state(settings: WorkerSettings, now: float) -> WorkerState:
    """A worker whose engine holds dummy weights: version 0 comes the same way as any other."""
    return WorkerState(settings=settings, started_at=now)


def is_converged(state: WorkerState) -> bool:
    """True while it serves what it was ordered to."""
    return (
        state.serving is not None
        and state.target is not None
        and _same(state.serving, state.target.published)
        and state.swap is Swap.NONE
    )


def step(state: WorkerState, event: Event, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Advance the machine. A poisoned worker does nothing more."""
    if state.poisoned is not None:
        return state, ()
    match event:
        case DesiredSeen(desired):
            if state.desired is not None and desired.order <= state.desired.order:
                return state, ()
            state = replace(state, desired=desired)
        case PublishedSeen(published):
            if state.published is not None and identity(published) <= identity(state.published):
                return state, ()
            state = replace(state, published=published)
        case CoordinatorBeat(beat):
            if beat != state.beat:
                state = replace(state, beat=beat, beat_seen_at=now)
        case Fetched(published):
            if state.fetching is not None and _same(published, state.fetching):
                state = replace(state, fetching=None, fetched=published, fetch_failures=0, retry_at=None, last_error="")
        case FetchFailed(published, error, corrupt):
            if state.fetching is not None and _same(published, state.fetching):
                said = f"version {published.version} could not be fetched: {error}"
                state = replace(_after_failed_fetch(state, corrupt, now), last_error=said)
        case GateShut():
            if state.swap is Swap.SHUTTING and state.swapping is not None:
                deadline = now + state.settings.apply_timeout_seconds
                return replace(state, swap=Swap.APPLYING, swap_deadline=deadline), (Apply(state.swapping),)
        case GateStuck(error):
            return _poison(state, f"the gate could not be shut: {error}")
        case Applied(published):
            if state.swap is Swap.APPLYING and state.swapping is not None and _same(published, state.swapping):
                deadline = now + state.settings.probe_timeout_seconds
                return replace(state, swap=Swap.PROBING, swap_deadline=deadline), (Probe(published),)
        case ApplyFailed(published, error):
            return _poison(state, f"version {published.version} could not be loaded: {error}")
        case ProbePassed(published):
            if state.swap is Swap.PROBING and state.swapping is not None and _same(published, state.swapping):
                return _serve(state, published, now)
        case ProbeFailed(published, error):
            return _poison(state, f"the engine does not hold version {published.version}: {error}")
        case DrainRequested():
            state, effects = _advance(replace(state, draining=True), now)
            return state, (*effects, Report())
        case Tick():
            pass
    return _advance(state, now)


def _advance(state: WorkerState, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Do the next thing that the present state asks for; level-triggered, so it may be called at any time."""
    if state.swap is not Swap.NONE:
        if now >= state.swap_deadline:
            version = -1 if state.swapping is None else state.swapping.version
            return _poison(state, f"version {version}: {state.swap.value.lower()} took too long")
        return state, ()
    effects: list[Effect] = []
    state = replace(state, target=_choose_target(state, now))
    if state.target is None or state.draining:
        return state, ()
    wanted = state.target.published
    if state.serving is not None and _same(state.serving, wanted):
        if state.order != state.target.order:
            # A new order for what is served already: nothing to swap, but the coordinator wants to know.
            return replace(state, order=state.target.order), (Report(),)
        return state, ()
    if state.fetching is not None and now - state.fetch_started_at >= state.settings.fetch_timeout_seconds:
        state = _after_failed_fetch(state, False, now)
    if state.fetched is not None and _same(state.fetched, wanted):
        deadline = now + state.settings.gate_timeout_seconds
        state = replace(state, swap=Swap.SHUTTING, swapping=wanted, fetched=None, swap_deadline=deadline)
        return state, (ShutGate(), Report())
    if state.fetching is None and (state.retry_at is None or now >= state.retry_at):
        state = replace(state, fetching=wanted, fetched=None, fetch_started_at=now, retry_at=None)
        effects.append(Fetch(wanted))
    return state, tuple(effects)


def _choose_target(state: WorkerState, now: float) -> Target | None:
    """The coordinator's order while it lives; the published version while it does not."""
    heard = state.started_at if state.beat_seen_at is None else state.beat_seen_at
    silent = now - heard >= state.settings.coordinator_timeout_seconds
    desired, published = state.desired, state.published
    ordered = None if desired is None else Target(desired.published, desired.order)
    target = state.target
    if not silent and target is not None and target.order is None:
        # A coordinator that returned beats before it orders: its predecessor's order would take the worker back.
        return ordered if ordered is not None and ordered.order != target.past else target
    if not silent or published is None:
        return ordered if ordered is not None else (state.target if silent else None)
    quarantined = () if desired is None else desired.quarantined
    if published.version in quarantined or (desired is not None and identity(published) <= identity(desired.published)):
        return ordered
    return Target(published, None, None if desired is None else desired.order)


def _after_failed_fetch(state: WorkerState, corrupt: bool, now: float) -> WorkerState:
    failures = state.fetch_failures + 1
    backoff = min(FETCH_BACKOFF_SECONDS * 2 ** (failures - 1), FETCH_BACKOFF_MAX_SECONDS)
    return replace(
        state,
        fetching=None,
        fetch_failures=failures,
        corrupt_fetches=state.corrupt_fetches + corrupt,
        retry_at=now + backoff,
    )


def _serve(state: WorkerState, published: PublishedVersion, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    order = None if state.target is None else state.target.order
    state = replace(state, serving=published, order=order, swap=Swap.NONE, swapping=None)
    effects: tuple[Effect, ...] = (OpenGate(), Report())
    state, more = _advance(state, now)
    return state, (*effects, *more)


def _poison(state: WorkerState, reason: str) -> tuple[WorkerState, tuple[Effect, ...]]:
    return replace(state, poisoned=reason), (Poison(reason),)


def identity(published: PublishedVersion) -> tuple[int, int]:
    """(epoch, version): what makes two published versions the same, and what orders them."""
    return (published.epoch, published.version)


def _same(one: PublishedVersion, other: PublishedVersion) -> bool:
    return identity(one) == identity(other)
