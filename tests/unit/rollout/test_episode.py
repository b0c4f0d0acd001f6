from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.fakes.engine import ScriptedEngine, logprob_of
from tests.fakes.tokenizers import character_tokenizer

from rljob_api.errors import EnvironmentFailure, RljobError
from rljob_api.messages import Outcome, Task
from rljob_api.trajectory import Segment, segments
from rljob_runtime.environments.base import Environment, EpisodeEnd, Message, StepResult
from rljob_runtime.environments.digits import DigitParameters, Digits, DigitTask
from rljob_runtime.rollout.environment_threads import EnvironmentThreads
from rljob_runtime.rollout.episode import EpisodeParts, EpisodeSettings, failed_trajectory, run_episode, sampling_seed
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.trajectory_codec import Trajectory, decode_trajectory, encode_trajectory

TASK = Task(task=7, sample=2, epoch=3, min_version=0, seed=11)
SETTINGS = EpisodeSettings(
    temperature=1.0, max_tokens=3, max_trajectory_tokens=64, worker="main-0", incarnation="main-0.1"
)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(character_tokenizer(tmp_path_factory.mktemp("characters")))


@pytest.fixture
async def threads() -> AsyncIterator[EnvironmentThreads]:
    made = EnvironmentThreads(4, timeout_seconds=5.0)
    yield made
    made.close()


class Quiz:
    """Three turns of `12=`; the reward of turn j is (j + 1) / 10."""

    def __init__(self, turns: int = 3, observation: str = "12=") -> None:
        self.turns = turns
        self.observation = observation
        self.answers: list[str] = []

    def reset(self) -> tuple[Message, ...]:
        return (Message("user", "12="),)

    def step(self, answer: str) -> StepResult:
        self.answers.append(answer)
        return StepResult(len(self.answers) / 10, len(self.answers) == self.turns, self.observation)

    def end(self) -> EpisodeEnd:
        return EpisodeEnd(0.5, {"constantBaseline": 0.1})


class Play:
    """An engine, a gate and an episode over them."""

    def __init__(
        self,
        renderer: Renderer,
        threads: EnvironmentThreads,
        make: Callable[[int], Environment],
        script: Callable[[int], int],
    ) -> None:
        self.engine = ScriptedEngine(script)
        self.tally = Tally()
        self.gate = Gate(self.engine, self.tally, time.monotonic)
        self.partial = PartialRollout()
        self.parts = EpisodeParts(make, renderer, self.gate, threads, wall_clock=lambda: 1000.0)

    async def run(self, settings: EpisodeSettings = SETTINGS) -> Trajectory:
        self.gate.open()
        with self.gate.partial() as self.partial:
            return await run_episode(TASK, 1, self.partial, self.parts, settings)

    async def run_with_swaps_at(self, *counts: int) -> Trajectory:
        self.engine.stop_at(*counts)
        episode = asyncio.create_task(self.run())
        for version, _ in enumerate(counts, start=1):
            await self.engine.held.wait()
            await self.gate.shut(5.0)
            self.engine.load(version)
            await self.engine.resume()
            self.gate.open()
        return await episode


def digit(position: int) -> int:
    return 3 + position % 10


