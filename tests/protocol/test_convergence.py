"""A model of the whole version protocol: coordinators that crash and return, three workers, a network that loses,
repeats and reorders. Safety at every step; convergence once the faults stop."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.fakes.kv import FakeKv

from rljob_api.errors import Fenced
from rljob_api.messages import (
    CoordinatorHeartbeat,
    DesiredVersion,
    PublishedVersion,
    TermClaim,
    WorkerPhase,
)
from rljob_api.messages import WorkerState as WorkerReport
from rljob_api.weights import Blob
from rljob_protocol import coordinator, worker

WORKERS = ("w0", "w1", "w2")
BOUND_SECONDS = 150
"""Convergence takes at most: a degraded timeout, a full fetch backoff, a check's retry, and the swaps."""

Step = Callable[[worker.WorkerState, worker.Event, float], tuple[worker.WorkerState, tuple[worker.Effect, ...]]]


def published(version: int, epoch: int) -> PublishedVersion:
    blob = Blob(name=f"m-{epoch}-{version}", sha256="0" * 64, num_bytes=1)
    return PublishedVersion(epoch=epoch, version=version, step=version, manifest=blob, num_bytes=1)


class WorkerProcess:
    """The shell of a worker machine and its engine."""

    def __init__(self, name: str, incarnation: int, step: Step, kv: FakeKv, now: float) -> None:
        self.name, self.incarnation, self._step, self._kv = name, str(incarnation), step, kv
        self.machine = worker.new_state(worker.WorkerSettings(), now)
        self.work: list[worker.Effect] = []
        self.is_gate_open = False
        self.holds: PublishedVersion | None = None
        self.is_proven = False
        self.verified: set[tuple[int, int]] = set()
        self.orders: list[tuple[int, int]] = []
        self.revision = 0
        self.is_down = False

    def feed(self, event: worker.Event, now: float) -> None:
        self.machine, effects = self._step(self.machine, event, now)
        if self.machine.order is not None and self.orders[-1:] != [self.machine.order]:
            assert not self.orders or self.machine.order > self.orders[-1], "the order that is served under fell"
            self.orders.append(self.machine.order)
        for effect in effects:
            match effect:
                case worker.ShutGate():
                    assert not any(not isinstance(other, worker.Fetch) for other in self.work), "two swaps"
                    self.is_gate_open = False
                    self.work.append(effect)
                case worker.OpenGate():
                    assert not self.is_gate_open
                    assert self.is_proven, "a version is served before its probe passed"
                    self.is_gate_open = True
                case worker.Fetch():
                    assert not any(isinstance(other, worker.Fetch) for other in self.work), "two fetches"
                    self.work.append(effect)
                case worker.Apply(version):
                    assert not self.is_gate_open
                    assert (version.epoch, version.version) in self.verified, "bytes are applied unverified"
                    self.work.append(effect)
                case worker.Probe():
                    assert not self.is_gate_open
                    self.work.append(effect)
                case worker.Poison():
                    self.is_down = True
                case worker.Report():
                    self.report()

    def do_work(self, number: int, fails: bool, now: float) -> None:
        """End one of the effects under way."""
        effect = self.work.pop(number % len(self.work))
        match effect:
            case worker.Fetch(version):
                if fails:
                    return self.feed(worker.FetchFailed(version, "sha256 differs", corrupt=True), now)
                self.verified.add((version.epoch, version.version))
                return self.feed(worker.Fetched(version), now)
            case worker.ShutGate():
                return self.feed(worker.GateStuck("timed out") if fails else worker.GateShut(), now)
            case worker.Apply(version):
                self.holds, self.is_proven = (None if fails else version), False
                return self.feed(worker.ApplyFailed(version, "shape") if fails else worker.Applied(version), now)
            case worker.Probe(version):
                self.is_proven = self.holds == version and not fails
                if self.is_proven:
                    return self.feed(worker.ProbePassed(version), now)
                return self.feed(worker.ProbeFailed(version, "off by 0.3"), now)
        raise AssertionError(effect)

    def generate(self) -> None:
        """A token, if the gate lets it pass."""
        if self.is_gate_open:
            assert self.machine.swap is worker.Swap.NONE, "a token between ShutGate and OpenGate"
            assert self.is_proven and self.holds == self.machine.serving, "a token of unproven weights"

    def report(self) -> None:
        serving = self.machine.serving
        phase = WorkerPhase.STARTING if serving is None else WorkerPhase.SERVING
        if self.machine.poisoned is not None:
            phase = WorkerPhase.POISONED
        elif serving is not None and not self.is_gate_open:
            phase = WorkerPhase.SWAPPING
        self.revision += 1
        report = WorkerReport(
            worker=self.name,
            pool="main",
            incarnation=self.incarnation,
            revision=self.revision,
            phase=phase,
            epoch=0 if serving is None else serving.epoch,
            serving_version=None if serving is None else serving.version,
            order=self.machine.order,
        )
        self._kv.put(f"worker.{self.name}", report)


