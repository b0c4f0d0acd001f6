"""vLLM's AsyncLLM behind the engine Protocol; written for the APIs of 0.32 and 0.33.

vLLM and its processes trust their caller in ways that end the engine or, worse, quietly sample from wrong weights. Each
guard here answers one of them: token ids outside the vocabulary, updates beside running requests, fused layers loaded in
part, tied output layers (vllm_weights.py), prefix caches that outlive an update, requests that arrive while it is paused.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import AutoConfig

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, Sampled, VersionSpan
from rljob_runtime.rollout.vllm_environment import prepare_environment
from rljob_runtime.rollout.weight_file import ExpectedTensors, check_weight_file, expected_tensors

R = TypeVar("R")

CPU_MIN_KV_CACHE_BYTES = 64 << 20
CPU_MAX_KV_CACHE_BYTES = 1 << 30
"""Left to itself vLLM takes 0.92 of the machine's memory and writes zeros to all of it."""
CPU_BLOCK_SIZE = 32
"""Tokens. Only whole blocks are reused, and 128, the default on a CPU, is longer than most turns."""
CPU_MIN_BATCHED_TOKENS = 4096
LATE_ABORT_SECONDS = 0.1
KILLED_SECONDS = 5.0
MAX_SEED = 1 << 31


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """One engine's settings. Lengths in tokens, sizes in bytes."""

    max_model_len: int
    """Prompt and answer together; `score` takes one token less."""
    max_num_seqs: int
    compute_type: Literal["Float32", "BFloat16"]
    kv_cache_bytes: int | None = None
    """None: vLLM's share of a GPU; on a CPU what `max_num_seqs` requests of full length need, from 64 MiB to 1 GiB."""
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    """On a CPU the engine is always eager."""
    seed: int = 0
    """Of the engine's sampler. Engines of equal seeds sample alike: give each its own."""
    repack_tied: bool = True
    """False serves tied models with the output layer of an older version on a CPU; only for proving that a probe sees it."""


