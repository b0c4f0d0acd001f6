"""The probe's verdict: strict in fp32, root mean square where one side computes in bf16, never passed by NaN."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from rljob_api.weights import Probe
from rljob_runtime.rollout.probe_check import MAX_ABS_FLOAT32, RMS_BFLOAT16, check_probe

EXPECTED = tuple(-0.1 * index for index in range(1, 65))


def probe(compute_type: Literal["Float32", "BFloat16"]) -> Probe:
    return Probe(tokens=tuple(range(65)), logprobs=EXPECTED, compute_type=compute_type)


def off_by(*errors: float) -> list[float]:
    return [value + errors[index % len(errors)] for index, value in enumerate(EXPECTED)]


def test_fp32_on_both_sides_is_held_to_the_largest_difference() -> None:
    result = check_probe(probe("Float32"), off_by(0.9 * MAX_ABS_FLOAT32, 0.0), "Float32")
    assert result.passed
    assert result.max_abs == pytest.approx(0.9 * MAX_ABS_FLOAT32)
    one_off = list(EXPECTED)
    one_off[63] += 1.1 * MAX_ABS_FLOAT32
    refused = check_probe(probe("Float32"), one_off, "Float32")
    assert not refused.passed
    assert "allowed: max 0.001 in fp32" in refused.reason


@pytest.mark.parametrize(
    ("trainer", "engine"), [("BFloat16", "BFloat16"), ("Float32", "BFloat16"), ("BFloat16", "Float32")]
)
def test_bf16_on_either_side_is_held_to_the_root_mean_square(
    trainer: Literal["Float32", "BFloat16"], engine: str
) -> None:
    # As measured on SmolLM2: RMS 0.06 with single tokens off by 0.34.
    noise = [0.06 * (-1) ** index for index in range(64)]
    noise[5] = 0.34
    scored = [value + error for value, error in zip(EXPECTED, noise, strict=True)]
    result = check_probe(probe(trainer), scored, engine)
    assert result.passed
    assert result.rms == pytest.approx(math.sqrt(math.fsum(error**2 for error in noise) / 64))
    refused = check_probe(probe(trainer), off_by(1.1 * RMS_BFLOAT16, -1.1 * RMS_BFLOAT16), engine)
    assert not refused.passed
    assert "allowed: RMS 0.25 in bf16" in refused.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compute_type", ["Float32", "BFloat16"])
def test_a_value_that_is_not_finite_never_passes(value: float, compute_type: Literal["Float32", "BFloat16"]) -> None:
    scored = [*EXPECTED[:-1], value]
    result = check_probe(probe(compute_type), scored, compute_type)
    assert not result.passed
    assert result.reason == "a probe log-probability is not finite"


def test_a_missing_value_never_passes() -> None:
    result = check_probe(probe("Float32"), EXPECTED[:-1], "Float32")
    assert not result.passed
    assert result.reason == "the engine scored 63 of 64 probe tokens"