class CoordinatorProcess:
    """The shell of a coordinator machine."""

    def __init__(self, kv: FakeKv, now: float) -> None:
        self._kv = kv
        held = kv.read("term")
        term = 1
        if held is not None:
            assert isinstance(held.value, TermClaim)
            term = held.value.term + 1
        kv.write("term", TermClaim(term=term), expected_revision=None if held is None else held.revision)
        left = kv.read("desired")
        self._revision = None if left is None else left.revision
        self.machine = coordinator.new_state(coordinator.CoordinatorSettings())
        self.checks: list[PublishedVersion] = []
        self.restarts: list[tuple[str, str]] = []
        self._beat = 0
        value = None if left is None else left.value
        assert value is None or isinstance(value, DesiredVersion)
        self.feed(coordinator.TermClaimed(term, value), now)

    @property
    def is_down(self) -> bool:
        return self.machine.stopped is not None

    def feed(self, event: coordinator.Event, now: float) -> None:
        self.machine, effects = coordinator.step(self.machine, event, now)
        for effect in effects:
            match effect:
                case coordinator.CheckManifest(version):
                    assert not self.checks, "two checks"
                    self.checks.append(version)
                case coordinator.WriteDesired(desired):
                    self._write(desired, now)
                case coordinator.Beat():
                    self._beat += 1
                    term, generation = coordinator.order_of(self.machine)
                    beat = CoordinatorHeartbeat(term=term, generation=generation, beat=self._beat)
                    self._kv.put("coordinator", beat)
                case coordinator.RestartWorker(name, incarnation, _):
                    self.restarts.append((name, incarnation))
                case coordinator.Stop():
                    assert self.is_down

    def _write(self, desired: DesiredVersion, now: float) -> None:
        try:
            self._revision = self._kv.write("desired", desired, expected_revision=self._revision)
        except Fenced:
            self.feed(coordinator.Fenced(), now)
        else:
            self.feed(coordinator.DesiredWritten(desired), now)

    def do_check(self, fails: bool, now: float) -> None:
        version = self.checks.pop()
        self.feed(coordinator.ManifestChecked(version, "no such blob" if fails else None), now)