class VllmEngine:
    """One AsyncLLM with its processes; see `engine.InferenceEngine` for the order of calls.

    `GenerationRequest.seed` is not used: vLLM would start the same random numbers again for the rest of an interrupted
    answer. Every call may raise EngineError; after the engine's process died, every call does.
    """

    def __init__(self, model_directory: Path, settings: VllmSettings) -> None:
        self._directory = model_directory
        self._settings = settings
        self._started: Any = None
        self._building: asyncio.Future[None] | None = None
        self._sampling: Callable[..., Any]
        self._delta: Any = None
        """The kind of output that brings tokens as they come, each once."""
        self._processes: tuple[BaseProcess, ...] = ()
        self._rendezvous: tuple[Path, ...] = ()
        self._expected: ExpectedTensors | None = None
        self._vocabulary = range(0)
        self._numbers = itertools.count()
        self._in_flight: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._paused = False
        self._loaded: int | None = None
        self._loading: int | None = None
        """Version whose update was begun and not finished. Stays set when it failed: the layers are then half loaded."""

    async def start(self) -> None:
        """Start with dummy weights; the folder needs config.json and, for others, the tokenizer's files.

        Importing and building take 10 s and more, in a thread, so that leases and heartbeats go on.

        Raises:
            EngineError: the model or the settings are not usable, or the engine's process ended.
        """
        try:
            self._building = asyncio.ensure_future(asyncio.to_thread(self._build))
            await asyncio.shield(self._building)
            from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

            transfer = WeightTransferInitRequest(init_info={"repack": self._settings.repack_tied})
            await self._llm.init_weight_transfer_engine(transfer)
            addresses = await self._llm.collective_rpc("rendezvous_address")
            self._rendezvous = tuple(Path(a.removeprefix("file://")) for a in addresses if a.startswith("file://"))
            self._vocabulary = range(int(self._llm.model_config.get_vocab_size()))
        except Exception as error:  # vLLM starts processes and reads models: it raises whatever they raise
            await self.shutdown()
            raise EngineError(f"vLLM did not start with {self._directory}: {_text(error)}") from error

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        """Run one request to its end, or until `pause` aborts it; stops at `stop_token_ids` only.

        vLLM says only at the end which version sampled the tokens. Those that `progress` takes before carry the loaded
        version, which cannot change beside a request; the end must confirm it.
        """
        given, loaded = 0, self._loaded

        def take(output: Any) -> None:
            nonlocal given
            (part,) = output.outputs
            tokens = tuple(int(token) for token in part.token_ids)
            if progress is None or loaded is None or not tokens:
                return
            given += len(tokens)
            spans = (VersionSpan(loaded, 0, len(tokens)),)
            progress.take(Sampled(tokens, _logprobs_of(tokens, part.logprobs or ()), spans))

        streamed: dict[str, Any] = {}
        if progress is not None and loaded is not None:
            streamed = {"output_kind": self._delta, "stream_interval": progress.every_tokens}
        output = await self._run(
            request.request_id,
            request.prompt,
            take,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            **streamed,
        )
        if output is None:
            return Generation(tokens=(), logprobs=(), spans=(), finish="aborted")
        (answer,) = output.outputs
        tokens = tuple(int(token) for token in answer.token_ids)
        if (tokens or given) and not answer.weight_versions:
            raise EngineError(f"request {request.request_id}: the engine does not say which version sampled its tokens")
        return Generation(
            tokens=tokens,
            logprobs=_logprobs_of(tokens, answer.logprobs or ()),
            spans=_spans_after(given, loaded, answer.weight_versions or ()),
            finish=_finish(answer.finish_reason),
        )

    async def pause(self) -> None:
        """Abort what is in flight, clear the caches and stop scheduling; returns once every `generate` has its partial."""
        self._paused = True
        # AsyncLLM.pause_generation makes this same call, then sleeps 20 ms so that outputs may arrive: we see them arrive.
        await self._call("pause", self._llm.engine_core.pause_scheduler_async(mode="abort", clear_cache=True))
        while self._in_flight:
            try:
                async with asyncio.timeout(LATE_ABORT_SECONDS):
                    await self._idle.wait()
            except TimeoutError:
                # What was still on its way when the engine paused is queued there until the resume: abort it by name.
                await self._call("abort", self._llm.abort(tuple(self._in_flight)))

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load `weights` as `manifest.version`.

        Raises:
            EngineError: requests are in flight, or the file is not that of this model; the engine is as it was.
            EnginePoisoned: the update had begun and failed; the next request would end the engine.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._refuse_unless_loaded()
        if self._expected is None:
            raise EngineError("weights were to be loaded before the engine was started")
        check_weight_file(weights, self._expected)
        if self._in_flight:  # vLLM's layers are empty during an update, and a step over them ends the engine
            raise EngineError(f"version {manifest.version} was to be loaded beside {len(self._in_flight)} requests")
        self._loading = manifest.version
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
            await self._llm.finish_weight_update(str(manifest.version))
            cleared = await self._llm.reset_prefix_cache()
        except Exception as error:  # whatever it was, the layers may be half loaded now
            raise EnginePoisoned(f"loading version {manifest.version} failed part-way: {_text(error)}") from error
        if not cleared:
            raise EnginePoisoned(f"the prefix cache was not cleared after version {manifest.version} was loaded")
        self._loaded, self._loading = manifest.version, None

    async def resume(self) -> None:
        """Schedule again."""
        await self._call("resume", self._llm.resume_generation())
        self._paused = False

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probabilities of tokens[1:]: vLLM's are raw for prompts, whatever temperature a request has."""
        output = await self._run("score", tokens, temperature=1.0, max_tokens=1, prompt_logprobs=0)
        if output is None or _finish(output.outputs[0].finish_reason) == "aborted":
            raise EngineError("scoring was interrupted by a pause")
        return _logprobs_of(tokens[1:], (output.prompt_logprobs or [None])[1:])

    async def shutdown(self) -> None:
        """Stop the engine and its processes; a request in flight ends as aborted. Idempotent.

        After a cancelled `start` it waits for what that was building: a thread cannot be stopped, only its result.
        """
        if self._building is not None:
            await asyncio.wait({self._building})
        llm, self._started = self._started, None
        if llm is None:
            return
        try:
            await self._call("abort", llm.abort(tuple(self._in_flight)))
        except EngineError:
            pass  # it died before, and took its requests with it
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # or it logs the engine's death as an error
        await asyncio.to_thread(_stop, llm, self._processes)
        del llm
        for path in self._rendezvous:  # vLLM leaves it in the temporary folder
            path.unlink(missing_ok=True)
        gc.collect()  # AsyncLLM is part of reference cycles, and its finaliser fails if the interpreter's end calls it

    @property
    def _llm(self) -> Any:
        if self._started is None:
            raise EngineError("the engine is not running: it was not started, or was shut down")
        return self._started

    def _refuse_unless_loaded(self) -> None:
        if self._loading is not None:
            raise EnginePoisoned(f"version {self._loading} was begun to be loaded and not finished: restart the engine")

    def _build(self) -> None:
        on_gpu = torch.cuda.is_available()
        prepare_environment(on_gpu=on_gpu)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM

        from rljob_runtime.rollout.vllm_weights import BACKEND, WeightWorker

        settings = self._settings
        arguments: dict[str, Any] = {
            "model": str(self._directory),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": settings.compute_type.lower(),
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
            "enforce_eager": settings.enforce_eager,
            "seed": settings.seed % MAX_SEED,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "worker_extension_cls": f"{WeightWorker.__module__}.{WeightWorker.__qualname__}",
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        }
        if not on_gpu:
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": settings.kv_cache_bytes or _cpu_kv_cache_bytes(self._directory, settings),
                "block_size": CPU_BLOCK_SIZE,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_MIN_BATCHED_TOKENS, settings.max_model_len),
            }
        # Made for each request and nowhere kept: vLLM needs no deep copy of it, a fifth of the front end's time.
        self._sampling = partial(
            SamplingParams, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True
        )
        self._delta = RequestOutputKind.DELTA
        self._expected = expected_tensors(self._directory)
        before = set(multiprocessing.active_children())
        # Kept here only: what a thread returns stays in its future, and is finalised at the interpreter's end.
        self._started = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._processes = tuple(process for process in multiprocessing.active_children() if process not in before)

    async def _run(
        self, name: str, prompt: tuple[int, ...], take: Callable[[Any], None] | None = None, **sampling: Any
    ) -> Any:
        """Submit, and wait for the output at the end; None where a paused engine did not take the request.

        `take` gets the outputs before, where the request's kind has any.
        """
        unknown = [token for token in prompt if token not in self._vocabulary]
        if unknown:  # without a tokenizer vLLM does not look, and the lookup ends the engine with all its requests
            raise EngineError(
                f"request {name}: token {unknown[0]} is not among the {len(self._vocabulary)} of the model"
            )
        self._refuse_unless_loaded()
        request_id = f"{name}-{next(self._numbers)}"
        self._in_flight.add(request_id)
        self._idle.clear()
        try:
            return await self._call(f"request {name}", self._final_output(request_id, prompt, take, sampling))
        finally:
            self._in_flight.discard(request_id)
            if not self._in_flight:
                self._idle.set()

    async def _final_output(
        self, request_id: str, prompt: tuple[int, ...], take: Callable[[Any], None] | None, sampling: dict[str, Any]
    ) -> Any:
        from vllm.v1.engine.exceptions import EngineGenerateError

        # Typed "token", the prompt is taken as it is; a bare list would go through the tokenizer's thread.
        tokens = {"type": "token", "prompt_token_ids": list(prompt)}
        last = None
        try:
            async for output in self._llm.generate(tokens, self._sampling(**sampling), request_id):
                last = output
                if take is not None and not output.finished:
                    take(output)
        except EngineGenerateError:
            # From 0.33 on an engine refuses what reaches it after its pause; 0.32 queues it, and `pause` aborts it.
            if self._paused:
                return None
            raise
        if last is None:
            raise EngineError(f"request {request_id} ended without an output")
        return last

    async def _call(self, what: str, call: Awaitable[R]) -> R:
        from vllm.exceptions import VLLMError

        try:
            return await call
        except (VLLMError, ValueError, RuntimeError) as error:
            raise EngineError(f"{what}: {_text(error)}") from error


