"""A probe passes for the weights it was made with and for nothing else that the numbers can tell."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from rljob_api.weights import Probe
from rljob_runtime.rollout.probe_check import check_probe

EXPECTED = (-1.0, -2.0, -3.0, -0.5)


def probe(compute_type: Literal["Float32", "BFloat16"] = "Float32") -> Probe:
    return Probe(tokens=(5, 6, 7, 8, 9), logprobs=EXPECTED, compute_type=compute_type)


def shifted(*errors: float) -> list[float]:
    return [value + error for value, error in zip(EXPECTED, errors, strict=True)]


def test_equal_log_probabilities_pass_with_no_error() -> None:
    result = check_probe(probe(), EXPECTED, "Float32")
    assert (result.passed, result.max_abs, result.rms, result.reason) == (True, 0.0, 0.0, "")


def test_the_errors_are_the_largest_and_the_root_mean_square() -> None:
    result = check_probe(probe(), shifted(3e-4, -4e-4, 0.0, 0.0), "Float32")
    assert result.passed
    assert result.max_abs == pytest.approx(4e-4, rel=1e-9)
    assert result.rms == pytest.approx(2.5e-4, rel=1e-9)  # sqrt((9 + 16) / 4) e-4


def test_float32_on_both_sides_holds_every_single_token_to_the_limit() -> None:
    errors = (0.0, 0.0, 0.0, -2e-3)
    result = check_probe(probe(), shifted(*errors), "Float32")
    assert not result.passed
    assert result.reason == "probe log-probabilities differ by up to 0.002 nats, more than 0.001 in Float32"
    assert check_probe(probe(), shifted(*errors), "BFloat16").passed  # control: it is the number format that decides


@pytest.mark.parametrize(
    ("trainer", "engine"), [("BFloat16", "BFloat16"), ("Float32", "BFloat16"), ("BFloat16", "Float32")]
)
def test_bfloat16_on_either_side_is_held_to_the_root_mean_square(
    trainer: Literal["Float32", "BFloat16"], engine: str
) -> None:
    assert check_probe(probe(trainer), shifted(0.4, 0.0, 0.0, 0.0), engine).passed  # RMS 0.2: one noisy token
    result = check_probe(probe(trainer), shifted(0.3, -0.3, 0.3, -0.3), engine)
    assert not result.passed
    assert result.reason == "probe log-probabilities differ by 0.3 nats (RMS), more than 0.25 in BFloat16"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compute_type", ["Float32", "BFloat16"])
def test_a_value_that_is_not_finite_fails(broken: float, compute_type: Literal["Float32", "BFloat16"]) -> None:
    result = check_probe(probe(compute_type), (*EXPECTED[:3], broken), compute_type)
    assert not result.passed
    assert result.max_abs == math.inf
    assert result.reason == "1 of 4 probe log-probabilities are not finite"


@pytest.mark.parametrize("scored", [(), EXPECTED[:3], (*EXPECTED, -1.0)])
def test_a_wrong_number_of_values_fails(scored: tuple[float, ...]) -> None:
    result = check_probe(probe(), scored, "Float32")
    assert not result.passed
    assert result.reason == f"the engine scored {len(scored)} tokens of a probe with 4"
