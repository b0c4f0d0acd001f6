"""One episode: turns of the model and of the environment, as one growing sequence of tokens."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from rljob_api.errors import EnvironmentFailure, RljobError
from rljob_api.messages import Outcome, Task, TrajectoryHeader
from rljob_api.spec import RLJobSpec
from rljob_runtime.environments.base import Environment
from rljob_runtime.environments.factory import make_environment
from rljob_runtime.rollout.gate import Gate, PartialTurn
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.trajectory_codec import Trajectory

T = TypeVar("T")
NOT_MODEL = -1


@dataclass(slots=True)
class EpisodeTokens:
    """Everything said so far; all lists have the same length."""

    tokens: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add_text(self, tokens: tuple[int, ...]) -> None:
        """Prompt or observation: never trained on."""
        self.tokens += tokens
        self.turn += [NOT_MODEL] * len(tokens)
        self.versions += [NOT_MODEL] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def add_turn(self, number: int, tokens: list[int], logprobs: list[float], versions: list[int]) -> None:
        """What the model sampled."""
        self.tokens += tokens
        self.turn += [number] * len(tokens)
        self.versions += versions
        self.logprobs += logprobs

    @property
    def num_model_tokens(self) -> int:
        return sum(turn != NOT_MODEL for turn in self.turn)


class Episode:
    """Runs one task's sample to its end. `num_model_tokens` may be read at any time."""

    def __init__(
        self,
        *,
        task: Task,
        attempt: int,
        worker: str,
        incarnation: str,
        spec: RLJobSpec,
        gate: Gate,
        renderer: Renderer,
        threads: concurrent.futures.Executor,
        clock: Callable[[], float],
        make: Callable[[], Environment] | None = None,
    ) -> None:
        self._task = task
        self._attempt = attempt
        self._worker = worker
        self._incarnation = incarnation
        self._spec = spec
        self._gate = gate
        self._renderer = renderer
        self._threads = threads
        self._clock = clock
        environment = spec.environment
        self._make = make or (lambda: make_environment(environment.name, environment.parameters, task.seed))
        self._said = EpisodeTokens()
        self._partial = PartialTurn.empty()

    @property
    def num_model_tokens(self) -> int:
        """Model tokens sampled so far, those of the unfinished turn included."""
        return self._said.num_model_tokens + len(self._partial.tokens)

    async def run(self) -> Trajectory:
        """Play until the environment is done or the trajectory is full.

        Raises:
            EnvironmentFailure: the environment raised or timed out; the sample is tried again, never scored.
            EngineError: the engine died.
        """
        started = self._clock()
        environment = await self._outside("make", self._make)
        self._said.add_text(self._renderer.first(await self._outside("reset", environment.reset)))
        sampling = self._spec.sampling
        rewards: list[float] = []
        outcome = Outcome.TRUNCATED
        seed = sample_seed(self._task)
        while (room := sampling.max_trajectory_tokens - len(self._said.tokens)) > 0:
            self._partial = PartialTurn.empty()
            turn = await self._gate.turn(
                self._partial,
                prompt=self._said.tokens,
                max_tokens=min(sampling.max_tokens, room),
                temperature=sampling.temperature,
                stop_token_ids=self._renderer.stop_token_ids,
                seed=seed,
            )
            self._said.add_turn(len(rewards), list(turn.tokens), list(turn.logprobs), list(turn.versions))
            self._partial = PartialTurn.empty()
            answer = self._renderer.decode(turn.tokens)
            result = await self._outside("step", partial(environment.step, answer))
            rewards.append(float(result.reward))
            if result.done:
                outcome = Outcome.FINISHED
                break
            observation = self._renderer.after_turn(result.observation, ended=turn.stopped)
            if len(self._said.tokens) + len(observation) >= sampling.max_trajectory_tokens:
                break
            self._said.add_text(observation)
        end = await self._outside("end", environment.end)
        header = TrajectoryHeader(
            task=self._task.task,
            sample=self._task.sample,
            attempt=self._attempt,
            epoch=self._task.epoch,
            worker=self._worker,
            incarnation=self._incarnation,
            outcome=outcome,
            turn_rewards=tuple(rewards),
            reward=float(end.reward),
            interruptions=max(0, len({v for v in self._said.versions if v >= 0}) - 1),
            started_at=started,
            finished_at=self._clock(),
            info=dict(end.info),
        )
        return self._trajectory(header)

    def failed(self, error: str) -> Trajectory:
        """The trajectory that says this sample ended without a score: its tokens are counted, never trained."""
        if len(self._said.tokens) < 2:
            self._said.add_text((0,) * (2 - len(self._said.tokens)))
        now = self._clock()
        header = TrajectoryHeader(
            task=self._task.task,
            sample=self._task.sample,
            attempt=self._attempt,
            epoch=self._task.epoch,
            worker=self._worker,
            incarnation=self._incarnation,
            outcome=Outcome.ENVIRONMENT_FAILED,
            started_at=now,
            finished_at=now,
            error=error[:500],
        )
        return self._trajectory(header)

    def _trajectory(self, header: TrajectoryHeader) -> Trajectory:
        said = self._said
        return Trajectory(
            header=header,
            tokens=np.array(said.tokens, np.int32),
            turn=np.array(said.turn, np.int32),
            weight_version=np.array(said.versions, np.int32),
            behavior_logprobs=np.array(said.logprobs, np.float32),
        )

    async def _outside(self, what: str, call: Callable[[], T]) -> T:
        """Run the environment's code on a thread, with the spec's deadline."""
        seconds = self._spec.environment.timeout_seconds
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError as error:
            raise EnvironmentFailure(
                f"environment {self._spec.environment.name}: {what} took longer than {seconds:g} s "
                "(spec.environment.timeoutSeconds)"
            ) from error
        except (RljobError, asyncio.CancelledError):
            raise
        except Exception as error:  # whatever foreign code raises is an infrastructure outcome, never a reward of 0
            raise EnvironmentFailure(
                f"environment {self._spec.environment.name}: {what} raised {type(error).__name__}: {error}"
            ) from error


def sample_seed(task: Task) -> int:
    """Seed of a sample's tokens where the engine takes one: differs between the samples of a group."""
    return task.seed * 1_000_003 + task.sample
