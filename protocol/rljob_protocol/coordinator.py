"""The coordinator of one job, pure (docs/design.md, section 5): published version and worker states in, orders out.

Invariants:
- An order is written only for a published version whose manifest was read, and never for an older epoch.
- Generations rise by one under a term; a write that meets another writer stops this coordinator.
- A worker's life is judged by this reader's clock since the worker's revision last rose, never by the worker's clock.
- Counters of an incarnation that ended stay in the totals; the tokens it held count as lost in its crash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rljob_api.messages import DesiredVersion, PublishedVersion, WorkerCounters, WorkerPhase, WorkerState

MAX_LAGGARDS = 10
QUARANTINE_WORKERS = 2
"""So many different workers must fail on a version before it is quarantined (or all of them, when there are fewer)."""


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    timeout_seconds: float = 120.0
    """weightSync.timeoutSeconds: a worker that has not converged by then is restarted."""
    liveness_seconds: float = 30.0
    beat_seconds: float = 2.0
    check_retry_seconds: float = 5.0
    max_restarts_per_worker: int = 10


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as this reader knows it."""

    state: WorkerState
    changed_at: float
    behind_since: float | None = None
    """Since when it neither serves what is ordered nor gets nearer: orders that come faster than it is given time for
    one do not hide a worker that is stuck."""


@dataclass(frozen=True, slots=True)
class CoordinatorState:
    """The machine's memory. All of it but counters can be rebuilt from the KV."""

    settings: CoordinatorSettings
    term: int | None = None
    desired: DesiredVersion | None = None
    writing: DesiredVersion | None = None
    published: PublishedVersion | None = None
    checking: PublishedVersion | None = None
    retry_check_at: float | None = None
    last_good: PublishedVersion | None = None
    quarantined: frozenset[tuple[int, int]] = frozenset()
    failed_on: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    workers: Mapping[str, SeenWorker] = field(default_factory=lambda: MappingProxyType({}))
    restarts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    restarted: frozenset[tuple[str, str]] = frozenset()
    gone: Mapping[str, WorkerState] = field(default_factory=lambda: MappingProxyType({}))
    """Last reports of workers that ended: their keys outlive them, and one that was only out of reach comes back."""
    ended: WorkerCounters = field(default_factory=WorkerCounters)
    """Totals of incarnations that were followed by another one."""
    crashed_tokens: int = 0
    beat_at: float | None = None
    stopped: str | None = None


# ------------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class TermClaimed:
    term: int
    desired: DesiredVersion | None
    """What an earlier term left."""


@dataclass(frozen=True, slots=True)
class PublishedSeen:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ManifestChecked:
    published: PublishedVersion
    error: str | None


@dataclass(frozen=True, slots=True)
class WorkersSeen:
    """All worker states that the liveness bucket holds now."""

    workers: tuple[WorkerState, ...]


