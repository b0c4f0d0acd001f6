"""A rollout worker's process: `python -m rljob_runtime.rollout`, or `rljob rollout`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import zlib
from pathlib import Path

from rljob_api.errors import RljobError
from rljob_api.names import ENV_ACCELERATOR, ENV_TERMINATION_FILE, JobNames
from rljob_api.pools import RolloutPool
from rljob_api.pools import VllmEngine as VllmPool
from rljob_protocol import logs
from rljob_protocol.ahead import SegmentLog
from rljob_protocol.link import Link
from rljob_protocol.streams import TaskQueue, TrajectoryLog
from rljob_runtime import termination
from rljob_runtime.accelerator import check_accelerator
from rljob_runtime.rollout.engine import InferenceEngine
from rljob_runtime.rollout.worker import EXIT_CONFIGURATION, RolloutWorker
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.termination import Termination
from rljob_runtime.weights.choose import blob_store

LEASE_SECONDS = 12.0
"""Leases are extended three times in that time; the queue's own limit is a little longer."""


def main() -> int:
    """Run one worker; the exit code tells the host what to do (see `worker.py`)."""
    try:
        settings = RuntimeSettings.from_environment(os.environ)
        logger = logs.configure(settings.worker)
        check_accelerator(os.environ, is_available=_cuda_is_available())
        return asyncio.run(_run(settings, logger))
    except RljobError as error:
        logs.configure("rollout").error("rollout worker could not start", extra=logs.fields(error=str(error)))
        _leave_word(termination.reason_of(error), EXIT_CONFIGURATION, str(error))
        return EXIT_CONFIGURATION


def _cuda_is_available() -> bool:
    if os.environ.get(ENV_ACCELERATOR) != "cuda":
        return False
    import torch

    return torch.cuda.is_available()


def _leave_word(reason: str, code: int, message: str) -> None:
    path = Path(os.environ.get(ENV_TERMINATION_FILE) or termination.KUBERNETES_FILE)
    termination.write(Termination(reason, code, termination.text_of(time.time()), message), path)


async def _run(settings: RuntimeSettings, logger: logging.Logger) -> int:
    pool = settings.rollout_pool()
    link = await Link.connect(
        JobNames(settings.uid),
        settings.nats_url,
        client_name=settings.worker,
        credentials=settings.credentials,
        logger=logger,
    )
    worker = RolloutWorker(
        settings,
        link,
        TaskQueue(link),
        TrajectoryLog(link),
        blob_store(link, settings.weights_dir),
        lambda directory: make_engine(settings, pool, directory),
        SegmentLog(link),
        engine_compute_type=engine_compute_type(settings, pool),
        lease_seconds=LEASE_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.request_drain)
    try:
        code = await worker.run()
        if code != 0:
            reason = termination.INVALID_CONFIGURATION if code == EXIT_CONFIGURATION else "WorkerFailed"
            _leave_word(reason, code, worker.end_reason)
        return code
    finally:
        await link.close()


def engine_compute_type(settings: RuntimeSettings, pool: RolloutPool) -> str:
    """Number format that the pool's engine computes in."""
    if pool.engine.simulated is not None:
        return "Float32"
    wanted = pool.engine.vllm or VllmPool()
    return wanted.compute_type or settings.job.spec.training.compute_type.value


def make_engine(settings: RuntimeSettings, pool: RolloutPool, directory: Path) -> InferenceEngine:
    """The pool's engine on a folder with config and tokenizer; heavy imports happen here."""
    if pool.engine.simulated is not None:
        from rljob_runtime.rollout.simulated_engine import SimulatedEngine

        return SimulatedEngine(directory, pool.engine.simulated)
    from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings

    spec = settings.job.spec
    wanted = pool.engine.vllm or VllmPool()
    return VllmEngine(
        directory,
        VllmSettings(
            max_model_len=spec.sampling.max_trajectory_tokens,
            max_num_seqs=pool.max_concurrent_trajectories,
            compute_type=wanted.compute_type or spec.training.compute_type.value,
            kv_cache_bytes=wanted.kv_cache_bytes,
            tensor_parallel_size=wanted.tensor_parallel_size,
            enforce_eager=wanted.enforce_eager,
            seed=zlib.crc32(f"{settings.worker}:{settings.incarnation}".encode()),
        ),
    )
