"""The machine of a coordinator: which version the workers should serve, who lags, what is quarantined, what was lost.

Pure: `step(coordinator, event, now) -> (coordinator, effects)`. The shell performs the effects and feeds their results
back; it sends `Tick` at least once a second, reads `published` before it claims a term, and re-reads everything on
start, on reconnect and on a timer. `WriteDesired` is answered with `DesiredWritten` also where the key already holds exactly
that value, since a write may be asked for again when its answer is overdue; any other conflict is `Fenced`.

Orders. A published version counts when its epoch is not older and its version is greater than the newest seen, and its
manifest can be read. The goal is the newest such version that is not quarantined. An order is written when the goal or
the quarantine changes and once under each new term, so that a coordinator that takes over needs the store alone.

Quarantine. A version that two workers, or all live ones, could not load is quarantined, and the newest good version is
ordered in its place; where there is none the order stands.

Life. A worker lives while its (incarnation, revision) keeps changing by this machine's own clock. What an incarnation
last reported stays in the totals after its end; its tokens in flight are then tokens lost to a crash.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerCounters, WorkerPhase, WorkerState

NUM_GOOD_KEPT = 8
"""Good versions remembered to go back to."""
NUM_QUARANTINED_KEPT = 64
NUM_ENDED_KEPT = 256
"""Ended incarnations remembered, so that a late reading of one does not count twice."""
NUM_LAGGARDS_NAMED = 10


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Timers, in seconds, and budgets."""

    timeout_seconds: float = 120.0
    """`weightSync.timeoutSeconds`: a worker behind for that long without progress is restarted."""
    start_timeout_seconds: float = 900.0
    """The same for a worker that has served nothing yet: its engine may still be coming up."""
    liveness_seconds: float = 30.0
    heartbeat_seconds: float = 5.0
    retry_seconds: float = 5.0
    """Wait before a manifest that could not be read is read again."""
    answer_seconds: float = 60.0
    """An effect without an answer for that long is asked for again."""
    restart_budget: int = 10
    """Restarts of workers in any `restart_window_seconds`."""
    restart_window_seconds: float = 3600.0
    forget_seconds: float = 3600.0
    """A worker silent for that long is taken off the list (pods come under new names); its counters stay."""


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PublishedSeen:
    """The control key `published` was read."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ManifestChecked:
    """The manifest was read and fits its version, or `error` says why not."""

    published: PublishedVersion
    error: str | None


@dataclass(frozen=True, slots=True)
class WorkersSeen:
    """All worker keys of the liveness bucket were read."""

    workers: tuple[WorkerState, ...]


@dataclass(frozen=True, slots=True)
class TermClaimed:
    """This coordinator holds the term; `desired` is what the key held then."""

    term: int
    desired: DesiredVersion | None


@dataclass(frozen=True, slots=True)
class DesiredWritten:
    """The order is in the key."""

    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class Fenced:
    """A write conflicted: another coordinator holds a higher term."""


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    settings: CoordinatorSettings


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = (
    PublishedSeen | ManifestChecked | WorkersSeen | TermClaimed | DesiredWritten | Fenced | SettingsChanged | Tick
)

# --------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class CheckManifest:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class WriteDesired:
    """Compare-and-set the control key `desired`."""

    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class Beat:
    """Write the heartbeat, with a number that rises."""


@dataclass(frozen=True, slots=True)
class RestartWorker:
    """The host ends this incarnation; a newer one of the same worker is left alone."""

    worker: str
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """This coordinator must not write any more."""

    reason: str


Effect: TypeAlias = CheckManifest | WriteDesired | Beat | RestartWorker | Stop

# ----------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True, slots=True)
class Seat:
    """What is known of one worker: its present incarnation's last report."""

    state: WorkerState
    changed_at: float
    """When its (incarnation, revision) last changed."""
    behind_since: float | None
    """Since when it has been behind its order without progress; None while converged or on its way out."""
    is_restarted: bool = False
    """Whether a restart of this incarnation was asked for."""
    is_lost: bool = False
    """Silent for longer than the liveness time; taken back when it is heard again."""

    @property
    def is_live(self) -> bool:
        return not self.is_lost and self.state.phase is not WorkerPhase.STOPPED


