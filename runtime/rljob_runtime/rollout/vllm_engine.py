"""vLLM's AsyncLLM in this process, behind the engine Protocol. Works with 0.32 (CPU wheel) and 0.33.

What it takes care of, each once found the hard way: tied embeddings, fused shards, seeds with chunked prefill (off on
CPUs), tokens outside the vocabulary (they kill the engine), the prefix cache after an update, engine-side version labels.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, VersionSpan
from rljob_runtime.rollout.vllm_environment import prepare_environment

CPU_KV_CACHE_BYTES = 256 << 20
CPU_BLOCK_SIZE = 32
MIN_BATCHED_TOKENS = 4096
LATE_ABORT_SECONDS = 0.002
FUSED_PARTNERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Engine settings of one worker."""

    max_model_len: int
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
        self._probes = itertools.count()
        self._in_flight: set[str] = set()

    async def start(self) -> None:
        """Start AsyncLLM with dummy weights from a folder with config and tokenizer files only."""
        on_gpu = torch.cuda.is_available()
        prepare_environment(on_gpu=on_gpu)
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
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
        if not on_gpu:
            arguments |= {
                "block_size": CPU_BLOCK_SIZE,
                "kv_cache_memory_bytes": settings.kv_cache_bytes or CPU_KV_CACHE_BYTES,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, settings.max_model_len),
            }
        elif settings.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            await self._engine.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info={"repack_tied": settings.repack_tied})
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM could not start: {error}") from error
        self._vocab_size = int(self._engine.model_config.get_vocab_size())

    async def generate(self, request: GenerationRequest) -> Generation:
        """Run one request to its end, or until `pause` aborts it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

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
        output = (await self._run(request.prompt, sampling, request.request_id)).outputs[0]
        tokens = tuple(int(token) for token in output.token_ids)
        logprobs = tuple(
            float(entry[token].logprob) for entry, token in zip(output.logprobs or (), tokens, strict=True)
        )
        spans = tuple(VersionSpan(_version(span.version), span.start, span.end) for span in output.weight_versions)
        return Generation(tokens, logprobs, spans, _finish(output.finish_reason))

    async def pause(self) -> None:
        """Abort everything in flight and stop scheduling; caches are cleared."""
        await self._call("pause", self._engine.pause_generation(mode="abort", clear_cache=True))
        # A request that was on its way when the engine paused waits there for the resume: it is aborted by name.
        while self._in_flight:
            await self._call("abort", self._engine.abort(list(self._in_flight)))
            await asyncio.sleep(LATE_ABORT_SECONDS)

    async def apply(self, manifest: WeightManifest, weights: Path) -> None:
        """Load a version; everything that can be checked is checked before the engine is touched."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        _check_file(weights)
        try:
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
            await self._engine.finish_weight_update(str(manifest.version))
            await self._engine.reset_prefix_cache()
        except Exception as error:  # whatever happened, the weights are half loaded now
            raise EnginePoisoned(f"{type(error).__name__}: {error}") from error

    async def resume(self) -> None:
        """Schedule again."""
        await self._call("resume", self._engine.resume_generation())

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Prompt log-probabilities: raw, so at temperature 1 whatever the sampling."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check(tokens, "probe")
        sampling = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._run(tokens, sampling, f"probe-{next(self._probes)}")
        scored = output.prompt_logprobs or []
        return tuple(float(entry[token].logprob) for entry, token in zip(scored[1:], tokens[1:], strict=True))

    async def shutdown(self) -> None:
        """Stop the engine and its processes."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None

    async def _run(self, prompt: tuple[int, ...], sampling: Any, request_id: str) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        last = None
        self._in_flight.add(request_id)
        try:
            async for output in self._engine.generate({"prompt_token_ids": list(prompt)}, sampling, request_id):
                last = output
        except EngineDeadError as error:
            raise EngineError("the engine died: it must be started again") from error
        except (EngineGenerateError, ValueError) as error:
            raise EngineError(f"request {request_id} was refused: {error}") from error
        finally:
            self._in_flight.discard(request_id)
        if last is None:
            raise EngineError(f"request {request_id} ended without any output")
        return last

    async def _call(self, what: str, call: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await call
        except EngineDeadError as error:
            raise EngineError(f"{what}: the engine died: it must be started again") from error

    def _check(self, tokens: tuple[int, ...], request_id: str) -> None:
        # Without a tokenizer vLLM does not check this itself, and an unknown id ends the engine with all its requests.
        outside = [token for token in tokens if not 0 <= token < self._vocab_size]
        if outside:
            raise EngineError(
                f"request {request_id}: token {outside[0]} is outside the vocabulary of {self._vocab_size} tokens"
            )


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


def _check_file(path: Path) -> None:
    """Refuse a file that would leave the engine half loaded.

    Raises:
        EngineError: it is no safetensors file, or a fused layer's partner is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path.name} cannot be read: {error}") from error
    for partners in FUSED_PARTNERS:
        for name in names:
            parts = name.split(".")
            if not any(part in partners for part in parts):
                continue
            position = next(i for i, part in enumerate(parts) if part in partners)
            missing = [
                partner
                for partner in partners
                if ".".join((*parts[:position], partner, *parts[position + 1 :])) not in names
            ]
            if missing:
                raise EngineError(f"{path.name} has {name} without {missing}: a fused layer must be loaded whole")
