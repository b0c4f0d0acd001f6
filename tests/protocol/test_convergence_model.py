"""Coordinators and workers over a network that loses, repeats and reorders, with crashes: safe always, live at last."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.fakes.cluster import Cluster, FakeEngine, FakeStore, published_version

from rljob_protocol import coordinator as co
from rljob_protocol import worker as wo

BOUND_SECONDS = 150
"""All deadlines of the fake cluster fit into it once: restart of a hung worker, degraded mode, quarantine."""


class ProtocolMachine(RuleBasedStateMachine):
    """Faults in any order; at the end they stop and everything must converge."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(3)

    @rule(bad=st.sampled_from([False, False, False, True]))
    def publish(self, bad: bool) -> None:
        self.cluster.publish(bad=bad)

    @rule()
    def restart_trainer(self) -> None:
        self.cluster.epoch += 1
        self.cluster.publish()

    @rule(data=st.data())
    @precondition(lambda self: self.cluster.epoch > 1)
    def zombie_trainer_speaks(self, data: st.DataObject) -> None:
        """An announcement of an older epoch, as a reader with an old snapshot may see it."""
        cluster = self.cluster
        newest = cluster.store.published
        assert newest is not None
        zombie = published_version(newest.version + 5, newest.epoch - 1)
        for name in list(cluster.workers):
            process = cluster.workers[name]
            knows_newer = process.machine.epoch >= newest.epoch
            cluster.tell_worker(process, wo.PublishedSeen(zombie))
            assert not knows_newer or process.machine.published != zombie
            if not knows_newer:
                cluster.kill_worker(name)  # it was fooled by an announcement that compare-and-set makes impossible

    @rule(data=st.data())
    def poll_worker(self, data: st.DataObject) -> None:
        self.cluster.poll_worker(data.draw(st.sampled_from(self.cluster.names)))

    @rule()
    def poll_coordinators(self) -> None:
        self.cluster.poll_coordinators()

    @rule(data=st.data(), keep=st.booleans())
    @precondition(lambda self: self.cluster.mail)
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        self.cluster.deliver(data.draw(st.integers(0, len(self.cluster.mail) - 1)), keep=keep)

    @rule()
    def deliver_everything_backwards(self) -> None:
        while self.cluster.mail:
            self.cluster.deliver(len(self.cluster.mail) - 1)

    @rule()
    def lose_all_mail(self) -> None:
        self.cluster.mail.clear()

    @rule(data=st.data(), outcome=st.sampled_from(["ok", "ok", "ok", "fail", "corrupt", "lost"]))
    @precondition(lambda self: any(process.jobs for process in self.cluster.workers.values()))
    def end_worker_job(self, data: st.DataObject, outcome: str) -> None:
        busy = sorted(name for name, process in self.cluster.workers.items() if process.jobs)
        name = data.draw(st.sampled_from(busy))
        if outcome == "lost":
            self.cluster.workers[name].jobs.clear()
        else:
            self.cluster.finish_worker_job(name, ok=outcome == "ok", corrupt=outcome == "corrupt")

    @rule(data=st.data(), outcome=st.sampled_from(["ok", "ok", "ok", "fail", "lost"]))
    @precondition(lambda self: any(process.jobs for process in self.cluster.coordinators))
    def end_coordinator_job(self, data: st.DataObject, outcome: str) -> None:
        busy = [process for process in self.cluster.coordinators if process.jobs]
        process = busy[data.draw(st.integers(0, len(busy) - 1))]
        if outcome == "lost":
            process.jobs.pop(0)
        else:
            self.cluster.finish_coordinator_job(process, ok=outcome == "ok")

    @rule(seconds=st.sampled_from([1.0, 3.0, 11.0, 45.0]))
    def tick(self, seconds: float) -> None:
        self.cluster.tick(seconds)

    @rule(seconds=st.integers(1, 8))
    def work_for_a_while(self, seconds: int) -> None:
        self.cluster.run(seconds)

    @rule(data=st.data())
    def kill_worker(self, data: st.DataObject) -> None:
        self.cluster.kill_worker(data.draw(st.sampled_from(self.cluster.names)))

    @rule(data=st.data())
    def restart_worker(self, data: st.DataObject) -> None:
        self.cluster.start_worker(data.draw(st.sampled_from(self.cluster.names)))

    @rule()
    def kill_coordinators(self) -> None:
        self.cluster.coordinators.clear()

    @rule()
    @precondition(lambda self: len(self.cluster.coordinators) < 3)
    def start_another_coordinator(self) -> None:
        self.cluster.start_coordinator()

    @invariant()
    def no_token_comes_from_unproven_weights(self) -> None:
        for process in self.cluster.workers.values():
            self.cluster.generate(process)
            assert process.engine.is_gate_open == process.machine.is_gate_open
            held = process.engine.generate()
            assert held is None or held == process.machine.serving
            assert held is None or held.version not in self.cluster.bad

    @invariant()
    def tokens_of_the_dead_are_counted_once(self) -> None:
        for process in self.cluster.coordinators:
            totals = co.totals(process.machine)
            assert totals.tokens_generated == totals.tokens_in_flight + co.crashed_tokens(process.machine)

    def teardown(self) -> None:
        cluster = self.cluster
        if not cluster.coordinators:
            self.converges_without_a_coordinator()
            cluster.start_coordinator()
        cluster.run(BOUND_SECONDS)
        [leader] = [process.machine for process in cluster.coordinators if process.term == cluster.store.term]
        newest = cluster.store.published
        assert newest is not None and leader.desired is not None
        if newest.version not in cluster.bad and newest.version not in leader.quarantined:
            assert leader.desired.published == newest
        if leader.desired.published.version not in cluster.bad:
            assert cluster.all_serve(leader.desired.published)
            assert co.is_converged(leader) and co.summary(leader, cluster.now).workers_converged == 3
        else:
            assert all(good.version in leader.quarantined for good in leader.good), "there was a good version to order"
        good = cluster.publish()
        assert cluster.run(BOUND_SECONDS, until=lambda: cluster.all_serve(good))
        assert all(wo.is_converged(process.machine) for process in cluster.workers.values())

    def converges_without_a_coordinator(self) -> None:
        """Degraded mode: the workers follow `published` alone."""
        good = self.cluster.publish()
        assert self.cluster.run(BOUND_SECONDS, until=lambda: self.cluster.all_serve(good))
        assert all(process.machine.is_degraded for process in self.cluster.workers.values())


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# ------------------------------------------------------------------------------------------------ negative controls


