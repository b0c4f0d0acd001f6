"""An old-policy worker's process: `python -m rljob_runtime.old_policy`, or `rljob old-policy`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

import torch

from rljob_api.errors import RljobError, SpecError, Violation
from rljob_api.names import ENV_TERMINATION_FILE, ENV_WORKER, JobNames
from rljob_protocol import logs
from rljob_protocol.ahead import ScoreLog
from rljob_protocol.claims import TrajectoryClaims
from rljob_protocol.link import Link
from rljob_runtime import termination
from rljob_runtime.accelerator import check_accelerator
from rljob_runtime.old_policy.scorer import Scorer
from rljob_runtime.old_policy.worker import EXIT_CONFIGURATION, OldPolicyWorker
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.termination import Termination
from rljob_runtime.weights.choose import blob_store

LEASE_SECONDS = 12.0
"""Leases are extended three times in that time; the consumer's own limit is a little longer."""


def main() -> int:
    """Run one worker; the exit code tells the host what to do (see `worker.py`)."""
    try:
        settings = RuntimeSettings.from_environment(os.environ)
        logger = logs.configure(settings.worker or "old-policy")
        _check(settings)
        check_accelerator(os.environ, is_available=torch.cuda.is_available())
        return asyncio.run(_run(settings, logger))
    except RljobError as error:
        logs.configure("old-policy").error("old-policy worker could not start", extra=logs.fields(error=str(error)))
        _leave_word(termination.reason_of(error), EXIT_CONFIGURATION, str(error))
        return EXIT_CONFIGURATION


def _check(settings: RuntimeSettings) -> None:
    if not settings.worker:
        remedy = "The process's host sets it."
        raise SpecError((Violation(ENV_WORKER, "", "this environment variable is not set", remedy),))
    if settings.job.spec.old_policy_pool is None:
        remedy = "Give the job one, or start no old-policy worker."
        raise SpecError((Violation("spec.oldPolicyPool", "", "the job has no old-policy pool", remedy),))


def _leave_word(reason: str, code: int, message: str) -> None:
    path = Path(os.environ.get(ENV_TERMINATION_FILE) or termination.KUBERNETES_FILE)
    termination.write(Termination(reason, code, termination.text_of(time.time()), message), path)


async def _run(settings: RuntimeSettings, logger: logging.Logger) -> int:
    link = await Link.connect(
        JobNames(settings.uid),
        settings.nats_url,
        client_name=settings.worker,
        credentials=settings.credentials,
        logger=logger,
    )
    worker = OldPolicyWorker(
        settings,
        link,
        TrajectoryClaims(link),
        ScoreLog(link),
        blob_store(link, settings.weights_dir),
        Scorer(
            settings.job.spec,
            "cuda" if torch.cuda.is_available() else "cpu",
            num_threads=max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))),
        ),
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
