"""The machine of a rollout worker: which weight version to fetch, when to swap to it, when to stop trusting the engine.

Pure: `step(worker, event, now) -> (worker, effects)`. The shell performs the effects and feeds their results back; it
sends `Tick` at least once a second. At most one fetch and at most one swap is under way, never both.

A swap is, in this order: ShutGate → (GateShut) → Apply → (Applied) → Probe → (ProbePassed) → OpenGate, Report. The
shell pauses the engine between the shut gate and the apply and resumes it before the probe; no token is released before
OpenGate. Everything before ShutGate happens while the worker generates.

Whom it follows. Orders (`DesiredVersion`) with the highest (term, generation); lower ones are replays and refused.
After `coordinator_timeout_seconds` without a new heartbeat or order it follows `published` itself, skipping quarantined
versions. An order given before that never pulls it back afterwards: only a new one does. A published version of an
older epoch than one already seen comes from a zombie trainer and is refused; an order may name one, because going back
to the last good version may cross a resume.

Every wait has a deadline. The shell must answer each effect well within it; one that passes means that a call hangs or
the engine is in an unknown state, and the worker is poisoned: its process restarts, rejoins and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from rljob_api.messages import CoordinatorHeartbeat, DesiredVersion, PublishedVersion, WorkerPhase

Order: TypeAlias = tuple[int, int]
"""(term, generation)."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Deadlines and retry budgets of one worker, in seconds unless named otherwise."""

    coordinator_timeout_seconds: float = 30.0
    fetch_deadline_seconds: float = 600.0
    gate_deadline_seconds: float = 60.0
    apply_deadline_seconds: float = 300.0
    probe_deadline_seconds: float = 120.0
    backoff_seconds: float = 1.0
    """Wait after the first failed fetch; doubles with each further one."""
    max_backoff_seconds: float = 30.0
    corrupt_attempts: int = 3
    """Corrupt fetches of one version under one order before it counts as one that this worker cannot load."""


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class DesiredSeen:
    """The control key `desired` was read."""

    desired: DesiredVersion


@dataclass(frozen=True, slots=True)
class PublishedSeen:
    """The control key `published` was read."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class CoordinatorBeat:
    """The liveness key `coordinator` was read."""

    beat: CoordinatorHeartbeat


@dataclass(frozen=True, slots=True)
class Fetched:
    """The version's bytes are here, decoded and verified against their digests."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class FetchFailed:
    published: PublishedVersion
    error: str
    corrupt: bool
    """The bytes came and were wrong, as opposed to not coming."""


@dataclass(frozen=True, slots=True)
class GateShut:
    """Nothing generates any more and every partial rollout is collected."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The engine took the weights and was resumed, behind the gate."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    published: PublishedVersion
    error: str


@dataclass(frozen=True, slots=True)
class ProbePassed:
    """The engine reproduced the probe's log-probabilities."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    published: PublishedVersion
    error: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The process was told to stop: no new swap from here on."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = (
    DesiredSeen
    | PublishedSeen
    | CoordinatorBeat
    | Fetched
    | FetchFailed
    | GateShut
    | Applied
    | ApplyFailed
    | ProbePassed
    | ProbeFailed
    | DrainRequested
    | Tick
)

# --------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Fetch:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class ShutGate:
    """Abort what is in flight and keep it as partial rollouts."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Engine pause, apply, engine resume."""

    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class Probe:
    published: PublishedVersion


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Let partial rollouts go on, under the version that was just proven."""


@dataclass(frozen=True, slots=True)
class Poison:
    """Never serve from this engine again: end the process so that its host restarts it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Write the worker's own state now."""


Effect: TypeAlias = Fetch | ShutGate | Apply | Probe | OpenGate | Poison | Report

