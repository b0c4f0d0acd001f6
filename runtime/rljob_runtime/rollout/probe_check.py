"""Whether an engine's log-probabilities of a probe are those of the version it should hold (docs/design.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rljob_api.weights import Probe

FLOAT32_MAX_ERROR = 1e-3
"""Measured in float32: 1e-5 for a tiny model, 7.6e-5 for one of 135 million parameters."""

BFLOAT16_RMS_ERROR = 0.25
"""Measured in bfloat16: RMS 0.06, single tokens up to 0.34; other weights are off by nats."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the comparison found, in nats; infinite where there is nothing to compare."""

    passed: bool
    max_abs: float
    rms: float
    reason: str
    """Empty if passed, else a sentence with the numbers."""


def check_probe(probe: Probe, scored: Sequence[float], engine_compute_type: str) -> ProbeResult:
    """Compare what the engine scored with what the trainer published.

    Exact to rounding where both sides compute in Float32 (every token is held to `FLOAT32_MAX_ERROR`). With BFloat16 on
    either side single tokens are noise and the RMS is held to `BFLOAT16_RMS_ERROR`: it tells foreign or half-loaded weights,
    and cannot tell neighbouring versions apart.
    """
    if len(scored) != len(probe.logprobs):
        reason = f"the engine scored {len(scored)} tokens of a probe with {len(probe.logprobs)}"
        return ProbeResult(False, math.inf, math.inf, reason)
    errors = [abs(got - expected) for got, expected in zip(scored, probe.logprobs, strict=True)]
    if not all(math.isfinite(error) for error in errors):
        broken = sum(not math.isfinite(error) for error in errors)
        reason = f"{broken} of {len(errors)} probe log-probabilities are not finite"
        return ProbeResult(False, math.inf, math.inf, reason)
    max_abs = max(errors)
    rms = math.sqrt(math.fsum(error * error for error in errors) / len(errors))
    exact = probe.compute_type == engine_compute_type == "Float32"
    if exact and max_abs > FLOAT32_MAX_ERROR:
        reason = (
            f"probe log-probabilities differ by up to {max_abs:.3g} nats, more than {FLOAT32_MAX_ERROR:g} in Float32"
        )
    elif not exact and rms > BFLOAT16_RMS_ERROR:
        reason = f"probe log-probabilities differ by {rms:.3g} nats (RMS), more than {BFLOAT16_RMS_ERROR:g} in BFloat16"
    else:
        reason = ""
    return ProbeResult(reason == "", max_abs, rms, reason)
