"""One episode: the environment asks, the model answers, until done or out of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as partial_call

import numpy as np

from rljob_api.errors import EnvironmentFailure
from rljob_api.messages import Outcome, Task, TrajectoryHeader
from rljob_runtime.environments.base import Environment, EpisodeEnd, Message, StepResult
from rljob_runtime.rollout.engine import GenerationRequest
from rljob_runtime.rollout.environment_threads import EnvironmentThreads
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.partial import OBSERVED, PartialRollout
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.trajectory_codec import Trajectory

SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """What all episodes of a worker share."""

    temperature: float
    max_tokens: int
    """Longest model turn."""
    max_trajectory_tokens: int
    """Longest trajectory, prompt and observations included."""
    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class EpisodeParts:
    """What an episode works with."""

    make_environment: Callable[[int], Environment]
    """Environment of a seed; called on an environment thread."""
    renderer: Renderer
    gate: Gate
    threads: EnvironmentThreads
    wall_clock: Callable[[], float]
    """Unix seconds, for duration statistics only."""


async def run_episode(
    task: Task, attempt: int, partial: PartialRollout, parts: EpisodeParts, settings: EpisodeSettings
) -> Trajectory:
    """Play one sample to its end in `partial`; interruptions on the way are invisible here.

    Ends when the environment says done, or when maxTrajectoryTokens leave no room for another model token (TRUNCATED,
    scored). A turn's limit is what remains, where that is less than maxTokens.

    Raises:
        EnvironmentFailure: the environment raised, timed out or returned what is no number. Never a reward.
        EngineError: the engine died.
    """
    started_at = parts.wall_clock()
    call = parts.threads.call
    environment, prompt = await call("making the environment and its reset", lambda: _begin(parts, task.seed))
    partial.observe(parts.renderer.first(prompt))
    if not 1 <= len(partial) < settings.max_trajectory_tokens:
        raise EnvironmentFailure(
            f"a prompt of {len(partial)} tokens; sampling.maxTrajectoryTokens is {settings.max_trajectory_tokens}; "
            "there must be a prompt and room for an answer"
        )
    rewards: list[float] = []
    end: EpisodeEnd | None = None
    outcome = Outcome.TRUNCATED
    while (room := settings.max_trajectory_tokens - len(partial)) > 0:
        partial.begin_turn()
        request = GenerationRequest(
            request_id=f"{task.task}-{task.sample}-{attempt}-{len(rewards)}",
            prompt=tuple(partial.tokens),
            max_tokens=min(settings.max_tokens, room),
            temperature=settings.temperature,
            stop_token_ids=parts.renderer.stop_token_ids,
            seed=sampling_seed(task),
        )
        await parts.gate.generate(request, partial)
        turn = partial.turn_tokens
        answer = parts.renderer.decode(turn)
        result, end = await call("step, or end after it", partial_call(_step, environment, answer))
        rewards.append(_finite("reward of a step", result.reward))
        if result.done:
            outcome = Outcome.FINISHED
            break
        ended = turn[-1] == parts.renderer.turn_end_token_id
        observation = parts.renderer.after_turn(result.observation, ended)
        if len(partial) + len(observation) >= settings.max_trajectory_tokens:
            break  # no model token would follow it: an observation at the end teaches nothing
        partial.observe(observation)
    if end is None:  # cut off by its length
        end = await call("end", environment.end)
    header = TrajectoryHeader(
        task=task.task,
        sample=task.sample,
        attempt=attempt,
        epoch=task.epoch,
        worker=settings.worker,
        incarnation=settings.incarnation,
        outcome=outcome,
        turn_rewards=tuple(rewards),
        reward=_finite("reward of the episode", end.reward),
        interruptions=partial.interruptions,
        started_at=started_at,
        finished_at=parts.wall_clock(),
        info={name: _finite(f"info {name}", value) for name, value in end.info.items()},
    )
    return partial.trajectory(header)


def failed_trajectory(task: Task, attempt: int, settings: EpisodeSettings, error: str, wall_clock: float) -> Trajectory:
    """Tells the trainer that a sample ended unscored after its last attempt.

    Carries no model token (those it cost are counted as dropped by the worker): two filler tokens, since a trajectory
    has at least two.
    """
    header = TrajectoryHeader(
        task=task.task,
        sample=task.sample,
        attempt=attempt,
        epoch=task.epoch,
        worker=settings.worker,
        incarnation=settings.incarnation,
        outcome=Outcome.ENVIRONMENT_FAILED,
        started_at=wall_clock,
        finished_at=wall_clock,
        error=error,
    )
    return Trajectory(
        header=header,
        tokens=np.zeros(2, np.int32),
        turn=np.full(2, OBSERVED, np.int32),
        weight_version=np.full(2, -1, np.int32),
        behavior_logprobs=np.zeros(2, np.float32),
    )


def sampling_seed(task: Task) -> int:
    """Key of the simulated engine's generator: differs between the samples of a group, equal for every attempt."""
    return (task.seed * 1_000_003 + task.task * 8191 + task.sample) % (1 << SEED_BITS)


def _begin(parts: EpisodeParts, seed: int) -> tuple[Environment, tuple[Message, ...]]:
    """What needs no model token in between goes to a thread together: a hop there and back costs more than most calls."""
    environment = parts.make_environment(seed)
    return environment, environment.reset()


def _step(environment: Environment, answer: str) -> tuple[StepResult, EpisodeEnd | None]:
    result = environment.step(answer)
    return result, environment.end() if result.done else None


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise EnvironmentFailure(f"the environment's {what} is {value}")
    return float(value)