@dataclass(frozen=True, slots=True)
class Checking:
    """A manifest that is being read, or is to be read again at `again_at`."""

    published: PublishedVersion
    again_at: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Coordinator:
    """What one coordinator incarnation knows and has asked for."""

    settings: CoordinatorSettings
    term: int = 0
    """0 until claimed."""
    desired: DesiredVersion | None = None
    """The order in the key, as far as known."""
    writing: DesiredVersion | None = None
    write_again_at: float = 0.0
    beat_at: float = float("-inf")
    published: PublishedVersion | None = None
    """Newest version seen, whether good or not."""
    checking: Checking | None = None
    good: tuple[PublishedVersion, ...] = ()
    """Versions whose manifest was read, ascending, the last few."""
    quarantined: tuple[int, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
    """(version, worker) pairs: who could not load what."""
    num_refused: int = 0
    """Published versions refused for an older epoch or a version that did not rise."""
    num_poisoned: int = 0
    """Worker incarnations that ended poisoned."""
    seats: tuple[Seat, ...] = ()
    """By worker name."""
    ended: tuple[tuple[str, str], ...] = ()
    """(worker, incarnation) pairs whose counters are in `ended_counters`."""
    ended_counters: WorkerCounters = field(default_factory=WorkerCounters)
    ended_crashed_tokens: int = 0
    restarts: tuple[float, ...] = ()
    """When restarts were asked for, within the window."""
    num_restarts: int = 0
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class CoordinationSummary:
    """What status and the live view show."""

    term: int
    generation: int
    epoch: int | None
    published_version: int | None
    desired_version: int | None
    workers_total: int
    workers_converged: int
    serving_versions: tuple[tuple[int, int], ...]
    """(version, live workers that serve it), newest first."""
    workers_degraded: int
    workers_poisoned: int
    """Incarnations that ended poisoned, ever."""
    laggards: tuple[str, ...]
    """Live workers behind for longer than the timeout, at most ten."""
    restarts: int
    quarantined: tuple[int, ...]
    manifest_error: str
    """Why the newest published version is not ordered; empty when nothing is wrong with it."""


def new_coordinator(settings: CoordinatorSettings) -> Coordinator:
    """A coordinator that holds no term and knows nothing."""
    return Coordinator(settings=settings)


# ------------------------------------------------------------------------------------------------------------ step


def step(coordinator: Coordinator, event: Event, now: float) -> tuple[Coordinator, tuple[Effect, ...]]:
    """Take in one event. Answers that no effect under way asked for change nothing."""
    if coordinator.stopped:
        return coordinator, ()
    match event:
        case Fenced():
            reason = f"term {coordinator.term} was superseded by another coordinator"
            return replace(coordinator, stopped=reason), (Stop(reason),)
        case PublishedSeen(published):
            coordinator = _published_seen(coordinator, published)
        case ManifestChecked(published, error):
            coordinator = _manifest_checked(coordinator, published, error, now)
        case WorkersSeen(workers):
            for state in workers:
                coordinator = _worker_seen(coordinator, state, now)
        case TermClaimed(term, desired) if term > coordinator.term:
            coordinator = _term_claimed(coordinator, term, desired)
        case DesiredWritten(desired) if desired == coordinator.writing:
            coordinator = replace(coordinator, desired=desired, writing=None)
        case SettingsChanged(settings):
            coordinator = replace(coordinator, settings=settings)
        case _:
            pass
    coordinator = _quarantine(_forget_the_long_gone(_watch(coordinator, now), now))
    effects: list[Effect] = []
    for part in (_check_manifest, _write_order, _restart_laggards, _beat):
        coordinator, more = part(coordinator, now)
        effects.extend(more)
    return coordinator, tuple(effects)


def is_converged(coordinator: Coordinator) -> bool:
    """Whether an order stands and every live worker serves its version."""
    live = [seat for seat in coordinator.seats if seat.is_live]
    return coordinator.desired is not None and all(_serves_order(coordinator, seat.state) for seat in live)


def summary(coordinator: Coordinator, now: float) -> CoordinationSummary:
    """What is ordered, what is served, who lags."""
    desired, published = coordinator.desired, coordinator.published
    live = [seat for seat in coordinator.seats if seat.is_live]
    serving = Counter(seat.state.serving_version for seat in live if seat.state.serving_version is not None)
    checking = coordinator.checking
    return CoordinationSummary(
        term=coordinator.term,
        generation=0 if desired is None else desired.generation,
        epoch=None if published is None else published.epoch,
        published_version=None if published is None else published.version,
        desired_version=None if desired is None else desired.published.version,
        workers_total=len(live),
        workers_converged=sum(_serves_order(coordinator, seat.state) for seat in live),
        serving_versions=tuple(sorted(serving.items(), reverse=True)),
        workers_degraded=sum(seat.state.degraded for seat in live),
        workers_poisoned=coordinator.num_poisoned,
        laggards=tuple(seat.state.worker for seat in live if _is_laggard(coordinator, seat, now))[:NUM_LAGGARDS_NAMED],
        restarts=coordinator.num_restarts,
        quarantined=coordinator.quarantined,
        manifest_error="" if checking is None else checking.error,
    )


def totals(coordinator: Coordinator) -> WorkerCounters:
    """Counters summed over all incarnations, also those that ended; tokens in flight are those of live workers only.

    tokens_generated = tokens_delivered + tokens dropped + tokens_in_flight + `crashed_tokens`, where each worker's own
    reports add up.
    """
    total = coordinator.ended_counters
    for seat in coordinator.seats:
        counters = seat.state.counters
        total = add_counters(total, counters if seat.is_live else counters.model_copy(update={"tokens_in_flight": 0}))
    return total


def crashed_tokens(coordinator: Coordinator) -> int:
    """Model tokens in flight at the last report of every incarnation that ended or is lost."""
    gone = [seat.state.counters.tokens_in_flight for seat in coordinator.seats if not seat.is_live]
    return coordinator.ended_crashed_tokens + sum(gone)


def add_counters(left: WorkerCounters, right: WorkerCounters) -> WorkerCounters:
    """The sum, field by field and reason by reason."""
    sums: dict[str, int | dict[str, int]] = {}
    for name in WorkerCounters.model_fields:
        a, b = getattr(left, name), getattr(right, name)
        sums[name] = {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})} if isinstance(a, dict) else a + b
    return WorkerCounters.model_validate(sums)


