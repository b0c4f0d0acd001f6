"""A vLLM engine whose process dies, or whose owner does: it is said at once, and no process and no file stays behind."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.integration.engine.small_models import SmallModel, make_small_model, prompt

from rljob_api.errors import EngineError, EnginePoisoned
from rljob_runtime.rollout.engine import GenerationRequest
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SETTINGS = VllmSettings(max_model_len=256, max_num_seqs=8, compute_type="Float32")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("tied"), tied=True, versions=1)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The engine's temporary folder; short, as it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="e") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


async def test_a_dead_engine_is_an_error_of_every_call_and_of_every_request_in_flight(
    tied: SmallModel, folder: Path
) -> None:
    engine = VllmEngine(tied.bare, SETTINGS)
    await engine.start()
    try:
        assert list(folder.glob("vllm_dist_*"))  # control: there is something to leave behind
        (version,) = tied.versions
        await engine.pause()
        await engine.apply(version.manifest, version.weights)
        await engine.resume()
        running = [
            asyncio.create_task(engine.generate(GenerationRequest(f"d{index}", prompt(index), 200, 1.0, ())))
            for index in range(4)
        ]
        await asyncio.sleep(0.03)
        for child in engine_processes():
            child.kill()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(result, EngineError) and "EngineDeadError" in str(result) for result in results)
            with pytest.raises(EngineError, match="EngineDeadError"):
                await engine.generate(GenerationRequest("r", prompt(0), 4, 1.0, ()))
            with pytest.raises(EngineError, match="EngineDeadError"):
                await engine.pause()
            with pytest.raises(EnginePoisoned, match="EngineDeadError"):
                await engine.apply(version.manifest, version.weights)
    finally:
        await engine.shutdown()
    assert not engine_processes()
    assert not list(folder.glob("vllm_dist_*"))


OWNER = """
import asyncio, multiprocessing, sys
from pathlib import Path
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

async def main():
    engine = VllmEngine(Path(sys.argv[1]), VllmSettings(max_model_len=64, max_num_seqs=2, compute_type="Float32"))
    await engine.start()
    print("children", *[process.pid for process in multiprocessing.active_children()], flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_an_engine_does_not_outlive_its_killed_owner(tied: SmallModel, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, "-W", "ignore", str(script), str(tied.bare)]
    said = tmp_path / "owner.log"
    with said.open("wb") as output:  # no pipe: the engine's process would hold it open, and `wait` with it
        owner = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 150
        while not children and time.monotonic() < deadline and owner.returncode is None:
            await asyncio.sleep(0.2)
            for line in said.read_text().splitlines():
                if line.startswith("children"):
                    children = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        assert children, said.read_text()[-4000:]
        owner.kill()
        async with asyncio.timeout(20):
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


def engine_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if _runs(child) and "resource_tracker" not in " ".join(child.cmdline())]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
