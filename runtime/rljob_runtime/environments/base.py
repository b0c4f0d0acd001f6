"""What a rollout worker needs of an environment. Text in and out, multi-turn; the runtime owns the tokens.

An environment object is one episode's state. It is created by a factory from (parameters, seed); the G samples of a
group get the same seed and so the same task. Calls may block: the worker runs them on threads with the spec's timeout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. Models without a chat template get the contents joined as they are."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the environment says to one model turn."""

    reward: float
    """Reward of this turn."""
    done: bool
    observation: str = ""
    """Text shown to the model next; ignored when done."""


@dataclass(frozen=True, slots=True)
class EpisodeEnd:
    """Closing numbers of an episode."""

    reward: float
    """Reward of the whole trajectory."""
    info: Mapping[str, float] = field(default_factory=dict)
    """For the report; `constantBaseline` is the score of the best constant answer to this task, where known."""


class Environment(Protocol):
    """One episode. Order: reset, step..., end. Infrastructure errors raise; what the model did wrong is scored."""

    def reset(self) -> tuple[Message, ...]:
        """First prompt."""

    def step(self, answer: str) -> StepResult:
        """Take one model turn (decoded text, special tokens left out)."""

    def end(self) -> EpisodeEnd:
        """Score the episode; called once, also when it was truncated by maxTrajectoryTokens."""
