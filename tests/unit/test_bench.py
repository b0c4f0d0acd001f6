"""The benchmarks' bookkeeping: limits that can be missed, and a page that says what was measured."""

from __future__ import annotations

import numpy as np
from bench.__main__ import outside, page
from bench.measure import Figure, Range, bootstrap_ratio, machine, ranges

LIMITS = {"speed": Range("speed over theirs", "≥ 0.95", at_least=0.9), "memory": Range("memory", "≤ 0.5", at_most=0.6)}


def figure(name: str, value: float) -> Figure:
    return Figure(name, value, value - 0.1, value + 0.1, "5 rounds", "9 over 10 tokens/s")


def test_a_figure_outside_its_limit_fails_on_either_side() -> None:
    assert outside([figure("speed", 0.9), figure("memory", 0.6)], LIMITS) == []
    assert outside([figure("speed", 0.89), figure("memory", 0.61)], LIMITS) == ["speed", "memory"]


def test_a_figure_that_was_not_measured_fails() -> None:
    assert outside([figure("speed", 1.0)], LIMITS) == ["memory"]


def test_every_limit_has_one_side_and_its_goal_is_within_it() -> None:
    for name, limit in ranges().items():
        assert (limit.at_least is None) != (limit.at_most is None), name
        assert limit.holds(float(limit.goal.split()[-1])), name


def test_the_page_gives_ratio_spread_goal_limit_machine_and_date() -> None:
    text = page([figure("speed", 0.987)], LIMITS, "2026-01-02", "some processor, 2 cores")
    assert "Measured on 2026-01-02: some processor, 2 cores." in text
    row = "| speed over theirs | **0.987** | 0.887 – 1.087 (5 rounds) | ≥ 0.95 | ≥ 0.9 | 9 over 10 tokens/s |"
    assert row in text


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_more_data() -> None:
    generator = np.random.default_rng(1)
    widths = []
    for count in (20, 2000):
        one, other = generator.normal(12, 1, count), generator.normal(10, 1, count)
        value, low, high = bootstrap_ratio(one.tolist(), other.tolist(), lambda values: float(np.median(values)))
        assert low < 1.2 < high
        assert low < value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_machine_is_told_by_its_parts() -> None:
    said = machine()
    assert "cores" in said and "GiB" in said and "torch 2" in said and "vllm" in said
