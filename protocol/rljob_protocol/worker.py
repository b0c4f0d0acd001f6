"""A rollout worker's version machine, pure (docs/design.md, section 5).

`step(state, event, now) -> (state, effects)`; the shell performs effects and feeds their results back as events.

Invariants:
- At most one fetch and at most one swap are under way; fetching goes on beside serving, swapping does not.
- A swap is exactly ShutGate, Apply, Probe, OpenGate in this order; no token is generated from the first to the last. Only
  a hold, for a barrier or a silent trainer, comes between ShutGate and Apply; it ends in Apply, or in Resume and OpenGate.
- A version is applied only after its bytes were verified, and served only after its probe passed.
- The highest (term, generation) counts: a replayed lower order changes nothing; a higher one may name a lower version.
- What fails after the gate was shut poisons the engine: it is restarted, never served on.
- A barrier is acknowledged after ShutGate and HandOver; then no token is generated before a newer version, or its release.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerPhase
from rljob_protocol.trainer_watch import TrainerWatch
from rljob_protocol.worker_events import (
    Applied,
    Apply,
    ApplyFailed,
    BarrierSeen,
    CoordinatorBeat,
    DesiredSeen,
    DrainRequested,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    GateShut,
    GateStuck,
    HandedOver,
    HandOver,
    HandOverFailed,
    OpenGate,
    Poison,
    Probe,
    ProbeFailed,
    ProbePassed,
    PublishedSeen,
    Report,
    Resume,
    Resumed,
    ShutGate,
    Tick,
    TrainerBeat,
)

FETCH_BACKOFF_SECONDS = 1.0
FETCH_BACKOFF_MAX_SECONDS = 30.0
HAND_OVER_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Deadlines of the waits."""

    coordinator_timeout_seconds: float = 30.0
    fetch_timeout_seconds: float = 600.0
    gate_timeout_seconds: float = 60.0
    apply_timeout_seconds: float = 600.0
    probe_timeout_seconds: float = 120.0
    hand_over_timeout_seconds: float = 60.0
    barrier_timeout_seconds: float | None = None
    """correction.barrierTimeoutSeconds on the interruption route; None on others, where no barrier is followed."""


class Swap(StrEnum):
    """What goes on at the gate; each state but the resting ones waits for one event, until its deadline."""

    NONE = "None"
    SHUTTING = "Shutting"
    HANDING_OVER = "Handing over"
    HELD = "Held"
    """Gate shut and engine paused, for a barrier or because the trainer is silent."""
    RESUMING = "Resuming"
    APPLYING = "Applying"
    PROBING = "Probing"


RESTING = (Swap.NONE, Swap.HELD)


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
    unreadable: PublishedVersion | None = None
    """What the store gave damaged, or not at all, at the last fetch; None while the next one runs."""
    retry_at: float | None = None
    swap: Swap = Swap.NONE
    swapping: PublishedVersion | None = None
    swap_deadline: float = 0.0
    trainer: TrainerWatch | None = None
    """None on routes without a barrier."""
    kept: tuple[int, int] | None = None
    """(epoch, version) of the barrier that is acknowledged: nothing was generated since all was handed over."""
    hand_over_at: float | None = None
    """When a failed hand-over is tried again."""
    beat: int = -1
    beat_seen_at: float | None = None
    draining: bool = False
    poisoned: str | None = None

    last_error: str = ""
    """Why the last fetch or hand-over failed; empty once one succeeded."""

    @property
    def degraded(self) -> bool:
        """True while the worker follows `published` by itself."""
        return self.target is not None and self.target.order is None

    @property
    def failed_version(self) -> int | None:
        """The version that poisoned the engine."""
        return self.swapping.version if self.poisoned is not None and self.swapping is not None else None

    @property
    def is_gate_shut(self) -> bool:
        """True from ShutGate to OpenGate."""
        return self.swap is not Swap.NONE

    @property
    def is_held(self) -> bool:
        """True while the gate is shut, or being shut, for something else than a swap."""
        is_shut_for_it = self.swap is Swap.SHUTTING and self.swapping is None
        return is_shut_for_it or self.swap in (Swap.HANDING_OVER, Swap.HELD, Swap.RESUMING)

    @property
    def phase(self) -> WorkerPhase:
        if self.poisoned is not None:
            return WorkerPhase.POISONED
        if self.draining:
            return WorkerPhase.DRAINING
        if self.serving is None:
            return WorkerPhase.STARTING
        if self.is_held:
            return WorkerPhase.HELD
        return WorkerPhase.SWAPPING if self.is_gate_shut else WorkerPhase.SERVING


