"""A SIMULATED engine for protocol and scale tests: the Protocol of a real one, with fixed device times.

It samples from the loaded weights with the real architecture on the CPU in fp32, so log-probabilities match the
trainer's, and sleeps for the device times it is given (not longer where computing took more). Sampling uses a
counter-based generator keyed by (seed, position): what a request yields depends neither on the batch it runs in nor on
interruptions, as long as the weights stay the same.

    produces    one token a step for every request in flight
    consumes    requests
    waits for   a request in flight, then for the device time of a step
    unblocked by  `generate`
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.pools import SimulatedEngine as SimulatedTimes
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, Sampled, VersionSpan
from rljob_runtime.rollout.weight_file import ExpectedTensors, check_weight_file, expected_tensors

DUMMY_WEIGHT = 1e-3


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    done: asyncio.Future[Generation]
    version: int
    ready_at: float
    """When its prefill is through, in seconds of `time.monotonic`."""
    progress: Progress | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    given: int = 0
    """Tokens that `progress` took."""

    def end(self, finish: Literal["stop", "length", "aborted"]) -> None:
        if not self.done.done():
            rest = self._since_last()
            self.done.set_result(Generation(rest.tokens, rest.logprobs, rest.spans, finish))

    def report(self) -> None:
        if self.progress is not None and len(self.tokens) - self.given >= self.progress.every_tokens:
            since = self._since_last()
            self.given = len(self.tokens)
            self.progress.take(since)

    def _since_last(self) -> Sampled:
        count = len(self.tokens) - self.given
        spans = (VersionSpan(self.version, 0, count),) if count else ()
        return Sampled(tuple(self.tokens[self.given :]), tuple(self.logprobs[self.given :]), spans)


class SimulatedEngine:
    """Steps all requests in flight together, one token a step. SIMULATED: its speed says nothing about a real engine."""

    def __init__(self, model_directory: Path, times: SimulatedTimes) -> None:
        self._directory = model_directory
        self._times = times
        self._model: Any = None
        self._expected: ExpectedTensors | None = None
        self._vocab_size = 0
        self._running: dict[str, _Running] = {}
        self._wake = asyncio.Event()
        self._paused = False
        self._version: int | None = None
        self._unusable: str | None = "the simulated engine holds dummy weights: no version was applied yet"
        self._stepper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the architecture with dummy weights."""
        try:
            config = AutoConfig.from_pretrained(self._directory)
            self._expected = expected_tensors(self._directory)
            with torch.random.fork_rng(devices=[]):
                self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise EngineError(f"the simulated engine could not start on {self._directory}: {error}") from error
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(DUMMY_WEIGHT)
        self._vocab_size = int(config.vocab_size)
        self._stepper = asyncio.create_task(self._step_for_ever(), name="simulated-engine")

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        """Run one request."""
        if self._unusable is not None:
            raise EngineError(f"request {request.request_id} was refused: {self._unusable}")
        if self._version is None or request.request_id in self._running:
            raise EngineError(f"request {request.request_id} was refused: its id is in use")
        if not all(0 <= token < self._vocab_size for token in request.prompt):
            raise EngineError(
                f"request {request.request_id}: a prompt token is outside the vocabulary of {self._vocab_size}"
            )
        running = _Running(
            request,
            asyncio.get_running_loop().create_future(),
            version=self._version,
            ready_at=time.monotonic() + self._times.prefill_seconds,
            progress=progress,
        )
        if self._paused:
            running.end("aborted")
            return running.done.result()
        self._running[request.request_id] = running
        self._wake.set()
        try:
            return await running.done
        finally:
            self._running.pop(request.request_id, None)

    async def pause(self) -> None:
        """Return every partial."""
        self._paused = True
        for running in self._running.values():
            running.end("aborted")
        self._running.clear()

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load a version."""
        if not self._paused or self._expected is None:
            raise EngineError("weights were applied while the engine was running: pause it first")
        check_weight_file(weights, self._expected)
        self._unusable = f"version {manifest.version} was not loaded to its end"
        started = time.monotonic()
        try:
            self._model.load_state_dict(load_file(weights), strict=False)
        except (OSError, RuntimeError) as error:
            raise EnginePoisoned(f"version {manifest.version} could not be loaded: {error}") from error
        await _sleep_rest(self._times.load_seconds, started)
        self._version = manifest.version
        self._unusable = None

    async def resume(self) -> None:
        """Schedule again."""
        self._paused = False

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probabilities of tokens[1:] at temperature 1."""
        with torch.inference_mode():
            logits_TV = self._model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        logprobs_T = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return tuple(logprobs_T.tolist())

    async def shutdown(self) -> None:
        """Stop stepping."""
        await self.pause()
        self._unusable = "the simulated engine was shut down"
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.gather(self._stepper, return_exceptions=True)

    async def _step_for_ever(self) -> None:
        try:
            while True:
                await self._step()
        except (RuntimeError, ValueError, IndexError) as error:
            self._unusable = f"the simulated engine died: {error}"
            for running in self._running.values():
                if not running.done.done():
                    running.done.set_exception(EngineError(self._unusable))

    async def _step(self) -> None:
        if not self._running:
            self._wake.clear()
            await self._wake.wait()
            return  # a pause may have come between the request and this task's turn: look again
        started = time.monotonic()
        batch = [running for running in self._running.values() if running.ready_at <= started]
        if not batch:
            await asyncio.sleep(min(running.ready_at for running in self._running.values()) - started)
            return
        self._sample(batch)
        await _sleep_rest(self._times.decode_seconds, started)

    def _sample(self, batch: list[_Running]) -> None:
        groups = [[running] for running in batch] if self._times.batch_invariant else [batch]
        for group in groups:
            for running, logits_V in zip(group, self._next_logits(group), strict=True):
                self._extend(running, logits_V)

    def _next_logits(self, batch: list[_Running]) -> list[torch.Tensor]:
        rows = [[*running.request.prompt, *running.tokens] for running in batch]
        longest = max(map(len, rows))
        # Padding on the right is never attended to under a causal mask.
        tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            logits_BTV = self._model(tokens_BT, use_cache=False).logits
        return [logits_BTV[index, len(row) - 1].float() for index, row in enumerate(rows)]

    def _extend(self, running: _Running, logits_V: torch.Tensor) -> None:
        request = running.request
        logprobs_V = torch.log_softmax(logits_V / request.temperature, -1)
        if not torch.isfinite(logprobs_V).any():
            raise ValueError(f"log-probabilities after request {request.request_id} are not finite")
        position = len(request.prompt) + len(running.tokens)
        key = request.request_id if request.seed is None else str(request.seed)
        cumulative_V = torch.cumsum(logprobs_V.double().exp(), 0)
        drawn = uniform(key, position) * float(cumulative_V[-1])
        token = min(int(torch.searchsorted(cumulative_V, drawn, right=True)), self._vocab_size - 1)
        running.tokens.append(token)
        running.logprobs.append(float(logprobs_V[token]))
        if token in request.stop_token_ids:
            running.end("stop")
        elif len(running.tokens) >= request.max_tokens:
            running.end("length")
        if running.done.done():
            self._running.pop(request.request_id, None)
        else:
            running.report()


async def _sleep_rest(device_seconds: float, started: float) -> None:
    """Sleep until the device time is over; also where it is, let other tasks run."""
    await asyncio.sleep(max(0.0, device_seconds - (time.monotonic() - started)))


def uniform(key: str, position: int) -> float:
    """A number in [0, 1), the same for the same (key, position)."""
    digest = hashlib.blake2b(f"{key}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
