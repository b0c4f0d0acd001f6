"""What goes wrong around a vLLM engine is found, said, and leaves no process behind."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from tests.integration.engine.small_models import SmallModel, make_small_model, prompt, without

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_runtime.rollout import vllm_processes
from rljob_runtime.rollout.engine import GenerationRequest
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's and its libraries' own
]

GO_ON = GenerationRequest("r", prompt(0), 4, 1.0, ())


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def not_repacked(tied: SmallModel) -> AsyncIterator[VllmEngine]:
    """An engine that leaves out the re-pack of tied layers after a load."""
    settings = VllmSettings(max_model_len=256, max_num_seqs=8, compute_type="Float32", repack_tied=False)
    engine = VllmEngine(tied.bare, settings)
    await engine.start()
    yield engine
    await engine.shutdown()


async def hold(engine: VllmEngine, model: SmallModel, number: int) -> None:
    await engine.pause()
    await engine.apply(model.versions[number].manifest, model.versions[number].weights)
    await engine.resume()


async def test_without_the_repack_a_tied_output_layer_stays_old_and_the_probe_shows_it(
    not_repacked: VllmEngine, tied: SmallModel
) -> None:
    probe = prompt(3, 64)
    await hold(not_repacked, tied, 0)
    await hold(not_repacked, tied, 1)
    scored = await not_repacked.score(probe)
    assert max(abs(a - b) for a, b in zip(scored, tied.versions[1].logprobs(probe), strict=True)) > 0.1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncated", "cannot be read as safetensors"),
        ("absent", "cannot be read as safetensors"),
        ("fused partner", r"2 tensors are missing \(model.layers.0.self_attn.k_proj.weight"),
        ("shape", "have another shape"),
        ("another model", "are not of this model"),
    ],
)
async def test_a_broken_file_poisons_the_engine_before_it_is_loaded(
    not_repacked: VllmEngine, tied: SmallModel, tmp_path: Path, harm: str, message: str
) -> None:
    version = tied.versions[2]
    state = load_file(version.weights)
    path = tmp_path / "weights.safetensors"
    match harm:
        case "truncated":
            path.write_bytes(version.weights.read_bytes()[:-1000])
        case "fused partner":
            path = without(version, tmp_path, "k_proj")
        case "shape":
            save_file(state | {"model.norm.weight": torch.ones(65)}, path)
        case "another model":
            save_file(state | {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}, path)
    await hold(not_repacked, tied, 0)
    await not_repacked.pause()
    with pytest.raises(EnginePoisoned, match=message):
        await not_repacked.apply(version.manifest, path)
    await not_repacked.resume()
    with pytest.raises(EngineError, match="version 2 was not loaded to its end"):
        await not_repacked.generate(GO_ON)


async def test_a_dead_engine_is_an_error_of_every_call_and_of_every_request_in_flight(
    not_repacked: VllmEngine, tied: SmallModel
) -> None:
    await hold(not_repacked, tied, 0)
    running = [
        asyncio.create_task(not_repacked.generate(GenerationRequest(f"d{index}", prompt(index), 200, 1.0, ())))
        for index in range(4)
    ]
    await asyncio.sleep(0.03)
    for process in vllm_processes.children():
        process.kill()
    async with asyncio.timeout(20):
        results = await asyncio.gather(*running, return_exceptions=True)
    assert [str(result) for result in results] == ["the engine died: it must be started again"] * 4
    with pytest.raises(EngineError, match="the engine died"):
        await not_repacked.generate(GO_ON)
    with pytest.raises(EngineError, match="the engine died"):
        await not_repacked.pause()
    with pytest.raises(EnginePoisoned, match="version 1"):
        await not_repacked.apply(tied.versions[1].manifest, tied.versions[1].weights)
    await not_repacked.shutdown()
    assert not vllm_processes.children()


OWNER = """
import asyncio, sys
from pathlib import Path
from rljob_runtime.rollout import vllm_processes
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

async def main():
    engine = VllmEngine(Path(sys.argv[1]), VllmSettings(max_model_len=64, max_num_seqs=2, compute_type="Float32"))
    await engine.start()
    print("children", *[process.pid for process in vllm_processes.children()], flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_an_engine_does_not_outlive_its_killed_owner(tied: SmallModel, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, "-W", "ignore", str(script), str(tied.bare)]
    pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    owner = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=nowhere)
    children: list[psutil.Process] = []
    try:
        assert owner.stdout is not None
        async for line in owner.stdout:
            if line.startswith(b"children"):
                children = [psutil.Process(int(pid)) for pid in line.split()[1:]]
                break
        assert children
        owner.kill()
        await owner.wait()
        deadline = time.monotonic() + 20
        while any(_runs(child) for child in children) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert not any(_runs(child) for child in children)
    finally:
        if owner.returncode is None:
            owner.kill()
            await owner.wait()
        for child in children:
            if _runs(child):
                child.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