def new_state(settings: WorkerSettings, now: float) -> WorkerState:
    """A worker whose engine holds dummy weights: version 0 comes the same way as any other."""
    timeout = settings.barrier_timeout_seconds
    trainer = None if timeout is None else TrainerWatch(timeout, now)
    return WorkerState(settings=settings, started_at=now, trainer=trainer)


def is_converged(state: WorkerState) -> bool:
    """True while it serves what it was ordered to."""
    return (
        state.serving is not None
        and state.target is not None
        and _same(state.serving, state.target.published)
        and state.swap is Swap.NONE
    )


def held_reason(state: WorkerState, now: float) -> str:
    """For users: what a worker that generates nothing waits for; empty for one that does not hold."""
    if not state.is_held or state.trainer is None:
        return ""
    barrier = state.trainer.barrier_to_keep(state.serving)
    if barrier is not None:
        return f"holds still for the update of version {barrier[1]}"
    if state.trainer.is_silent(now):
        return f"stopped generating: nothing was heard of the trainer for {now - state.trainer.heard_at:.0f} s"
    return "waits for the next version"


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
            trainer = None if state.trainer is None else state.trainer.heard(now)
            state = replace(state, published=published, trainer=trainer)
        case CoordinatorBeat(beat):
            if beat != state.beat:
                state = replace(state, beat=beat, beat_seen_at=now)
        case BarrierSeen(barrier):
            if state.trainer is not None:
                state = replace(state, trainer=state.trainer.saw_barrier(barrier, now))
        case TrainerBeat(trainer_beat):
            if state.trainer is not None:
                state = replace(state, trainer=state.trainer.saw_beat(trainer_beat, now))
        case Fetched(published):
            if state.fetching is not None and _same(published, state.fetching):
                state = replace(state, fetching=None, fetched=published, fetch_failures=0, retry_at=None, last_error="")
        case FetchFailed(published, error, corrupt):
            if state.fetching is not None and _same(published, state.fetching):
                said = f"version {published.version} could not be fetched: {error}"
                unreadable = published if corrupt else None
                state = replace(_after_failed_fetch(state, now), unreadable=unreadable, last_error=said)
        case GateShut():
            if state.swap is Swap.SHUTTING and state.swapping is not None and _may_swap(state, state.swapping):
                return _apply(state, state.swapping, now)
            if state.swap is Swap.SHUTTING:
                state = replace(state, swap=Swap.HELD, swapping=None, fetched=state.swapping or state.fetched)
        case GateStuck(error):
            return _poison(state, f"the gate could not be shut: {error}")
        case HandedOver():
            if state.swap is Swap.HANDING_OVER:
                # A barrier that came meanwhile is kept as well: nothing was generated since the gate was shut.
                state = replace(state, swap=Swap.HELD, kept=_barrier_to_keep(state), hand_over_at=None, last_error="")
                state, effects = _advance(state, now)
                return state, (Report(), *effects)
        case HandOverFailed(error):
            if state.swap is Swap.HANDING_OVER:
                said = f"open trajectories could not be handed over: {error}"
                again = now + HAND_OVER_AGAIN_SECONDS
                state = replace(state, swap=Swap.HELD, hand_over_at=again, last_error=said)
        case Resumed():
            if state.swap is Swap.RESUMING:
                return _open(state, now)
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
    if state.swap not in RESTING:
        if now >= state.swap_deadline:
            what = "" if state.swapping is None else f"version {state.swapping.version}: "
            return _poison(state, f"{what}{state.swap.value.lower()} took too long")
        return state, ()
    effects: list[Effect] = []
    state = replace(state, target=_choose_target(state, now))
    wanted = None if state.target is None or state.draining else state.target.published
    if wanted is not None and state.serving is not None and _same(state.serving, wanted):
        if state.target is not None and state.order != state.target.order:
            # A new order for what is served already: nothing to swap, but the coordinator wants to know.
            state = replace(state, order=state.target.order)
            effects.append(Report())
        wanted = None
    if state.fetching is not None and now - state.fetch_started_at >= state.settings.fetch_timeout_seconds:
        state = _after_failed_fetch(state, now)
    is_fetched = wanted is not None and state.fetched is not None and _same(state.fetched, wanted)
    if wanted is not None and is_fetched and _may_swap(state, wanted):
        if state.swap is Swap.HELD:
            state, apply = _apply(state, wanted, now)
            return state, (*effects, *apply, Report())
        return _shut(state, wanted, now)
    if state.swap is Swap.NONE and _must_stop(state, now):
        state, shut = _shut(state, None, now)
        return state, (*effects, *shut)
    if state.swap is Swap.HELD:
        state, more = _while_held(state, now, is_swap_due=wanted is not None)
        effects += more
    may_fetch = state.fetching is None and not is_fetched and (state.retry_at is None or now >= state.retry_at)
    if wanted is not None and may_fetch:
        state = replace(state, fetching=wanted, fetched=None, unreadable=None, fetch_started_at=now, retry_at=None)
        effects.append(Fetch(wanted))
    return state, tuple(effects)