# ----------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True, slots=True)
class Target:
    """A version to serve, and the order that says so; None where it was followed from `published`."""

    published: PublishedVersion
    order: Order | None

    @property
    def identity(self) -> tuple[int, int]:
        return identity(self.published)


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing under way."""


@dataclass(frozen=True, slots=True)
class Fetching:
    target: Target
    deadline: float
    failures: int = 0
    corrupt: int = 0


@dataclass(frozen=True, slots=True)
class BackingOff:
    """A fetch failed; the next attempt waits."""

    target: Target
    until: float
    failures: int
    corrupt: int


@dataclass(frozen=True, slots=True)
class Shutting:
    target: Target
    deadline: float


@dataclass(frozen=True, slots=True)
class Applying:
    target: Target
    deadline: float


@dataclass(frozen=True, slots=True)
class Probing:
    target: Target
    deadline: float


Activity: TypeAlias = Idle | Fetching | BackingOff | Shutting | Applying | Probing


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker incarnation knows and does."""

    settings: WorkerSettings
    heard_at: float
    """When a new heartbeat or order was last seen."""
    activity: Activity = Idle()
    desired: DesiredVersion | None = None
    published: PublishedVersion | None = None
    epoch: int = 0
    """Highest epoch seen."""
    beat: tuple[int, int] = (0, -1)
    """Highest (term, beat) seen."""
    proven: PublishedVersion | None = None
    """The version whose probe the engine passed last."""
    order: Order | None = None
    """The order that the proven version was served under; None where it was followed from `published`."""
    order_floor: Order = (0, 0)
    """Orders up to this one are older than what the worker chose itself while degraded."""
    is_degraded: bool = False
    is_draining: bool = False
    poison: str = ""
    failed_version: int | None = None
    given_up: Target | None = None
    """A version that came corrupt too often, not tried again under the same order."""
    corrupt_fetches: int = 0
    swaps_failed: int = 0
    last_error: str = ""

    @property
    def is_swapping(self) -> bool:
        return isinstance(self.activity, Shutting | Applying | Probing)

    @property
    def is_gate_open(self) -> bool:
        """Whether the engine may generate."""
        return self.proven is not None and not self.is_swapping and not self.poison

    @property
    def serving(self) -> PublishedVersion | None:
        """The version to report as served; a poisoned engine serves none."""
        return None if self.poison else self.proven

    @property
    def phase(self) -> WorkerPhase:
        if self.poison:
            return WorkerPhase.POISONED
        if self.is_draining:
            return WorkerPhase.DRAINING
        if self.proven is None:
            return WorkerPhase.STARTING
        return WorkerPhase.SWAPPING if self.is_swapping else WorkerPhase.SERVING


def new_worker(settings: WorkerSettings, now: float) -> Worker:
    """A worker that serves nothing yet; its gate is shut."""
    return Worker(settings=settings, heard_at=now)


def identity(published: PublishedVersion) -> tuple[int, int]:
    """(epoch, version): what makes two published versions the same."""
    return (published.epoch, published.version)


def is_converged(worker: Worker) -> bool:
    """Whether the worker serves what it should follow and has nothing under way."""
    target = _target(worker)
    is_serving = worker.phase is WorkerPhase.SERVING and isinstance(worker.activity, Idle)
    return is_serving and target is not None and _is_proven(worker, target)


# ------------------------------------------------------------------------------------------------------------ step


def step(worker: Worker, event: Event, now: float) -> tuple[Worker, tuple[Effect, ...]]:
    """Take in one event. Results that no effect under way asked for change nothing."""
    if worker.poison:
        return worker, ()
    worker, effects = _take_in(worker, event, now)
    is_degraded = now - worker.heard_at >= worker.settings.coordinator_timeout_seconds
    if is_degraded != worker.is_degraded:
        worker, effects = replace(worker, is_degraded=is_degraded), (*effects, Report())
    worker, more = _pursue(worker, now)
    return worker, _report_last((*effects, *more))


def _take_in(worker: Worker, event: Event, now: float) -> tuple[Worker, tuple[Effect, ...]]:
    settings, activity = worker.settings, worker.activity
    match event, activity:
        case DesiredSeen(desired), _:
            if worker.desired is not None and desired.order <= worker.desired.order:
                return worker, ()
            epoch = max(worker.epoch, desired.published.epoch)
            return replace(worker, desired=desired, epoch=epoch, heard_at=now), ()
        case PublishedSeen(published), _:
            if published.epoch < worker.epoch:
                return worker, ()
            if worker.published is not None and identity(published) <= identity(worker.published):
                return worker, ()
            return replace(worker, published=published, epoch=published.epoch), ()
        case CoordinatorBeat(beat), _:
            if (beat.term, beat.beat) <= worker.beat:
                return worker, ()
            return replace(worker, beat=(beat.term, beat.beat), heard_at=now), ()
        case Fetched(published), Fetching(target=target) if published == target.published:
            worker = replace(worker, activity=Idle())
            wanted = _target(worker)
            if worker.is_draining or wanted is None or wanted.identity != target.identity:
                return worker, ()
            return replace(worker, activity=Shutting(wanted, now + settings.gate_deadline_seconds)), (ShutGate(),)
        case FetchFailed(published, error, corrupt), Fetching(target=target) if published == target.published:
            return _after_failed_fetch(worker, activity, error, corrupt, now)
        case GateShut(), Shutting(target=target):
            applying = Applying(target, now + settings.apply_deadline_seconds)
            return replace(worker, activity=applying), (Apply(target.published),)
        case Applied(published), Applying(target=target) if published == target.published:
            probing = Probing(target, now + settings.probe_deadline_seconds)
            return replace(worker, activity=probing), (Probe(target.published),)
        case ApplyFailed(published, error), Applying(target=target) if published == target.published:
            return _poisoned(worker, f"version {published.version} could not be applied: {error}", target)
        case ProbePassed(published), Probing(target=target) if published == target.published:
            return _opened(worker, target), (OpenGate(), Report())
        case ProbeFailed(published, error), Probing(target=target) if published == target.published:
            return _poisoned(worker, f"version {published.version} failed its probe: {error}", target)
        case DrainRequested(), _:
            return (worker, ()) if worker.is_draining else (replace(worker, is_draining=True), (Report(),))
        case Tick(), _:
            return _check_deadline(worker, now)
    return worker, ()


