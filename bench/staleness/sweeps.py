"""Which runs make an experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

from bench.staleness.results import load
from bench.staleness.settings import ARMS, Settings

SEEDS = (0, 1, 2)
CAPS = (2, 4, 8)
DECAYS = (0.4, 0.5, 0.6, 0.75, 0.9)
RESET_THRESHOLDS = (0.8,)
"""Besides 0.9 and off, which are arms of the learning sweep."""
CLIPS = (0.1, 0.2, 0.4)
ABLATION_CAP = 4
OPEN_BOUND = 2.0
"""The project's default for a mask on single tokens."""


def calibration() -> Iterator[Settings]:
    """Runs without staleness and with an open mask: what the engine's discrepancy alone is."""
    for seed in SEEDS:
        yield Settings(arm="exact", cap=0, delay="fixed", seed=seed, discrepancy_bound=OPEN_BOUND)


def small(settings: Settings) -> Settings:
    """The same run with a drift per version of the size of the engine's discrepancy, from weights that know a part."""
    return replace(settings, learning_rate=1e-4, warm_steps=40, steps=200, evaluate_every=20)


def small_calibration() -> Iterator[Settings]:
    """The calibration where the drift is small."""
    yield from map(small, calibration())


def calibrated_bound(sweep: str = "variable") -> float:
    """exp of the 99th percentile of |log r_d| at staleness 0, mean over seeds, rounded to 4 digits.

    Raises:
        LookupError: the calibration has not been run.
    """
    name = "small_calibration" if sweep == "small_drift" else "calibration"
    runs = load(name)
    if len(runs) < len(SEEDS):
        raise LookupError(f"the discrepancy mask is not calibrated: python -m bench.staleness run {name}")
    return round(math.exp(fmean(run.record["abs_log_discrepancy"]["0.99"] for run in runs)), 4)


def fresh(bound: float) -> Iterator[Settings]:
    """Runs without staleness, with the calibrated mask."""
    for seed in SEEDS:
        yield Settings(arm="exact", cap=0, delay="fixed", seed=seed, discrepancy_bound=bound)


def variable(bound: float) -> Iterator[Settings]:
    """Every arm under variable delays; seeds in the outer loop, so that what is there early is a whole table."""
    yield from fresh(bound)
    for seed in SEEDS:
        for cap in reversed(CAPS):
            for arm in ARMS:
                yield Settings(arm=arm, cap=cap, delay="variable", seed=seed, discrepancy_bound=bound)


def fixed(bound: float) -> Iterator[Settings]:
    """Every arm under fixed delays; without staleness the two kinds are one."""
    for settings in variable(bound):
        if settings.cap:
            yield replace(settings, delay="fixed")


def open_mask(bound: float) -> Iterator[Settings]:
    """Every arm with the project's default mask instead of the calibrated one."""
    for settings in variable(bound):
        if settings.cap == ABLATION_CAP:
            yield replace(settings, discrepancy_bound=OPEN_BOUND)


def small_drift(bound: float) -> Iterator[Settings]:
    """Every arm under variable delays where the drift is small."""
    yield from map(small, variable(bound))


def decay(bound: float) -> Iterator[Settings]:
    """Fixed decays of the averaged weights, without resets, which would hide them; both masks."""
    for seed in SEEDS:
        for of_mask in (OPEN_BOUND, bound):
            for value in DECAYS:
                yield Settings(
                    arm="ewma-no-reset",
                    cap=ABLATION_CAP,
                    delay="variable",
                    seed=seed,
                    discrepancy_bound=of_mask,
                    decay=value,
                )


def reset(bound: float) -> Iterator[Settings]:
    """Reset thresholds that the learning sweeps lack; both masks."""
    for seed in SEEDS:
        for of_mask in (OPEN_BOUND, bound):
            for threshold in RESET_THRESHOLDS:
                yield Settings(
                    arm="ewma",
                    cap=ABLATION_CAP,
                    delay="variable",
                    seed=seed,
                    discrepancy_bound=of_mask,
                    reset_threshold=threshold,
                )


def thresholds(bound: float) -> Iterator[Settings]:
    """Width of the discrepancy mask times width of the clip, exact old log-probabilities; less what other sweeps have."""
    elsewhere = {settings.key for sweep in (variable, open_mask) for settings in sweep(bound)}
    for seed in SEEDS:
        for of_mask in mask_bounds(bound):
            for clip in CLIPS:
                settings = Settings(
                    arm="exact", cap=ABLATION_CAP, delay="variable", seed=seed, discrepancy_bound=of_mask, clip=clip
                )
                if settings.key not in elsewhere:
                    yield settings


def mask_bounds(bound: float) -> tuple[float, float, float]:
    """A mask a third as wide as the calibrated one, that one, and the project's default."""
    return round(bound ** (1 / 3), 4), bound, OPEN_BOUND


CALIBRATIONS = {"calibration": calibration, "small_calibration": small_calibration}
"""These come first: the mask of the others follows from them."""
SWEEPS = {
    "variable": variable,
    "open_mask": open_mask,
    "fixed": fixed,
    "small_drift": small_drift,
    "decay": decay,
    "reset": reset,
    "thresholds": thresholds,
}
