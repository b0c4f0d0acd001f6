"""A real vLLM engine against transformers: log-probabilities, interruption, weight versions and what it must refuse.

One engine serves the module; the class at the top has its own, which it ruins.
"""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_api.messages import TrajectoryHeader
from rljob_api.weights import Probe, WeightManifest
from rljob_runtime.rollout.engine import Generation, GenerationRequest, Progress, Sampled, VersionSpan
from rljob_runtime.rollout.gate import Gate
from rljob_runtime.rollout.probe_check import check_probe
from rljob_runtime.rollout.tally import Tally
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings
from rljob_runtime.weights.encode import encode_version

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

VOCAB = 512
TOLERANCE = 1e-4
PROBE_TOKENS = tuple((7 * i * i + 3 * i + 5) % VOCAB for i in range(64))


@dataclass(frozen=True)
class Version:
    """One set of weights, as trainer and as engine see it."""

    model: LlamaForCausalLM
    manifest: WeightManifest
    weights: Path

    def renumbered(self, version: int) -> WeightManifest:
        return self.manifest.model_copy(update={"version": version})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def model_directory(directory: Path) -> Path:
    """config.json and nothing else: the weights come by `apply`."""
    made = directory / "model"
    _config().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def first(directory: Path) -> Version:
    return _version(directory, 1)


@pytest.fixture(scope="module")
def second(directory: Path) -> Version:
    return _version(directory, 2)


@pytest_asyncio.fixture(scope="class", loop_scope="module")
async def engine_without_repacking(model_directory: Path) -> AsyncIterator[VllmEngine]:
    async for engine in _running(model_directory, repack_tied=False):
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(model_directory: Path) -> AsyncIterator[VllmEngine]:
    async for engine in _running(model_directory, repack_tied=True):
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: VllmEngine, first: Version) -> VllmEngine:
    """Holds the first version, whatever the test before did."""
    await _swap(started, first.manifest, first.weights)
    return started


class TestAnEngineThatIsGivenUp:
    async def test_tokens_of_dummy_weights_are_refused(self, engine_without_repacking: VllmEngine) -> None:
        with pytest.raises(EngineError, match="sampled under the label 'default', which no loaded version has"):
            await engine_without_repacking.generate(_request(0, max_tokens=2))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="packed layers are a matter of CPUs")
    async def test_the_probe_sees_a_tied_output_layer_that_kept_the_old_weights(
        self, engine_without_repacking: VllmEngine, first: Version
    ) -> None:
        await _swap(engine_without_repacking, first.manifest, first.weights)
        scored = await engine_without_repacking.score(PROBE_TOKENS)
        result = check_probe(first.manifest.probe, scored, "Float32")
        assert not result.passed
        assert result.max_abs > 0.5

    async def test_an_update_that_fails_part_way_poisons_the_engine(
        self, engine_without_repacking: VllmEngine, first: Version
    ) -> None:
        with first.weights.open("rb") as file:
            # A file that this process can read, and the engine's own process cannot.
            number = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, 700)
        try:
            with pytest.raises(EnginePoisoned, match="loading version 1 failed part-way"):
                await _swap(engine_without_repacking, first.manifest, Path(f"/proc/self/fd/{number}"))
        finally:
            os.close(number)
        with pytest.raises(EnginePoisoned, match="version 1 was begun to be loaded and not finished"):
            await engine_without_repacking.generate(_request(0))

    async def test_a_start_that_is_given_up_leaves_no_process(self, model_directory: Path) -> None:
        others = set(multiprocessing.active_children())
        engine = VllmEngine(model_directory, _settings())
        starting = asyncio.create_task(engine.start())
        while not set(multiprocessing.active_children()) - others:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await engine.shutdown()
        assert set(multiprocessing.active_children()) == others

    async def test_shutdown_leaves_no_process_and_no_way_to_call(self, engine_without_repacking: VllmEngine) -> None:
        assert multiprocessing.active_children()  # control: there was one
        await engine_without_repacking.shutdown()
        assert multiprocessing.active_children() == []
        with pytest.raises(EngineError, match="the engine is not running"):
            await engine_without_repacking.resume()


async def test_applied_weights_give_the_trainers_log_probabilities(engine: VllmEngine, first: Version) -> None:
    result = check_probe(first.manifest.probe, await engine.score(PROBE_TOKENS), "Float32")
    assert result.passed
    assert result.max_abs <= TOLERANCE


async def test_wrong_weights_fail_the_probe(engine: VllmEngine, first: Version, second: Version) -> None:
    await _swap(engine, first.manifest, second.weights)
    result = check_probe(first.manifest.probe, await engine.score(PROBE_TOKENS), "Float32")
    assert not result.passed
    assert result.max_abs > 0.5