class Protocol(RuleBasedStateMachine):
    worker_step: Step = staticmethod(worker.step)

    @initialize()
    def start(self) -> None:
        self.kv = FakeKv()
        self.now = 0.0
        self.epoch, self.version = 1, -1
        self.incarnations = 0
        self.unreadable: set[int] = set()
        self.workers = {name: self._new_worker(name) for name in WORKERS}
        self.coordinators: list[CoordinatorProcess] = []
        self.network: list[tuple[str, worker.Event | coordinator.Event]] = []
        self.trainer_publishes(False)
        self.a_coordinator_starts()

    def _new_worker(self, name: str) -> WorkerProcess:
        self.incarnations += 1
        process = WorkerProcess(name, self.incarnations, type(self).worker_step, self.kv, self.now)
        process.report()
        return process

    # ---- reads of the KV travel over the network: they may be lost, repeated, late and out of order

    def _read(self) -> None:
        desired, newest, beat = (self.kv.read(key) for key in ("desired", "published", "coordinator"))
        assert newest is not None and isinstance(newest.value, PublishedVersion)
        reports = tuple(
            entry.value
            for name in WORKERS
            if (entry := self.kv.read(f"worker.{name}")) is not None and isinstance(entry.value, WorkerReport)
        )
        for name in WORKERS:
            self.network.append((name, worker.PublishedSeen(newest.value)))
            if desired is not None and isinstance(desired.value, DesiredVersion):
                self.network.append((name, worker.DesiredSeen(desired.value)))
            if beat is not None and isinstance(beat.value, CoordinatorHeartbeat):
                self.network.append((name, worker.CoordinatorBeat(beat.value.beat)))
        self.network.append(("coordinators", coordinator.PublishedSeen(newest.value)))
        self.network.append(("coordinators", coordinator.WorkersSeen(reports)))

    def _deliver(self, to: str, event: worker.Event | coordinator.Event) -> None:
        if to in self.workers:
            assert isinstance(event, worker.Event)
            self.workers[to].feed(event, self.now)
            return
        assert isinstance(event, coordinator.Event)
        for process in self.coordinators:
            process.feed(event, self.now)

    def _clean_up(self) -> None:
        """What is down is restarted by its host."""
        for process in self.coordinators:
            for name, incarnation in process.restarts:
                if self.workers[name].incarnation == incarnation:
                    self.workers[name] = self._new_worker(name)
            process.restarts.clear()
        self.coordinators = [process for process in self.coordinators if not process.is_down]
        for name, worker_process in self.workers.items():
            if worker_process.is_down:
                worker_process.report()
                self.workers[name] = self._new_worker(name)

    # ---- what may happen

    @rule(new_epoch=st.booleans())
    def trainer_publishes(self, new_epoch: bool) -> None:
        self.epoch, self.version = self.epoch + new_epoch, self.version + 1
        self.kv.put("published", published(self.version, self.epoch))

    @precondition(lambda self: len(self.coordinators) < 2)
    @rule()
    def a_coordinator_starts(self) -> None:
        """Also while another one, a zombie from now on, believes that it still is the one."""
        self.coordinators.append(CoordinatorProcess(self.kv, self.now))

    @precondition(lambda self: self.coordinators)
    @rule()
    def a_coordinator_crashes(self) -> None:
        self.coordinators.pop(0)

    @rule(name=st.sampled_from(WORKERS))
    def a_worker_crashes(self, name: str) -> None:
        self.workers[name] = self._new_worker(name)

    @rule(seconds=st.sampled_from([1, 5, 31, 130, 700]))
    def nothing_gets_through_for_a_while(self, seconds: int) -> None:
        self.now += seconds
        for process in self.coordinators:
            process.feed(coordinator.Tick(), self.now)
        for worker_process in self.workers.values():
            worker_process.feed(worker.Tick(), self.now)
        self._clean_up()

    @rule(seed=st.integers(0, 2**16), events=st.integers(10, 80), faults=st.sampled_from([0.0, 0.1, 0.4]))
    def things_happen(self, seed: int, events: int, faults: float) -> None:
        chance = random.Random(seed)
        for _ in range(events):
            self.now += 0.3 * chance.random()
            if chance.random() < 0.15:
                self._read()
            for _ in range(min(len(self.network), chance.randrange(8))):
                to, event = self.network[chance.randrange(len(self.network))]
                if chance.random() >= faults:  # else it comes again, later
                    self.network.remove((to, event))
                if chance.random() >= faults:  # else it is lost, this time
                    self._deliver(to, event)
            for process in self.workers.values():
                if process.work and not process.is_down and chance.random() < 0.5:
                    process.do_work(chance.randrange(9), chance.random() < 0.2 * faults, self.now)
            if chance.random() < 0.05:
                self.trainer_publishes(chance.random() < 0.1)
            for leader in self.coordinators:
                if leader.checks and chance.random() < 0.5:
                    leader.do_check(chance.random() < faults, self.now)
                leader.feed(coordinator.Tick(), self.now)
            for worker_process in self.workers.values():
                worker_process.feed(worker.Tick(), self.now)
                worker_process.generate()
            self._clean_up()

    # ---- what always holds

    @invariant()
    def tokens_come_from_proven_weights(self) -> None:
        for process in self.workers.values():
            process.generate()

    @invariant()
    def orders_never_fall_and_epochs_never_fall(self) -> None:
        orders = [value for key, value in self.kv.history if key == "desired" and isinstance(value, DesiredVersion)]
        for one, following in pairwise(orders):
            assert following.order > one.order
            assert following.published.epoch >= one.published.epoch
            assert following.published.version >= one.published.version
            if following.term == one.term:
                assert following.generation == one.generation + 1

    def teardown(self) -> None:
        """Once the faults stop, everything serves the newest published version within the bound."""
        if not hasattr(self, "kv"):
            return
        self.network.clear()
        self.trainer_publishes(False)
        newest = published(self.version, self.epoch)
        for _ in range(BOUND_SECONDS):
            self.now += 1.0
            self._clean_up()
            if not self.coordinators:
                self.a_coordinator_starts()
            for process in self.workers.values():
                process.report()
            self._read()
            for to, event in self.network:
                self._deliver(to, event)
            self.network.clear()
            for leader in self.coordinators:
                leader.feed(coordinator.Tick(), self.now)
                if leader.checks:
                    leader.do_check(False, self.now)
            for process in self.workers.values():
                process.feed(worker.Tick(), self.now)
                while process.work and not process.is_down:
                    process.do_work(0, False, self.now)
                process.generate()
        assert all(process.machine.serving == newest for process in self.workers.values()), "no convergence"
        assert all(worker.is_converged(process.machine) for process in self.workers.values()), "no convergence"
        found = coordinator.summary(self.coordinators[-1].machine, self.now)
        assert found.desired == newest
        assert found.converged == len(WORKERS)
        self.orders_never_fall_and_epochs_never_fall()


