"""Rules of admission, one claim each."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rljob_api.errors import MalformedMessage
from rljob_api.spec import OnExceeded
from rljob_protocol.admission import (
    AdmissionSettings,
    Admitted,
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
    staleness_of,
    step_of_version,
    take_batch,
    version_of_step,
)


def settings(**changes: object) -> AdmissionSettings:
    base = AdmissionSettings(
        tasks_per_step=2,
        samples_per_task=2,
        max_versions=1,
        on_exceeded=OnExceeded.MASK_TOKENS,
        min_group_size=2,
        straggler_timeout_seconds=10.0,
        steps=100,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


class Trainer:
    """Feeds a ledger in stream order and keeps the settings at hand."""

    def __init__(self, rules: AdmissionSettings, ledger: Ledger | None = None) -> None:
        self.rules = rules
        self.ledger = new_ledger() if ledger is None else ledger
        self.admitted: list[Admitted] = []

    def admit(self) -> tuple[Admitted, ...]:
        self.ledger, admitted = admit(self.ledger, self.rules)
        self.admitted.extend(admitted)
        return admitted

    def sample(
        self,
        task: int,
        sample: int,
        *,
        oldest: int | None = 0,
        newest: int | None = None,
        scored: bool = True,
        now: float = 0.0,
        sequence: int | None = None,
    ) -> Verdict:
        seen = SampleSeen(
            task,
            sample,
            self.ledger.last_sequence + 1 if sequence is None else sequence,
            oldest,
            scored,
            10,
            oldest if newest is None else newest,
        )
        self.ledger, verdict = on_sample(self.ledger, self.rules, seen, now)
        return verdict

    def group(self, task: int, *, oldest: int = 0, newest: int | None = None) -> None:
        for sample in range(self.rules.samples_per_task):
            assert self.sample(task, sample, oldest=oldest, newest=newest) is Verdict.ACCEPTED

    def expire(self, now: float = 0.0) -> tuple[DroppedGroup, ...]:
        self.ledger, dropped = expire(self.ledger, self.rules, now)
        return dropped

    def take(self, now: float = 0.0) -> tuple[BatchGroup, ...] | None:
        self.ledger, batch = take_batch(self.ledger, self.rules, now)
        return batch

    def train(self) -> list[int]:
        batch = self.take()
        assert batch is not None
        self.ledger = on_step_trained(self.ledger, self.rules, self.ledger.version + 1)
        return [group.task for group in batch]

    def step(self) -> None:
        """One step on samples of the newest version."""
        self.admit()
        for group in self.ledger.groups[: self.rules.tasks_per_step]:
            for sample in range(self.rules.samples_per_task):
                self.sample(group.task, sample, oldest=self.ledger.version)
        self.train()


# --------------------------------------------------------------------------------------------------------- pacing


def test_a_new_job_admits_the_groups_of_eta_plus_one_steps() -> None:
    trainer = Trainer(settings())
    assert trainer.admit() == (Admitted(0, 0, 0), Admitted(1, 1, 0), Admitted(2, 2, 0), Admitted(3, 3, 0))
    assert trainer.admit() == ()


def test_each_trained_step_admits_one_more_step_with_the_version_that_step_minus_eta_trains_on() -> None:
    trainer = Trainer(settings())
    trainer.step()
    assert trainer.admit() == (Admitted(4, 4, 1), Admitted(5, 5, 1))
    trainer.step()
    assert trainer.admit() == (Admitted(6, 6, 2), Admitted(7, 7, 2))


def test_admission_never_goes_beyond_the_last_step() -> None:
    trainer = Trainer(settings(steps=3, max_versions=4))
    assert len(trainer.admit()) == 6
    for _ in range(3):
        trainer.step()
    assert trainer.admit() == ()
    assert trainer.take() is None
    assert trainer.ledger.groups == ()


def test_a_drop_frees_its_ordinal_and_the_lowest_free_one_is_taken_next_under_a_new_task_number() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    trainer.sample(2, 0, scored=False)
    trainer.sample(1, 0, scored=False)
    assert [drop.task for drop in trainer.expire()] == [1, 2]
    assert trainer.admit() == (Admitted(4, 1, 0), Admitted(5, 2, 0))


def test_training_consumes_an_ordinal_for_good_even_out_of_order() -> None:
    trainer = Trainer(settings(max_versions=2))
    trainer.admit()
    trainer.group(4)
    trainer.group(5)
    assert trainer.train() == [4, 5]
    assert [admitted.ordinal for admitted in trainer.admit()] == [6, 7]
    assert {group.ordinal for group in trainer.ledger.groups} == {0, 1, 2, 3, 6, 7}


def test_a_refilled_slot_whose_step_has_passed_asks_for_a_version_that_can_still_train() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    for number in range(3):  # tasks 0 and 1 hang; everything else trains
        for task in (2 + 2 * number, 3 + 2 * number):
            trainer.group(task, oldest=number)
        trainer.train()
        trainer.admit()
    trainer.sample(0, 0, scored=False)
    assert [drop.reason for drop in trainer.expire()] == [DropReason.ENVIRONMENT_FAILED]
    assert trainer.admit() == (Admitted(10, 0, 2),)  # step 3 is the earliest that trains it: 3 - 1


def test_a_lowered_bound_stops_admission_until_the_window_has_caught_up() -> None:
    trainer = Trainer(settings(max_versions=3))
    trainer.admit()
    trainer.rules = settings(max_versions=0)
    trainer.step()
    assert trainer.admit() == ()
    trainer.rules = settings(max_versions=3)
    assert len(trainer.admit()) == 2


def test_a_group_larger_than_its_samples_can_never_train_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"minGroupSize 3 must lie in 1..samplesPerTask \(2\)"):
        settings(min_group_size=3)


# -------------------------------------------------------------------------------------------------------- verdicts


def test_the_first_finished_trajectory_of_a_sample_wins() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    assert trainer.sample(0, 0) is Verdict.ACCEPTED
    assert trainer.sample(0, 0) is Verdict.DUPLICATE
    assert [seen.sequence for seen in trainer.ledger.groups[0].samples] == [1]


def test_a_sample_that_was_never_admitted_is_unknown() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    assert trainer.sample(4, 0) is Verdict.UNKNOWN
    assert trainer.sample(0, 2) is Verdict.UNKNOWN
    assert trainer.sample(-1, 0) is Verdict.UNKNOWN


def test_a_sample_of_a_trained_or_dropped_group_is_late() -> None:
    trainer = Trainer(settings(min_group_size=1))
    trainer.admit()
    trainer.sample(0, 0)
    trainer.group(1)
    batch = trainer.take(now=10.0)
    assert batch == (BatchGroup(0, (0,)), BatchGroup(1, (0, 1)))
    assert trainer.sample(0, 1) is Verdict.LATE


def test_reading_the_stream_again_changes_nothing() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    trainer.sample(3, 1)
    trainer.group(0)
    trainer.group(1)
    trainer.train()
    before = trainer.ledger
    assert trainer.sample(3, 1, sequence=1) is Verdict.ACCEPTED  # still held: its trajectory is wanted
    assert trainer.sample(0, 0, sequence=2) is Verdict.REPLAYED  # trained: counted already
    assert trainer.ledger == before


# ---------------------------------------------------------------------------------------------- readiness and drops


def test_a_group_waits_for_all_its_samples_until_the_straggler_timeout() -> None:
    trainer = Trainer(settings(tasks_per_step=1, min_group_size=1))
    trainer.admit()
    trainer.sample(0, 1, now=5.0)
    assert trainer.take(now=14.9) is None
    assert trainer.take(now=15.0) == (BatchGroup(0, (1,)),)


def test_the_straggler_clock_starts_with_the_first_scored_sample() -> None:
    trainer = Trainer(settings(tasks_per_step=1, min_group_size=1, samples_per_task=3))
    trainer.admit()
    trainer.sample(0, 0, scored=False, now=0.0)
    trainer.sample(0, 1, now=8.0)
    assert trainer.take(now=17.9) is None
    assert trainer.take(now=18.0) == (BatchGroup(0, (1,), unscored=(0,)),)


def test_too_few_scored_samples_after_the_timeout_drop_the_group_as_one() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    trainer.sample(0, 1, now=0.0)
    assert trainer.expire(now=9.9) == ()
    assert trainer.expire(now=10.0) == (DroppedGroup(0, DropReason.GROUP_TOO_SMALL, (1,), 10),)


def test_failed_samples_drop_the_group_as_soon_as_min_group_size_is_out_of_reach() -> None:
    trainer = Trainer(settings(samples_per_task=3, min_group_size=2))
    trainer.admit()
    trainer.sample(0, 0, scored=False)
    assert trainer.expire() == ()
    trainer.sample(0, 2, scored=False)
    assert trainer.expire() == (DroppedGroup(0, DropReason.ENVIRONMENT_FAILED, (0, 2), 20),)


def test_failed_samples_never_count_towards_the_group() -> None:
    trainer = Trainer(settings(tasks_per_step=1, samples_per_task=2, min_group_size=1))
    trainer.admit()
    trainer.sample(0, 0, scored=False)
    trainer.sample(0, 1)
    assert trainer.take() == (BatchGroup(0, (1,), unscored=(0,)),)


def test_the_group_with_the_oldest_token_trains_first_and_ties_go_to_the_lower_task() -> None:
    trainer = Trainer(settings(tasks_per_step=1, max_versions=3))
    for _ in range(2):
        trainer.step()
    trainer.admit()
    first, second, third, fourth = (group.task for group in trainer.ledger.groups)
    trainer.group(first, oldest=2)
    trainer.group(second, oldest=1)
    trainer.group(third, oldest=2)
    trainer.group(fourth, oldest=0)
    assert [trainer.train()[0] for _ in range(4)] == [fourth, second, first, third]


def test_a_batch_under_way_holds_back_the_next_one() -> None:
    trainer = Trainer(settings(tasks_per_step=1))
    trainer.admit()
    trainer.group(0)
    trainer.group(1)
    assert trainer.take() is not None
    assert trainer.take() is None


def test_a_step_is_counted_only_for_a_batch_that_was_taken() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    with pytest.raises(ValueError, match="step 0 cannot be counted: its batch was not taken from this ledger"):
        on_step_trained(trainer.ledger, trainer.rules, 1)
    trainer.group(0)
    trainer.group(1)
    trainer.take()
    with pytest.raises(ValueError, match="step 0 published version 0, not above 0"):
        on_step_trained(trainer.ledger, trainer.rules, 0)


# ------------------------------------------------------------------------------------------------------- staleness


def after_three_steps(on_exceeded: OnExceeded) -> Trainer:
    """Bound 1, step 3: tokens of versions 0 and 1 are over the bound. Tasks 6.. are outstanding."""
    trainer = Trainer(settings(on_exceeded=on_exceeded))
    for _ in range(3):
        trainer.step()
    trainer.admit()
    return trainer


def test_mask_tokens_keeps_a_group_with_one_token_in_the_bound() -> None:
    trainer = after_three_steps(OnExceeded.MASK_TOKENS)
    trainer.group(6, oldest=0, newest=2)
    trainer.group(7, oldest=3)
    assert trainer.expire() == ()
    assert trainer.train() == [6, 7]


def test_mask_tokens_drops_a_group_whose_every_token_is_over_the_bound() -> None:
    trainer = after_three_steps(OnExceeded.MASK_TOKENS)
    trainer.sample(6, 0, oldest=0, newest=1)
    assert trainer.expire() == ()  # its other sample may still bring tokens in the bound
    trainer.sample(6, 1, oldest=0, newest=1)
    trainer.group(7, oldest=3)
    trainer.group(8, oldest=3)
    assert trainer.expire() == (DroppedGroup(6, DropReason.STALE, (0, 1), 20),)


def test_mask_tokens_drops_nothing_as_stale_while_the_newest_version_is_unknown() -> None:
    trainer = after_three_steps(OnExceeded.MASK_TOKENS)
    for sample in (0, 1):
        seen = SampleSeen(6, sample, trainer.ledger.last_sequence + 1, 0, True, 10)
        trainer.ledger, _ = on_sample(trainer.ledger, trainer.rules, seen, 0.0)
    assert trainer.expire() == ()


def test_drop_group_drops_a_group_at_its_first_token_over_the_bound() -> None:
    trainer = after_three_steps(OnExceeded.DROP_GROUP)
    trainer.sample(6, 0, oldest=2)
    assert trainer.expire() == ()
    trainer.sample(6, 1, oldest=1, newest=3)
    assert trainer.expire() == (DroppedGroup(6, DropReason.STALE, (0, 1), 20),)


def test_drop_group_never_trains_a_stale_group_that_nobody_expired() -> None:
    trainer = after_three_steps(OnExceeded.DROP_GROUP)
    trainer.group(6, oldest=1)
    trainer.group(7, oldest=2)
    assert trainer.take() is None


def test_a_group_without_model_tokens_is_not_stale() -> None:
    trainer = after_three_steps(OnExceeded.MASK_TOKENS)
    for sample in (0, 1):
        trainer.sample(6, sample, oldest=None)
    trainer.group(7, oldest=3)
    assert trainer.expire() == ()
    assert trainer.train() == [6, 7]


# ------------------------------------------------------------------------------------------------------------ Wait


def test_wait_starts_no_step_while_a_running_group_must_train_in_it() -> None:
    trainer = Trainer(settings(tasks_per_step=1, max_versions=1, on_exceeded=OnExceeded.WAIT))
    trainer.admit()
    trainer.group(1)
    assert trainer.take() is None  # task 0, deadline 0, still runs
    trainer.group(0)
    assert trainer.take() == (BatchGroup(0, (0, 1)),)


def test_mask_tokens_starts_the_step_that_wait_holds_back() -> None:
    trainer = Trainer(settings(tasks_per_step=1, max_versions=1))
    trainer.admit()
    trainer.group(1)
    assert trainer.take() == (BatchGroup(1, (0, 1)),)


def test_wait_leaves_room_for_every_later_deadline() -> None:
    # Two ready groups and a running one, all with deadline <= 1 after step 0: only one step is left for the two others.
    trainer = Trainer(settings(tasks_per_step=1, max_versions=2, on_exceeded=OnExceeded.WAIT))
    trainer.admit()
    trainer.group(0)
    trainer.group(2)
    assert trainer.train() == [0]
    trainer.admit()
    assert trainer.take() is None  # task 1 runs with deadline 1
    trainer.group(1, oldest=0)
    assert trainer.train() == [1]
    assert trainer.take() is not None  # task 2, version 0, deadline 2: the last step that may train it


def test_wait_gives_a_freed_slot_the_first_step_that_still_has_room() -> None:
    trainer = Trainer(settings(tasks_per_step=1, max_versions=2, on_exceeded=OnExceeded.WAIT))
    for _ in range(4):
        trainer.step()
    trainer.admit()  # tasks 4, 5, 6 with the ordinals and steps 4, 5, 6
    for task in (4, 5):
        trainer.sample(task, 0, scored=False)
    trainer.group(6, oldest=4)
    trainer.expire()
    assert trainer.train() == [6]
    # Step 5 has room for one; ordinal 5 is paced for step 6, or no order of steps 5 and 6 could train both in time.
    assert trainer.admit() == (Admitted(7, 4, 3), Admitted(8, 5, 4), Admitted(9, 7, 5))


def test_without_wait_a_freed_slot_keeps_its_step() -> None:
    trainer = Trainer(settings(tasks_per_step=1, max_versions=2))
    for _ in range(4):
        trainer.step()
    trainer.admit()
    for task in (4, 5):
        trainer.sample(task, 0, scored=False)
    trainer.group(6, oldest=4)
    trainer.expire()
    assert trainer.train() == [6]
    assert trainer.admit() == (Admitted(7, 4, 3), Admitted(8, 5, 3), Admitted(9, 7, 5))


def test_wait_drops_the_youngest_ready_group_when_a_lowered_bound_leaves_too_few_steps() -> None:
    rules = settings(tasks_per_step=1, max_versions=2, on_exceeded=OnExceeded.WAIT)
    trainer = Trainer(rules)
    trainer.admit()
    for task in range(3):
        trainer.group(task)
    assert trainer.expire() == ()
    trainer.rules = replace(rules, max_versions=1)
    assert [(drop.task, drop.reason) for drop in trainer.expire()] == [(2, DropReason.STALE)]
    assert trainer.train() == [0]
    assert trainer.train() == [1]


# ---------------------------------------------------------------------------------------------- cursor, checkpoint


def test_the_cursor_stops_below_the_oldest_sample_that_a_group_holds() -> None:
    trainer = Trainer(settings())
    assert cursor(trainer.ledger) == 0
    trainer.admit()
    trainer.sample(9, 0)  # unknown: consumed at once
    trainer.sample(2, 0)
    trainer.sample(2, 0)  # duplicate
    trainer.group(0)
    trainer.group(1)
    assert cursor(trainer.ledger) == 1
    trainer.train()
    assert cursor(trainer.ledger) == 1
    trainer.sample(2, 1, scored=False)
    trainer.expire()
    assert cursor(trainer.ledger) == 8 == trainer.ledger.last_sequence


def test_outstanding_names_exactly_the_samples_that_were_not_seen() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    trainer.group(0)
    trainer.group(1)
    trainer.sample(2, 1)
    trainer.train()
    assert outstanding(trainer.ledger) == ((2, 0), (3, 0), (3, 1))


def test_min_version_of_a_group_rises_with_the_steps_that_have_passed_it() -> None:
    trainer = Trainer(settings(max_versions=1))
    trainer.admit()
    assert min_version_of(trainer.ledger, trainer.rules, 3) == 0
    for number in range(3):
        trainer.group(2 * number if number else 0, oldest=number)
        trainer.group(2 * number + 1 if number else 1, oldest=number)
        trainer.train()
        trainer.admit()
    assert [min_version_of(trainer.ledger, trainer.rules, group.task) for group in trainer.ledger.groups] == [
        2,
        2,
        3,
        3,
    ]
    with pytest.raises(ValueError, match="task 0 is not outstanding: it was trained, dropped or never admitted"):
        min_version_of(trainer.ledger, trainer.rules, 0)


def test_a_ledger_survives_json_exactly() -> None:
    trainer = Trainer(settings(samples_per_task=3, min_group_size=1))
    trainer.step()
    trainer.admit()
    trainer.sample(2, 1, oldest=None, now=0.1 + 0.2)
    trainer.sample(3, 0, scored=False)
    trainer.ledger = on_resume(trainer.ledger, 7)
    trainer.sample(3, 1, now=1 / 3)
    assert ledger_from_json(json.loads(json.dumps(ledger_to_json(trainer.ledger)))) == trainer.ledger


def test_a_broken_ledger_document_is_malformed() -> None:
    document = ledger_to_json(new_ledger()) | {"next_task": "many"}
    with pytest.raises(MalformedMessage, match=r"ledger of the checkpoint: next_task: Input should be a valid integer"):
        ledger_from_json(document)


# -------------------------------------------------------------------------------------------- versions across resumes


def test_versions_count_as_steps_without_a_resume() -> None:
    ledger = replace(new_ledger(), steps_trained=5, version=5)
    assert [step_of_version(ledger, version) for version in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [version_of_step(ledger, step) for step in (-1, 0, 3, 5)] == [0, 0, 3, 5]


def test_a_resume_counts_no_step_and_older_versions_keep_theirs() -> None:
    ledger = on_resume(replace(new_ledger(), steps_trained=8, version=8), 12)
    assert (ledger.steps_trained, ledger.version) == (8, 12)
    assert [step_of_version(ledger, version) for version in (6, 7, 8, 9, 10, 11, 12)] == [6, 7, 8, 8, 8, 8, 8]
    assert staleness_of(ledger, 6) == 2
    assert [version_of_step(ledger, step) for step in (6, 7, 8)] == [6, 7, 8]


def test_steps_after_a_resume_continue_from_the_republished_version() -> None:
    trainer = Trainer(settings(max_versions=3))
    for _ in range(3):
        trainer.step()
    trainer.ledger = on_resume(trainer.ledger, 9)
    trainer.step()
    assert (trainer.ledger.steps_trained, trainer.ledger.version) == (4, 10)
    assert [step_of_version(trainer.ledger, version) for version in (2, 3, 5, 9, 10)] == [2, 3, 3, 3, 4]
    assert version_of_step(trainer.ledger, 4) == 10


def test_repeated_resumes_without_a_step_do_not_grow_the_ledger() -> None:
    ledger = replace(new_ledger(), steps_trained=2, version=2)
    for version in range(3, 40):
        ledger = on_resume(ledger, version)
    assert len(ledger.anchors) == 2
    assert [step_of_version(ledger, version) for version in (1, 2, 3, 20, 39)] == [1, 2, 2, 2, 2]


def test_anchors_below_the_bound_are_forgotten_and_their_versions_stay_over_it() -> None:
    trainer = Trainer(settings(max_versions=2))
    for resumed_as in (4, 9, 14, 19):
        for _ in range(3):
            trainer.step()
        trainer.ledger = on_resume(trainer.ledger, resumed_as)
    for _ in range(4):
        trainer.step()
    assert len(trainer.ledger.anchors) == 1
    assert all(staleness_of(trainer.ledger, version) > 2 for version in range(19))


def test_a_resume_starts_the_straggler_clocks_again() -> None:
    trainer = Trainer(settings())
    trainer.admit()
    trainer.sample(0, 0, now=1000.0)
    trainer.ledger = on_resume(trainer.ledger, 1)
    assert trainer.expire(now=3.0) == ()  # another process, another monotonic clock
    assert trainer.expire(now=12.9) == ()
    assert [drop.reason for drop in trainer.expire(now=13.0)] == [DropReason.GROUP_TOO_SMALL]


def test_a_resume_cannot_go_below_the_checkpointed_version() -> None:
    ledger = replace(new_ledger(), steps_trained=5, version=5)
    with pytest.raises(ValueError, match="cannot resume as version 4: the checkpoint holds version 5"):
        on_resume(ledger, 4)
