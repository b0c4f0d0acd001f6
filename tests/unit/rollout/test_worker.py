from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.rollout_rig import Rig, is_conserved, job, sample, until

from rljob_api.messages import CoordinatorHeartbeat, DesiredVersion, Outcome, WorkerPhase
from rljob_api.names import KEY_COORDINATOR, KEY_DESIRED
from rljob_runtime.rollout import worker as worker_module
from rljob_runtime.rollout.worker import EXIT_CONFIGURATION, EXIT_RESTART, EXIT_STOPPED


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path, job())
    yield made
    if made.exit is not None and not made.exit.done():
        assert await made.stop() is not None


async def test_a_worker_waits_for_the_first_version_and_then_delivers_every_task(rig: Rig) -> None:
    rig.queue.put(*(sample(n) for n in range(10)))
    rig.start()
    await until(lambda: bool(rig.link.states))
    assert rig.last.phase is WorkerPhase.STARTING and "first published version" in rig.last.message
    assert rig.engine.events == []
    rig.order(0)
    await until(lambda: len(rig.queue.acked) == 10)
    assert sorted(rig.queue.acked) == [(n, 0) for n in range(10)]
    assert {t.header.task for t in rig.log.trajectories} == set(range(10))
    assert all(t.versions == (0,) and t.num_model_tokens == 6 for t in rig.log.trajectories)
    await until(lambda: rig.last.phase is WorkerPhase.SERVING)
    assert rig.last.serving_version == 0 and rig.last.order == (1, 1) and not rig.last.degraded
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.counters.tokens_delivered == rig.last.counters.tokens_generated == 60
    assert is_conserved(rig.last) and rig.last.counters.trajectories == 10


async def test_a_new_version_interrupts_what_runs_and_every_trajectory_goes_on_under_it(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(4)))
    rig.engine.stop_at(9)
    rig.start()
    await rig.engine.held.wait()
    rig.order(1)
    await until(lambda: len(rig.queue.acked) == 4)
    tokens = [v for t in rig.log.trajectories for v in t.weight_version[t.model_mask].tolist()]
    assert tokens.count(0) == 9 and tokens.count(1) == 4 * 6 - 9
    for trajectory in rig.log.trajectories:
        versions = trajectory.weight_version[trajectory.model_mask].tolist()
        assert versions == sorted(versions)
    assert await rig.stop() == EXIT_STOPPED
    counters = rig.last.counters
    assert (counters.interruptions, counters.tokens_salvaged, counters.tokens_lost) == (1, 9, 0)
    assert counters.partials_continued >= 1 and is_conserved(rig.last)
    assert len(rig.last.pause_seconds) == 1
    start = rig.engine.events.index("load:1")
    assert rig.engine.events[start - 1 : start + 3] == ["pause", "load:1", "resume", "score"]
    streamed = [v for s in rig.segments.segments for v in s.weight_version[s.turn >= 0].tolist()]
    assert streamed.count(0) == 9, "what the old version made can be scored before its trajectories end"


async def test_nothing_is_generated_between_the_shut_gate_and_the_passed_probe(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(40)))
    rig.engine.token_seconds = 0.002
    rig.start()
    for version in range(1, 6):
        await until(lambda version=version: rig.state.serving_version == version - 1)
        await asyncio.sleep(0.02)
        rig.order(version)
    await until(lambda: len(rig.queue.acked) == 40)
    inside = False
    for event in rig.engine.events:
        if event in {"pause", "score"}:
            inside = event == "pause"
        assert not (inside and event.startswith("generate"))
    assert await rig.stop() == EXIT_STOPPED and is_conserved(rig.last)