@dataclass(frozen=True, slots=True)
class DesiredWritten:
    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another coordinator wrote `desired`."""


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    settings: CoordinatorSettings


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = TermClaimed | PublishedSeen | ManifestChecked | WorkersSeen | DesiredWritten | Fenced | SettingsChanged | Tick


# ----------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class CheckManifest:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class WriteDesired:
    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class Beat:
    pass


@dataclass(frozen=True, slots=True)
class RestartWorker:
    worker: str
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    reason: str


Effect = CheckManifest | WriteDesired | Beat | RestartWorker | Stop


@dataclass(frozen=True, slots=True)
class CoordinationSummary:
    """What a user sees of the rollout side."""

    desired: PublishedVersion | None
    published: PublishedVersion | None
    workers: tuple[WorkerState, ...]
    """Live ones, by name."""
    converged: int
    serving: tuple[tuple[int, int], ...]
    """(version, workers), newest first."""
    laggards: tuple[str, ...]
    """Workers that have been behind for longer than the timeout, by name."""
    restarts: int
    quarantined: tuple[int, ...]
    totals: WorkerCounters
    crashed_tokens: int


def new_state(settings: CoordinatorSettings) -> CoordinatorState:
    """A coordinator that has not claimed its term yet."""
    return CoordinatorState(settings=settings)


def order_of(state: CoordinatorState) -> tuple[int, int]:
    """(term, generation) of the present order; generation 0 before the first."""
    if state.term is None:
        return (0, 0)
    generation = state.desired.generation if state.desired is not None and state.desired.term == state.term else 0
    return (state.term, generation)


def step(state: CoordinatorState, event: Event, now: float) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    """Advance the machine. A stopped coordinator does nothing more."""
    if state.stopped is not None:
        return state, ()
    match event:
        case TermClaimed(term, desired):
            state = replace(state, term=term, desired=desired)
            if desired is not None:
                quarantined = frozenset((desired.published.epoch, version) for version in desired.quarantined)
                state = replace(state, last_good=desired.published, quarantined=quarantined)
        case PublishedSeen(published):
            if state.published is None or _rank(published) > _rank(state.published):
                state = replace(state, published=published, retry_check_at=None)
        case ManifestChecked(published, error):
            state = _on_manifest(state, published, error, now)
        case WorkersSeen(workers):
            state = _on_workers(state, workers, now)
        case DesiredWritten(desired):
            state = replace(state, desired=desired, writing=None)
        case Fenced():
            reason = "another coordinator wrote the desired version: this one stops"
            return replace(state, stopped=reason, writing=None), (Stop(reason),)
        case SettingsChanged(settings):
            state = replace(state, settings=settings)
        case Tick():
            pass
    return _advance(state, now)


def _on_manifest(
    state: CoordinatorState, published: PublishedVersion, error: str | None, now: float
) -> CoordinatorState:
    if state.checking is None or _rank(published) != _rank(state.checking):
        return state
    state = replace(state, checking=None)
    if error is not None:
        return replace(state, retry_check_at=now + state.settings.check_retry_seconds)
    return replace(state, last_good=published, retry_check_at=None)


def _on_workers(state: CoordinatorState, reported: tuple[WorkerState, ...], now: float) -> CoordinatorState:
    workers, gone = dict(state.workers), dict(state.gone)
    for report in reported:
        last = gone.get(report.worker)
        if last is not None:
            if last.incarnation == report.incarnation and report.revision <= last.revision:
                continue
            del gone[report.worker]
            if last.incarnation != report.incarnation:
                state = _end(state, last)
        seen = workers.get(report.worker)
        if seen is not None and seen.state.incarnation != report.incarnation:
            state = _end(state, seen.state)
            seen = None
        if seen is None or report.revision > seen.state.revision:
            stays = seen is not None and seen.state.serving_version == report.serving_version
            workers[report.worker] = SeenWorker(report, now, seen.behind_since if seen is not None and stays else None)
            state = _note_failure(state, report)
    for name, seen in tuple(workers.items()):
        if seen.state.phase is WorkerPhase.STOPPED or now - seen.changed_at >= state.settings.liveness_seconds:
            gone[name] = seen.state
            del workers[name]
    state = replace(state, workers=MappingProxyType(workers), gone=MappingProxyType(gone))
    return _quarantine(state)


def _end(state: CoordinatorState, last: WorkerState) -> CoordinatorState:
    """An incarnation is over: keep its totals; what it held is lost unless it stopped in order."""
    held = last.counters.tokens_in_flight
    kept = last.counters
    if last.phase is not WorkerPhase.STOPPED:
        state = replace(state, crashed_tokens=state.crashed_tokens + held)
        kept = kept.model_copy(update={"tokens_in_flight": 0})
    return replace(state, ended=add_counters(state.ended, kept))


def _note_failure(state: CoordinatorState, report: WorkerState) -> CoordinatorState:
    if report.phase is not WorkerPhase.POISONED or state.desired is None:
        return state
    rank = _rank(state.desired.published)
    if report.failed_version is not None:
        # The report may come after a newer order: the blame goes to the version that the worker names.
        rank = (rank[0], report.failed_version)
    failed = state.failed_on.get(rank, frozenset()) | {report.worker}
    return replace(state, failed_on=MappingProxyType({**state.failed_on, rank: failed}))


def _quarantine(state: CoordinatorState) -> CoordinatorState:
    if state.desired is None:
        return state
    rank = _rank(state.desired.published)
    failed = state.failed_on.get(rank, frozenset())
    served = any(_serves(seen.state, state.desired.published) for seen in state.workers.values())
    have_all_failed = bool(failed) and failed >= set(state.workers)
    if served or (len(failed) < QUARANTINE_WORKERS and not have_all_failed):
        return state
    return replace(state, quarantined=state.quarantined | {rank})


def _advance(state: CoordinatorState, now: float) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    effects: list[Effect] = []
    if state.term is None:
        return state, ()
    if state.beat_at is None or now - state.beat_at >= state.settings.beat_seconds:
        state = replace(state, beat_at=now)
        effects.append(Beat())
    state, check = _check_published(state, now)
    state, order = _order(state)
    state = _time_laggards(state, now)
    state, restarts = _restart_laggards(state, now)
    return state, (*effects, *check, *order, *restarts)


def _check_published(state: CoordinatorState, now: float) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    published = state.published
    if published is None or state.checking is not None or _rank(published) in state.quarantined:
        return state, ()
    if state.last_good is not None and _rank(published) <= _rank(state.last_good):
        return state, ()
    if state.retry_check_at is not None and now < state.retry_check_at:
        return state, ()
    return replace(state, checking=published), (CheckManifest(published),)


def _order(state: CoordinatorState) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    if state.writing is not None or state.last_good is None or state.term is None:
        return state, ()
    wanted = state.last_good
    if _rank(wanted) in state.quarantined:
        return state, ()  # every worker keeps what it serves until a newer version is published
    quarantined = tuple(sorted(version for epoch, version in state.quarantined if epoch == wanted.epoch))
    held = state.desired
    if (held is None or held.term != state.term) and _awaits_check(state):
        # Workers follow `published` by themselves while there is no coordinator: the order of the term before would
        # take them back to an older version.
        return state, ()
    if held is not None and held.term == state.term and held.published == wanted and held.quarantined == quarantined:
        return state, ()
    generation = held.generation + 1 if held is not None and held.term == state.term else 1
    desired = DesiredVersion(term=state.term, generation=generation, published=wanted, quarantined=quarantined)
    return replace(state, writing=desired), (WriteDesired(desired),)


def _awaits_check(state: CoordinatorState) -> bool:
    """True until the newest published version is known and its manifest was read or found unreadable."""
    if state.published is None:
        return True
    if _rank(state.published) in state.quarantined or state.retry_check_at is not None:
        return False
    return state.last_good is None or _rank(state.published) > _rank(state.last_good)


def _time_laggards(state: CoordinatorState, now: float) -> CoordinatorState:
    laggards = set(laggards_of(state))
    workers = {}
    for name, seen in state.workers.items():
        since = None if name not in laggards else now if seen.behind_since is None else seen.behind_since
        workers[name] = seen if since == seen.behind_since else replace(seen, behind_since=since)
    return replace(state, workers=MappingProxyType(workers))


def _restart_laggards(state: CoordinatorState, now: float) -> tuple[CoordinatorState, tuple[Effect, ...]]:
    effects: list[Effect] = []
    for name in _late(state, now):
        seen = state.workers[name]
        key = (name, seen.state.incarnation)
        spent = state.restarts.get(name, 0)
        if key in state.restarted or spent >= state.settings.max_restarts_per_worker:
            continue
        serving = "no version" if seen.state.serving_version is None else f"version {seen.state.serving_version}"
        assert state.desired is not None  # or it were not late
        assert seen.behind_since is not None
        reason = (
            f"has served {serving} for {now - seen.behind_since:.0f} s while later ones were ordered, now version "
            f"{state.desired.published.version}"
        )
        state = replace(
            state,
            restarted=state.restarted | {key},
            restarts=MappingProxyType({**state.restarts, name: spent + 1}),
        )
        effects.append(RestartWorker(name, seen.state.incarnation, reason))
    return state, tuple(effects)


def laggards_of(state: CoordinatorState) -> tuple[str, ...]:
    """Live workers that do not serve the ordered version, though they could, by name."""
    if state.desired is None:
        return ()
    wanted = state.desired.published
    return tuple(
        sorted(
            name
            for name, seen in state.workers.items()
            if not _serves(seen.state, wanted) and not _keeps_barrier(seen.state, wanted)
        )
    )


def _late(state: CoordinatorState, now: float) -> tuple[str, ...]:
    """Laggards whose time is up. An engine that still starts has its own deadline; one that drains swaps no more."""
    found = []
    for name in laggards_of(state):
        seen = state.workers[name]
        is_due = seen.behind_since is not None and now - seen.behind_since >= state.settings.timeout_seconds
        if is_due and seen.state.phase not in (WorkerPhase.STARTING, WorkerPhase.DRAINING):
            found.append(name)
    return tuple(found)


def summary(state: CoordinatorState, now: float) -> CoordinationSummary:
    """What to show of the state at `now`."""
    live = {
        name: seen.state
        for name, seen in sorted(state.workers.items())
        if now - seen.changed_at < state.settings.liveness_seconds
    }
    desired = None if state.desired is None else state.desired.published
    histogram: dict[int, int] = {}
    for worker in live.values():
        if worker.serving_version is not None:
            histogram[worker.serving_version] = histogram.get(worker.serving_version, 0) + 1
    ended = state
    for last in state.gone.values():
        ended = _end(ended, last)
    totals = ended.ended
    for seen in state.workers.values():
        totals = add_counters(totals, seen.state.counters)
    return CoordinationSummary(
        desired=desired,
        published=state.published,
        workers=tuple(live.values()),
        converged=0 if desired is None else sum(_serves(worker, desired) for worker in live.values()),
        serving=tuple(sorted(histogram.items(), reverse=True)),
        laggards=_late(state, now)[:MAX_LAGGARDS],
        restarts=sum(state.restarts.values()),
        quarantined=tuple(sorted(version for _, version in state.quarantined)),
        totals=totals,
        crashed_tokens=ended.crashed_tokens,
    )


def add_counters(one: WorkerCounters, other: WorkerCounters) -> WorkerCounters:
    """Field by field; reasons of drops are kept apart."""
    dropped = dict(one.tokens_dropped)
    for reason, tokens in other.tokens_dropped.items():
        dropped[reason] = dropped.get(reason, 0) + tokens
    numbers = {
        name: getattr(one, name) + getattr(other, name)
        for name in WorkerCounters.model_fields
        if name != "tokens_dropped"
    }
    return WorkerCounters(**numbers, tokens_dropped=dropped)


def _serves(worker: WorkerState, published: PublishedVersion) -> bool:
    return (
        worker.phase in (WorkerPhase.SERVING, WorkerPhase.HELD)
        and worker.serving_version == published.version
        and worker.epoch == published.epoch
    )


def _keeps_barrier(worker: WorkerState, published: PublishedVersion) -> bool:
    """It waits for the version after the barrier's, as it must: no earlier one is loaded before."""
    return worker.barrier is not None and worker.barrier >= _rank(published)


def _rank(published: PublishedVersion) -> tuple[int, int]:
    return (published.epoch, published.version)
