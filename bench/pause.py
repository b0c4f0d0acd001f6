"""How long a weight version stops a real vLLM engine with 32 requests in flight, over the engine's own floor.

Ours is what a worker does: the gate shuts, the swapper applies and probes, the gate opens. The floor is the least that
vLLM can do for the same on the same engine: abort, load, resume, score the probe. In turn, on a tiny model, where our
own part weighs most.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench.measure import Figure, bootstrap_ratio
from rljob_api.messages import PublishedVersion
from rljob_api.spec import Model, RandomModel
from rljob_api.weights import Blob, Probe
from rljob_protocol.worker_events import ProbePassed
from rljob_runtime.model_source import materialise
from rljob_runtime.rollout.engine import GenerationRequest
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.swapper import Swapper
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings
from rljob_runtime.weights.encode import EncodedVersion, encode_version
from rljob_runtime.weights.publish import publish_version
from rljob_runtime.weights.volume import VolumeBlobStore

IN_FLIGHT = 32
ROUNDS = 60
MAX_TOKENS = 900
RUN_UP_SECONDS = 0.2
PROBE_TOKENS = tuple((7 * i * i + 3 * i + 5) % 14 for i in range(64))


def main() -> None:
    """Measure and print."""
    ours, floor = asyncio.run(_measure())
    for name, share in (("pause_p50", 0.5), ("pause_p95", 0.95)):
        value, low, high = bootstrap_ratio(ours, floor, partial(_quantile, share=share))
        detail = (
            f"{np.quantile(ours, share) * 1e3:.1f} ms over {np.quantile(floor, share) * 1e3:.1f} ms, "
            f"{ROUNDS} interruptions of {IN_FLIGHT} requests each way"
        )
        Figure(name, value, low, high, "90 % bootstrap interval", detail).print()


async def _measure() -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory(prefix="rljob-bench-") as folder:
        root = Path(folder)
        model = materialise(Model(random=RandomModel(alphabet="0123456789=", max_positions=1024)), root / "model")
        versions = [_version(model, number) for number in (1, 2)]
        bare = root / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = VllmSettings(
            max_model_len=1024, max_num_seqs=IN_FLIGHT, compute_type="Float32", kv_cache_bytes=64 << 20
        )
        engine = VllmEngine(bare, settings)
        await engine.start()
        try:
            gate = Gate(engine, Tally(), time.monotonic)
            swapper = Swapper(
                VolumeBlobStore(root / "blobs"), engine, gate, root / "cache", engine_compute_type="Float32"
            )
            ours, floor = [], []
            for number in range(ROUNDS + 2):
                encoded = versions[number % 2]
                mine = await _swap(gate, swapper, root / "blobs", encoded)
                bare_time = await _floor(engine, root, encoded)
                if number >= 2:  # the first rounds warm caches up
                    ours.append(mine)
                    floor.append(bare_time)
        finally:
            await engine.shutdown()
    return ours, floor


async def _swap(gate: Gate, swapper: Swapper, blobs: Path, encoded: EncodedVersion) -> float:
    """Seconds from the order to shut the gate until it is open, as a worker's machine orders it."""
    published = await _published(blobs, encoded)
    fetched = await swapper.fetch(published)
    assert type(fetched).__name__ == "Fetched", fetched

    async def swap() -> None:
        await swapper.shut(60)
        await swapper.apply(published)
        probed = await swapper.probe(published)
        assert isinstance(probed, ProbePassed), probed
        gate.open()

    if not gate.is_open:
        await swap()
        fetched = await swapper.fetch(published)
    async with _running(lambda i: _through(gate, _request(i))):
        started = time.perf_counter()
        await swap()
        return time.perf_counter() - started


async def _through(gate: Gate, request: GenerationRequest) -> None:
    with gate.partial() as partial:
        await gate.generate(request, partial)


def _quantile(seconds: np.ndarray, share: float) -> float:
    return float(np.quantile(seconds, share))


async def _floor(engine: VllmEngine, root: Path, encoded: EncodedVersion) -> float:
    """The same with bare calls, nothing checked."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    weights = root / "floor.safetensors"
    weights.write_bytes(b"".join(data for _, data in encoded.chunks))
    llm: Any = engine._llm
    requests: list[asyncio.Task[Any]] = []

    async def bare(i: int) -> None:
        own = asyncio.current_task()
        assert own is not None
        requests.append(own)
        prompt = {"type": "token", "prompt_token_ids": list(_request(i).prompt)}
        sampling = engine._sampling(temperature=1.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
        async for _ in llm.generate(prompt, sampling, f"bare-{i}-{time.monotonic_ns()}"):
            pass

    async with _running(bare):
        started = time.perf_counter()
        await llm.engine_core.pause_scheduler_async(mode="abort", clear_cache=True)
        await asyncio.wait(requests)
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
        await llm.finish_weight_update(str(encoded.manifest.version))
        await llm.resume_generation()
        probe = {"type": "token", "prompt_token_ids": list(PROBE_TOKENS)}
        sampling = engine._sampling(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        async for _ in llm.generate(probe, sampling, f"probe-{time.monotonic_ns()}"):
            pass
        return time.perf_counter() - started


@asynccontextmanager
async def _running(start: Any) -> AsyncIterator[None]:
    """All requests in flight, decoding; given up at the end."""
    tasks = [asyncio.create_task(start(i)) for i in range(IN_FLIGHT)]
    await asyncio.sleep(RUN_UP_SECONDS)
    assert not any(task.done() for task in tasks), "a request ended before it could be interrupted"
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _request(number: int) -> GenerationRequest:
    prompt = tuple((number * 7 + position * 5) % 14 for position in range(16))
    return GenerationRequest(f"r-{number}-{time.monotonic_ns()}", prompt, MAX_TOKENS, 1.0, ())


def _version(model: Path, number: int) -> EncodedVersion:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(number)
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        logits_TV = network(torch.tensor([PROBE_TOKENS])).logits[0, :-1]
        logprobs_T = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(PROBE_TOKENS[1:])[:, None])[:, 0]
    probe = Probe(tokens=PROBE_TOKENS, logprobs=tuple(logprobs_T.tolist()), compute_type="Float32")
    state = {
        name: tensor for name, tensor in network.state_dict().items() if name != "lm_head.weight" or not tied(network)
    }
    return encode_version(state, epoch=1, version=number, compute_type="Float32", model_files=(), probe=probe)


def tied(network: Any) -> bool:
    """Whether the output layer is the embedding."""
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


async def _published(blobs: Path, encoded: EncodedVersion) -> PublishedVersion:
    manifest: Blob = await publish_version(VolumeBlobStore(blobs), encoded)
    version = encoded.manifest.version
    return PublishedVersion(
        epoch=1, version=version, step=version, manifest=manifest, num_bytes=encoded.manifest.num_bytes
    )


if __name__ == "__main__":
    main()