async def test_a_failed_probe_poisons_the_worker_and_its_leases_go_back(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(4)))
    rig.engine.stop_at(9)
    rig.start()
    await rig.engine.held.wait()
    rig.engine.scores_wrong = True
    rig.order(1)
    assert await rig.ended() == EXIT_RESTART
    assert rig.last.phase is WorkerPhase.POISONED and rig.last.failed_version == 1
    assert "the engine does not hold version 1: probe log-probabilities differ by up to 0.5" in rig.last.message
    assert rig.last.counters.swaps_failed == 1 and rig.last.serving_version is None
    assert rig.last.counters.tokens_dropped == {"EngineFailed": 9} and is_conserved(rig.last)
    assert sorted(rig.queue.released) == [(n, 0, 0.0) for n in range(4)]
    assert rig.engine.events[-1] == "shutdown"
    assert not rig.log.trajectories


async def test_a_drain_counts_what_it_cuts_off_gives_leases_back_and_exits_zero(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(9)))
    rig.engine.stop_at(11)
    rig.start()
    await rig.engine.held.wait()
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.phase is WorkerPhase.STOPPED and rig.last.in_flight == 0
    assert rig.last.counters.tokens_generated == 11 and is_conserved(rig.last)
    assert rig.last.counters.tokens_dropped == {"Drained": 11}
    assert len(rig.queue.released) == 4 and len(rig.queue.waiting) == 5
    assert WorkerPhase.DRAINING in {state.phase for state in rig.link.states}
    assert rig.engine.events[-1] == "shutdown"


async def test_a_drain_before_anything_was_published_ends_at_once(rig: Rig) -> None:
    rig.start()
    await asyncio.sleep(0.02)
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.phase is WorkerPhase.STOPPED