def _opened(worker: Worker, target: Target) -> Worker:
    floor = worker.order_floor
    if target.order is None and worker.desired is not None:
        floor = max(floor, worker.desired.order)
    return replace(
        worker, activity=Idle(), proven=target.published, order=target.order, order_floor=floor, last_error=""
    )


def _after_failed_fetch(
    worker: Worker, fetching: Fetching, error: str, corrupt: bool, now: float
) -> tuple[Worker, tuple[Effect, ...]]:
    settings, target = worker.settings, fetching.target
    version = target.published.version
    worker = replace(
        worker,
        corrupt_fetches=worker.corrupt_fetches + corrupt,
        last_error=f"version {version} could not be fetched: {error}",
    )
    num_corrupt = fetching.corrupt + corrupt
    if num_corrupt >= settings.corrupt_attempts:
        return replace(
            worker,
            activity=Idle(),
            failed_version=version,
            given_up=target,
            last_error=f"version {version} came corrupt {num_corrupt} times: {error}",
        ), (Report(),)
    wait = min(settings.max_backoff_seconds, settings.backoff_seconds * 2.0 ** min(fetching.failures, 30))
    return replace(worker, activity=BackingOff(target, now + wait, fetching.failures + 1, num_corrupt)), ()


def _poisoned(worker: Worker, reason: str, failed: Target | None) -> tuple[Worker, tuple[Effect, ...]]:
    return replace(
        worker,
        activity=Idle(),
        poison=reason,
        last_error=reason,
        failed_version=worker.failed_version if failed is None else failed.published.version,
        swaps_failed=worker.swaps_failed + worker.is_swapping,
    ), (Poison(reason), Report())


def _check_deadline(worker: Worker, now: float) -> tuple[Worker, tuple[Effect, ...]]:
    settings = worker.settings
    match worker.activity:
        case Fetching(target=target, deadline=deadline) if now >= deadline:
            seconds = settings.fetch_deadline_seconds
            return _poisoned(worker, f"the fetch of version {target.published.version} hung for {seconds:g} s", None)
        case Shutting(deadline=deadline) if now >= deadline:
            return _poisoned(worker, f"the gate did not shut within {settings.gate_deadline_seconds:g} s", None)
        case Applying(target=target, deadline=deadline) if now >= deadline:
            seconds = settings.apply_deadline_seconds
            reason = f"version {target.published.version} was not applied within {seconds:g} s"
            return _poisoned(worker, reason, target)
        case Probing(target=target, deadline=deadline) if now >= deadline:
            seconds = settings.probe_deadline_seconds
            reason = f"version {target.published.version} was not probed within {seconds:g} s"
            return _poisoned(worker, reason, target)
    return worker, ()


# ------------------------------------------------------------------------------------------------- whom to follow


def _target(worker: Worker) -> Target | None:
    """What to serve by all that is known; None where nothing says so, or nothing newer than its own choice."""
    desired, published = worker.desired, worker.published
    ordered = None
    if desired is not None and desired.order > worker.order_floor:
        ordered = Target(desired.published, desired.order)
    if not worker.is_degraded or published is None:
        return ordered
    if desired is not None and published.version in desired.quarantined:
        return ordered
    if ordered is not None and identity(published) <= ordered.identity:
        return ordered
    if worker.proven is not None and identity(published) < identity(worker.proven):
        return ordered
    return Target(published, None)


def _is_proven(worker: Worker, target: Target) -> bool:
    return worker.proven is not None and identity(worker.proven) == target.identity


def _pursue(worker: Worker, now: float) -> tuple[Worker, tuple[Effect, ...]]:
    """Start the next fetch where nothing is under way that has to end first."""
    activity = worker.activity
    if worker.poison or not isinstance(activity, Idle | BackingOff):
        return worker, ()
    target = _target(worker)
    if worker.is_draining or target is None or target == worker.given_up:
        return replace(worker, activity=Idle()), ()
    if _is_proven(worker, target):
        worker = replace(worker, activity=Idle())
        if target.order is None or target.order == worker.order:
            return worker, ()
        return replace(worker, order=target.order), (Report(),)
    failures = corrupt = 0
    if isinstance(activity, BackingOff) and activity.target.identity == target.identity:
        if now < activity.until:
            return worker, ()
        failures, corrupt = activity.failures, activity.corrupt
    fetching = Fetching(target, now + worker.settings.fetch_deadline_seconds, failures, corrupt)
    return replace(worker, activity=fetching), (Fetch(target.published),)


def _report_last(effects: tuple[Effect, ...]) -> tuple[Effect, ...]:
    """One report after everything else, where there are any."""
    others = tuple(effect for effect in effects if not isinstance(effect, Report))
    return (*others, Report()) if len(others) < len(effects) else others
