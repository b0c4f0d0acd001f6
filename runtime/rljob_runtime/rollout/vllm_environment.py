"""Environment variables that vLLM reads when it is imported, or that its processes inherit."""

from __future__ import annotations

import os

ALWAYS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ON_CPU = {
    # The worker runs inside the engine's process: one child instead of two, 7.5 s to start instead of 13.5 s.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Required by the line above: a second OpenMP thread spins against the front end, 62 ms a step instead of 1.5 ms.
    "OMP_NUM_THREADS": "1",
    # The first request for log-probabilities would otherwise compile a helper with g++, for 8 to 16 s.
    "TORCHDYNAMO_DISABLE": "1",
}


def prepare_environment(*, on_gpu: bool) -> None:
    """Set what vLLM needs and the user has not set. Call before vLLM is first imported.

    No usage reports and no log below errors; on a CPU also one process, one OpenMP thread and no compiler. What decides
    whether models are looked up in the network (HF_HUB_OFFLINE) is left as it is: the engine reads a local folder only.
    """
    for name, value in (ALWAYS if on_gpu else ALWAYS | ON_CPU).items():
        os.environ.setdefault(name, value)