async def test_a_task_waits_for_the_version_it_needs(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(sample(0, min_version=2), sample(1))
    rig.start()
    await until(lambda: rig.queue.acked == [(1, 0)])
    rig.order(1)
    await until(lambda: rig.state.serving_version == 1)
    await asyncio.sleep(0.02)
    assert rig.queue.acked == [(1, 0)] and rig.state.in_flight == 1
    rig.order(2)
    await until(lambda: len(rig.queue.acked) == 2)
    assert rig.log.trajectories[1].versions == (2,)


async def test_a_dead_engine_ends_the_worker_for_a_restart(rig: Rig) -> None:
    rig.order(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    rig.engine.die = True
    rig.queue.put(sample(0), sample(1))
    assert await rig.ended() == EXIT_RESTART
    assert rig.last.phase is WorkerPhase.POISONED and "the engine process died" in rig.last.message
    assert {(task, number) for task, number, _ in rig.queue.released} == {(0, 0), (1, 0)}


async def test_a_failing_environment_is_tried_again_and_then_reported_never_scored(tmp_path: Path) -> None:
    rig = Rig(tmp_path, job(), alphabet="0123456789")  # no `=`: every prompt of digit-copy fails
    rig.queue.redelivers = True
    rig.order(0)
    rig.queue.put(sample(5))
    rig.start()
    await until(lambda: bool(rig.queue.acked))
    assert [delay for _, _, delay in rig.queue.released] == [1.0, 2.0]
    (trajectory,) = rig.log.trajectories
    assert trajectory.header.outcome is Outcome.ENVIRONMENT_FAILED and trajectory.header.attempt == 3
    assert "no token for '='" in trajectory.header.error and trajectory.num_model_tokens == 0
    assert rig.state.counters.environment_failures == 3 and rig.state.counters.trajectories == 0
    assert "no token for '='" in rig.state.message
    assert await rig.stop() == EXIT_STOPPED


async def test_work_survives_an_outage_and_reaches_the_log_after_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.order(0)
    rig.queue.put(*(sample(n) for n in range(4)))
    rig.engine.stop_at(5)
    rig.start()
    await rig.engine.held.wait()
    rig.link.is_down = True
    await rig.worker._gate.shut(1.0)  # type: ignore[union-attr]
    await rig.engine.resume()
    rig.worker._gate.open()  # type: ignore[union-attr]
    await until(lambda: rig.engine.sampled == 24)
    await asyncio.sleep(0.05)
    assert not rig.log.trajectories and rig.state.counters.tokens_in_flight == 24
    rig.link.is_down = False
    await until(lambda: len(rig.queue.acked) == 4)
    assert await rig.stop() == EXIT_STOPPED
    assert rig.last.counters.tokens_delivered == 24 and is_conserved(rig.last)


async def test_leases_are_extended_while_episodes_run(rig: Rig) -> None:
    rig.order(0)
    rig.queue.put(sample(0))
    rig.engine.stop_at(1)
    rig.start()
    await rig.engine.held.wait()
    await until(lambda: rig.queue.extended >= 2)


async def test_without_a_coordinator_the_worker_follows_what_is_published(tmp_path: Path) -> None:
    rig = Rig(tmp_path, job(weightSync={"coordinatorTimeoutSeconds": 0.3}))
    rig.publish(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    assert rig.state.degraded and rig.state.order is None
    rig.link.live[KEY_COORDINATOR] = CoordinatorHeartbeat(term=1, generation=0, beat=1)
    rig.order(0)
    await until(lambda: not rig.state.degraded)
    assert await rig.stop() == EXIT_STOPPED


async def test_a_corrupt_version_is_never_served_and_generation_goes_on(rig: Rig) -> None:
    rig.order(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    published = rig.store.publish(1, rig.tokenizer_dir)
    rig.store.corrupt = {name for name in rig.store.blobs if name.startswith("w-1-1-")}
    rig.link.put(KEY_DESIRED, DesiredVersion(term=1, generation=9, published=published))
    rig.queue.put(*(sample(n) for n in range(5)))
    await until(lambda: len(rig.queue.acked) == 5)
    await until(lambda: "could not be fetched" in rig.state.message)
    assert rig.state.serving_version == 0 and "load:1" not in rig.engine.events
    assert rig.state.unreadable == (published.epoch, 1)


async def test_a_wrong_environment_is_a_configuration_error(tmp_path: Path) -> None:
    rig = Rig(tmp_path, job(environment={"name": "digit-copi"}))
    rig.start()
    assert await rig.ended() == EXIT_CONFIGURATION
    assert "Did you mean `digit-copy`?" in rig.last.message


async def test_old_weights_do_not_pile_up_on_disk(rig: Rig) -> None:
    rig.start()
    for version in range(4):
        rig.order(version)
        await until(lambda version=version: rig.state.serving_version == version)
    weights = [path for path in rig.worker._settings.cache_dir.rglob("*") if path.suffix == ".safetensors"]
    assert weights == []


def test_exit_codes_are_those_hosts_know() -> None:
    assert (worker_module.EXIT_STOPPED, worker_module.EXIT_RESTART, worker_module.EXIT_CONFIGURATION) == (0, 70, 78)


@pytest.mark.parametrize("end", ["drain", "poison", "dead engine"])
async def test_a_cancellation_that_a_library_swallows_does_not_keep_the_worker_from_ending(rig: Rig, end: str) -> None:
    async def beat(key: str, value: Any) -> None:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            return  # as wait_for of Python 3.11 does when its future is done already
        finally:
            rig.link.states.append(value)

    rig.link.beat = beat  # type: ignore[method-assign]
    rig.order(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    rig.worker._report_now.set()
    await asyncio.sleep(0.01)
    if end == "drain":
        assert await rig.stop() == EXIT_STOPPED
    elif end == "poison":
        rig.engine.scores_wrong = True
        rig.order(1)
        assert await rig.ended() == EXIT_RESTART
    else:
        rig.engine.die = True
        rig.queue.put(sample(0))
        assert await rig.ended() == EXIT_RESTART


async def test_a_defect_in_a_task_ends_the_worker_with_a_last_state(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.order(0)
    rig.start()
    await until(lambda: rig.state.serving_version == 0)
    rig.queue.waiting.append(None)  # type: ignore[arg-type]
    assert await rig.ended() == EXIT_RESTART
    assert rig.last.phase is WorkerPhase.POISONED and "TypeError" in rig.last.message
    assert "a task of the worker failed" in caplog.text
