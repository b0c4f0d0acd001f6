"""Whether an engine holds the weights that its label says: a manifest's probe against the engine's own scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rljob_api.weights import Probe

FLOAT32_MAX_ERROR = 1e-3
"""Largest difference of one log-probability where trainer and engine both compute in fp32 (measured: 8e-5 at worst)."""
BFLOAT16_RMS_ERROR = 0.25
"""Root mean square of the differences where one computes in bf16 (measured: 0.06; wrong weights: several nats)."""


def probe_error(probe: Probe, scores: Sequence[float], *, is_float32: bool) -> str | None:
    """Why the scores do not prove the version; None where they do.

    `is_float32`: trainer and engine both compute in fp32, so the strict bound holds.
    """
    if len(scores) != len(probe.logprobs):
        return f"the engine scored {len(scores)} tokens of the probe's {len(probe.logprobs)}"
    errors = [abs(a - b) for a, b in zip(scores, probe.logprobs, strict=True)]
    if not all(math.isfinite(error) for error in errors):
        return "the engine's log-probabilities of the probe are not finite"
    largest = max(errors)
    rms = math.sqrt(math.fsum(error * error for error in errors) / len(errors))
    if is_float32:
        if largest > FLOAT32_MAX_ERROR:
            return f"log-probabilities differ by up to {largest:.3g}, more than {FLOAT32_MAX_ERROR:g} (RMS {rms:.3g})"
        return None
    if rms > BFLOAT16_RMS_ERROR:
        return f"log-probabilities differ by RMS {rms:.3g}, more than {BFLOAT16_RMS_ERROR:g} (max {largest:.3g})"
    return None