# ---------------------------------------------------------------------------------------------------------- orders


def _identity(published: PublishedVersion) -> tuple[int, int]:
    return (published.epoch, published.version)


def _published_seen(coordinator: Coordinator, published: PublishedVersion) -> Coordinator:
    newest = coordinator.published
    if newest is not None and published == newest:
        return coordinator
    if newest is not None and (published.epoch < newest.epoch or published.version <= newest.version):
        return replace(coordinator, num_refused=coordinator.num_refused + 1)
    if any(_identity(published) == _identity(good) for good in coordinator.good):
        return replace(coordinator, published=published, checking=None)
    return replace(coordinator, published=published, checking=Checking(published, again_at=float("-inf")))


def _check_manifest(coordinator: Coordinator, now: float) -> tuple[Coordinator, tuple[Effect, ...]]:
    checking = coordinator.checking
    if checking is None or now < checking.again_at:
        return coordinator, ()
    asked = replace(checking, again_at=now + coordinator.settings.answer_seconds)
    return replace(coordinator, checking=asked), (CheckManifest(checking.published),)


def _manifest_checked(
    coordinator: Coordinator, published: PublishedVersion, error: str | None, now: float
) -> Coordinator:
    if coordinator.checking is None or coordinator.checking.published != published:
        return coordinator
    if error is not None:
        return replace(
            coordinator, checking=Checking(published, now + coordinator.settings.retry_seconds, error or "unreadable")
        )
    return replace(coordinator, checking=None, good=_with_good(coordinator.good, published))


def _with_good(good: tuple[PublishedVersion, ...], published: PublishedVersion) -> tuple[PublishedVersion, ...]:
    others = [known for known in good if _identity(known) != _identity(published)]
    return tuple(sorted((*others, published), key=_identity)[-NUM_GOOD_KEPT:])


