"""What a rollout worker needs of an inference engine. Two implementations: `vllm_engine` and `simulated_engine`.

The worker's gate (rollout/gate.py) guarantees the call order: no `generate` is in flight or started between `pause` and
the passed probe, so an engine never has to decide what a request means under changing weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rljob_api.weights import WeightManifest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Continue `prompt` by at most `max_tokens` model tokens, stopping after any of `stop_token_ids` (kept)."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    seed: int | None = None
    """Simulated engine: key of a counter-based generator (seed, position), so resubmitting a partial goes on the same way."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a generation were sampled under `version`, as the engine says."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """Model tokens in order. `len(tokens) == len(logprobs)` always; spans cover all tokens in order, from 0 on."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Processed (after temperature), fp32: log mu of each sampled token."""
    spans: tuple[VersionSpan, ...]


@dataclass(frozen=True, slots=True)
class Generation(Sampled):
    """What came back at the end, and what the end was."""

    finish: Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class Progress:
    """The wish to have a request's tokens while it runs."""

    every_tokens: int
    """At most so many wait in the engine; the first comes by itself."""
    take: Callable[[Sampled], None]
    """Gets what was sampled since its last call, in the engine's event loop: it must not wait."""


class InferenceEngine(Protocol):
    """Lifecycle: start -> (apply -> generate* -> pause)* -> shutdown. Starts with dummy weights: the first version comes by `apply`."""

    async def start(self) -> None:
        """Load the architecture from the model directory with dummy weights.

        Raises:
            EngineError: the engine could not start.
        """

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        """Run one request to its end or until `pause` aborts it. Cancelling the caller aborts the request.

        `progress` takes tokens while it runs; what comes back then is the rest, after the last that it took.

        Raises:
            EngineError: the engine refused the request or died.
        """

    async def pause(self) -> None:
        """Abort every request in flight (each returns its partial from `generate`) and stop scheduling."""

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load a verified safetensors file as `manifest.version`; clear prefix and KV caches. Only between pause and resume.

        Raises:
            EnginePoisoned: the update failed part-way or its result is unknown.
        """

    async def resume(self) -> None:
        """Schedule again. Until the probe passed, only `score` may be called."""

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probability of tokens[1:] under the loaded weights at temperature 1 (raw prompt log-probabilities)."""

    async def shutdown(self) -> None:
        """Stop the engine and every process it started."""
