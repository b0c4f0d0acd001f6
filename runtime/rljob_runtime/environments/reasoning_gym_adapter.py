"""Any dataset of reasoning-gym by name: one question, one answer, scored by the dataset's own scorer."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from rljob_api.errors import EnvironmentFailure, RljobError
from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult

BASELINE_ITEMS = 100
SHOT_SEED = 7
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class ReasoningGymParameters:
    dataset: str
    config: dict[str, Any] = field(default_factory=dict)
    prompt: Literal["zero-shot", "few-shot"] = "zero-shot"
    shots: int = 3
    extract: Literal["text", "last-number"] = "text"


def create_dataset(parameters: ReasoningGymParameters, *, seed: int, size: int) -> Any:
    """A dataset of reasoning-gym.

    Raises:
        RljobError: the package is not installed, or it refuses the name or the configuration.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise RljobError("environment reasoning-gym needs the package: install rljob[reasoning-gym]") from error
    try:
        return reasoning_gym.create_dataset(parameters.dataset, seed=seed, size=size, **parameters.config)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise RljobError(
            f"reasoning-gym refuses dataset {parameters.dataset!r} with {parameters.config}: {error}"
        ) from error


def score(dataset: Any, answer: str, item: Any) -> float:
    """The dataset's score, 0 where its scorer cannot read the text: that is the model's doing, not a failure."""
    try:
        return float(dataset.score_answer(answer, item))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, SyntaxError, ZeroDivisionError, OverflowError):
        return 0.0


@functools.lru_cache(maxsize=64)
def constant_baseline(dataset: str, config: str) -> float:
    """Mean score of always giving the commonest right answer; many tasks look learned and are only this."""
    parameters = ReasoningGymParameters(dataset, json.loads(config))
    made = create_dataset(parameters, seed=0, size=BASELINE_ITEMS)
    items = [made[index] for index in range(BASELINE_ITEMS)]
    commonest = Counter(str(item["answer"]) for item in items).most_common(1)[0][0]
    return sum(score(made, commonest, item) for item in items) / len(items)


class ReasoningGymEnvironment:
    """One item; the item of a seed is always the same."""

    def __init__(self, parameters: ReasoningGymParameters, seed: int) -> None:
        self._parameters = parameters
        self._dataset = create_dataset(parameters, seed=seed, size=1)
        self._item = self._dataset[0]
        self._reward = 0.0

    def reset(self) -> tuple[Message, ...]:
        """The question, after solved examples when few-shot."""
        examples: list[Message] = []
        if self._parameters.prompt == "few-shot":
            solved = create_dataset(self._parameters, seed=SHOT_SEED, size=self._parameters.shots)
            for index in range(self._parameters.shots):
                examples.append(Message("user", solved[index]["question"]))
                examples.append(Message("assistant", str(solved[index]["answer"])))
        return (*examples, Message("user", self._item["question"]))

    def step(self, answer: str) -> StepResult:
        """Score the answer, or the last number in it."""
        text = answer.strip()
        if self._parameters.extract == "last-number":
            numbers = _NUMBER.findall(text)
            text = numbers[-1] if numbers else text
        self._reward = score(self._dataset, text, self._item)
        return StepResult(self._reward, done=True)

    def end(self) -> EpisodeEnd:
        """The score, with the constant answer's beside it."""
        config = json.dumps(self._parameters.config, sort_keys=True)
        try:
            baseline = constant_baseline(self._parameters.dataset, config)
        except RljobError as error:
            raise EnvironmentFailure(str(error)) from error
        return EpisodeEnd(self._reward, {"constantBaseline": baseline})
