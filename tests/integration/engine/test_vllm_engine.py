"""The vLLM engine against transformers: log-probabilities, versions, interruptions. One engine start a parameter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from tests.integration.engine.small_models import SmallModel, Version, make_small_model, prompt

from rljob_api.errors import EngineError
from rljob_runtime.rollout import vllm_processes
from rljob_runtime.rollout.engine import Generation, GenerationRequest, VersionSpan
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's and its libraries' own
]

TEMPERATURE = 0.7
SETTINGS = VllmSettings(max_model_len=512, max_num_seqs=48, compute_type="Float32")


class Served:
    """A running engine, its model and the version it holds."""

    def __init__(self, engine: VllmEngine, model: SmallModel) -> None:
        self.engine = engine
        self.model = model
        self.ids = iter(range(1_000_000))

    async def hold(self, number: int) -> Version:
        """Swap to a version as a worker does."""
        version = self.model.versions[number]
        await self.engine.pause()
        await self.engine.apply(version.manifest, version.weights)
        await self.engine.resume()
        return version

    async def generate(
        self, tokens: tuple[int, ...], max_tokens: int, stop: tuple[int, ...] = (), temperature: float = TEMPERATURE
    ) -> Generation:
        request = GenerationRequest(f"t{next(self.ids)}", tokens, max_tokens, temperature, stop)
        return await self.engine.generate(request)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["tied", "untied"])
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    kind = str(request.param)
    architecture = "Llama" if kind == "tied" else "Qwen3"
    model = make_small_model(tmp_path_factory.mktemp(kind), tied=kind == "tied", architecture=architecture)
    engine = VllmEngine(model.bare, SETTINGS)
    before = vllm_processes.children()
    await engine.start()
    started = vllm_processes.children() - before
    rendezvous = engine.rendezvous_files
    try:
        yield Served(engine, model)
    finally:
        await engine.shutdown()
    assert started and not any(process.is_running() for process in started)
    assert not any(path.exists() for path in rendezvous)


async def test_an_engine_without_a_version_generates_nothing(served: Served) -> None:
    with pytest.raises(EngineError, match="no weight version was applied yet"):
        await VllmEngine(served.model.bare, SETTINGS).generate(GenerationRequest("r", prompt(0), 4, 1.0, ()))


async def test_each_applied_version_scores_as_in_transformers(served: Served) -> None:
    probe = prompt(3, 64)
    for number in (0, 1, 2, 0):
        version = await served.hold(number)
        scored = await served.engine.score(probe)
        assert max(abs(a - b) for a, b in zip(scored, version.logprobs(probe), strict=True)) <= 1e-4
        # Negative control: any other version is nats away, so the comparison tells them apart.
        other = served.model.versions[(number + 1) % 3]
        assert max(abs(a - b) for a, b in zip(scored, other.logprobs(probe), strict=True)) > 1.0


async def test_generated_tokens_carry_the_logprobs_they_were_sampled_with(served: Served) -> None:
    version = await served.hold(1)
    generations = await asyncio.gather(*[served.generate(prompt(index), 24) for index in range(8)])
    for index, generation in enumerate(generations):
        assert len(generation.tokens) == len(generation.logprobs) == 24
        assert generation.finish == "length"
        assert generation.spans == (VersionSpan(1, 0, 24),)
        assert version.worst(prompt(index), generation, TEMPERATURE) <= 1e-4
        # Negative control: at temperature 1 they are others.
        assert version.worst(prompt(index), generation, 1.0) > 1e-2


async def test_a_stop_token_ends_a_generation_and_is_kept(served: Served) -> None:
    await served.hold(0)
    free = await served.generate(prompt(2), 40)
    stop = free.tokens[10]
    generation = await served.generate(prompt(2), 200, (stop, free.tokens[20]))
    assert generation.finish == "stop"
    assert generation.tokens[-1] in (stop, free.tokens[20])
    assert not {stop, free.tokens[20]} & set(generation.tokens[:-1])


async def test_the_end_token_is_an_ordinary_token_unless_it_is_a_stop_token(served: Served) -> None:
    await served.hold(0)
    generations = await asyncio.gather(*[served.generate(prompt(index), 100) for index in range(8)])
    assert all(generation.finish == "length" for generation in generations)
    assert any(1 in generation.tokens for generation in generations)


async def test_an_interruption_returns_every_partial_and_it_goes_on_under_the_next_version(served: Served) -> None:
    before = await served.hold(0)
    num_requests, wanted = 32, 300
    running = [asyncio.create_task(served.generate(prompt(index), wanted)) for index in range(num_requests)]
    await asyncio.sleep(0.1)
    await served.engine.pause()
    assert all(task.done() for task in running)
    partials = [task.result() for task in running]
    assert {partial.finish for partial in partials} == {"aborted"}
    assert sum(len(partial.tokens) for partial in partials) > 0

    after = served.model.versions[2]
    await served.engine.apply(after.manifest, after.weights)
    await served.engine.resume()
    rests = await asyncio.gather(
        *[
            served.generate((*prompt(index), *partial.tokens), wanted - len(partial.tokens))
            for index, partial in enumerate(partials)
        ]
    )
    for index, (partial, rest) in enumerate(zip(partials, rests, strict=True)):
        assert len(partial.tokens) + len(rest.tokens) == wanted
        assert rest.spans == (VersionSpan(2, 0, len(rest.tokens)),)
        assert after.worst((*prompt(index), *partial.tokens), rest, TEMPERATURE) <= 1e-4
        if partial.tokens:
            assert partial.spans == (VersionSpan(0, 0, len(partial.tokens)),)
            assert before.worst(prompt(index), partial, TEMPERATURE) <= 1e-4


async def test_a_partial_is_an_exact_prefix_of_the_uninterrupted_generation(served: Served) -> None:
    await served.hold(1)
    # Greedy, so that two runs sample the same.
    wholes = await asyncio.gather(*[served.generate(prompt(i), 200, temperature=0.0) for i in range(32)])
    running = [asyncio.create_task(served.generate(prompt(i), 200, temperature=0.0)) for i in range(32)]
    await asyncio.sleep(0.08)
    await served.engine.pause()
    partials = [task.result() for task in running]
    await served.engine.resume()
    assert any(partial.finish == "aborted" and partial.tokens for partial in partials)
    for whole, partial in zip(wholes, partials, strict=True):
        assert partial.tokens == whole.tokens[: len(partial.tokens)]


async def test_requests_that_cross_the_pause_come_back_empty(served: Served) -> None:
    await served.hold(1)
    for _ in range(5):
        running = [asyncio.create_task(served.generate(prompt(index), 400)) for index in range(16)]
        await asyncio.sleep(0)  # they are on their way to the engine, and some get there after the pause
        pausing = asyncio.create_task(served.engine.pause())
        late = [asyncio.create_task(served.generate(prompt(index), 400)) for index in range(4)]
        async with asyncio.timeout(10):
            await pausing
            generations = await asyncio.gather(*running, *late)
        assert {generation.finish for generation in generations} == {"aborted"}
        await served.engine.resume()
    assert len((await served.generate(prompt(0), 5)).tokens) == 5


async def test_a_cancelled_caller_aborts_its_request(served: Served) -> None:
    await served.hold(1)
    running = asyncio.create_task(served.generate(prompt(0), 480))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(5):
        await served.engine.pause()
    await served.engine.resume()


async def test_no_key_or_value_of_the_old_version_survives_a_swap(served: Served) -> None:
    shared = prompt(5, 300)  # many whole blocks: served from the prefix cache where it is not cleared
    for number in (0, 1):
        version = await served.hold(number)
        for _ in range(2):  # the second one does come from the cache
            generation = await served.generate(shared, 8)
            assert version.worst(shared, generation, TEMPERATURE) <= 1e-4


async def test_a_token_outside_the_vocabulary_is_refused_and_the_engine_lives(served: Served) -> None:
    await served.hold(0)
    for token in (16, -1, 1 << 40):
        with pytest.raises(EngineError, match=f"token {token} is outside the vocabulary of 16 tokens"):
            await served.generate((1, token), 4)
        with pytest.raises(EngineError, match="outside the vocabulary"):
            await served.engine.score((1, token))
    assert len((await served.generate(prompt(0), 4)).tokens) == 4


async def test_a_prompt_as_long_as_the_model_is_refused_and_the_engine_lives(served: Served) -> None:
    await served.hold(0)
    with pytest.raises(EngineError, match="was refused"):
        await served.generate(prompt(0, 512), 4)
    generation = await served.generate(prompt(0, 510), 4)
    assert (generation.finish, len(generation.tokens)) == ("length", 2)


async def test_weights_are_refused_while_the_engine_runs(served: Served) -> None:
    version = await served.hold(0)
    with pytest.raises(EngineError, match="pause it first"):
        await served.engine.apply(version.manifest, version.weights)
    assert len((await served.generate(prompt(0), 4)).tokens) == 4


async def test_a_pause_takes_no_fixed_sleep(served: Served) -> None:
    await served.hold(0)
    pauses = []
    for _ in range(7):
        running = [asyncio.create_task(served.generate(prompt(index), 400)) for index in range(32)]
        await asyncio.sleep(0.1)
        began = time.perf_counter()
        await served.engine.pause()
        pauses.append(time.perf_counter() - began)
        assert all(task.done() for task in running)
        await served.engine.resume()
    # pause_generation sleeps 20 ms each time; the fastest of several shows what is fixed on a busy machine too.
    assert min(pauses) < 0.02


async def test_two_workers_do_not_sample_the_same(served: Served) -> None:
    await served.hold(0)
    generations = await asyncio.gather(*[served.generate(prompt(0), 32) for _ in range(4)])
    assert len({generation.tokens for generation in generations}) == 4


async def test_a_folder_without_a_config_is_refused_in_words(served: Served, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="vLLM could not start on"):
        await VllmEngine(tmp_path, replace(SETTINGS)).start()
    assert psutil.Process().is_running()
