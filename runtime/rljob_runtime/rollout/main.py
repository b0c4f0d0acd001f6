"""Entry point of a rollout worker's process: `python -m rljob_runtime.rollout.main`, or `rljob rollout`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import zlib

from rljob_api.errors import DeadlineExceeded, EngineError, RljobError
from rljob_api.messages import PublishedVersion
from rljob_api.names import KEY_PUBLISHED, JobNames
from rljob_api.pools import RolloutPool
from rljob_protocol.link import Link
from rljob_runtime import logs
from rljob_runtime.rollout.engine import InferenceEngine
from rljob_runtime.rollout.worker import Identity, RolloutWorker
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.weights.choose import blob_store
from rljob_runtime.weights.fetch import fetch_manifest, fetch_model_files

EXIT_POISONED = 70
"""The engine must be restarted: the host starts this process again."""
FIRST_VERSION_SECONDS = 900.0


def main() -> int:
    """Run one worker; the exit code tells the host what to do."""
    settings = RuntimeSettings.from_environment(os.environ)
    logger = logs.configure(settings.worker or "rollout")
    try:
        asyncio.run(_run(settings, logger))
    except EngineError as error:
        logger.error("engine given up", extra={"error": str(error)})
        return EXIT_POISONED
    except RljobError as error:
        logger.error("rollout worker failed", extra={"error": str(error)})
        return 1
    return 0


async def _run(settings: RuntimeSettings, logger: logging.Logger) -> None:
    pool = next((pool for pool in settings.job.spec.rollout_pools if pool.name == settings.pool), None)
    if pool is None:
        raise RljobError(f"the RLJob has no rollout pool {settings.pool!r}")
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    link = await Link.connect(
        JobNames(settings.uid),
        settings.nats_url,
        client_name=settings.worker,
        credentials=settings.credentials,
        logger=logger,
    )
    store = blob_store(link, settings.weights_dir)
    model_directory = settings.cache_dir / "model"
    engine: InferenceEngine | None = None
    try:
        published = await _first_version(link, stop)
        if published is None:
            return
        manifest = await fetch_manifest(store, published.manifest, settings.cache_dir)
        await fetch_model_files(store, manifest, model_directory)
        from rljob_runtime.rollout.rendering import Renderer

        engine, compute_type = _make_engine(settings, pool)
        started = time.monotonic()
        await engine.start()
        logger.info("engine started", extra={"seconds": round(time.monotonic() - started, 1)})
        worker = RolloutWorker(
            identity=Identity(settings.worker, settings.pool, settings.incarnation),
            spec=settings.job.spec,
            max_concurrent=pool.max_concurrent_trajectories,
            link=link,
            store=store,
            engine=engine,
            engine_compute_type=compute_type,
            renderer=Renderer(model_directory),
            cache=settings.cache_dir / "versions",
            logger=logger,
        )
        watcher = asyncio.create_task(_forward(stop, worker))
        try:
            await worker.run()
        finally:
            watcher.cancel()
    finally:
        if engine is not None:
            await engine.shutdown()
        await link.close()


async def _forward(stop: asyncio.Event, worker: RolloutWorker) -> None:
    await stop.wait()
    worker.request_stop()


async def _first_version(link: Link, stop: asyncio.Event) -> PublishedVersion | None:
    """The first published version, which also names config and tokenizer; None when told to stop before."""
    deadline = time.monotonic() + FIRST_VERSION_SECONDS
    while not stop.is_set():
        held = await link.read(KEY_PUBLISHED, PublishedVersion)
        if held is not None:
            return held.value
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(
                f"the trainer published no version within {FIRST_VERSION_SECONDS:g} s: look at its log"
            )
        await asyncio.sleep(0.2)
    return None


def _make_engine(settings: RuntimeSettings, pool: RolloutPool) -> tuple[InferenceEngine, str]:
    """The pool's engine and the number format it computes in."""
    spec = settings.job.spec
    directory = settings.cache_dir / "model"
    if pool.engine.simulated is not None:
        from rljob_runtime.rollout.simulated_engine import SimulatedEngine

        return SimulatedEngine(directory, pool.engine.simulated), "Float32"
    from rljob_api.pools import VllmEngine as VllmPool
    from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

    wanted = pool.engine.vllm or VllmPool()
    compute_type = wanted.compute_type or spec.training.compute_type.value
    engine_settings = VllmSettings(
        max_model_len=spec.sampling.max_trajectory_tokens,
        max_num_seqs=pool.max_concurrent_trajectories,
        compute_type=compute_type,
        kv_cache_bytes=wanted.kv_cache_bytes,
        tensor_parallel_size=wanted.tensor_parallel_size,
        enforce_eager=wanted.enforce_eager,
        seed=zlib.crc32(f"{settings.worker}:{settings.incarnation}".encode()),
    )
    return VllmEngine(directory, engine_settings), compute_type


if __name__ == "__main__":
    raise SystemExit(main())
