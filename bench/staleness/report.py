"""Writes the figures, and the tables of docs/results.md between their markers."""

from __future__ import annotations

from bench.pages import DOCS, IMAGES, filled
from bench.staleness import figures, sweeps
from bench.staleness.document_tables import device_time_table, proposition_table, table_4_table
from bench.staleness.results import load, load_document
from bench.staleness.run_tables import (
    calibration_table,
    decay_table,
    discrepancy_table,
    drift_table,
    learning_table,
    machine_line,
    reset_table,
    thresholds_table,
    tracking_table,
)
from bench.staleness.summaries import chosen

PAGE = DOCS / "results.md"
LARGEST_CAP = sweeps.CAPS[-1]


def write() -> None:
    """Make everything anew from bench/staleness/results/."""
    PAGE.write_text(filled(PAGE.read_text(), "staleness", tables()))
    bound, images, variable, small = sweeps.calibrated_bound(), IMAGES, load("variable"), load("small_drift")
    fresh = chosen(variable, cap=0)
    figures.learning(fresh, variable, "variable", images / "staleness-variable.svg")
    figures.learning(fresh, load("fixed"), "fixed", images / "staleness-fixed.svg")
    figures.behind_exact(small, images / "staleness-small-drift.svg")
    figures.discrepancy(variable, LARGEST_CAP, images / "staleness-discrepancy.svg")
    figures.decays(load("decay"), (bound, sweeps.OPEN_BOUND), images / "staleness-decay.svg")
    figures.proposition(load_document("proposition"), images / "staleness-proposition.svg")


def tables() -> dict[str, str]:
    """Each table of the page, by the name in its marker."""
    bound, small_bound = sweeps.calibrated_bound(), sweeps.calibrated_bound("small_drift")
    of_sweep = {name: load(name) for name in (*sweeps.CALIBRATIONS, *sweeps.SWEEPS)}
    variable, opened, small = of_sweep["variable"], of_sweep["open_mask"], of_sweep["small_drift"]
    fresh, small_fresh = chosen(variable, cap=0), chosen(small, cap=0)
    of_mask = {bound: chosen(variable, cap=sweeps.ABLATION_CAP), sweeps.OPEN_BOUND: opened}
    drifts = {"as above": variable, "small drift": small}
    return {
        **{f"variable-{cap}": learning_table(chosen(variable, cap=cap), fresh) for cap in sweeps.CAPS},
        **{f"fixed-{cap}": learning_table(chosen(of_sweep["fixed"], cap=cap), fresh) for cap in sweeps.CAPS},
        **{f"small-{cap}": learning_table(chosen(small, cap=cap), small_fresh) for cap in sweeps.CAPS},
        "machine": machine_line(run for runs in of_sweep.values() for run in runs),
        "calibration": calibration_table(of_sweep["calibration"], bound),
        "small-calibration": calibration_table(of_sweep["small_calibration"], small_bound),
        "drift": drift_table(drifts),
        "tracking": tracking_table(drifts),
        "open": learning_table(opened, chosen(of_sweep["calibration"], cap=0)),
        "discrepancy": discrepancy_table(chosen(variable, cap=LARGEST_CAP)),
        "decay": decay_table(of_sweep["decay"], bound),
        "reset": reset_table({mask: [*runs, *of_sweep["reset"]] for mask, runs in of_mask.items()}),
        "thresholds": thresholds_table([*chosen([*variable, *opened], arm="exact"), *of_sweep["thresholds"]], bound),
        "table-4": table_4_table(),
        "proposition": proposition_table(load_document("proposition")["runs"]),
        "device-time": device_time_table(load_document("device_time")),
    }
