"""The simulated engine: honest log-probabilities, results that depend on nothing but weights, seed and prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.engine.small_models import SmallModel, make_small_model, prompt, without

from rljob_api.errors import EngineError
from rljob_api.pools import SimulatedEngine as SimulatedTimes
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, Sampled, VersionSpan
from rljob_runtime.rollout.simulated_engine import SimulatedEngine, uniform

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    kind = str(request.param)
    return make_small_model(tmp_path_factory.mktemp(kind), tied=kind == "tied", versions=2)


@pytest.fixture
async def engine(model: SmallModel) -> AsyncIterator[SimulatedEngine]:
    made = SimulatedEngine(model.bare, SimulatedTimes())
    await made.start()
    await hold(made, model, 0)
    yield made
    await made.shutdown()


async def hold(engine: SimulatedEngine, model: SmallModel, number: int) -> None:
    version = model.versions[number]
    await engine.pause()
    await engine.apply(version.manifest, version.weights)
    await engine.resume()


def request(
    index: int, max_tokens: int, tokens: tuple[int, ...] = (), *, stop: tuple[int, ...] = (), seeded: bool = True
) -> GenerationRequest:
    number = index if seeded else None
    return GenerationRequest(
        f"r{index}-{len(tokens)}", (*prompt(index), *tokens), max_tokens - len(tokens), TEMPERATURE, stop, number
    )


async def generate_all(engine: SimulatedEngine, indexes: range, max_tokens: int) -> list[Generation]:
    return await asyncio.gather(*[engine.generate(request(index, max_tokens)) for index in indexes])


async def test_scores_and_sampled_tokens_carry_the_logprobs_of_transformers(
    engine: SimulatedEngine, model: SmallModel
) -> None:
    for number, other in ((1, 0), (0, 1)):
        await hold(engine, model, number)
        version = model.versions[number]
        probe = prompt(3, 40)
        scored = await engine.score(probe)
        assert max(abs(a - b) for a, b in zip(scored, version.logprobs(probe), strict=True)) <= 1e-5
        for index, generation in enumerate(await generate_all(engine, range(4), 12)):
            assert generation.spans == (VersionSpan(number, 0, 12),)
            assert generation.finish == "length"
            assert version.worst(prompt(index), generation, TEMPERATURE) <= 1e-4
            # Negative control.
            assert model.versions[other].worst(prompt(index), generation, TEMPERATURE) > 0.1


async def test_tokens_come_while_a_request_runs_and_with_the_rest_they_are_those_of_a_request_without_progress(
    engine: SimulatedEngine,
) -> None:
    whole = await engine.generate(request(0, 11))
    parts: list[Sampled] = []
    rest = await engine.generate(request(0, 11), Progress(3, parts.append))
    assert [len(part.tokens) for part in (*parts, rest)] == [3, 3, 3, 2]
    assert tuple(token for part in (*parts, rest) for token in part.tokens) == whole.tokens
    assert tuple(logprob for part in (*parts, rest) for logprob in part.logprobs) == whole.logprobs
    assert [part.spans for part in (*parts, rest)] == [(VersionSpan(0, 0, n),) for n in (3, 3, 3, 2)]
    parts.clear()
    assert (await engine.generate(request(0, 3), Progress(3, parts.append))).tokens == whole.tokens[:3]
    assert parts == [], "the last tokens come with the end"


async def test_a_result_depends_neither_on_the_batch_nor_on_interruptions(
    engine: SimulatedEngine, model: SmallModel
) -> None:
    together = await generate_all(engine, range(6), 20)
    alone = [await engine.generate(request(index, 20)) for index in range(6)]
    assert [generation.tokens for generation in together] == [generation.tokens for generation in alone]
    for index, whole in enumerate(alone):
        running = asyncio.create_task(engine.generate(request(index, 20)))
        await asyncio.sleep(0.01)
        await engine.pause()
        partial = await running
        assert partial.tokens == whole.tokens[: len(partial.tokens)]
        await hold(engine, model, 0)
        if partial.finish == "aborted":
            rest = await engine.generate(request(index, 20, partial.tokens))
            assert partial.tokens + rest.tokens == whole.tokens


async def test_batch_invariant_results_are_equal_to_the_last_bit(model: SmallModel) -> None:
    engine = SimulatedEngine(model.bare, SimulatedTimes(batch_invariant=True))
    await engine.start()
    await hold(engine, model, 0)
    together = await generate_all(engine, range(4), 16)
    alone = [await engine.generate(request(index, 16)) for index in range(4)]
    await engine.shutdown()
    assert together == alone


async def test_other_seeds_and_requests_without_a_seed_give_other_results(engine: SimulatedEngine) -> None:
    same_prompt = [GenerationRequest(f"s{seed}", prompt(0), 20, 1.0, (), seed) for seed in (0, 1)]
    unseeded = [GenerationRequest(f"u{number}", prompt(0), 20, 1.0, ()) for number in (0, 1)]
    results = await asyncio.gather(*[engine.generate(each) for each in (*same_prompt, *unseeded)])
    assert len({generation.tokens for generation in results}) == 4


async def test_tokens_are_drawn_from_the_distribution_whose_logprobs_are_reported(engine: SimulatedEngine) -> None:
    version_logprobs: dict[int, float] = {}
    counts: dict[int, int] = {}
    draws = 2000
    requests = [GenerationRequest(f"d{seed}", prompt(1), 1, 1.0, (), seed) for seed in range(draws)]
    for generation in await asyncio.gather(*[engine.generate(each) for each in requests]):
        token = generation.tokens[0]
        counts[token] = counts.get(token, 0) + 1
        version_logprobs[token] = generation.logprobs[0]
    for token, count in counts.items():
        probability = float(torch.tensor(version_logprobs[token]).exp())
        spread = (probability * (1 - probability) / draws) ** 0.5
        assert abs(count / draws - probability) <= 5 * spread + 1e-3


async def test_a_stop_token_ends_a_generation_and_is_kept(engine: SimulatedEngine) -> None:
    free = await engine.generate(request(0, 30))
    stop = free.tokens[7]
    generation = await engine.generate(request(0, 30, stop=(stop,)))
    assert generation.finish == "stop"
    assert generation.tokens == free.tokens[: free.tokens.index(stop) + 1]


async def test_a_pause_returns_every_partial_at_once_also_during_a_long_step_or_prefill(model: SmallModel) -> None:
    for times in (SimulatedTimes(decode_seconds=10), SimulatedTimes(prefill_seconds=10)):
        engine = SimulatedEngine(model.bare, times)
        await engine.start()
        await hold(engine, model, 0)
        running = [asyncio.create_task(engine.generate(request(index, 20))) for index in range(4)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await engine.pause()
        partials = await asyncio.gather(*running)
        assert time.monotonic() - began < 8
        assert {partial.finish for partial in partials} == {"aborted"}
        late = await engine.generate(request(9, 20))
        assert late == Generation((), (), (), "aborted")
        await engine.shutdown()


async def test_device_times_are_kept_whatever_the_batch(model: SmallModel) -> None:
    times = SimulatedTimes(decode_seconds=0.2, prefill_seconds=0.1, load_seconds=0.3)
    engine = SimulatedEngine(model.bare, times)
    await engine.start()
    began = time.monotonic()
    await hold(engine, model, 0)
    loaded = time.monotonic()
    assert loaded - began >= 0.3
    await generate_all(engine, range(5), 6)
    # Six steps and a prefill; five requests one after the other would take five times that.
    assert 0.1 + 5 * 0.2 <= time.monotonic() - loaded < 4
    await engine.shutdown()


@pytest.mark.parametrize(
    ("removed", "reason"),
    [("k_proj", "2 tensors are missing"), ("model.norm", "1 tensors are missing"), (None, "read")],
)
async def test_a_file_that_is_not_whole_is_refused_before_the_engine_is_touched(
    engine: SimulatedEngine, model: SmallModel, tmp_path: Path, removed: str | None, reason: str
) -> None:
    version = model.versions[1]
    broken = tmp_path / "absent.safetensors" if removed is None else without(version, tmp_path, removed)
    before = await engine.score(prompt(0, 20))
    await engine.pause()
    with pytest.raises(EngineError, match=reason):
        await engine.apply(version.manifest, broken)
    await engine.resume()
    assert await engine.score(prompt(0, 20)) == before
    assert (await engine.generate(request(0, 4))).spans == (VersionSpan(0, 0, 4),)


async def test_nan_weights_end_in_an_error_not_in_a_hang(
    engine: SimulatedEngine, model: SmallModel, tmp_path: Path
) -> None:
    state = {name: tensor * float("nan") for name, tensor in load_file(model.versions[0].weights).items()}
    path = tmp_path / "nan.safetensors"
    save_file(state, path)
    await engine.pause()
    await engine.apply(model.versions[0].manifest, path)
    await engine.resume()
    async with asyncio.timeout(5):
        with pytest.raises(EngineError, match="not finite"):
            await engine.generate(request(0, 4))


async def test_calls_out_of_order_and_unusable_requests_are_refused(engine: SimulatedEngine, model: SmallModel) -> None:
    version = model.versions[0]
    with pytest.raises(EngineError, match="pause it first"):
        await engine.apply(version.manifest, version.weights)
    with pytest.raises(EngineError, match="outside the vocabulary of 16"):
        await engine.generate(GenerationRequest("r", (1, 16), 4, 1.0, ()))
    fresh = SimulatedEngine(model.bare, SimulatedTimes())
    await fresh.start()
    with pytest.raises(EngineError, match="no version was applied yet"):
        await fresh.generate(request(0, 4))
    await fresh.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        await fresh.generate(request(0, 4))


async def test_a_folder_without_a_config_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="simulated engine could not start"):
        await SimulatedEngine(tmp_path, SimulatedTimes()).start()


async def test_starting_leaves_the_global_random_state_alone(model: SmallModel) -> None:
    before = torch.random.get_rng_state()
    engine = SimulatedEngine(model.bare, SimulatedTimes())
    await engine.start()
    await engine.shutdown()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_counter_based_generator_is_uniform_and_keyed_by_both() -> None:
    drawn = [uniform(str(key), position) for key in range(50) for position in range(50)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= value < 1 for value in drawn)
    for low in (0.0, 0.25, 0.5, 0.75):
        assert abs(sum(low <= value < low + 0.25 for value in drawn) / len(drawn) - 0.25) < 0.04


async def test_a_pause_right_after_a_request_does_not_stop_the_engine_for_ever(engine: SimulatedEngine) -> None:
    """The request wakes the stepping task, and the pause takes the request away before that task has its turn."""
    for index in range(3):
        running = asyncio.create_task(engine.generate(request(index, 4)))
        await asyncio.sleep(0)
        await engine.pause()
        assert (await running).finish == "aborted"
        await engine.resume()
        async with asyncio.timeout(10):
            assert len((await engine.generate(request(index + 10, 4))).tokens) == 4
