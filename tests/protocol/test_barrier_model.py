"""A model of the interruption route: a trainer with its barrier, two workers, a network that delays and repeats.

The property that the route stands on: once every live worker has acknowledged a barrier, every token of versions up to
its own is with the trainer, and none is made before a newer version is served or the barrier is given up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from tests.protocol.machine_events import published

from rljob_api.messages import Barrier, BarrierState, DesiredVersion, PublishedVersion
from rljob_protocol import worker
from rljob_protocol.worker_events import HandedOver

Step = Callable[[worker.WorkerState, worker.Event, float], tuple[worker.WorkerState, tuple[worker.Effect, ...]]]
HISTORIES = 120
EVENTS = 250
SETTLING_SECONDS = 150
SETTINGS = worker.WorkerSettings(coordinator_timeout_seconds=20.0, barrier_timeout_seconds=15.0)


@dataclass
class Worker:
    """The shell of a machine: an engine, the tokens it made, and the work under way."""

    step: Step
    machine: worker.WorkerState
    work: list[worker.Effect] = field(default_factory=list)
    is_open: bool = False
    holds: PublishedVersion | None = None
    made: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, version) of each token."""
    handed_over: int = 0
    acknowledged: tuple[int, int] | None = None
    """What its last report says."""
    is_down: bool = False

    def feed(self, event: worker.Event, now: float) -> None:
        self.machine, effects = self.step(self.machine, event, now)
        for effect in effects:
            match effect:
                case worker.ShutGate():
                    self.is_open = False
                    self.work.append(effect)
                case worker.OpenGate():
                    assert not self.is_open
                    self.is_open = True
                case worker.Poison():
                    self.is_down = True
                case worker.Report():
                    self.acknowledged = self.machine.kept
                    if self.acknowledged is not None:
                        assert self.handed_over == len(self.made), "acknowledged before the hand-over"
                case _:
                    if not isinstance(effect, worker.Fetch):
                        assert not self.is_open, "the engine is touched behind an open gate"
                    self.work.append(effect)

    def do_work(self, number: int, fails: bool, now: float) -> None:
        effect = self.work.pop(number % len(self.work))
        match effect:
            case worker.Fetch(version):
                failed = worker.FetchFailed(version, "sha256 differs", corrupt=True)
                self.feed(failed if fails else worker.Fetched(version), now)
            case worker.ShutGate():
                self.feed(worker.GateShut(), now)
            case worker.HandOver():
                if not fails:
                    self.handed_over = len(self.made)
                self.feed(worker.HandOverFailed("no server") if fails else HandedOver(), now)
            case worker.Resume():
                self.feed(worker.Resumed(), now)
            case worker.Apply(version):
                self.holds = None if fails else version
                self.feed(worker.ApplyFailed(version, "shape") if fails else worker.Applied(version), now)
            case worker.Probe(version):
                self.feed(worker.ProbePassed(version), now)

    def generate(self) -> None:
        if self.is_open:
            assert self.holds is not None
            assert self.holds == self.machine.serving
            self.made.append(worker.identity(self.holds))


