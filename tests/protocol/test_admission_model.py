"""Admission against its specification: adversarial schedules by hypothesis, heavy-tailed ones by simulation."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rljob_api.spec import OnExceeded
from rljob_protocol.admission import (
    AdmissionSettings,
    BatchGroup,
    DroppedGroup,
    DropReason,
    Ledger,
    SampleSeen,
    Verdict,
    admit,
    cursor,
    expire,
    ledger_from_json,
    ledger_to_json,
    min_version_of,
    new_ledger,
    on_resume,
    on_sample,
    on_step_trained,
    outstanding,
    take_batch,
)

Key = tuple[int, int]


def assert_paced(ledger: Ledger, rules: AdmissionSettings) -> None:
    """What pacing promises of any ledger, whatever happened before."""
    ordinals = [group.ordinal for group in ledger.groups]
    assert len(set(ordinals)) == len(ordinals), "two groups hold one ordinal"
    assert not set(ordinals) & set(ledger.freed), "a held ordinal is free"
    assert len(ordinals) <= (rules.max_versions + 1) * rules.tasks_per_step, "more groups than the window holds"
    end = (ledger.steps_trained + rules.max_versions + 1) * rules.tasks_per_step
    assert all(ordinal < end for ordinal in ordinals), "an ordinal lies beyond the window"
    trained = ledger.steps_trained * rules.tasks_per_step
    assert trained + len(ordinals) <= rules.steps * rules.tasks_per_step, "more groups than the job needs"


@dataclass
class World:
    """Workers and stream as the ledger sees them, and an account of every model token, kept independently."""

    rules: AdmissionSettings
    ledger: Ledger = field(default_factory=new_ledger)
    published: int = 0
    step_of: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Steps trained into each published version; on a resume, what was published since counts as the checkpoint's."""
    min_version: dict[int, int] = field(default_factory=dict)
    queued: set[Key] = field(default_factory=set)
    running: dict[Key, int] = field(default_factory=dict)
    """Sample -> version that its first token was sampled with."""
    stream: list[SampleSeen] = field(default_factory=list)
    fate: dict[Key, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    """Stream sequence -> how its tokens ended; sequences that a group holds are absent."""
    held: dict[Key, SampleSeen] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)
    now: float = 0.0

    def publish_tasks(self) -> None:
        self.ledger, admitted = admit(self.ledger, self.rules)
        for group in admitted:
            assert group.min_version <= self.ledger.version
            self.min_version[group.task] = group.min_version
            self.queue(group.task)

    def queue(self, task: int, only: set[Key] | None = None) -> None:
        keys = {(task, sample) for sample in range(self.rules.samples_per_task)}
        self.queued |= {key for key in (keys & only if only is not None else keys) if key not in self.running}

    def start(self, key: Key, version: int) -> None:
        self.queued.remove(key)
        self.running[key] = version

    def finish(self, key: Key, *, scored: bool = True) -> None:
        oldest = self.running.pop(key)
        self.append(key, oldest, self.published, scored=scored)

    def append(self, key: Key, oldest: int, newest: int, *, scored: bool = True) -> None:
        seen = SampleSeen(*key, len(self.stream) + 1, oldest, scored, 1 + len(self.stream) % 7, newest)
        self.stream.append(seen)
        self.read(seen)

    def read(self, seen: SampleSeen) -> None:
        self.ledger, verdict = on_sample(self.ledger, self.rules, seen, self.now)
        key = (seen.task, seen.sample)
        match verdict:
            case Verdict.ACCEPTED:
                self.held[key] = seen
            case Verdict.REPLAYED:
                assert seen.sequence in self.ends, "replayed, yet never accounted for"
            case _:
                assert seen.sequence not in self.ends
                self.ends[seen.sequence] = verdict.value

    def end(self, key: Key, how: str) -> None:
        assert key not in self.fate, f"{key} ended twice: {self.fate[key]}, then {how}"
        self.fate[key] = how
        if (seen := self.held.pop(key, None)) is not None:
            assert seen.sequence not in self.ends
            self.ends[seen.sequence] = how

    def expire(self) -> tuple[DroppedGroup, ...]:
        self.ledger, dropped = expire(self.ledger, self.rules, self.now)
        for group in dropped:
            self.drops[group.reason] += 1
            tokens = [seen.model_tokens for key, seen in self.held.items() if key[0] == group.task]
            assert sum(tokens) == group.model_tokens
            for sample in range(self.rules.samples_per_task):
                assert ((group.task, sample) in self.held) == (sample in group.samples)
                self.end((group.task, sample), group.reason)
        return dropped

    def staleness(self, version: int) -> int:
        return self.ledger.steps_trained - self.step_of[version]

    def train(self) -> tuple[BatchGroup, ...] | None:
        self.ledger, batch = take_batch(self.ledger, self.rules, self.now)
        if batch is None:
            return None
        assert len(batch) == self.rules.tasks_per_step
        for group in batch:
            assert len(group.samples) >= self.rules.min_group_size
            trained = [self.held[(group.task, sample)] for sample in group.samples]
            assert all(seen.scored for seen in trained)
            oldest = max(self.staleness(seen.oldest_version) for seen in trained if seen.oldest_version is not None)
            newest = min(self.staleness(seen.newest_version) for seen in trained if seen.newest_version is not None)
            assert newest <= self.rules.max_versions, "no token of the group is within the bound"
            if self.rules.on_exceeded is not OnExceeded.MASK_TOKENS:
                assert oldest <= self.rules.max_versions, (
                    f"{self.rules.on_exceeded} trains a token of staleness {oldest}"
                )
            for sample in range(self.rules.samples_per_task):
                how = "Trained" if sample in group.samples else "Straggler"
                if sample in group.unscored:
                    how = "EnvironmentFailed"
                self.end((group.task, sample), how)
        self.published += 1
        self.ledger = on_step_trained(self.ledger, self.rules, self.published)
        self.step_of[self.published] = self.ledger.steps_trained
        return batch

    def check(self) -> None:
        """Conservation: every trajectory read ended once or is held; every admitted sample ended or is outstanding."""
        held = {seen.sequence for seen in self.held.values()}
        assert not held & set(self.ends)
        assert held | set(self.ends) == set(range(1, self.ledger.last_sequence + 1))
        assert cursor(self.ledger) == min(held, default=self.ledger.last_sequence + 1) - 1
        unseen = set(outstanding(self.ledger))
        assert not unseen & set(self.held)
        admitted = {(t, s) for t in range(self.ledger.next_task) for s in range(self.rules.samples_per_task)}
        assert unseen | set(self.held) | set(self.fate) == admitted
        assert not (unseen | set(self.held)) & set(self.fate)

    def finish_job(self) -> None:
        """Workers serve the newest version and finish what they run: the job must end, whatever came before."""
        waves = 0
        while self.ledger.steps_trained < self.rules.steps:
            waves += 1
            assert waves <= 4 * self.rules.steps + 10, f"stuck after step {self.ledger.steps_trained}"
            self.expire()
            self.publish_tasks()
            for key in sorted(self.queued):
                self.start(key, self.published)
            for key in sorted(self.running):
                self.finish(key)
            self.expire()
            self.publish_tasks()
            self.train()
            self.check()


