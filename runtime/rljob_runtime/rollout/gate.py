"""The worker's gate: every generation passes it, and a version change shuts it (invariant 8 of docs/design.md).

    produces    finished generations, with the tokens of every partial kept
    consumes    requests of the episodes
    waits for   the gate to be open; while shutting, the partials of all requests in flight, with a deadline
    unblocked by  `open`, called once the probe passed

A generation that is cut off keeps its tokens and goes on as prompt + tokens when the gate opens again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rljob_api.errors import DeadlineExceeded, EngineError
from rljob_runtime.rollout.engine import GenerationRequest, InferenceEngine

MAX_SPURIOUS_ABORTS = 100


@dataclass(slots=True)
class GateCounters:
    """Tokens, as the gate saw them."""

    tokens_generated: int = 0
    tokens_salvaged: int = 0
    spurious_aborts: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished model turn; lengths are equal."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stopped: bool
    """True when a stop token ended it (the last token), False at the length bound."""


@dataclass(slots=True)
class PartialTurn:
    """A model turn in the making; its episode holds it, so that nothing is lost whatever ends the wait."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]

    @classmethod
    def empty(cls) -> PartialTurn:
        return cls([], [], [])


class Gate:
    """Shut at first: an engine starts with dummy weights."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._open = asyncio.Event()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ids = itertools.count()
        self._busy_seconds = 0.0
        self._busy_since: float | None = None
        self.counters = GateCounters()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    @property
    def in_flight(self) -> int:
        """Requests that the engine holds."""
        return self._in_flight

    def busy_seconds(self, now: float) -> float:
        """Time with at least one request in flight."""
        return self._busy_seconds + (0.0 if self._busy_since is None else now - self._busy_since)

    async def turn(
        self,
        partial: PartialTurn,
        *,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float,
        stop_token_ids: tuple[int, ...],
        seed: int | None,
    ) -> Turn:
        """Generate a model turn to its end, over any number of interruptions; tokens are added to `partial` as they come.

        Raises:
            EngineError: the engine refused the request or died.
        """
        spurious = 0
        while True:
            await self._open.wait()
            request = GenerationRequest(
                request_id=f"g{next(self._ids)}",
                prompt=(*prompt, *partial.tokens),
                max_tokens=max_tokens - len(partial.tokens),
                temperature=temperature,
                stop_token_ids=stop_token_ids,
                seed=seed,
            )
            self._enter()
            try:
                generation = await self._engine.generate(request)
            finally:
                self._leave()
            partial.tokens += generation.tokens
            partial.logprobs += generation.logprobs
            for span in generation.spans:
                partial.versions += [span.version] * (span.end - span.start)
            if not len(partial.tokens) == len(partial.logprobs) == len(partial.versions):
                raise EngineError(
                    f"the engine returned {len(partial.tokens)} tokens, {len(partial.logprobs)} log-probabilities and "
                    f"{len(partial.versions)} version labels: a token without a version cannot be trained"
                )
            self.counters.tokens_generated += len(generation.tokens)
            stopped = bool(partial.tokens) and partial.tokens[-1] in stop_token_ids
            if generation.finish != "aborted" or stopped or len(partial.tokens) >= max_tokens:
                return Turn(tuple(partial.tokens), tuple(partial.logprobs), tuple(partial.versions), stopped)
            self.counters.tokens_salvaged += len(partial.tokens)
            if self._open.is_set():
                spurious += 1
                self.counters.spurious_aborts += 1
                if spurious > MAX_SPURIOUS_ABORTS:
                    raise EngineError(f"the engine aborted a request {spurious} times although nobody paused it")

    async def shut(self, *, deadline_seconds: float) -> None:
        """Admit nothing more, abort what is in flight and wait until every partial came back.

        Raises:
            DeadlineExceeded: a request did not return.
        """
        self._open.clear()
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._engine.pause()
                await self._idle.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._in_flight} requests did not return within {deadline_seconds:g} s of the engine's pause"
            ) from error

    def open(self) -> None:
        """Let generation go on: only after the probe passed."""
        self._open.set()

    def _enter(self) -> None:
        if self._in_flight == 0:
            self._busy_since = asyncio.get_running_loop().time()
        self._in_flight += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            now = asyncio.get_running_loop().time()
            self._busy_seconds += now - (now if self._busy_since is None else self._busy_since)
            self._busy_since = None
            self._idle.set()