def test_the_fake_engine_catches_a_token_from_unproven_weights() -> None:
    engine = FakeEngine()
    engine.apply(published_version(3), ok=True)
    engine.open_gate()
    with pytest.raises(AssertionError, match="a token was generated by unproven weights"):
        engine.generate()


def test_the_fake_engine_catches_an_apply_behind_an_open_gate() -> None:
    engine = FakeEngine()
    engine.open_gate()
    with pytest.raises(AssertionError, match="weights were applied behind an open gate"):
        engine.apply(published_version(3), ok=True)


def test_the_fake_store_catches_an_order_that_goes_back() -> None:
    store = FakeStore()
    order = co.DesiredVersion(term=2, generation=1, published=published_version(3))
    assert store.write_desired(order, 0)
    assert not store.write_desired(order, 0)
    with pytest.raises(AssertionError, match="an order went back"):
        store.write_desired(order.model_copy(update={"term": 1}), 1)


def test_without_mail_nothing_converges_so_the_liveness_check_can_fail() -> None:
    cluster = Cluster(3)
    for _ in range(BOUND_SECONDS):
        cluster.tick()
    assert not cluster.all_serve(cluster.store.published)
    assert cluster.run(BOUND_SECONDS, until=lambda: cluster.all_serve(cluster.store.published))


def test_a_version_that_every_engine_refuses_is_quarantined_and_the_last_good_one_served_again() -> None:
    cluster = Cluster(3)
    good = cluster.store.published
    assert cluster.run(BOUND_SECONDS, until=lambda: cluster.all_serve(good))
    cluster.publish(bad=True)
    cluster.run(BOUND_SECONDS)
    assert cluster.all_serve(good)
    assert cluster.store.desired is not None
    assert (cluster.store.desired.published, cluster.store.desired.quarantined) == (good, (1,))


def test_a_worker_that_joins_late_takes_the_same_path() -> None:
    cluster = Cluster(2)
    cluster.run(20)
    newest = [cluster.publish() for _ in range(3)][-1]
    cluster.run(20)
    cluster.names.append("main-2")
    assert cluster.run(10, until=lambda: cluster.all_serve(newest))
    assert cluster.workers["main-2"].engine.log == ["shut", "apply 3", "probe 3", "open"]