def _cpu_kv_cache_bytes(directory: Path, settings: VllmSettings) -> int:
    """Room for all sequences at full length within the bounds, and always for one of them."""
    config = AutoConfig.from_pretrained(directory)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element_bytes = 4 if settings.compute_type == "Float32" else 2
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * element_bytes
    sequence_bytes = (settings.max_model_len + 2 * CPU_BLOCK_SIZE) * token_bytes
    wanted = min(settings.max_num_seqs * sequence_bytes, CPU_MAX_KV_CACHE_BYTES)
    return int(max(wanted, sequence_bytes, CPU_MIN_KV_CACHE_BYTES))


def _stop(llm: Any, processes: Sequence[BaseProcess]) -> None:
    llm.shutdown()
    for process in processes:  # vLLM kills what has not ended in time, and does not wait for its end
        process.join(KILLED_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _logprobs_of(tokens: tuple[int, ...], entries: Any) -> tuple[float, ...]:
    if len(entries) != len(tokens):
        raise EngineError(f"the engine returned {len(entries)} log-probabilities for {len(tokens)} tokens")
    return tuple(float(entry[token].logprob) for token, entry in zip(tokens, entries, strict=True))


def _spans_after(given: int, loaded: int | None, spans: Any) -> tuple[VersionSpan, ...]:
    """Those of the tokens from `given` on, counted from there; the ones before must be of the loaded version.

    Raises:
        EngineError: tokens were given away under a version that did not sample them.
    """
    whole = [VersionSpan(_version(span.version), int(span.start), int(span.end)) for span in spans]
    wrong = [span for span in whole if span.start < given and span.version != loaded]
    if wrong:
        raise EngineError(
            f"tokens were sampled under version {wrong[0].version} while version {loaded} was the loaded one"
        )
    return tuple(
        VersionSpan(span.version, max(0, span.start - given), span.end - given) for span in whole if span.end > given
    )


def _version(label: str) -> int:
    if not label.isdecimal():
        raise EngineError(f"tokens were sampled under the label {label!r}, which no loaded version has")
    return int(label)


def _finish(reason: str | None) -> Literal["stop", "length", "aborted"]:
    match reason:
        case "stop" | "length":
            return reason
        case "abort":
            return "aborted"
        case _:
            raise EngineError(f"the engine ended a request with reason {reason!r}")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
