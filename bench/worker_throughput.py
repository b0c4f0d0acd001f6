"""Tokens a second of the rollout worker's episodes, over a bare AsyncLLM loop that sends the same requests.

Ours is everything a worker does for a token: environment, chat rendering, gate, engine adapter, versions, encoding of
the trajectory. The bare loop replays the requests of those episodes, turn after turn, and throws the answers away. In
turn on one engine. Our part is paid once a turn and once an episode, not once a token; so there are two figures: turns
of 64 tokens, and turns of 8, where the quickstart's tiny model makes it as heavy as it can be.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Figure, repeated
from bench.pause import _version
from rljob_api.messages import Task
from rljob_api.spec import Model, RandomModel
from rljob_runtime.environments.factory import make_environment
from rljob_runtime.model_source import materialise
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress
from rljob_runtime.rollout.environment_threads import EnvironmentThreads
from rljob_runtime.rollout.episode import EpisodeParts, EpisodeSettings, run_episode
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.rendering import Renderer
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings
from rljob_runtime.trajectory_codec import encode_trajectory

AT_ONCE = 64
ROUNDS = 9
PARAMETERS = {"digits": 8, "turns": 6}
DIGITS = "0123456789="
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
"""Enough characters that a model of random weights seldom samples its end token."""


@dataclass(frozen=True, slots=True)
class Case:
    """One figure: how long the turns of how many episodes are."""

    figure: str
    max_tokens: int
    episodes: int


CASES = (Case("worker_tokens", 64, 192), Case("worker_tokens_short_turns", 8, 768))


class Recording:
    """The engine, with a note of every request by episode."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.requests: dict[str, list[GenerationRequest]] = {}

    async def generate(self, request: GenerationRequest, progress: Progress | None = None) -> Generation:
        self.requests.setdefault(request.request_id.rsplit("-", 3)[0], []).append(request)
        return await self._engine.generate(request, progress)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main() -> None:
    """Measure and print."""
    for case, rates in asyncio.run(_measure()).items():
        ratios = [ours / bare for ours, bare in rates]
        value, low, high = repeated(ratios)
        ours, bare = sorted(rates)[len(rates) // 2]
        detail = (
            f"{ours:,.0f} over {bare:,.0f} tokens/s, {case.episodes} episodes each way, {AT_ONCE} at once, turns of at "
            f"most {case.max_tokens} tokens"
        )
        Figure(case.figure, value, low, high, f"{ROUNDS} rounds, smallest and largest", detail).print()


async def _measure() -> dict[Case, list[tuple[float, float]]]:
    with tempfile.TemporaryDirectory(prefix="rljob-bench-") as folder:
        root = Path(folder)
        model = materialise(Model(random=RandomModel(alphabet=DIGITS + IDEOGRAPHS, max_positions=512)), root / "model")
        encoded = _version(model, 1)
        weights = root / "weights.safetensors"
        weights.write_bytes(b"".join(data for _, data in encoded.chunks))
        bare = root / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        settings = VllmSettings(
            max_model_len=512, max_num_seqs=AT_ONCE, compute_type="Float32", kv_cache_bytes=64 << 20
        )
        engine = VllmEngine(bare, settings)
        await engine.start()
        try:
            await engine.pause()
            await engine.apply(encoded.manifest, weights)
            await engine.resume()
            return {case: await _rates(engine, bare, case) for case in CASES}
        finally:
            await engine.shutdown()


async def _rates(engine: VllmEngine, directory: Path, case: Case) -> list[tuple[float, float]]:
    """Tokens a second, ours and bare, of each round."""
    rates = []
    for number in range(ROUNDS + 1):
        await engine._llm.reset_prefix_cache()
        tokens, seconds, requests = await _ours(engine, directory, case, number)
        await engine._llm.reset_prefix_cache()  # or the same prompts would cost the second nothing
        bare_tokens, bare_seconds = await _bare(engine, requests)
        if number:  # the first round warms up
            rates.append((tokens / seconds, bare_tokens / bare_seconds))
    return rates


async def _ours(
    engine: VllmEngine, directory: Path, case: Case, number: int
) -> tuple[int, float, list[list[GenerationRequest]]]:
    recording = Recording(engine)
    gate = Gate(recording, Tally(), time.monotonic)
    gate.open()
    with closing(EnvironmentThreads(AT_ONCE, 60.0)) as threads:
        parts = EpisodeParts(
            make_environment=lambda seed: make_environment("digit-copy", PARAMETERS, seed),
            renderer=Renderer(directory),
            gate=gate,
            threads=threads,
            wall_clock=time.time,
        )
        settings = EpisodeSettings(
            temperature=1.0, max_tokens=case.max_tokens, max_trajectory_tokens=511, worker="main-0", incarnation="a"
        )
        tokens = 0

        async def work(indices: Iterator[int]) -> None:
            nonlocal tokens
            for index in indices:
                task = Task(task=number * case.episodes + index, sample=0, epoch=1, min_version=0, seed=index)
                with gate.partial() as partial:
                    trajectory = await run_episode(task, 1, partial, parts, settings)
                encode_trajectory(trajectory)
                tokens += trajectory.num_model_tokens

        started = time.perf_counter()
        indices = iter(range(case.episodes))
        await asyncio.gather(*(work(indices) for _ in range(AT_ONCE)))
        return tokens, time.perf_counter() - started, list(recording.requests.values())


async def _bare(engine: VllmEngine, episodes: list[list[GenerationRequest]]) -> tuple[int, float]:
    llm: Any = engine._llm
    tokens = 0

    async def work(queue: Iterator[list[GenerationRequest]]) -> None:
        nonlocal tokens
        for episode in queue:
            for request in episode:
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt)}
                sampling = engine._sampling(
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    stop_token_ids=list(request.stop_token_ids),
                    ignore_eos=True,
                    logprobs=0,
                )
                async for output in llm.generate(prompt, sampling, f"{request.request_id}-bare"):
                    last = output
                tokens += len(last.outputs[0].token_ids)

    started = time.perf_counter()
    queue = iter(episodes)
    await asyncio.gather(*(work(queue) for _ in range(AT_ONCE)))
    return tokens, time.perf_counter() - started


if __name__ == "__main__":
    main()
