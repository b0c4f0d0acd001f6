from __future__ import annotations

import asyncio

import pytest
from tests.fakes.engine import DeadEngine, ScriptedEngine, logprob_of

from rljob_api.errors import DeadlineExceeded, EngineError
from rljob_api.messages import TrajectoryHeader
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, VersionSpan
from rljob_runtime.rollout.gate import MAX_SPURIOUS_ABORTS, Gate
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.tally import Tally

PROMPT = (2, 5, 6)
STOP = 1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(max_tokens: int = 6, request_id: str = "r") -> GenerationRequest:
    return GenerationRequest(request_id, PROMPT, max_tokens, 1.0, (STOP,), seed=0)


def script(position: int) -> int:
    return 3 + position % 7


async def swap(gate: Gate, engine: ScriptedEngine, version: int) -> None:
    await gate.shut(5.0)
    engine.load(version)
    await engine.resume()
    gate.open()


async def test_a_shut_gate_admits_nothing_until_it_opens() -> None:
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), Clock())
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(), partial))
        await asyncio.sleep(0.01)
        assert engine.events == []
        gate.open()
        assert await turn == "length"


async def test_a_waiter_that_wakes_behind_a_gate_that_shut_again_stays_out() -> None:
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), Clock())
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(), partial))
        await asyncio.sleep(0)
        gate.open()
        await gate.shut(1.0)  # before the waiter ran
        await asyncio.sleep(0.01)
        assert engine.in_flight == 0 and engine.events == ["pause"]
        await engine.resume()
        gate.open()
        await turn


@pytest.mark.parametrize("at", range(7))
async def test_an_interruption_at_any_token_neither_loses_nor_repeats_one(at: int) -> None:
    engine = ScriptedEngine(script, version=3)
    tally = Tally()
    gate = Gate(engine, tally, Clock())
    gate.open()
    engine.stop_at(at)
    with gate.partial() as partial:
        partial.observe(PROMPT)
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(6), partial))
        if at < 6:
            await engine.held.wait()
            await swap(gate, engine, 4)
        assert await turn == "length"
        tokens = tuple(script(3 + i) for i in range(6))
        assert partial.turn_tokens == tokens
        generation = partial.trajectory(TrajectoryHeader.model_construct())
        versions = [3] * at + [4] * (6 - at)
        assert generation.behavior_logprobs[3:].tolist() == [logprob_of(v, 3 + i) for i, v in enumerate(versions)]
        assert generation.weight_version.tolist() == [-1, -1, -1, *versions]
        assert partial.tokens == [*PROMPT, *tokens]
        assert engine.prompts == ([PROMPT, PROMPT + tokens[:at]] if at < 6 else [PROMPT])
        assert tally.tokens_generated == 6 == gate.tokens_in_flight
        assert tally.tokens_salvaged == (at if at < 6 else 0)
        assert tally.partials_continued == (1 if 0 < at < 6 else 0)
        assert partial.interruptions == (1 if 0 < at < 6 else 0)
    assert gate.tokens_in_flight == 0


@pytest.mark.parametrize("at", range(9))
async def test_progress_brings_every_token_into_the_partial_while_the_turn_runs_and_changes_nothing_else(
    at: int,
) -> None:
    engine = ScriptedEngine(script, version=3)
    tally = Tally()
    gate = Gate(engine, tally, Clock(), progress_tokens=3)
    gate.open()
    engine.stop_at(at)
    seen: list[int] = []
    with gate.partial() as partial:
        partial.observe(PROMPT)
        partial.begin_turn()
        partial.on_growth = lambda: seen.append(partial.num_model_tokens)
        turn = asyncio.create_task(gate.generate(request(9), partial))
        await engine.held.wait()
        assert partial.num_model_tokens == at - at % 3, "before the interruption: whole threes"
        await swap(gate, engine, 4)
        assert await turn == "length"
        found = partial.trajectory(TrajectoryHeader.model_construct())
        versions = [3] * at + [4] * (9 - at)
        assert found.weight_version.tolist() == [-1, -1, -1, *versions]
        assert found.behavior_logprobs[3:].tolist() == [logprob_of(v, 3 + i) for i, v in enumerate(versions)]
        assert found.tokens[3:].tolist() == [script(3 + i) for i in range(9)]
        assert tally.tokens_generated == 9 == seen[-1] == gate.tokens_in_flight
        assert tally.partials_continued == (1 if at else 0)
    assert seen == sorted(set(seen))