async def test_an_episode_alternates_observed_and_sampled_tokens(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    quiz = Quiz()
    trajectory = await Play(renderer, threads, lambda seed: quiz, digit).run()
    assert trajectory.turn.tolist() == [-1] * 4 + [0] * 3 + [-1] * 3 + [1] * 3 + [-1] * 3 + [2] * 3
    assert quiz.answers == ["456", "012", "678"]  # script(position): positions 4-6, 10-12, 16-18
    header = trajectory.header
    assert (header.outcome, header.turn_rewards, header.reward) == (Outcome.FINISHED, (0.1, 0.2, 0.3), 0.5)
    assert (header.task, header.sample, header.epoch, header.attempt) == (7, 2, 3, 1)
    assert header.info == {"constantBaseline": 0.1}
    assert decode_trajectory(encode_trajectory(trajectory)).header == header


async def test_a_turn_that_ends_itself_is_shorter_and_keeps_its_end_token(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    quiz = Quiz(turns=1)
    trajectory = await Play(renderer, threads, lambda seed: quiz, lambda position: 1 if position == 5 else 4).run()
    assert trajectory.tokens.tolist()[4:] == [4, 1] and quiz.answers == ["1"]


@pytest.mark.parametrize("at", range(9))
async def test_an_interruption_at_any_token_of_an_episode_leaves_the_same_tokens_and_exact_versions(
    renderer: Renderer, threads: EnvironmentThreads, at: int
) -> None:
    undisturbed = await Play(renderer, threads, lambda seed: Quiz(), digit).run()
    play = Play(renderer, threads, lambda seed: Quiz(), digit)
    trajectory = await play.run_with_swaps_at(at)
    assert trajectory.tokens.tolist() == undisturbed.tokens.tolist()
    assert trajectory.turn.tolist() == undisturbed.turn.tolist()
    mask = trajectory.model_mask
    assert trajectory.weight_version[mask].tolist() == [0] * at + [1] * (9 - at)
    positions = np.flatnonzero(mask)
    expected = [logprob_of(0 if i < at else 1, int(p)) for i, p in enumerate(positions)]
    assert trajectory.behavior_logprobs[mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert play.tally.tokens_generated == 9
    assert trajectory.header.interruptions == (1 if at else 0)
    assert play.tally.tokens_salvaged == at
    assert play.tally.partials_continued == (1 if at else 0)
    assert trajectory.header.turn_rewards == undisturbed.header.turn_rewards


async def test_token_k_is_version_v_and_token_k_plus_one_is_version_v_plus_one(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    play = Play(renderer, threads, lambda seed: Quiz(), digit)
    trajectory = await play.run_with_swaps_at(*range(1, 9))
    assert trajectory.weight_version[trajectory.model_mask].tolist() == list(range(9))
    found = segments(trajectory.turn.tolist(), trajectory.weight_version.tolist())
    assert len(found) == 9 and found[4] == Segment(11, 12, 4)
    assert play.tally.partials_continued == 8 and play.tally.tokens_salvaged == sum(range(1, 9))


async def test_an_episode_without_room_for_another_token_ends_truncated_and_scored(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    for limit, length, turns in [(5, 5, 1), (7, 7, 1), (8, 7, 1), (10, 7, 1), (11, 11, 2), (12, 12, 2), (13, 13, 2)]:
        play = Play(renderer, threads, lambda seed: Quiz(turns=9), digit)
        trajectory = await play.run(replace(SETTINGS, max_trajectory_tokens=limit))
        assert trajectory.header.outcome is Outcome.TRUNCATED
        assert (trajectory.num_tokens, len(trajectory.header.turn_rewards)) == (length, turns)
        assert trajectory.turn[-1] >= 0 and trajectory.header.reward == 0.5


async def test_an_episode_that_is_done_on_its_last_token_is_finished(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    play = Play(renderer, threads, lambda seed: Quiz(turns=1), digit)
    trajectory = await play.run(replace(SETTINGS, max_trajectory_tokens=7))
    assert trajectory.header.outcome is Outcome.FINISHED


async def test_a_prompt_that_leaves_no_room_is_refused(renderer: Renderer, threads: EnvironmentThreads) -> None:
    play = Play(renderer, threads, lambda seed: Quiz(), digit)
    with pytest.raises(EnvironmentFailure, match=r"a prompt of 4 tokens; sampling.maxTrajectoryTokens is 4"):
        await play.run(replace(SETTINGS, max_trajectory_tokens=4))


async def test_digits_answered_right_score_one(renderer: Renderer, threads: EnvironmentThreads) -> None:
    parameters = DigitParameters(digits=3, turns=4)
    play = Play(renderer, threads, lambda seed: Digits(DigitTask.COPY, parameters, seed), digit)
    play.engine.script = lambda position: play.partial.tokens[position - 4]  # copy the question, `=` left out
    trajectory = await play.run()
    assert trajectory.header.turn_rewards == (1.0, 1.0, 1.0, 1.0)


class Broken(Quiz):
    def __init__(self, where: str, value: object) -> None:
        super().__init__()
        self.where, self.value = where, value

    def _break(self, where: str) -> float:
        if where == self.where:
            if isinstance(self.value, Exception):
                raise self.value
            return float(self.value)  # type: ignore[arg-type]
        return 0.0

    def reset(self) -> tuple[Message, ...]:
        self._break("reset")
        return super().reset()

    def step(self, answer: str) -> StepResult:
        return StepResult(self._break("step"), False, "1=")

    def end(self) -> EpisodeEnd:
        return EpisodeEnd(self._break("end"))


@pytest.mark.parametrize("where", ["reset", "step", "end"])
@pytest.mark.parametrize("value", [OSError("disk"), TimeoutError("socket"), RljobError("gone")])
async def test_an_environment_that_raises_is_a_failure_and_never_a_reward(
    renderer: Renderer, threads: EnvironmentThreads, where: str, value: Exception
) -> None:
    play = Play(renderer, threads, lambda seed: Broken(where, value), digit)
    with pytest.raises(EnvironmentFailure, match=f"{where}.*{value}"):
        await play.run()


@pytest.mark.parametrize("where", ["step", "end"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_reward_that_is_no_number_is_a_failure(
    renderer: Renderer, threads: EnvironmentThreads, where: str, value: float
) -> None:
    play = Play(renderer, threads, lambda seed: Broken(where, value), digit)
    with pytest.raises(EnvironmentFailure, match=f"reward.* is {value}"):
        await play.run()


async def test_a_reward_of_zero_is_a_reward(renderer: Renderer, threads: EnvironmentThreads) -> None:
    trajectory = await Play(renderer, threads, lambda seed: Broken("nowhere", 0), digit).run()
    assert trajectory.header.outcome is Outcome.TRUNCATED and trajectory.header.reward == 0.0


async def test_an_observation_with_an_unknown_character_is_a_failure(
    renderer: Renderer, threads: EnvironmentThreads
) -> None:
    with pytest.raises(EnvironmentFailure, match="no token for 'x'"):
        await Play(renderer, threads, lambda seed: Quiz(observation="1x"), digit).run()


def test_a_failed_sample_travels_without_model_tokens_and_unscored() -> None:
    trajectory = failed_trajectory(TASK, 3, SETTINGS, "step raised OSError: disk", 5.0)
    back = decode_trajectory(encode_trajectory(trajectory))
    assert back.header.outcome is Outcome.ENVIRONMENT_FAILED and back.header.error == "step raised OSError: disk"
    assert back.num_model_tokens == 0 and back.versions == () and back.header.attempt == 3


def test_samples_of_a_group_sample_differently_and_attempts_of_a_sample_alike() -> None:
    seeds = {sampling_seed(TASK.model_copy(update={"sample": sample})) for sample in range(64)}
    assert len(seeds) == 64
    assert sampling_seed(TASK) == sampling_seed(TASK.model_copy())


async def test_a_call_that_never_returns_times_out_is_counted_and_holds_its_slot() -> None:
    threads = EnvironmentThreads(2, timeout_seconds=0.05)
    release = threading.Event()
    with pytest.raises(EnvironmentFailure, match=r"step did not return within 0.05 s"):
        await threads.call("step", release.wait)
    assert threads.hung == 1
    assert await threads.call("step", lambda: 5) == 5
    with pytest.raises(EnvironmentFailure):
        await threads.call("step", release.wait)
    with pytest.raises(RljobError, match="all 2 environment threads hang"):
        await threads.call("step", lambda: 5)
    release.set()
    await asyncio.sleep(0.05)
    assert threads.hung == 0
    assert await threads.call("step", lambda: 6) == 6
    threads.close()


async def test_more_calls_than_threads_wait_their_turn_and_all_return() -> None:
    threads = EnvironmentThreads(3, timeout_seconds=5.0)
    running, most = 0, 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return i

    results = await asyncio.gather(*(threads.call("work", lambda i=i: work(i)) for i in range(30)))
    assert results == list(range(30)) and most <= 3
    threads.close()


async def test_a_call_on_a_thread_does_not_block_the_loop(threads: EnvironmentThreads) -> None:
    release = threading.Event()
    call = asyncio.create_task(threads.call("step", release.wait))
    await asyncio.sleep(0.01)
    assert not call.done()
    release.set()
    assert await call is True