class History:
    """One random history of everything."""

    def __init__(self, seed: int, step: Step) -> None:
        self.chance = random.Random(seed)
        self.step = step
        self.now = 0.0
        self.published = published(0)
        self.generation = 0
        self.barrier: Barrier | None = None
        self.quiesced_at = 0.0
        self.is_complete = False
        """Every live worker has acknowledged the barrier that holds."""
        self.complete_barriers = 0
        self.network: list[tuple[int, tuple[worker.Event, ...]]] = []
        self.workers = [self._start() for _ in range(2)]

    def _start(self) -> Worker:
        made = Worker(self.step, worker.new_state(SETTINGS, self.now))
        if self.barrier is not None:
            made.feed(worker.BarrierSeen(self.barrier), self.now)  # read before the machine runs
        return made

    def _read(self) -> None:
        """Each key is read by itself; a release is read together with what is published then."""
        desired = DesiredVersion(term=1, generation=self.generation + 1, published=self.published)
        newest = worker.PublishedSeen(self.published)
        reads: list[tuple[worker.Event, ...]] = [(worker.DesiredSeen(desired),), (newest,)]
        reads.append((worker.CoordinatorBeat(int(self.now)),))
        reads.append((worker.TrainerBeat((self.published.epoch, int(self.now))),))
        if self.barrier is not None:
            is_released = self.barrier.state is BarrierState.RELEASED
            reads.append((*((newest,) if is_released else ()), worker.BarrierSeen(self.barrier)))
        self.network += [(index, read) for index in range(len(self.workers)) for read in reads]

    def _deliver(self, faults: float) -> None:
        for _ in range(min(len(self.network), self.chance.randrange(10))):
            message = self.network[self.chance.randrange(len(self.network))]
            if self.chance.random() >= faults:  # else it comes again, later
                self.network.remove(message)
            index, events = message
            if self.chance.random() >= faults:  # else it is lost, this time
                for event in events:
                    self.workers[index].feed(event, self.now)

    def _train(self, may_be_dead: bool) -> None:
        """The trainer: quiesce; once all acknowledged or time is up, update: publish, order, release."""
        newest = worker.identity(self.published)
        if self.barrier is None or self.barrier.state is BarrierState.RELEASED:
            if self.barrier is not None and newest == (self.barrier.epoch, self.barrier.version):
                if self.chance.random() < 0.05:  # the update was given up; whoever resumes publishes anew
                    self._publish(self.published.epoch + 1)
            elif self.chance.random() < 0.05:
                self.barrier = Barrier(epoch=newest[0], version=newest[1], state=BarrierState.QUIESCE)
                self.quiesced_at, self.is_complete = self.now, False
            return
        if may_be_dead and self.chance.random() < 0.01:  # dies behind its barrier; the next one resumes
            self._publish(self.published.epoch + 1)
            return
        held = (self.barrier.epoch, self.barrier.version)
        acknowledged = [process.acknowledged == held for process in self.workers]
        if all(acknowledged) and not self.is_complete:
            self.is_complete = True
            self.complete_barriers += 1
        is_over = self.is_complete and self.chance.random() < 0.3
        is_late = self.now - self.quiesced_at > 10.0 and not self.is_complete
        if is_over or is_late:
            if self.chance.random() < 0.8:  # else the update is given up
                self._publish(self.published.epoch)
            self.barrier = self.barrier.model_copy(update={"state": BarrierState.RELEASED})

    def _publish(self, epoch: int) -> None:
        self.published = published(self.published.version + 1, epoch)
        self.generation += 1

    def _generate(self) -> None:
        """A token for each worker that may; behind a complete barrier no worker may, before it serves a newer version."""
        barrier = self.barrier
        for process in self.workers:
            process.generate()
            if self.is_complete and barrier is not None and barrier.state is BarrierState.QUIESCE and process.is_open:
                assert process.made[-1] > (barrier.epoch, barrier.version), "a token behind a complete barrier"

    def run(self) -> None:
        for _ in range(EVENTS):
            faults = self.chance.choice((0.0, 0.1, 0.4))
            self.now += 0.5 * self.chance.random() if self.chance.random() < 0.98 else 20.0
            if self.chance.random() < 0.3:
                self._read()
            self._deliver(faults)
            for index, process in enumerate(self.workers):
                process.feed(worker.Tick(), self.now)
                if process.work and not process.is_down and self.chance.random() < 0.6:
                    process.do_work(self.chance.randrange(9), self.chance.random() < 0.2 * faults, self.now)
                if process.is_down or self.chance.random() < 0.002:
                    self.workers[index] = self._start()
                    self.is_complete = False
            self._generate()
            self._train(may_be_dead=True)
        self._settle()

    def _settle(self) -> None:
        """The faults stop, and the trainer ends its barrier without an update."""
        self.network.clear()
        if self.barrier is not None:
            self.barrier = self.barrier.model_copy(update={"state": BarrierState.RELEASED})
        for _ in range(SETTLING_SECONDS):
            self.now += 1.0
            self._read()
            for index, events in self.network:
                for event in events:
                    self.workers[index].feed(event, self.now)
            self.network.clear()
            for index, process in enumerate(self.workers):
                if process.is_down:
                    self.workers[index] = process = self._start()
                process.feed(worker.Tick(), self.now)
                while process.work and not process.is_down:
                    process.do_work(0, False, self.now)
        for process in self.workers:
            assert process.is_open, "a worker does not go on"
            assert process.machine.serving == self.published, "no convergence"


def run_histories(step: Step) -> int:
    """Barriers that all workers acknowledged, over all histories."""
    complete = 0
    for seed in range(HISTORIES):
        history = History(seed, step)
        history.run()
        complete += history.complete_barriers
    return complete


def test_behind_a_complete_barrier_no_token_is_made_and_all_are_handed_over_and_every_history_goes_on() -> None:
    assert run_histories(worker.step) > HISTORIES


def acknowledges_at_once(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    state, effects = worker.step(state, event, now)
    if worker.HandOver() in effects:
        held = worker.step(state, HandedOver(), now)
        return held[0], (*effects, *held[1])
    return state, effects


def reopens_when_time_passes(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    if state.swap is worker.Swap.HELD and isinstance(event, worker.Tick) and int(now) % 3 == 0:
        object.__setattr__(state.trainer, "barrier", None)
    return worker.step(state, event, now)


def forgets_releases(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    if isinstance(event, worker.BarrierSeen) and event.barrier.state is BarrierState.RELEASED:
        event = worker.Tick()
    return worker.step(state, event, now)


@pytest.mark.parametrize(
    ("defective", "found"),
    [
        (acknowledges_at_once, "acknowledged before the hand-over"),
        (reopens_when_time_passes, "a token behind a complete barrier"),
        (forgets_releases, "a worker does not go on"),
    ],
)
def test_the_model_finds_a_worker_that_breaks_a_rule(defective: Step, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        run_histories(defective)