async def test_turns_no_longer_than_the_interval_ask_for_no_progress() -> None:
    engine = ScriptedEngine(script)
    asked: list[bool] = []
    generate = engine.generate

    async def noting(request: GenerationRequest, progress: Progress | None = None) -> Generation:
        asked.append(progress is not None)
        return await generate(request, progress)

    engine.generate = noting  # type: ignore[method-assign]
    for interval, expected in ((0, False), (6, False), (5, True)):
        gate = Gate(engine, Tally(), Clock(), progress_tokens=interval)
        gate.open()
        with gate.partial() as partial:
            partial.begin_turn()
            await gate.generate(request(6), partial)
        assert asked.pop() is expected


@pytest.mark.parametrize(("token", "finish"), [(STOP, "stop"), (9, "length")])
async def test_an_abort_that_lands_on_the_last_token_ends_the_turn(token: int, finish: str) -> None:
    class Late(ScriptedEngine):
        async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
            self.events.append(request.request_id)
            return Generation((8, token), (-1.0, -1.0), (VersionSpan(0, 0, 2),), "aborted")

    engine = Late(script)
    gate = Gate(engine, Tally(), Clock())
    gate.open()
    with gate.partial() as partial:
        partial.begin_turn()
        assert await gate.generate(request(2), partial) == finish
    assert (partial.turn_tokens, engine.events) == ((8, token), ["r-0"])


async def test_shutting_pauses_again_for_a_request_that_slipped_in_while_the_engine_paused() -> None:
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), Clock())
    gate.open()
    engine.stop_at(2)
    engine.deaf_pauses = 1
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(), partial))
        await engine.held.wait()
        await gate.shut(5.0)
        assert engine.events.count("pause") == 2 and engine.in_flight == 0 and partial.num_model_tokens == 2
        await engine.resume()
        gate.open()
        await turn


async def test_requests_that_do_not_come_back_by_the_deadline_are_an_error() -> None:
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), Clock())
    gate.open()
    engine.stop_at(2)
    engine.deaf_pauses = 1000
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(), partial))
        await engine.held.wait()
        with pytest.raises(DeadlineExceeded, match=r"1 requests did not return within 0.05 s"):
            await gate.shut(0.05)
        assert not gate.is_open
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
    assert gate.in_engine == 0


async def test_an_abort_that_nobody_ordered_is_resubmitted_and_counted() -> None:
    engine = ScriptedEngine(script)
    tally = Tally()
    gate = Gate(engine, tally, Clock())
    gate.open()
    engine.abort_next = 2
    with gate.partial() as partial:
        partial.begin_turn()
        assert await gate.generate(request(), partial) == "length"
        assert partial.num_model_tokens == 6
    assert (tally.spurious_aborts, tally.interruptions, tally.tokens_salvaged) == (2, 0, 0)


async def test_an_engine_that_only_aborts_is_given_up() -> None:
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), Clock(), spurious_abort_seconds=0.0)
    gate.open()
    engine.abort_next = 10**6
    with gate.partial() as partial, pytest.raises(EngineError, match=f"{MAX_SPURIOUS_ABORTS + 1} times though nobody"):
        await gate.generate(request(), partial)


async def test_a_dead_engine_and_one_that_hangs_are_engine_errors() -> None:
    dead = Gate(DeadEngine(script), Tally(), Clock())
    dead.open()
    with dead.partial() as partial, pytest.raises(EngineError, match="died"):
        await dead.generate(request(), partial)
    hanging = ScriptedEngine(script)
    hanging.stop_at(1)
    gate = Gate(hanging, Tally(), Clock(), generation_seconds=0.05)
    gate.open()
    with gate.partial() as partial, pytest.raises(EngineError, match=r"did not end within 0.05 s"):
        await gate.generate(request(), partial)
    assert gate.in_engine == 0