async def test_sampled_tokens_carry_their_log_probability_after_temperature(engine: VllmEngine, first: Version) -> None:
    request = _request(3, max_tokens=48, temperature=0.7)
    generation = await engine.generate(request)
    assert (len(generation.tokens), generation.finish) == (48, "length")
    assert generation.spans == (VersionSpan(1, 0, 48),)
    assert _largest_error(first, request, generation) <= TOLERANCE
    untempered = _request(3, max_tokens=48, temperature=1.0)
    assert _largest_error(first, untempered, generation) > 0.05  # control: raw log-probabilities would be seen


async def test_an_interrupted_answer_goes_on_under_the_new_version(
    engine: VllmEngine, first: Version, second: Version
) -> None:
    request = _request(4, max_tokens=400, temperature=0.9)
    running = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.1)
    await engine.pause()
    before = await running
    assert before.finish == "aborted"
    assert 0 < len(before.tokens) < 400
    await engine.apply(second.manifest, second.weights)
    await engine.resume()
    rest = _request(4, max_tokens=400 - len(before.tokens), temperature=0.9, prompt=request.prompt + before.tokens)
    after = await engine.generate(rest)

    assert before.spans == (VersionSpan(1, 0, len(before.tokens)),)
    assert after.spans == (VersionSpan(2, 0, 400 - len(before.tokens)),)
    assert _largest_error(first, request, before) <= TOLERANCE
    assert _largest_error(second, rest, after) <= TOLERANCE
    assert _largest_error(first, rest, after) > 0.5  # control: the versions can be told apart


async def test_tokens_come_during_a_long_turn_and_are_those_of_the_final_trajectory(
    engine: VllmEngine, first: Version, second: Version
) -> None:
    """Through gate and partial, as an episode has it, with an interruption in the middle."""
    gate = Gate(engine, Tally(), time.monotonic, progress_tokens=16)
    gate.open()
    lengths: list[int] = []
    request = _request(6, max_tokens=300, temperature=0.9)
    with gate.partial() as partial:
        partial.observe(request.prompt)
        partial.begin_turn()
        partial.on_growth = lambda: lengths.append(partial.num_model_tokens)
        turn = asyncio.create_task(gate.generate(request, partial))
        while partial.num_model_tokens < 64:
            assert not turn.done()
            await asyncio.sleep(0)
        streamed = partial.trajectory(TrajectoryHeader.model_construct())
        await gate.shut(10.0)
        interrupted_at = partial.num_model_tokens
        await engine.apply(second.manifest, second.weights)
        await engine.resume()
        gate.open()
        assert await turn == "length"
        final = partial.trajectory(TrajectoryHeader.model_construct())
    assert final.num_model_tokens == 300 and 64 <= interrupted_at < 300
    for name in ("tokens", "turn", "weight_version", "behavior_logprobs"):
        held = getattr(streamed, name)
        assert (getattr(final, name)[: held.shape[0]] == held).all()
    model_versions = final.weight_version[len(request.prompt) :].tolist()
    assert model_versions == [1] * interrupted_at + [2] * (300 - interrupted_at)
    steps = [following - one for one, following in pairwise([0, *lengths])]
    assert min(steps) >= 1 and len(steps) >= 300 // 32, "often enough that no more than a few intervals wait"
    halves = {1: first, 2: second}
    for version, start, end in ((1, 0, interrupted_at), (2, interrupted_at, 300)):
        before = tuple(final.tokens[: len(request.prompt) + start].tolist())
        tokens = tuple(final.tokens[len(request.prompt) + start : len(request.prompt) + end].tolist())
        logprobs = final.behavior_logprobs[len(request.prompt) + start : len(request.prompt) + end].tolist()
        part = Generation(tokens, tuple(logprobs), (VersionSpan(version, 0, len(tokens)),), "length")
        asked = _request(6, max_tokens=300, temperature=0.9, prompt=before)
        assert _largest_error(halves[version], asked, part) <= TOLERANCE


@pytest.mark.parametrize("every_tokens", [1, 7, 64])
async def test_progress_and_rest_hold_each_token_once_at_any_interval(engine: VllmEngine, every_tokens: int) -> None:
    requests = [_request(i, max_tokens=64 - i) for i in range(16)]
    parts: list[list[Sampled]] = [[] for _ in requests]
    rests = await asyncio.gather(
        *(engine.generate(r, Progress(every_tokens, p.append)) for r, p in zip(requests, parts, strict=True))
    )
    for asked, taken, rest in zip(requests, parts, rests, strict=True):
        assert sum(len(part.tokens) for part in (*taken, rest)) == asked.max_tokens
        for part in (*taken, rest):
            assert len(part.tokens) == len(part.logprobs)
            assert part.spans == ((VersionSpan(1, 0, len(part.tokens)),) if part.tokens else ())


