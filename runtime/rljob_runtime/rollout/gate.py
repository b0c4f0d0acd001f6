"""The worker's gate: what stands between episodes and the engine while the weight version changes.

Open, requests pass. Shut, none is admitted, those in flight were aborted and have come back with their tokens, and each
waits to go on as prompt + tokens under the next version. An episode sees one `generate` that returns when its turn is
complete, however often it was interrupted. Between `shut` and `open` belongs only: apply, resume, probe (invariant 8), and
on the interruption route the time for which a barrier holds it shut, which is counted by itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from rljob_api.errors import DeadlineExceeded, EngineError
from rljob_runtime.rollout.engine import Generation, GenerationRequest, InferenceEngine, Progress, Sampled
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.tally import Tally

PAUSES_KEPT = 64
PAUSE_AGAIN_SECONDS = 0.5
"""A request that entered the engine while it was pausing is queued there and never returns: it needs another pause."""
MAX_SPURIOUS_ABORTS = 100
"""Aborts in a row without a pause or a token before the engine counts as broken."""


Finish = Literal["stop", "length", "aborted"]


class Gate:
    """Starts shut: the first version opens it.

    `clock` gives monotonic seconds. `generation_seconds` bounds one request in the engine: no wait without a deadline;
    `spurious_abort_seconds` is what the wait after an abort that nobody ordered grows by. `progress_tokens`: a longer turn's
    tokens reach its partial while it is generated, each time that many are new; 0: only when the engine returns.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        tally: Tally,
        clock: Callable[[], float],
        *,
        generation_seconds: float = 3600.0,
        spurious_abort_seconds: float = 0.01,
        progress_tokens: int = 0,
    ) -> None:
        self._engine = engine
        self._tally = tally
        self._clock = clock
        self._generation_seconds = generation_seconds
        self._spurious_abort_seconds = spurious_abort_seconds
        self._progress_tokens = progress_tokens
        self._shutting = asyncio.Lock()
        self._opened = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_engine = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._shut_at: float | None = None
        self._held_at: float | None = None
        self._held_seconds = 0.0
        self._held_before = 0.0
        """`held_seconds` when the gate was shut."""
        self._partials: set[PartialRollout] = set()
        self._pauses: deque[float] = deque(maxlen=PAUSES_KEPT)

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    @property
    def in_engine(self) -> int:
        """Requests in the engine right now."""
        return self._in_engine

    @property
    def tokens_in_flight(self) -> int:
        """Model tokens held in unfinished trajectories right now."""
        return sum(partial.num_model_tokens for partial in self._partials)

    @property
    def busy_seconds(self) -> float:
        """Time with at least one request in the engine, since the start."""
        return self._busy_seconds + (self._clock() - self._busy_since if self._in_engine else 0.0)

    @property
    def pause_seconds(self) -> tuple[float, ...]:
        """How long the gate was shut at each of the last interruptions, oldest first."""
        return tuple(self._pauses)

    @property
    def held_seconds(self) -> float:
        """Time for which the gate was held shut for something else than a swap, since the start."""
        return self._held_seconds + (0.0 if self._held_at is None else self._clock() - self._held_at)

    def hold(self, is_held: bool) -> None:
        """From now on the time behind the shut gate counts as held, or no longer; it is no pause then."""
        if is_held and self._held_at is None:
            self._held_at = self._clock()
        elif not is_held:
            self._held_seconds, self._held_at = self.held_seconds, None

    @contextmanager
    def partial(self) -> Iterator[PartialRollout]:
        """A new partial rollout, in flight until the block ends; its end says in the tally where the tokens went."""
        partial = PartialRollout()
        self._partials.add(partial)
        try:
            yield partial
        finally:
            self._partials.discard(partial)

    async def generate(self, request: GenerationRequest, partial: PartialRollout) -> Finish:
        """One whole model turn, appended to `partial` as it comes; how it ended, never "aborted".

        Waits while the gate is shut. A cancelled caller
        aborts the request; what was taken before stays in `partial`.

        Raises:
            EngineError: the engine refused the request, died, or does not get anywhere.
        """
        attempts = 0
        tokens: tuple[int, ...] = ()
        spurious = 0

        def take(sampled: Sampled) -> None:
            nonlocal tokens
            self._tally.partials_continued += partial.take(sampled)
            self._tally.tokens_generated += len(sampled.tokens)
            tokens += sampled.tokens

        while True:
            while not self._opened.is_set():  # it may have shut again before this task came to run
                await self._opened.wait()
            attempt = replace(
                request,
                request_id=f"{request.request_id}-{attempts}",
                prompt=request.prompt + tokens,
                max_tokens=request.max_tokens - len(tokens),
            )
            before = len(tokens)
            wants_progress = 0 < self._progress_tokens < attempt.max_tokens
            progress = Progress(self._progress_tokens, take) if wants_progress else None
            part = await self._submit(attempt, progress)
            take(part)
            attempts += 1
            finish = _finish(part, tokens, request)
            if finish != "aborted":
                return finish
            if self.is_open:
                self._tally.spurious_aborts += 1
                spurious = 0 if len(tokens) > before else spurious + 1
                if spurious > MAX_SPURIOUS_ABORTS:
                    raise EngineError(
                        f"the engine aborted request {request.request_id} {spurious} times though nobody paused it"
                    )
                await asyncio.sleep(self._spurious_abort_seconds * spurious)

    async def shut(self, deadline_seconds: float) -> None:
        """Admit nothing more, abort what is in flight and wait until all of it came back with its tokens.

        Shut already, it pauses the engine again.

        Raises:
            DeadlineExceeded: requests are still in the engine; it must be restarted.
            EngineError: the engine could not pause.
        """
        if self._opened.is_set():
            self._opened.clear()
            self._shut_at, self._held_before = self._clock(), self.held_seconds
        try:
            async with asyncio.timeout(deadline_seconds), self._shutting:
                while True:
                    await self._engine.pause()
                    try:
                        async with asyncio.timeout(PAUSE_AGAIN_SECONDS):
                            await self._idle.wait()
                    except TimeoutError:
                        continue
                    return
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._in_engine} requests did not return within {deadline_seconds:g} s of the engine's pause"
            ) from error

    def open(self, *, is_interruption: bool = True) -> None:
        """Let requests pass again: the version is loaded and proven.

        Counts the interruption that ends here; it is none where the version is the one from before.
        """
        if self._opened.is_set():
            return
        self.hold(False)
        if self._shut_at is not None and is_interruption:
            self._pauses.append(self._clock() - self._shut_at - (self._held_seconds - self._held_before))
            self._tally.interruptions += 1
            for partial in self._partials:
                if partial.num_model_tokens:
                    partial.interruptions += 1
                    self._tally.tokens_salvaged += partial.num_model_tokens
        self._shut_at = None
        self._opened.set()

    async def _submit(self, request: GenerationRequest, progress: Progress | None) -> Generation:
        if self._in_engine == 0:
            self._busy_since = self._clock()
            self._idle.clear()
        self._in_engine += 1
        try:
            async with asyncio.timeout(self._generation_seconds):
                return await self._engine.generate(request, progress)
        except TimeoutError as error:
            raise EngineError(
                f"request {request.request_id} did not end within {self._generation_seconds:g} s"
            ) from error
        finally:
            self._in_engine -= 1
            if self._in_engine == 0:
                self._busy_seconds += self._clock() - self._busy_since
                self._idle.set()


def _finish(part: Generation, tokens: tuple[int, ...], request: GenerationRequest) -> Finish:
    """How the turn stands: an abort that lands on its last token leaves nothing to go on with."""
    if part.finish != "aborted":
        return part.finish
    if tokens and tokens[-1] in request.stop_token_ids:
        return "stop"
    return "length" if len(tokens) >= request.max_tokens else "aborted"
