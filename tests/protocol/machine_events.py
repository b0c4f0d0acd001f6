"""Events of a rollout worker's machine, for the tests of it."""

from __future__ import annotations

from rljob_api.messages import DesiredVersion, PublishedVersion
from rljob_api.weights import Blob
from rljob_protocol.worker import WorkerState, step
from rljob_protocol.worker_events import Applied, DesiredSeen, Effect, Event, Fetched, GateShut, ProbePassed


def published(version: int, epoch: int = 1) -> PublishedVersion:
    blob = Blob(name=f"m-{epoch}-{version}", sha256="0" * 64, num_bytes=1)
    return PublishedVersion(epoch=epoch, version=version, step=version, manifest=blob, num_bytes=1)


def ordered(version: int, generation: int = 1, term: int = 1, quarantined: tuple[int, ...] = ()) -> DesiredSeen:
    return DesiredSeen(
        DesiredVersion(term=term, generation=generation, published=published(version), quarantined=quarantined)
    )


def run(state: WorkerState, *events: Event, now: float = 0.0) -> tuple[WorkerState, tuple[Effect, ...]]:
    """Feed events at one time; all their effects in order."""
    effects: tuple[Effect, ...] = ()
    for event in events:
        state, more = step(state, event, now)
        effects += more
    return state, effects


def swap_events(version: int) -> tuple[Event, ...]:
    done = published(version)
    return Fetched(done), GateShut(), Applied(done), ProbePassed(done)