def _term_claimed(coordinator: Coordinator, term: int, desired: DesiredVersion | None) -> Coordinator:
    coordinator = replace(coordinator, term=term, writing=None)
    if desired is None:
        return coordinator
    quarantined = sorted({*coordinator.quarantined, *desired.quarantined})[-NUM_QUARANTINED_KEPT:]
    newest = coordinator.published
    if newest is None or _identity(newest) < _identity(desired.published):
        newest = desired.published
    # What was ordered before had its manifest read before: it is something to go back to.
    good = _with_good(coordinator.good, desired.published)
    checking = coordinator.checking
    if checking is not None and _identity(checking.published) <= _identity(desired.published):
        checking = None
    return replace(
        coordinator,
        desired=desired,
        published=newest,
        quarantined=tuple(quarantined),
        good=good,
        checking=checking,
    )


def _goal(coordinator: Coordinator) -> PublishedVersion | None:
    good = [published for published in coordinator.good if published.version not in coordinator.quarantined]
    return good[-1] if good else None


def _write_order(coordinator: Coordinator, now: float) -> tuple[Coordinator, tuple[Effect, ...]]:
    if not coordinator.term:
        return coordinator, ()
    if coordinator.writing is not None:
        if now < coordinator.write_again_at:
            return coordinator, ()
        again_at = now + coordinator.settings.answer_seconds
        return replace(coordinator, write_again_at=again_at), (WriteDesired(coordinator.writing),)
    goal, desired = _goal(coordinator), coordinator.desired
    if goal is None:
        return coordinator, ()
    is_own = desired is not None and desired.term == coordinator.term
    is_current = is_own and desired is not None and _identity(desired.published) == _identity(goal)
    if is_current and desired is not None and desired.quarantined == coordinator.quarantined:
        return coordinator, ()
    # A first order of a new term for an old version would pull back degraded workers that are ahead of it.
    checking = coordinator.checking
    if not is_own and checking is not None and not checking.error:
        return coordinator, ()
    order = DesiredVersion(
        term=coordinator.term,
        generation=desired.generation + 1 if is_own and desired is not None else 1,
        published=goal,
        quarantined=coordinator.quarantined,
    )
    again_at = now + coordinator.settings.answer_seconds
    return replace(coordinator, writing=order, write_again_at=again_at), (WriteDesired(order),)


def _beat(coordinator: Coordinator, now: float) -> tuple[Coordinator, tuple[Effect, ...]]:
    if not coordinator.term or now - coordinator.beat_at < coordinator.settings.heartbeat_seconds:
        return coordinator, ()
    return replace(coordinator, beat_at=now), (Beat(),)


# --------------------------------------------------------------------------------------------------------- workers


def _serves_order(coordinator: Coordinator, state: WorkerState) -> bool:
    desired = coordinator.desired
    return (
        desired is not None
        and state.phase is WorkerPhase.SERVING
        and (state.epoch, state.serving_version) == _identity(desired.published)
    )


def _worker_seen(coordinator: Coordinator, state: WorkerState, now: float) -> Coordinator:
    if (state.worker, state.incarnation) in coordinator.ended:
        return coordinator
    seat = next((held for held in coordinator.seats if held.state.worker == state.worker), None)
    if seat is not None and seat.state.incarnation == state.incarnation and state.revision <= seat.state.revision:
        return coordinator
    was_poisoned = False
    if seat is not None and seat.state.incarnation == state.incarnation:
        was_poisoned = seat.state.phase is WorkerPhase.POISONED
        moved = state.serving_version != seat.state.serving_version
        behind_since = now if moved else seat.behind_since
        seat = replace(seat, state=state, changed_at=now, behind_since=behind_since, is_lost=False)
    else:
        if seat is not None:
            coordinator = _end(coordinator, seat)
        seat = Seat(state, changed_at=now, behind_since=None)
    others = [held for held in coordinator.seats if held.state.worker != state.worker]
    failures = coordinator.failures
    if state.failed_version is not None and (state.failed_version, state.worker) not in failures:
        failures = (*failures, (state.failed_version, state.worker))
    if state.phase is WorkerPhase.SERVING:  # it came round, after a restart perhaps
        failures = tuple(pair for pair in failures if pair != (state.serving_version, state.worker))
    return replace(
        coordinator,
        seats=tuple(sorted((*others, seat), key=lambda held: held.state.worker)),
        failures=failures,
        num_poisoned=coordinator.num_poisoned + (state.phase is WorkerPhase.POISONED and not was_poisoned),
    )


