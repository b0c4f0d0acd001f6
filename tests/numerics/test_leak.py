"""The verdict on RMS(log r_d) per staleness: what it says of exact, present and averaged references, and how often."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rljob_api.diagnostics import LeakCell
from rljob_runtime.correction.leak import Shape, leak_cells, leak_verdict

FLAT = "flat: clean"
RISES = "rises with staleness: staleness leaks into the discrepancy mask"
TOO_FEW = "too few tokens to say"
VERSIONS, ROWS, LENGTH = 40, 96, 24
Floats = NDArray[np.float64]


def cells(
    seed: int,
    *,
    drift: float = 0.0,
    center: float = 0.0,
    noise: float = 0.003,
    versions: int = VERSIONS,
    rows: int = ROWS,
) -> list[LeakCell]:
    """A run whose reference lies `center` versions back while the policy drifts by `drift` a version: residual (n - m).

    An exact reference has no drift in it. Noise is shared within a trajectory, doubles over positions and grows
    twentyfold over training, all of which staleness goes with: late positions are fresher, late versions staler.
    """
    generator = np.random.default_rng(seed)
    shape = (versions, rows, LENGTH)
    step = np.arange(4, 4 + versions)[:, None, None]
    position = np.broadcast_to(np.arange(LENGTH), shape)
    first = generator.integers(0, 3, (versions, rows, 1)) + (
        generator.random((versions, rows, 1)) < step / versions / 2
    )
    staleness = np.where(position < generator.integers(0, LENGTH, (versions, rows, 1)), first, np.maximum(first - 1, 0))
    version = step - staleness
    level = noise * np.exp(0.4 * generator.standard_normal((versions, rows, 1)))
    level = level * (1 + position / LENGTH) * np.exp(3.0 * version / VERSIONS)
    log_discrepancy = level * generator.standard_normal(shape)
    log_discrepancy += (staleness - center) * drift * generator.standard_normal(shape)
    return [
        cell
        for t in range(versions)
        for cell in leak_cells(
            log_discrepancy[t].ravel(), version[t].ravel(), staleness[t].ravel(), position[t].ravel()
        )
    ]


def test_an_exact_reference_is_flat_in_nearly_every_run() -> None:
    verdicts = [str(leak_verdict(cells(seed))) for seed in range(40)]
    assert verdicts.count(FLAT) >= 38, verdicts


def test_the_simulation_would_fool_a_verdict_that_forgets_position_and_version() -> None:
    """Negative control: the same exact runs, without the position, or by the step that trained instead of the version."""
    for forgetful in (
        lambda cell: cell._replace(position=0),
        lambda cell: cell._replace(weight_version=cell.weight_version + cell.staleness),
    ):
        verdicts = [str(leak_verdict([forgetful(cell) for cell in cells(seed)])) for seed in range(10)]
        assert sum(verdict != FLAT for verdict in verdicts) >= 8, verdicts


def test_the_present_policy_taken_for_the_old_one_rises() -> None:
    for seed in range(5):
        assert str(leak_verdict(cells(seed, drift=0.006))) == RISES
    # Engine and trainer agree to the bit: fresh tokens have no discrepancy at all.
    silent = leak_verdict(cells(0, drift=0.003, noise=0.0))
    assert str(silent) == RISES
    assert silent.relative_rms[1] > 1000


def test_an_average_of_weights_is_v_shaped_around_its_centre_of_mass() -> None:
    for center in (1.0, 1.5, 2.0):
        for seed in range(3):
            verdict = leak_verdict(cells(seed, drift=0.02, center=center))
            assert verdict.shape is Shape.VALLEY
            assert verdict.minimum == pytest.approx(center, abs=0.15)
            assert str(verdict) == f"V-shaped around {verdict.minimum:.1f}: EWMA"


def test_an_average_that_reaches_too_far_back_has_its_minimum_at_the_stalest_tokens() -> None:
    verdict = leak_verdict(cells(0, drift=0.02, center=6.0))
    assert str(verdict) == "V-shaped around 3.0: EWMA"


def test_engine_and_trainer_that_agree_to_the_bit_are_flat() -> None:
    assert str(leak_verdict(cells(0, noise=0.0))) == FLAT


@pytest.mark.parametrize(
    "few",
    [
        pytest.param([], id="no tokens"),
        pytest.param(cells(0, versions=8), id="few versions"),
        pytest.param([cell for cell in cells(0) if cell.staleness == 1], id="one staleness"),
        pytest.param([cell for cell in cells(0) if cell.staleness == cell.weight_version % 2], id="one a version"),
        pytest.param(cells(0, rows=3), id="few trajectories"),
    ],
)
def test_where_nothing_can_be_compared_nothing_is_said(few: list[LeakCell]) -> None:
    verdict = leak_verdict(few)
    assert (verdict.shape, str(verdict)) == (Shape.UNKNOWN, TOO_FEW)


def test_what_a_test_found_is_said_even_where_cells_show_nothing() -> None:
    short = [cell for cell in cells(0, drift=0.003) if cell.weight_version < 5]
    assert str(leak_verdict(short)) == "too few tokens to say"
    assert str(leak_verdict(short, differs=False)) == "flat: clean"
    said = "changes with staleness: staleness leaks into the discrepancy mask"
    assert str(leak_verdict(short, differs=True)) == said
    assert str(leak_verdict([], differs=True)) == said


def test_the_verdict_does_not_depend_on_the_order_of_cells_nor_on_how_they_are_cut_up() -> None:
    whole = cells(3, drift=0.006)
    shuffled = [whole[i] for i in np.random.default_rng(0).permutation(len(whole))]
    expected = leak_verdict(whole)
    for other in (leak_verdict(shuffled), leak_verdict([*whole, *whole])):
        assert other.relative_rms == pytest.approx(expected.relative_rms, rel=1e-6)
        assert other.shape is expected.shape


def test_the_relative_rms_is_that_of_the_model_behind_the_data() -> None:
    """No chance in it: cells of known level and factor, unbalanced, some strata with one staleness only."""
    factor = {0: 1.0, 1: 1.25, 2: 1.5}
    generator = np.random.default_rng(2)
    made = [
        LeakCell(v, n, p, int(generator.integers(1, 500)), 0.01 * (1 + v) * (1 + p) * factor[n])
        for v in range(12) for p in range(3) for n in range(3) if (v + p + n) % 4
    ]  # fmt: skip
    assert leak_verdict(made).relative_rms == pytest.approx(factor, rel=1e-4)


def test_a_test_with_more_to_go_on_is_believed() -> None:
    flat, rising = cells(0), cells(0, drift=0.006)
    assert leak_verdict(rising, differs=False).shape is Shape.FLAT
    assert leak_verdict(flat, differs=True).shape in (Shape.RISING, Shape.VALLEY)
    assert leak_verdict(cells(0, drift=0.003), differs=True).shape is Shape.RISING
    assert leak_verdict(cells(0, drift=0.02, center=1.5), differs=True).shape is Shape.VALLEY


def test_cells_hold_the_tokens_of_one_version_staleness_and_stretch() -> None:
    found = leak_cells(
        np.array([3.0, -4.0, 1.0, 2.0, 6.0]),
        np.array([7, 7, 7, 8, 8]),
        np.array([1, 1, 1, 0, 0]),
        np.array([1, 2, 3, 0, 7]),
    )
    assert [cell[:4] for cell in found] == [(7, 1, 1, 2), (7, 1, 2, 1), (8, 0, 0, 1), (8, 0, 3, 1)]
    assert [cell.rms for cell in found] == pytest.approx([12.5**0.5, 1.0, 2.0, 6.0])
    assert leak_cells(np.zeros(0), *[np.zeros(0, np.int64)] * 3) == ()