async def test_tokens_given_away_under_a_version_that_did_not_sample_them_end_the_request(engine: VllmEngine) -> None:
    engine._loaded = 7
    with pytest.raises(EngineError, match="sampled under version 1 while version 7 was the loaded one"):
        await engine.generate(_request(0, max_tokens=64), Progress(8, lambda _: None))


async def test_a_pause_with_32_requests_in_flight_loses_nothing(engine: VllmEngine, first: Version) -> None:
    requests = [_request(i, max_tokens=900) for i in range(32)]
    running = [asyncio.create_task(engine.generate(request)) for request in requests]
    await asyncio.sleep(0.2)
    await engine.pause()
    assert all(task.done() for task in running)
    partials = [task.result() for task in running]
    await engine.resume()
    assert {partial.finish for partial in partials} == {"aborted"}
    assert all(0 < len(partial.tokens) == len(partial.logprobs) < 900 for partial in partials)
    errors = [_largest_error(first, *pair) for pair in zip(requests, partials, strict=True)]
    assert max(errors) <= TOLERANCE


async def test_requests_on_their_way_into_the_engine_come_back_from_a_pause(engine: VllmEngine) -> None:
    for turns in range(12):
        running = [asyncio.create_task(engine.generate(_request(i, max_tokens=900))) for i in range(8)]
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await engine.pause()
            partials = await asyncio.gather(*running)
        assert {partial.finish for partial in partials} == {"aborted"}
        await engine.resume()


async def test_a_cancelled_caller_takes_its_request_out_of_the_engine(engine: VllmEngine, first: Version) -> None:
    running = asyncio.create_task(engine.generate(_request(0, max_tokens=1000)))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await engine.apply(first.manifest, first.weights)  # refused, were it still running
    assert (await engine.generate(_request(0, max_tokens=3))).finish == "length"


async def test_the_prefix_cache_does_not_outlive_a_version(engine: VllmEngine, second: Version) -> None:
    request = _request(9, max_tokens=16, prompt=tuple((31 * i + 7) % VOCAB for i in range(200)))

    async def cached_tokens() -> int:
        output = await engine._run("cached", request.prompt, temperature=1.0, max_tokens=1)
        return int(output.num_cached_tokens)

    assert await cached_tokens() == 0
    assert await cached_tokens() >= 160  # control: there is a cache
    await engine.pause()
    await engine.apply(second.manifest, second.weights)
    await engine.resume()
    generation = await engine.generate(request)
    assert _largest_error(second, request, generation) <= TOLERANCE
    await engine.apply(second.renumbered(3), second.weights)  # no pause: it is `apply` itself that clears
    assert await cached_tokens() == 0


async def test_a_stop_token_ends_the_answer_and_is_kept(engine: VllmEngine) -> None:
    stops = tuple(range(0, VOCAB, 8))
    generation = await engine.generate(_request(5, max_tokens=800, stop_token_ids=stops))
    assert generation.finish == "stop"
    assert generation.tokens[-1] in stops
    assert not set(generation.tokens[:-1]) & set(stops)
    assert len(generation.logprobs) == len(generation.tokens)


async def test_the_end_of_sequence_token_stops_only_where_it_is_asked_to(engine: VllmEngine) -> None:
    eos = _config().eos_token_id
    generations = await asyncio.gather(*(engine.generate(_request(i, max_tokens=200)) for i in range(32)))
    assert {generation.finish for generation in generations} == {"length"}
    assert any(eos in generation.tokens for generation in generations)  # control: it was sampled


@pytest.mark.parametrize("token", [VOCAB, -1])
async def test_a_token_outside_the_vocabulary_is_refused_and_the_engine_lives_on(
    engine: VllmEngine, token: int
) -> None:
    running = asyncio.create_task(engine.generate(_request(0, max_tokens=64)))
    with pytest.raises(EngineError, match=f"token {token} is not among the 512 of the model"):
        await engine.generate(_request(1, prompt=(1, 2, token)))
    with pytest.raises(EngineError, match=f"token {token} is not among the 512 of the model"):
        await engine.score((1, 2, token))
    assert len((await running).tokens) == 64


async def test_what_vllm_refuses_is_an_engine_error_and_the_engine_lives_on(engine: VllmEngine) -> None:
    for refused in (_request(0, max_tokens=0), _request(0, prompt=(3,) * 1024), _request(0, temperature=-1.0)):
        with pytest.raises(EngineError):
            await engine.generate(refused)
    assert len((await engine.generate(_request(0, max_tokens=4))).tokens) == 4