def _end(coordinator: Coordinator, seat: Seat) -> Coordinator:
    """Move an incarnation's last counters into the totals, for good."""
    counters = seat.state.counters
    others = tuple(held for held in coordinator.seats if held.state.worker != seat.state.worker)
    return replace(
        coordinator,
        seats=others,
        ended=(*coordinator.ended, (seat.state.worker, seat.state.incarnation))[-NUM_ENDED_KEPT:],
        ended_counters=add_counters(coordinator.ended_counters, counters.model_copy(update={"tokens_in_flight": 0})),
        ended_crashed_tokens=coordinator.ended_crashed_tokens + counters.tokens_in_flight,
    )


def _watch(coordinator: Coordinator, now: float) -> Coordinator:
    """Judge life and progress of every worker by the clock."""
    seats = []
    for seat in coordinator.seats:
        seat = replace(seat, is_lost=now - seat.changed_at > coordinator.settings.liveness_seconds)
        is_leaving = seat.state.phase in (WorkerPhase.DRAINING, WorkerPhase.STOPPED)
        if coordinator.desired is None or is_leaving or seat.is_lost or _serves_order(coordinator, seat.state):
            seat = replace(seat, behind_since=None)
        elif seat.behind_since is None:
            seat = replace(seat, behind_since=now)
        seats.append(seat)
    return replace(coordinator, seats=tuple(seats))


def _forget_the_long_gone(coordinator: Coordinator, now: float) -> Coordinator:
    for seat in coordinator.seats:
        if now - seat.changed_at > coordinator.settings.forget_seconds:
            coordinator = _end(coordinator, seat)
    return coordinator


def _quarantine(coordinator: Coordinator) -> Coordinator:
    live = {seat.state.worker for seat in coordinator.seats if seat.is_live}
    found = set(coordinator.quarantined)
    for version in {version for version, _ in coordinator.failures}:
        failed = {worker for failed_version, worker in coordinator.failures if failed_version == version}
        if len(failed) >= 2 or (live and live <= failed):
            found.add(version)
    oldest = coordinator.good[0].version if coordinator.good else 0
    return replace(
        coordinator,
        quarantined=tuple(sorted(found)[-NUM_QUARANTINED_KEPT:]),
        failures=tuple(pair for pair in coordinator.failures if pair[0] >= oldest),
    )


def _allowed_seconds(coordinator: Coordinator, seat: Seat) -> float:
    settings = coordinator.settings
    is_starting = seat.state.phase is WorkerPhase.STARTING
    return max(settings.timeout_seconds, settings.start_timeout_seconds) if is_starting else settings.timeout_seconds


def _is_laggard(coordinator: Coordinator, seat: Seat, now: float) -> bool:
    return seat.behind_since is not None and now - seat.behind_since >= _allowed_seconds(coordinator, seat)


def _restart_laggards(coordinator: Coordinator, now: float) -> tuple[Coordinator, tuple[Effect, ...]]:
    settings, desired = coordinator.settings, coordinator.desired
    if not coordinator.term or desired is None:
        return coordinator, ()
    restarts = [at for at in coordinator.restarts if now - at < settings.restart_window_seconds]
    seats: list[Seat] = []
    effects: list[Effect] = []
    for seat in coordinator.seats:
        is_due = _is_laggard(coordinator, seat, now) and not seat.is_restarted
        if is_due and len(restarts) < settings.restart_budget:
            state = seat.state
            serving = "no version" if state.serving_version is None else f"version {state.serving_version}"
            reason = (
                f"it serves {serving} in phase {state.phase} and made no progress towards version "
                f"{desired.published.version} for {_allowed_seconds(coordinator, seat):g} s"
            )
            effects.append(RestartWorker(state.worker, state.incarnation, reason))
            restarts.append(now)
            seat = replace(seat, is_restarted=True)
        seats.append(seat)
    return replace(
        coordinator,
        seats=tuple(seats),
        restarts=tuple(restarts),
        num_restarts=coordinator.num_restarts + len(effects),
    ), tuple(effects)
