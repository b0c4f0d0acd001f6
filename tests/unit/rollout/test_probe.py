from __future__ import annotations

import pytest

from rljob_api.weights import Probe
from rljob_runtime.rollout.probe import probe_error

PROBE = Probe(tokens=(1, 2, 3, 4, 5), logprobs=(-1.0, -2.0, -3.0, -4.0), compute_type="Float32")


def shifted(*deltas: float) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(PROBE.logprobs, deltas, strict=True))


def test_equal_scores_prove_the_version() -> None:
    assert probe_error(PROBE, PROBE.logprobs, is_float32=True) is None


def test_float32_bounds_the_largest_difference() -> None:
    assert probe_error(PROBE, shifted(0.0009, 0, 0, 0), is_float32=True) is None
    assert probe_error(PROBE, shifted(0.0011, 0, 0, 0), is_float32=True) == (
        "log-probabilities differ by up to 0.0011, more than 0.001 (RMS 0.00055)"
    )


def test_bfloat16_bounds_the_root_mean_square() -> None:
    assert probe_error(PROBE, shifted(0.45, 0, 0, 0), is_float32=False) is None
    assert probe_error(PROBE, shifted(0.3, -0.3, 0.3, -0.3), is_float32=False) == (
        "log-probabilities differ by RMS 0.3, more than 0.25 (max 0.3)"
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_proves_nothing(value: float) -> None:
    for is_float32 in (True, False):
        assert probe_error(PROBE, (-1.0, value, -3.0, -4.0), is_float32=is_float32) == (
            "the engine's log-probabilities of the probe are not finite"
        )


def test_a_missing_score_proves_nothing() -> None:
    assert probe_error(PROBE, (-1.0, -2.0, -3.0), is_float32=False) == "the engine scored 3 tokens of the probe's 4"
