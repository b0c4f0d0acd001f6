"""vLLM's AsyncLLM in this process, behind the engine Protocol. Works with 0.32 (CPU wheel) and 0.33.

What it takes care of, each once found the hard way: tied embeddings, fused shards, seeds with chunked prefill (off on
CPUs), tokens outside the vocabulary (they kill the engine), the prefix cache after an update, engine-side version labels.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoConfig

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout import vllm_processes
from rljob_runtime.rollout.engine import Generation, GenerationRequest, VersionSpan
from rljob_runtime.rollout.vllm_environment import prepare_environment
from rljob_runtime.rollout.weight_file import ExpectedTensors, check_weight_file, expected_tensors

CPU_BLOCK_SIZE = 32
"""The CPU's default of 128 caches no prefix shorter than that."""
MIN_CPU_KV_CACHE_BYTES = 64 << 20
MAX_CPU_KV_CACHE_BYTES = 1 << 30
MIN_BATCHED_TOKENS = 4096
LATE_ABORT_SECONDS = 0.005
NOTHING = Generation((), (), (), "aborted")


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Engine settings of one worker."""

    max_model_len: int
    """Longest prompt and answer together, in tokens; `score` takes one less."""
    max_num_seqs: int
    compute_type: Literal["Float32", "BFloat16"]
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    seed: int = 0
    repack_tied: bool = True
    """Off only to show that the probe finds what goes wrong without it."""


class VllmEngine:
    """One AsyncLLM. `start` first; see `engine.InferenceEngine` for the order of calls."""

    def __init__(self, model_directory: Path, settings: VllmSettings) -> None:
        self._directory = model_directory
        self._settings = settings
        self._engine: Any = None
        self._vocab_size = 0
        self._expected: ExpectedTensors | None = None
        self._processes: frozenset[psutil.Process] = frozenset()
        self.rendezvous_files: tuple[Path, ...] = ()
        self._probes = itertools.count()
        self._in_flight: set[str] = set()
        self._idle = asyncio.Event()
        self._paused = False
        self._unusable: str | None = "no weight version was applied yet"

    async def start(self) -> None:
        """Start AsyncLLM with dummy weights from a folder with config and tokenizer files only."""
        before = vllm_processes.children()
        try:
            # In a thread: it takes seconds, and the worker's heartbeats must go on.
            await asyncio.to_thread(self._construct)
            self._processes = vllm_processes.children() - before
            from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

            await self._engine.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info={"repack_tied": self._settings.repack_tied})
            )
            self.rendezvous_files = tuple(
                Path(address.removeprefix("file://"))
                for address in await self._engine.collective_rpc("rendezvous_address")
                if address.startswith("file://")
            )
        except BaseException as error:
            self._processes = vllm_processes.children() - before
            await self.shutdown()
            if isinstance(error, (RuntimeError, ValueError, OSError, ImportError)):
                raise EngineError(f"vLLM could not start on {self._directory}: {error}") from error
            raise
        self._vocab_size = int(self._engine.model_config.get_vocab_size())

    async def generate(self, request: GenerationRequest) -> Generation:
        """Run one request to its end, or until `pause` aborts it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._unusable is not None:
            raise EngineError(f"request {request.request_id} was refused: {self._unusable}")
        self._check(request.prompt, request.request_id)
        sampling = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self._paused:
            return NOTHING
        result = await self._run(request.prompt, sampling, request.request_id)
        if result is None:
            return NOTHING
        output = result.outputs[0]
        tokens = tuple(int(token) for token in output.token_ids)
        logprobs = tuple(
            float(entry[token].logprob) for entry, token in zip(output.logprobs or (), tokens, strict=True)
        )
        spans = tuple(VersionSpan(_version(span.version), span.start, span.end) for span in output.weight_versions)
        return Generation(tokens, logprobs, spans, _finish(output.finish_reason))

    async def pause(self) -> None:
        """Abort everything in flight and stop scheduling; caches are cleared."""
        self._paused = True
        # Not `pause_generation`, which is this call and then always a sleep of 20 ms, longer than all the rest of a swap.
        pausing = self._engine.engine_core.pause_scheduler_async(mode="abort", clear_cache=True)
        await self._call("pause", pausing)
        # The partials are on their way to `generate` now. A request that reached the engine after its pause waits there
        # for the resume: it is aborted by name, but late, as that would cost the others the tokens still under way.
        while self._in_flight:
            self._idle.clear()
            try:
                async with asyncio.timeout(LATE_ABORT_SECONDS):
                    await self._idle.wait()
            except TimeoutError:
                await self._call("abort", self._engine.abort(list(self._in_flight)))

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load a version; everything that can be checked is checked before the engine is touched.

        Raises:
            EnginePoisoned: the engine does not hold the version now; nothing is generated with it any more.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if not self._paused or self._in_flight:
            raise EngineError("weights were applied while the engine was running: pause it first")
        if self._expected is None:
            raise EngineError("weights were applied before the engine was started")
        self._unusable = f"version {manifest.version} was not loaded to its end"
        try:
            check_weight_file(weights, self._expected)
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
            await self._engine.finish_weight_update(str(manifest.version))
            if not await self._engine.reset_prefix_cache():
                raise EngineError("the prefix cache could not be cleared: it holds keys and values of the old version")
        except (
            Exception
        ) as error:  # vLLM passes on any exception of its worker, and whatever it was, the weights are unknown
            raise EnginePoisoned(f"version {manifest.version}: {type(error).__name__}: {error}") from error
        self._unusable = None

    async def resume(self) -> None:
        """Schedule again."""
        await self._call("resume", self._engine.resume_generation())
        self._paused = False

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Prompt log-probabilities: raw, so at temperature 1 whatever the sampling. At most max_model_len - 1 tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check(tokens, "probe")
        if self._paused:
            raise EngineError("a paused engine scores nothing: resume it first")
        sampling = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._run(tokens, sampling, f"probe-{next(self._probes)}")
        scored = None if output is None else output.prompt_logprobs
        if scored is None or len(scored) != len(tokens):
            raise EngineError("the engine was paused before it had scored the probe")
        return tuple(float(entry[token].logprob) for entry, token in zip(scored[1:], tokens[1:], strict=True))

    async def shutdown(self) -> None:
        """Stop the engine and every process it started. May be called twice, and after the engine died."""
        self._unusable = "the engine was shut down"
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
        self._engine = None
        await asyncio.to_thread(vllm_processes.end, self._processes)
        # AsyncLLM is part of a reference cycle; collected only at the interpreter's exit, its finalizer fails there.
        gc.collect()
        self._processes = frozenset()
        for path in self.rendezvous_files:
            path.unlink(missing_ok=True)

    def _construct(self) -> None:
        on_gpu = torch.cuda.is_available()
        prepare_environment(on_gpu=on_gpu)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from rljob_runtime.rollout.vllm_weights import BACKEND

        settings = self._settings
        arguments: dict[str, Any] = {
            "model": str(self._directory),
            "load_format": "dummy",
            "dtype": "float32" if settings.compute_type == "Float32" else "bfloat16",
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "enforce_eager": settings.enforce_eager or not on_gpu,
            "seed": settings.seed % (1 << 31),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "worker_extension_cls": "rljob_runtime.rollout.vllm_weights.Extension",
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        }
        if settings.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
        if not on_gpu:
            arguments |= {
                "block_size": CPU_BLOCK_SIZE,
                "kv_cache_memory_bytes": settings.kv_cache_bytes or _cpu_kv_cache_bytes(self._directory, settings),
                # Chunks and per-request seeds together end the engine on a CPU.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, settings.max_model_len),
            }
        self._expected = expected_tensors(self._directory)
        # Not returned: the thread's future would hold it for ever.
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _run(self, prompt: tuple[int, ...], sampling: Any, request_id: str) -> Any:
        """The final output; None where the engine refused the request because it was paused meanwhile."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._engine is None:
            raise EngineError(f"request {request_id} was refused: the engine is not running")
        last = None
        self._in_flight.add(request_id)
        try:
            async for output in self._engine.generate({"prompt_token_ids": list(prompt)}, sampling, request_id):
                last = output
        except EngineDeadError as error:
            self._unusable = "the engine died"
            raise EngineError("the engine died: it must be started again") from error
        except (EngineGenerateError, VLLMValidationError, ValueError) as error:
            if self._paused:
                return None  # 0.33 refuses new requests of a paused engine, 0.32 keeps them
            raise EngineError(f"request {request_id} was refused: {error}") from error
        finally:
            self._in_flight.discard(request_id)
            if not self._in_flight:
                self._idle.set()
        if last is None:
            raise EngineError(f"request {request_id} ended without any output")
        return last

    async def _call(self, what: str, call: Awaitable[Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await call
        except EngineDeadError as error:
            self._unusable = "the engine died"
            raise EngineError(f"{what}: the engine died: it must be started again") from error

    def _check(self, tokens: tuple[int, ...], request_id: str) -> None:
        # Without a tokenizer vLLM does not check this itself, and an unknown id ends the engine with all its requests.
        outside = [token for token in tokens if not 0 <= token < self._vocab_size]
        if outside:
            raise EngineError(
                f"request {request_id}: token {outside[0]} is outside the vocabulary of {self._vocab_size} tokens"
            )


def _cpu_kv_cache_bytes(directory: Path, settings: VllmSettings) -> int:
    """Room for every sequence at its longest, within bounds: vLLM's own default is nearly the whole memory, zeroed."""
    config = AutoConfig.from_pretrained(directory)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element_bytes = 4 if settings.compute_type == "Float32" else 2
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * element_bytes
    sequence_bytes = (settings.max_model_len + 2 * CPU_BLOCK_SIZE) * token_bytes
    wanted = min(settings.max_num_seqs * sequence_bytes, MAX_CPU_KV_CACHE_BYTES)
    return int(max(wanted, sequence_bytes, MIN_CPU_KV_CACHE_BYTES))


def _version(label: str) -> int:
    try:
        return int(label)
    except ValueError as error:
        raise EngineError(f"the engine sampled tokens under the label {label!r}: no version was loaded yet") from error


def _finish(reason: str | None) -> Literal["stop", "length", "aborted"]:
    match reason:
        case "stop":
            return "stop"
        case "length":
            return "length"
        case "abort":
            return "aborted"
    raise EngineError(f"unknown finish reason {reason!r} from the engine")
