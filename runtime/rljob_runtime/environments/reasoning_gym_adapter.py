"""`reasoning-gym`: one question of a reasoning-gym dataset an episode, scored by the dataset's own verifier.

The seed alone gives the item. What the model wrote can make a verifier raise (several call `int()` on free text): that
is the model's doing and scores 0. A wrong dataset or configuration is found at validation (`check`), not in an episode.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections import Counter
from functools import lru_cache
from statistics import fmean
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, JsonValue

from rljob_api.errors import EnvironmentFailure, RljobError, Violation
from rljob_runtime.environments.base import EpisodeEnd, Message, StepResult
from rljob_runtime.environments.parameters import PARAMETERS_PATH, Parameters, nearest

EXAMPLES_SEED = 7
"""Seed of the solved examples of few-shot prompts: the same ones in every episode."""
BASELINE_SEED = 1_000_003
BASELINE_ITEMS = 100

# What dataset code raises on configurations and answers that it does not like.
_LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class ReasoningGymParameters(Parameters):
    dataset: str = Field(min_length=1, description="Name of the dataset, such as `chain_sum`.")
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="Its configuration, such as `{max_terms: 2}`."
    )
    prompt: Literal["zero-shot", "few-shot"] = Field(default="zero-shot", description="`zero-shot` or `few-shot`.")
    shots: int = Field(
        default=3, ge=1, le=64, description="Solved examples of a few-shot prompt, as earlier chat turns."
    )
    extract: Literal["last-number", "text"] = Field(
        default="text", description="What is scored: the last number in the answer, or all of its text."
    )
    size: int | None = Field(default=None, ge=1, description="Number of distinct questions; unset is unlimited.")


class ReasoningGym:
    """One question. Raises EnvironmentFailure where the dataset itself fails."""

    def __init__(self, parameters: ReasoningGymParameters, seed: int) -> None:
        self._parameters = parameters
        self._seed = seed if parameters.size is None else seed % parameters.size
        self._dataset: Any = None
        self._item: Any = None
        self._reward = 0.0

    def reset(self) -> tuple[Message, ...]:
        """The question, after the solved examples of a few-shot prompt."""
        dataset = _dataset(self._parameters, seed=self._seed, size=1)
        self._dataset, self._item = dataset, dataset[0]
        messages: list[Message] = []
        if self._parameters.prompt == "few-shot":
            for example in _dataset(self._parameters, seed=EXAMPLES_SEED, size=self._parameters.shots):
                messages.append(Message("user", str(example["question"])))
                messages.append(Message("assistant", str(example["answer"])))
        messages.append(Message("user", str(self._item["question"])))
        return tuple(messages)

    def step(self, answer: str) -> StepResult:
        """The verifier's score of the extracted answer, in [0, 1]; 0 where the verifier raises on it."""
        if self._item is None:
            raise EnvironmentFailure("reasoning-gym: step before reset")
        self._reward = _score(self._dataset, self._item, extract(answer, self._parameters.extract))
        return StepResult(reward=self._reward, done=True)

    def end(self) -> EpisodeEnd:
        """The score; `constantBaseline` is that of always giving the commonest correct answer of 100 fixed items."""
        return EpisodeEnd(reward=self._reward, info={"constantBaseline": constant_baseline(self._parameters)})


def extract(answer: str, how: Literal["last-number", "text"]) -> str:
    """The text that is scored. Without any number, `last-number` scores the whole text."""
    text = answer.strip()
    if how == "text":
        return text
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text


def constant_baseline(parameters: ReasoningGymParameters) -> float:
    """Score of always giving the commonest correct answer, over 100 fixed items; computed once a process."""
    with _BASELINE_LOCK:
        return _baseline(parameters.dataset, json.dumps(parameters.config, sort_keys=True))


def check(parameters: ReasoningGymParameters) -> tuple[Violation, ...]:
    """What is wrong with dataset and configuration; makes one item to find out."""
    try:
        library = _library()
    except RljobError as error:
        return (
            Violation(
                "spec.environment.name", "reasoning-gym", str(error), "Install the extra `rljob[reasoning-gym]`."
            ),
        )
    known = library.factory.DATASETS
    if parameters.dataset not in known:
        path = f"{PARAMETERS_PATH}.dataset"
        return (
            Violation(
                path,
                parameters.dataset,
                "reasoning-gym has no dataset of that name",
                nearest(parameters.dataset, known),
            ),
        )
    path = f"{PARAMETERS_PATH}.config"
    reserved = sorted({"seed", "size"} & parameters.config.keys())
    if reserved:
        return tuple(
            Violation(
                f"{path}.{name}", str(parameters.config[name]), "is set by the runtime, from the task", "Leave it out."
            )
            for name in reserved
        )
    try:
        library.create_dataset(parameters.dataset, seed=0, size=1, **parameters.config)[0]
    except _LIBRARY_ERRORS as error:
        said = str(error) or type(error).__name__
        remedy = f"See the configuration class of `{parameters.dataset}` in reasoning-gym."
        return (
            Violation(path, json.dumps(parameters.config)[:80], f"`{parameters.dataset}` refuses it: {said}", remedy),
        )
    return ()


_BASELINE_LOCK = threading.Lock()


@lru_cache(maxsize=16)
def _baseline(dataset: str, config: str) -> float:
    parameters = ReasoningGymParameters(dataset=dataset, config=json.loads(config))
    source = _dataset(parameters, seed=BASELINE_SEED, size=BASELINE_ITEMS)
    items = list(source)
    answer, _ = Counter(str(item["answer"]) for item in items).most_common(1)[0]
    return fmean(_score(source, item, answer) for item in items)


def _dataset(parameters: ReasoningGymParameters, *, seed: int, size: int) -> Any:
    try:
        return _library().create_dataset(parameters.dataset, seed=seed, size=size, **parameters.config)
    except _LIBRARY_ERRORS as error:
        raise EnvironmentFailure(f"reasoning-gym: dataset {parameters.dataset} failed: {error}") from error


def _score(dataset: Any, item: Any, answer: str) -> float:
    try:
        return float(dataset.score_answer(answer, item))
    except _LIBRARY_ERRORS:
        return 0.0


def _library() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # A dependency of reasoning-gym compares strings with `is`; Python says so at the first import.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ImportError as error:
        raise RljobError(
            f"the environment reasoning-gym needs the package reasoning-gym ({error}): install `rljob[reasoning-gym]`"
        ) from error
    library: ModuleType = reasoning_gym
    return library