class AdmissionMachine(RuleBasedStateMachine):
    """Everything that may happen to a ledger, in any order."""

    @initialize(
        mode=st.sampled_from(OnExceeded),
        size=st.integers(1, 3),
        samples=st.integers(1, 3),
        bound=st.integers(0, 3),
        smaller=st.integers(0, 1),
        steps=st.integers(1, 8),
    )
    def begin(self, mode: OnExceeded, size: int, samples: int, bound: int, smaller: int, steps: int) -> None:
        rules = AdmissionSettings(size, samples, bound, mode, max(1, samples - smaller), 10.0, steps)
        self.world = World(rules)
        self.has_resumed = self.has_changed = False
        self.cursor = 0
        self.checkpoint()

    @rule()
    def admit(self) -> None:
        self.world.publish_tasks()

    @rule(data=st.data())
    @precondition(lambda self: self.world.queued)
    def start(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.queued)))
        lowest = min(self.world.min_version[key[0]], self.world.published)
        self.world.start(key, data.draw(st.integers(lowest, self.world.published)))

    @rule(data=st.data(), scored=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.world.running)
    def finish(self, data: st.DataObject, scored: bool) -> None:
        self.world.finish(data.draw(st.sampled_from(sorted(self.world.running))), scored=scored)

    @rule()
    def finish_all_but_the_oldest(self) -> None:
        for key in sorted(self.world.queued):
            self.world.start(key, self.world.min_version[key[0]])
        for key in sorted(self.world.running)[1:]:
            self.world.finish(key)

    @rule(data=st.data())
    @precondition(lambda self: self.world.stream)
    def repeat(self, data: st.DataObject) -> None:
        seen = data.draw(st.sampled_from(self.world.stream))
        self.world.append((seen.task, seen.sample), seen.oldest_version or 0, seen.newest_version or 0)

    @rule(ahead=st.integers(0, 3))
    def invent(self, ahead: int) -> None:
        self.world.append((self.world.ledger.next_task + ahead, 0), 0, 0)
        assert self.world.ends[len(self.world.stream)] == Verdict.UNKNOWN

    @rule(seconds=st.sampled_from([0.0, 4.0, 11.0]))
    def expire(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.expire()
        if self.world.rules.on_exceeded is OnExceeded.WAIT and not (self.has_resumed or self.has_changed):
            assert DropReason.STALE not in self.world.drops, "Wait let a group become stale"

    @rule()
    def train(self) -> None:
        self.world.train()

    @rule(bound=st.integers(0, 3))
    def change_bound(self, bound: int) -> None:
        self.has_changed = True
        self.world.rules = replace(self.world.rules, max_versions=bound)

    @rule()
    def checkpoint(self) -> None:
        world = self.world
        self.saved = (json.dumps(ledger_to_json(world.ledger)), dict(world.fate), dict(world.ends))

    @rule()
    def crash_and_resume(self) -> None:
        """The trainer dies and starts from its checkpoint; workers and stream live on."""
        self.has_resumed = True
        world = self.world
        document, fate, ends = self.saved
        ledger = ledger_from_json(json.loads(document))
        assert ledger_to_json(ledger) == json.loads(document)
        world.published += 1
        world.ledger, world.fate, world.ends, world.held = (
            on_resume(ledger, world.published),
            dict(fate),
            dict(ends),
            {},
        )
        for version in range(ledger.version + 1, world.published + 1):
            world.step_of[version] = min(ledger.steps_trained, world.step_of.get(version, ledger.steps_trained))
        self.cursor = start = cursor(world.ledger)
        for seen in world.stream[start:]:
            world.read(seen)
        unseen = set(outstanding(world.ledger))
        for task in {task for task, _ in unseen}:
            world.min_version[task] = min_version_of(world.ledger, world.rules, task)
            world.queue(task, only=unseen)
        self.checkpoint()

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    @invariant()
    def the_cursor_never_falls(self) -> None:
        if hasattr(self, "world"):
            assert cursor(self.world.ledger) >= self.cursor
            self.cursor = cursor(self.world.ledger)

    @invariant()
    def admission_is_paced(self) -> None:
        if hasattr(self, "world") and not self.has_changed:
            assert_paced(self.world.ledger, self.world.rules)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_job()


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# ------------------------------------------------------------------------------------------ heavy-tailed durations


def simulate(mode: OnExceeded, bound: int, seed: int, *, slots: int = 24) -> tuple[int, World]:
    """A job on `slots` sample slots with Pareto durations; returns the largest staleness of any trained token.

    A sample starts with the version its worker serves, up to two behind the newest but never below its minimum.
    """
    rng = random.Random(seed)
    world = World(AdmissionSettings(3, 2, bound, mode, 2, 1e9, 40))
    finishing: list[tuple[float, Key]] = []
    largest = 0
    world.publish_tasks()
    while world.ledger.steps_trained < world.rules.steps:
        for key in sorted(world.queued)[: slots - len(world.running)]:
            lowest = world.min_version[key[0]]
            world.start(key, max(lowest, world.published - rng.randrange(3)))
            heapq.heappush(finishing, (world.now + rng.paretovariate(1.1), key))
        if finishing:
            world.now, key = heapq.heappop(finishing)
            world.finish(key)
        while True:
            world.expire()
            world.publish_tasks()
            stream, step = {(s.task, s.sample): s for s in world.stream}, world.ledger.steps_trained
            batch = world.train()
            if batch is None:
                break
            versions = [stream[(g.task, s)].oldest_version for g in batch for s in g.samples]
            largest = max(largest, *(step - world.step_of[v] for v in versions if v is not None))
        world.check()
        assert_paced(world.ledger, world.rules)
    return largest, world


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_wait_trains_no_token_over_the_bound_and_drops_nothing_under_heavy_tails(bound: int) -> None:
    for seed in range(4):
        largest, world = simulate(OnExceeded.WAIT, bound, seed)
        assert largest <= bound
        assert not world.drops
        assert world.ledger.steps_trained == 40


def test_the_same_durations_break_the_bound_without_wait() -> None:
    """Negative control: pacing alone is not strict, so the test above can fail."""
    assert max(simulate(OnExceeded.MASK_TOKENS, 1, seed)[0] for seed in range(4)) > 1


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_drop_group_trains_no_token_over_the_bound_and_pays_in_dropped_groups(bound: int) -> None:
    for seed in range(2):
        largest, world = simulate(OnExceeded.DROP_GROUP, bound, seed)
        assert largest <= bound
        assert set(world.drops) <= {DropReason.STALE}


# ------------------------------------------------------------------------------------------------ negative controls


def test_the_pacing_check_catches_a_ledger_that_admitted_too_much() -> None:
    rules = AdmissionSettings(2, 2, 1, OnExceeded.MASK_TOKENS, 2, 10.0, 100)
    generous, _ = admit(new_ledger(), replace(rules, max_versions=2))
    with pytest.raises(AssertionError, match="more groups than the window holds"):
        assert_paced(generous, rules)
    endless, _ = admit(new_ledger(), replace(rules, steps=100))
    with pytest.raises(AssertionError, match="more groups than the job needs"):
        assert_paced(endless, replace(rules, steps=1))
    twice = replace(endless, groups=(*endless.groups[:3], replace(endless.groups[3], ordinal=0)))
    with pytest.raises(AssertionError, match="two groups hold one ordinal"):
        assert_paced(twice, rules)


def test_the_account_catches_a_ledger_that_forgot_a_group() -> None:
    world = World(AdmissionSettings(2, 2, 1, OnExceeded.MASK_TOKENS, 2, 10.0, 100))
    world.publish_tasks()
    world.start((1, 0), 0)
    world.finish((1, 0))
    world.check()
    world.ledger = replace(world.ledger, groups=world.ledger.groups[:1] + world.ledger.groups[2:])
    with pytest.raises(AssertionError):
        world.check()


def test_the_bound_check_catches_a_trainer_whose_rules_are_laxer_than_the_bound() -> None:
    world = World(AdmissionSettings(1, 1, 1, OnExceeded.DROP_GROUP, 1, 10.0, 100))
    world.publish_tasks()
    world.start((0, 0), 0)
    for task in (1, 2, 3):
        world.publish_tasks()
        world.start((task, 0), world.published)
        world.finish((task, 0))
        world.train()
    world.finish((0, 0))
    lax = replace(world.rules, max_versions=9)
    world.ledger, batch = take_batch(world.ledger, lax, world.now)
    assert batch == (BatchGroup(0, (0,)),)
    assert world.staleness(0) > world.rules.max_versions