async def test_a_cancelled_waiter_leaves_its_tokens_in_the_partial() -> None:
    engine = ScriptedEngine(script)
    tally = Tally()
    gate = Gate(engine, tally, Clock())
    gate.open()
    engine.stop_at(3)
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(), partial))
        await engine.held.wait()
        await gate.shut(1.0)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert partial.num_model_tokens == tally.tokens_generated == gate.tokens_in_flight == 3


async def test_pause_times_run_from_shutting_to_opening_and_the_first_opening_is_none() -> None:
    clock = Clock()
    engine = ScriptedEngine(script)
    tally = Tally()
    gate = Gate(engine, tally, clock)
    await gate.shut(1.0)
    gate.open()
    assert (gate.pause_seconds, tally.interruptions) == ((), 0)
    for seconds in (0.5, 0.25):
        await gate.shut(1.0)
        clock.now += seconds
        gate.open()
    assert (gate.pause_seconds, tally.interruptions) == ((0.5, 0.25), 2)
    for _ in range(100):
        await gate.shut(1.0)
        gate.open()
    assert len(gate.pause_seconds) == 64


async def test_time_for_which_the_gate_is_held_is_no_pause_of_the_swap() -> None:
    clock = Clock()
    engine = ScriptedEngine(script)
    tally = Tally()
    gate = Gate(engine, tally, clock)
    gate.open()
    for is_new, seconds in ((True, 40.0), (False, 5.0)):
        clock.now += 100
        gate.hold(True)
        await gate.shut(1.0)
        clock.now += seconds
        assert gate.held_seconds == (40.0 if is_new else 45.0)
        gate.hold(True)  # told again: nothing new
        if is_new:
            gate.hold(False)
            clock.now += 0.5
        gate.open(is_interruption=is_new)
        assert (gate.pause_seconds, tally.interruptions) == ((0.5,), 1)
    clock.now += 100
    assert gate.held_seconds == 45.0


async def test_busy_time_is_time_with_a_request_in_the_engine() -> None:
    clock = Clock()
    engine = ScriptedEngine(script)
    gate = Gate(engine, Tally(), clock)
    gate.open()
    engine.stop_at(1)
    clock.now += 5
    with gate.partial() as partial:
        partial.begin_turn()
        turn = asyncio.create_task(gate.generate(request(2), partial))
        await engine.held.wait()
        clock.now += 3
        assert gate.busy_seconds == 3
        await gate.shut(1.0)
        clock.now += 7
        assert gate.busy_seconds == 3
        await engine.resume()
        gate.open()
        await turn
    assert gate.busy_seconds == 3


@pytest.mark.parametrize(
    ("logprobs", "spans"),
    [
        ((-1.0,), ((0, 0, 2),)),
        ((-1.0, -1.0), ((0, 0, 1),)),
        ((-1.0, -1.0), ((0, 1, 2),)),
        ((-1.0, -1.0), ((0, 0, 1), (1, 0, 1))),
        ((-1.0, -1.0), ()),
    ],
)
def test_tokens_whose_version_would_be_a_guess_are_refused(
    logprobs: tuple[float, ...], spans: tuple[tuple[int, int, int], ...]
) -> None:
    partial = PartialRollout()
    partial.begin_turn()
    generation = Generation((4, 5), logprobs, tuple(VersionSpan(*span) for span in spans), "length")
    with pytest.raises(EngineError, match="must cover the tokens in order"):
        partial.take(generation)
    assert len(partial) == 0


def test_a_generation_that_went_on_across_versions_gives_each_token_its_own() -> None:
    partial = PartialRollout()
    partial.observe(PROMPT)
    partial.begin_turn()
    spans = (VersionSpan(4, 0, 1), VersionSpan(5, 1, 3))
    assert partial.take(Generation((7, 8, 9), (-1.0, -2.0, -3.0), spans, "length")) == 1
    assert partial.take(Generation((7,), (-1.0,), (VersionSpan(4, 0, 1),), "length")) == 1
    assert partial.trajectory(TrajectoryHeader.model_construct()).weight_version.tolist() == [-1, -1, -1, 4, 5, 5, 4]