async def test_an_update_beside_running_requests_is_refused(engine: VllmEngine, second: Version) -> None:
    running = asyncio.create_task(engine.generate(_request(0, max_tokens=300)))
    await asyncio.sleep(0.02)
    with pytest.raises(EngineError, match="version 2 was to be loaded beside 1 requests") as caught:
        await engine.apply(second.manifest, second.weights)
    assert not isinstance(caught.value, EnginePoisoned)
    assert (await running).spans == (VersionSpan(1, 0, 300),)


@pytest.mark.parametrize("defect", ["cut off", "no k_proj", "no norm", "shape", "foreign", "not there"])
async def test_a_file_that_is_not_whole_is_refused_before_the_engine_is_touched(
    engine: VllmEngine, second: Version, tmp_path: Path, defect: str
) -> None:
    broken = tmp_path / "broken.safetensors"
    match defect:
        case "cut off":
            broken.write_bytes(second.weights.read_bytes()[:-100])
            reason = "broken.safetensors cannot be read"
        case "no k_proj":
            _saved(_state(second.model, without="model.layers.1.self_attn.k_proj.weight"), broken)
            reason = r"1 tensors are missing \(model.layers.1.self_attn.k_proj.weight\)"
        case "no norm":
            _saved(_state(second.model, without="model.norm.weight"), broken)
            reason = r"1 tensors are missing \(model.norm.weight\)"
        case "shape":
            _saved(_state(second.model) | {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)}, broken)
            reason = r"1 have another shape \(model.layers.1.mlp.down_proj.weight \(3, 3\) instead of \(64, 128\)\)"
        case "foreign":
            _saved(_state(second.model) | {"model.layers.2.mlp.down_proj.weight": torch.zeros(64, 128)}, broken)
            reason = "1 are not of this model"
        case _:
            reason = "broken.safetensors cannot be read"
    scored = await engine.score(PROBE_TOKENS)
    await engine.pause()
    with pytest.raises(EngineError, match=reason) as caught:
        await engine.apply(second.manifest, broken)
    await engine.resume()
    assert not isinstance(caught.value, EnginePoisoned)
    assert await engine.score(PROBE_TOKENS) == scored


async def _running(model_directory: Path, *, repack_tied: bool) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(model_directory, _settings(repack_tied=repack_tied))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


def _settings(*, repack_tied: bool = True) -> VllmSettings:
    return VllmSettings(
        max_model_len=1024, max_num_seqs=64, compute_type="Float32", kv_cache_bytes=64 << 20, repack_tied=repack_tied
    )


async def _swap(engine: VllmEngine, manifest: WeightManifest, weights: Path) -> None:
    await engine.pause()
    await engine.apply(manifest, weights)
    await engine.resume()


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.15,
        architectures=["LlamaForCausalLM"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _state(model: LlamaForCausalLM, without: str = "") -> dict[str, Tensor]:
    """As a trainer publishes it: the tied output layer is left out."""
    return {name: value for name, value in model.state_dict().items() if name not in ("lm_head.weight", without)}


def _saved(state: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def _version(directory: Path, number: int) -> Version:
    torch.manual_seed(number)
    model = LlamaForCausalLM(_config()).eval()
    probe = Probe(tokens=PROBE_TOKENS, logprobs=tuple(_logprobs(model, PROBE_TOKENS)), compute_type="Float32")
    encoded = encode_version(
        _state(model), epoch=1, version=number, compute_type="Float32", model_files=(), probe=probe
    )
    weights = directory / f"version-{number}.safetensors"
    weights.write_bytes(b"".join(part for _, part in encoded.chunks))
    return Version(model, encoded.manifest, weights)


def _logprobs(model: LlamaForCausalLM, tokens: tuple[int, ...], temperature: float = 1.0) -> list[float]:
    """Of tokens[1:], by transformers."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens])).logits[0, :-1]
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return [float(row[token]) for row, token in zip(logprobs_TV, tokens[1:], strict=True)]


def _request(
    number: int,
    *,
    max_tokens: int = 8,
    temperature: float = 1.0,
    stop_token_ids: tuple[int, ...] = (),
    prompt: tuple[int, ...] | None = None,
) -> GenerationRequest:
    made = tuple((number * 37 + i * 11 + 3) % VOCAB for i in range(16))
    return GenerationRequest(f"request-{number}", prompt or made, max_tokens, temperature, stop_token_ids)


def _largest_error(version: Version, request: GenerationRequest, generation: Generation) -> float:
    """Between the engine's log-probabilities and the trainer's model, over the generated tokens."""
    expected = _logprobs(version.model, request.prompt + generation.tokens, request.temperature)[
        len(request.prompt) - 1 :
    ]
    return max(abs(got - wanted) for got, wanted in zip(generation.logprobs, expected, strict=True))
