"""A SIMULATED engine for protocol and scale tests: the Protocol of a real one, with fixed device times.

It samples from the loaded weights with the real architecture on the CPU, so log-probabilities match the trainer's, and
sleeps for the device times it is given. Sampling uses a counter-based generator keyed by (seed, position): what a
request yields depends neither on the batch it runs in nor on interruptions, as long as the weights stay the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.pools import SimulatedEngine as SimulatedTimes
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, VersionSpan

DUMMY_SCALE = 1e-3


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    done: asyncio.Future[Generation]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version: int = -1

    def generation(self, finish: Literal["stop", "length", "aborted"]) -> Generation:
        spans = (VersionSpan(self.version, 0, len(self.tokens)),) if self.tokens else ()
        return Generation(tuple(self.tokens), tuple(self.logprobs), spans, finish)


class SimulatedEngine:
    """Steps all requests in flight together, one token a step."""

    def __init__(self, model_directory: Path, times: SimulatedTimes, *, batch_invariant: bool = False) -> None:
        self._directory = model_directory
        self._times = times
        self._batch_invariant = batch_invariant
        self._running: dict[str, _Running] = {}
        self._wake = asyncio.Event()
        self._paused = True
        self._version: int | None = None
        self._stepper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the architecture with dummy weights."""
        config = AutoConfig.from_pretrained(self._directory)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self._vocab_size = int(config.vocab_size)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.uniform_(-DUMMY_SCALE, DUMMY_SCALE)
        self._stepper = asyncio.create_task(self._step_for_ever())

    async def generate(self, request: GenerationRequest) -> Generation:
        """Run one request."""
        if self._version is None:
            raise EngineError("the simulated engine holds dummy weights: no version was applied yet")
        if not all(0 <= token < self._vocab_size for token in request.prompt):
            raise EngineError(
                f"request {request.request_id}: a prompt token is outside the vocabulary of {self._vocab_size}"
            )
        if self._times.prefill_seconds:
            await asyncio.sleep(self._times.prefill_seconds)
        running = _Running(request, asyncio.get_running_loop().create_future(), version=self._version)
        if self._paused:
            return running.generation("aborted")
        self._running[request.request_id] = running
        self._wake.set()
        try:
            return await running.done
        finally:
            self._running.pop(request.request_id, None)

    async def pause(self) -> None:
        """Return every partial."""
        self._paused = True
        for running in list(self._running.values()):
            if not running.done.done():
                running.done.set_result(running.generation("aborted"))
        self._running.clear()

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load a version."""
        if not self._paused:
            raise EngineError("weights were applied while the engine was running: pause it first")
        if self._times.load_seconds:
            await asyncio.sleep(self._times.load_seconds)
        try:
            state = load_file(weights)
            missing, unexpected = self._model.load_state_dict(state, strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise EnginePoisoned(f"version {manifest.version} could not be loaded: {error}") from error
        tied = bool(self._model.config.tie_word_embeddings)
        if unexpected or (set(missing) - ({"lm_head.weight"} if tied else set())):
            raise EnginePoisoned(
                f"version {manifest.version}: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
            )
        self._version = manifest.version

    async def resume(self) -> None:
        """Schedule again."""
        self._paused = False

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probabilities of tokens[1:] at temperature 1."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return tuple(logprobs.tolist())

    async def shutdown(self) -> None:
        """Stop stepping."""
        await self.pause()
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.gather(self._stepper, return_exceptions=True)

    async def _step_for_ever(self) -> None:
        while True:
            if not self._running:
                self._wake.clear()
                await self._wake.wait()
            started = time.monotonic()
            batch = [running for running in self._running.values() if not running.done.done()]
            if batch:
                self._sample(batch)
            await asyncio.sleep(max(0.0, self._times.decode_seconds - (time.monotonic() - started)))

    def _sample(self, batch: list[_Running]) -> None:
        groups = [[running] for running in batch] if self._batch_invariant else [batch]
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
        position = len(request.prompt) + len(running.tokens)
        cumulative_V = torch.cumsum(logprobs_V.double().exp(), 0)
        drawn = uniform(request.seed or 0, position) * float(cumulative_V[-1])
        token = min(int(torch.searchsorted(cumulative_V, drawn, right=True)), self._vocab_size - 1)
        running.tokens.append(token)
        running.logprobs.append(float(logprobs_V[token]))
        if token in request.stop_token_ids:
            running.done.set_result(running.generation("stop"))
        elif len(running.tokens) >= request.max_tokens:
            running.done.set_result(running.generation("length"))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same (seed, position)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