def _while_held(state: WorkerState, now: float, *, is_swap_due: bool) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Hand over for a barrier that was not acknowledged yet; reopen where nothing holds and no newer version is to come."""
    barrier = _barrier_to_keep(state)
    if barrier is not None and barrier != state.kept and (state.hand_over_at is None or now >= state.hand_over_at):
        deadline = now + state.settings.hand_over_timeout_seconds
        return replace(state, swap=Swap.HANDING_OVER, swap_deadline=deadline), (HandOver(),)
    if state.serving is None or state.draining or is_swap_due or _must_stop(state, now):
        return state, ()
    deadline = now + state.settings.gate_timeout_seconds
    return replace(state, swap=Swap.RESUMING, swap_deadline=deadline), (Resume(),)


def _barrier_to_keep(state: WorkerState) -> tuple[int, int] | None:
    return None if state.trainer is None else state.trainer.barrier_to_keep(state.serving)


def _may_swap(state: WorkerState, wanted: PublishedVersion) -> bool:
    """A barrier ends with the version after its own; one of before is not worth loading."""
    barrier = _barrier_to_keep(state)
    return barrier is None or identity(wanted) > barrier


def _must_stop(state: WorkerState, now: float) -> bool:
    """No token may be generated: a barrier holds, nobody can tell, or it could be scored by nobody any more."""
    if state.trainer is None:
        return False
    is_in_vain = state.serving is not None and (state.trainer.is_silent(now) or _awaits_update(state))
    return _barrier_to_keep(state) is not None or (is_in_vain and not state.draining)


def _awaits_update(state: WorkerState) -> bool:
    """A newer version is published, its order under way: the trainer can score no more tokens of this one.

    A trainer that is faster than a swap has passed the barrier of the very version that the swap ends with.
    """
    quarantined = () if state.desired is None else state.desired.quarantined
    newest, serving = state.published, state.serving
    if newest is None or serving is None or newest.version in quarantined:
        return False
    return identity(newest) > identity(serving)


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


def _after_failed_fetch(state: WorkerState, now: float) -> WorkerState:
    failures = state.fetch_failures + 1
    backoff = min(FETCH_BACKOFF_SECONDS * 2 ** (failures - 1), FETCH_BACKOFF_MAX_SECONDS)
    return replace(
        state,
        fetching=None,
        fetch_failures=failures,
        retry_at=now + backoff,
    )


def _shut(state: WorkerState, swapping: PublishedVersion | None, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Shut the gate for a swap, or to hold it shut where there is nothing to swap to."""
    fetched = None if swapping is not None else state.fetched
    deadline = now + state.settings.gate_timeout_seconds
    state = replace(state, swap=Swap.SHUTTING, swapping=swapping, fetched=fetched, swap_deadline=deadline)
    return state, (ShutGate(), Report())


def _apply(state: WorkerState, wanted: PublishedVersion, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    deadline = now + state.settings.apply_timeout_seconds
    state = replace(state, swap=Swap.APPLYING, swapping=wanted, fetched=None, swap_deadline=deadline)
    return state, (Apply(wanted),)


def _serve(state: WorkerState, published: PublishedVersion, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    order = None if state.target is None else state.target.order
    return _open(replace(state, serving=published, order=order), now)


def _open(state: WorkerState, now: float) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Let tokens pass, unless a barrier holds by now: then the engine, which has resumed, is paused again."""
    state = replace(state, swap=Swap.NONE, swapping=None)
    if _must_stop(state, now):
        return _shut(state, None, now)
    state, more = _advance(replace(state, kept=None), now)
    return state, (OpenGate(), Report(), *more)


def _poison(state: WorkerState, reason: str) -> tuple[WorkerState, tuple[Effect, ...]]:
    return replace(state, poisoned=reason), (Poison(reason),)


def identity(published: PublishedVersion) -> tuple[int, int]:
    """(epoch, version): what makes two published versions the same, and what orders them."""
    return (published.epoch, published.version)


def _same(one: PublishedVersion, other: PublishedVersion) -> bool:
    return identity(one) == identity(other)
