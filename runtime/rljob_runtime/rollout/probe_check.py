"""Does the engine hold the version that it says it holds? Compares its log-probabilities of the probe with the trainer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rljob_api.weights import Probe

MAX_ABS_FLOAT32 = 1e-3
"""Both sides in fp32 agree to 1e-4 on SmolLM2 (tied) and 1e-5 on small models; a neighbouring version usually does not."""
RMS_BFLOAT16 = 0.25
"""bf16 noise on SmolLM2 is an RMS of 0.06; wrong, half-applied, wrongly tied or NaN weights are off by nats."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Verdict of a probe; `reason` is a sentence when it did not pass."""

    passed: bool
    max_abs: float
    rms: float
    reason: str = ""


def check_probe(probe: Probe, scored: Sequence[float], engine_compute_type: str) -> ProbeResult:
    """Compare. fp32 on both sides is held to the largest difference, anything in bf16 to the root mean square."""
    if len(scored) != len(probe.logprobs):
        reason = f"the engine scored {len(scored)} of {len(probe.logprobs)} probe tokens"
        return ProbeResult(False, math.inf, math.inf, reason)
    differences = [abs(mine - theirs) for mine, theirs in zip(scored, probe.logprobs, strict=True)]
    if not all(math.isfinite(difference) for difference in differences):
        return ProbeResult(False, math.inf, math.inf, "a probe log-probability is not finite")
    largest = max(differences)
    rms = math.sqrt(sum(difference**2 for difference in differences) / len(differences))
    exact = probe.compute_type == "Float32" and engine_compute_type == "Float32"
    passed = largest <= MAX_ABS_FLOAT32 if exact else rms <= RMS_BFLOAT16
    if passed:
        return ProbeResult(True, largest, rms)
    limit = f"max {MAX_ABS_FLOAT32:g} in fp32" if exact else f"RMS {RMS_BFLOAT16:g} in bf16"
    return ProbeResult(
        False, largest, rms, f"probe differs by max {largest:.3g}, RMS {rms:.3g} nats (allowed: {limit})"
    )
