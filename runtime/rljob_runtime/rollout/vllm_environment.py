"""Environment variables that vLLM reads when it is imported; set before, and only where the user has not."""

from __future__ import annotations

import os

ALWAYS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ON_CPU = {
    # One engine process instead of two.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # With the line above two OpenMP threads spin against the front end: 62 ms a step instead of 1.5.
    "OMP_NUM_THREADS": "1",
    # The first log-probabilities would otherwise compile a helper with g++, for 8 to 16 s.
    "TORCHDYNAMO_DISABLE": "1",
}


def prepare_environment(*, on_gpu: bool) -> None:
    """Set what is not set yet."""
    for name, value in (ALWAYS if on_gpu else ALWAYS | ON_CPU).items():
        os.environ.setdefault(name, value)
