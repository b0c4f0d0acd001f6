"""An engine that samples from a script: which token comes at a position is known before, so nothing can hide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rljob_api.errors import EngineError
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, Sampled, VersionSpan


def logprob_of(version: int, position: int) -> float:
    """Log-probability that the fake reports: names version and position, so a swapped or repeated one shows."""
    return -float(version + 1) - position / 1024


class ScriptedEngine:
    """Samples `script(position)` at each position of the sequence, one token at a time.

    `stop_at(n)` holds generation back once n tokens were sampled in all, until it is paused: an interruption at exactly
    that token. Records what was asked of it in `events` and `prompts`.
    """

    def __init__(self, script: Callable[[int], int], version: int = 0) -> None:
        self.script = script
        self.version = version
        self.events: list[str] = []
        self.prompts: list[tuple[int, ...]] = []
        self.sampled = 0
        self.in_flight = 0
        self.held = asyncio.Event()
        self.abort_next = 0
        self.deaf_pauses = 0
        self.token_seconds = 0.0
        self._stops: list[int] = []
        self._pause = asyncio.Event()

    def stop_at(self, *counts: int) -> None:
        self._stops = sorted(counts)

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        self.events.append(f"generate:{request.request_id}")
        self.prompts.append(request.prompt)
        self.in_flight += 1
        pause = self._pause
        tokens: list[int] = []
        logprobs: list[float] = []

        given = 0

        def since_last() -> Sampled:
            count = len(tokens) - given
            spans = (VersionSpan(self.version, 0, count),) if count else ()
            return Sampled(tuple(tokens[given:]), tuple(logprobs[given:]), spans)

        def result(finish: str) -> Generation:
            rest = since_last()
            return Generation(rest.tokens, rest.logprobs, rest.spans, finish)  # type: ignore[arg-type]

        try:
            if self.abort_next:
                self.abort_next -= 1
                return result("aborted")
            while True:
                if self._stops and self.sampled >= self._stops[0]:
                    self.held.set()
                    await pause.wait()
                if pause.is_set():
                    return result("aborted")
                position = len(request.prompt) + len(tokens)
                tokens.append(self.script(position))
                logprobs.append(logprob_of(self.version, position))
                self.sampled += 1
                if tokens[-1] in request.stop_token_ids:
                    return result("stop")
                if len(tokens) == request.max_tokens:
                    return result("length")
                if progress is not None and len(tokens) - given >= progress.every_tokens:
                    progress.take(since_last())
                    given = len(tokens)
                await asyncio.sleep(self.token_seconds)
        finally:
            self.in_flight -= 1

    async def pause(self) -> None:
        self.events.append("pause")
        if self.deaf_pauses:
            self.deaf_pauses -= 1
            return
        if self._stops and self.held.is_set():
            self._stops.pop(0)
            self.held.clear()
        self._pause.set()
        await asyncio.sleep(0)

    async def resume(self) -> None:
        self.events.append("resume")
        self._pause = asyncio.Event()

    def load(self, version: int) -> None:
        self.events.append(f"load:{version}")
        if self.in_flight:
            raise EngineError("a version was loaded while requests were in flight")
        self.version = version


class DeadEngine(ScriptedEngine):
    """Refuses every request, as an engine whose process died."""

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        raise EngineError("the engine process died")


class FakeEngine(ScriptedEngine):
    """The whole Protocol: loads a "version" from a file that holds its number, and scores a probe accordingly."""

    def __init__(self, script: Callable[[int], int]) -> None:
        super().__init__(script, version=-1)
        self.scores_wrong = False
        self.die = False

    async def start(self) -> None:
        self.events.append("start")

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        if self.die:
            raise EngineError("the engine process died")
        return await super().generate(request, progress)

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        if not self._pause.is_set():
            raise EngineError("apply outside pause and resume")
        if int(weights.read_text()) != manifest.version:
            raise EngineError("the file holds another version")
        self.load(manifest.version)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        self.events.append("score")
        if self.in_flight or self._pause.is_set():
            raise EngineError("score while paused or with requests in flight")
        return probe_logprobs(self.version + self.scores_wrong, len(tokens) - 1)

    async def shutdown(self) -> None:
        self.events.append("shutdown")


def probe_logprobs(version: int, count: int) -> tuple[float, ...]:
    """What the fake says of a probe under a version."""
    return tuple(-0.5 * (version + 1) - i for i in range(count))