def opens_without_a_probe(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    state, effects = worker.step(state, event, now)
    if isinstance(event, worker.Applied) and effects:
        return worker.step(state, worker.ProbePassed(event.published), now)
    return state, effects


def takes_any_order(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    if isinstance(event, worker.DesiredSeen):
        object.__setattr__(state, "desired", None)
    return worker.step(state, event, now)


def is_deaf(
    state: worker.WorkerState, event: worker.Event, now: float
) -> tuple[worker.WorkerState, tuple[worker.Effect, ...]]:
    if isinstance(event, worker.DesiredSeen | worker.PublishedSeen):
        event = worker.Tick()
    return worker.step(state, event, now)


MODEL = hypothesis_settings(
    max_examples=100,
    stateful_step_count=12,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking takes minutes: turn it on to look into a failure
)


def test_every_history_is_safe_and_converges_once_the_faults_stop() -> None:
    run_state_machine_as_test(Protocol, settings=MODEL)


@pytest.mark.parametrize(
    ("defective", "found"),
    [
        (opens_without_a_probe, "served before its probe passed"),
        (takes_any_order, "the order that is served under fell"),
        (is_deaf, "no convergence"),
    ],
)
def test_the_model_finds_a_worker_that_breaks_a_rule(defective: Step, found: str) -> None:
    class Defective(Protocol):
        worker_step = staticmethod(defective)

    with pytest.raises(AssertionError, match=found):
        run_state_machine_as_test(Defective, settings=MODEL)
