"""Writes the figures, and the tables of docs/results.md between their markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.staleness import figures, sweeps
from bench.staleness.proposition import table_4
from bench.staleness.results import Run, load, load_document
from bench.staleness.settings import ARMS
from bench.staleness.summaries import (
    Value,
    chosen,
    clipped,
    cpu_minutes,
    curve_mean,
    keep,
    last_mean,
    leak,
    paired,
    pooled_buckets,
    resets,
    spread,
    verdict,
)

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
LARGEST_CAP = sweeps.CAPS[-1]
EARLY_STEPS = 70
"""Of the runs on one stream: before rounding has grown into another run."""


def write() -> None:
    """Make everything anew from bench/staleness/results/."""
    PAGE.write_text(filled(PAGE.read_text(), tables()))
    bound, images, variable = sweeps.calibrated_bound(), figures.IMAGES, load("variable")
    figures.learning(chosen(variable, cap=0), variable, "variable", images / "staleness-variable.svg")
    figures.discrepancy(variable, LARGEST_CAP, images / "staleness-discrepancy.svg")
    figures.decays(load("decay"), (bound, sweeps.OPEN_BOUND), images / "staleness-decay.svg")
    figures.proposition(load_document("proposition"), images / "staleness-proposition.svg")


def tables() -> dict[str, str]:
    """Each table of the page, by the name in its marker."""
    bound = sweeps.calibrated_bound()
    of_sweep = {name: load(name) for name in ("calibration", *sweeps.SWEEPS)}
    variable, opened = of_sweep["variable"], of_sweep["open_mask"]
    fresh = chosen(variable, cap=0)
    by_cap = {f"variable-{cap}": learning_table(chosen(variable, cap=cap), fresh) for cap in sweeps.CAPS}
    of_mask = {bound: chosen(variable, cap=sweeps.ABLATION_CAP), sweeps.OPEN_BOUND: opened}
    return {
        **by_cap,
        "fixed": learning_table(of_sweep["fixed"], fresh),
        "machine": machine_line([run for runs in of_sweep.values() for run in runs]),
        "calibration": calibration_table(of_sweep["calibration"], bound),
        "open": learning_table(opened, chosen(of_sweep["calibration"], cap=0)),
        "discrepancy": discrepancy_table(chosen(variable, cap=LARGEST_CAP)),
        "decay": decay_table(of_sweep["decay"], bound),
        "reset": reset_table({mask: [*runs, *of_sweep["reset"]] for mask, runs in of_mask.items()}),
        "thresholds": thresholds_table([*chosen([*variable, *opened], arm="exact"), *of_sweep["thresholds"]], bound),
        "table-4": _table(("n", "mask low", "mask high", "clip low", "clip high"), table_4()),
        "proposition": proposition_table(),
        "device-time": device_time_table(),
    }


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each block between `<!-- staleness:NAME -->` and `<!-- end -->` replaced.

    Raises:
        LookupError: the page asks for a table that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise LookupError(f"docs/results.md asks for the table {name!r}; there are {', '.join(tables)}")
        return f"<!-- staleness:{name} -->\n{tables[name]}\n<!-- end -->"

    return re.sub(r"<!-- staleness:(\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def learning_table(runs: Sequence[Run], fresh: Sequence[Run]) -> str:
    """One row an arm; the order against `exact` is that of the same seeds."""
    exact = chosen(runs, arm="exact")
    rows = [_learning_row("no staleness", fresh, exact)]
    rows += [_learning_row(arm, of_arm, exact) for arm in ARMS if (of_arm := chosen(runs, arm=arm))]
    return _table(
        (
            "old policy",
            "seeds",
            "last 3, mean (range)",
            "against exact",
            "curve, mean (range)",
            "kept",
            "clipped",
            "leak",
            "resets",
        ),
        rows,
    )


def _learning_row(name: str, runs: Sequence[Run], exact: Sequence[Run]) -> list[str]:
    def mean(value: Value, digits: int) -> str:
        return f"{spread(runs, value).mean:.{digits}f}"

    return [
        name,
        str(len(runs)),
        spread(runs, last_mean).text(),
        "–" if name == "exact" else verdict(paired(runs, exact, last_mean)),
        spread(runs, curve_mean).text(),
        mean(keep, 3),
        mean(clipped, 3),
        mean(leak, 3),
        mean(resets, 0) if name == "ewma" else "–",
    ]


def calibration_table(runs: Sequence[Run], bound: float) -> str:
    """Engine noise without staleness, and the mask that follows."""
    rows = [
        [f"{run.settings.seed}", *(f"{value:.4f}" for value in run.record["abs_log_discrepancy"].values())]
        for run in runs
    ]
    shares = [f"{float(share):.1%}".replace(".0%", "%") for share in runs[0].record["abs_log_discrepancy"]]
    return f"{_table(('seed', *shares), rows)}\n\nCalibrated mask: [1/{bound:g}, {bound:g}]."


def discrepancy_table(runs: Sequence[Run]) -> str:
    """RMS of log r_d by staleness in the middle third of training, all seeds pooled."""
    rows = []
    for arm in ARMS:
        found = pooled_buckets(chosen(runs, arm=arm), figures.MIDDLE_PHASE)
        if found:
            rows.append([arm, *(f"{used:.4f}" for used, _ in found.values())])
    return _table(("old policy", *(str(n) for n in range(LARGEST_CAP + 1))), rows)


def decay_table(runs: Sequence[Run], bound: float) -> str:
    """Fixed decays, without resets."""
    rows = [
        [f"[1/{of_mask:g}, {of_mask:g}]", f"{decay:g}", f"{decay / (1 - decay):.2f}", *_ablation(of_decay)]
        for of_mask in (bound, sweeps.OPEN_BOUND)
        for decay in sweeps.DECAYS
        if (of_decay := chosen(runs, discrepancy_bound=of_mask, decay=decay))
    ]
    return _table(("mask", "β", "centre of mass", *_ABLATION_HEAD), rows)


def reset_table(runs: dict[float, Sequence[Run]]) -> str:
    """Automatic decay; reset thresholds and none."""
    rows = []
    for of_mask, of_runs in runs.items():
        automatic = chosen(of_runs, discrepancy_bound=of_mask, decay=None)
        for label, found in (
            ("0.8", chosen(automatic, arm="ewma", reset_threshold=0.8)),
            ("0.9", chosen(automatic, arm="ewma", reset_threshold=0.9)),
            ("off", chosen(automatic, arm="ewma-no-reset")),
        ):
            if found:
                rows.append(
                    [f"[1/{of_mask:g}, {of_mask:g}]", label, *_ablation(found), f"{spread(found, resets).mean:.0f}"]
                )
    return _table(("mask", "τ", *_ABLATION_HEAD, "resets"), rows)


def thresholds_table(runs: Sequence[Run], bound: float) -> str:
    """Mask width times clip width, exact old log-probabilities."""
    unique = {run.settings.key: run for run in runs}.values()
    rows = [
        [f"[1/{of_mask:g}, {of_mask:g}]", f"{clip:g}", *_ablation(found)]
        for of_mask in sweeps.mask_bounds(bound)
        for clip in sweeps.CLIPS
        if (found := chosen(unique, cap=sweeps.ABLATION_CAP, discrepancy_bound=of_mask, clip=clip))
    ]
    return _table(("mask", "clip", *_ABLATION_HEAD), rows)


_ABLATION_HEAD = ("seeds", "last 3, mean (range)", "curve, mean (range)", "kept", "clipped", "leak")


def _ablation(runs: Sequence[Run]) -> list[str]:
    return [
        str(len(runs)),
        spread(runs, last_mean).text(),
        spread(runs, curve_mean).text(),
        *(f"{spread(runs, value).mean:.3f}" for value in (keep, clipped, leak)),
    ]


def proposition_table() -> str:
    """Largest difference to the log-linear run, of a parameter (relative) and of the reward: early, and over all steps."""
    rows = []
    for run in load_document("proposition")["runs"]:
        early = sum(step <= EARLY_STEPS for step in run["steps"])
        for name in ("moved", "as they were"):
            parameters = run["difference"][name]
            rewards = [abs(a - b) for a, b in zip(run["reward"][name], run["reward"]["log-linear"], strict=True)]
            cells = [f"{max(parameters[:count]):.0e}; {max(rewards[:count]):.3f}" for count in (early, None)]
            rows.append([str(run["seed"]), name, *cells])
    head = ("seed", "thresholds on the total ratio", f"first {EARLY_STEPS} steps: parameters; reward", "all steps")
    return _table(head, rows)


def device_time_table() -> str:
    """Simulated seconds a step."""
    document = load_document("device_time")
    rows = [
        [
            ratio,
            f"{of_batches:.0%}",
            f"{single:g}",
            f"{overlapped:g}",
            *(f"{found:.0f} ({found / single - 1:+.1%})" for found in simulated),
        ]
        for ratio, of_batches, single, overlapped, *simulated in document["table"]
    ]
    ideal = [[ratio, f"{single:.3f}", f"{dedicated:.3f}"] for ratio, single, dedicated in document["ideal"]]
    return "\n\n".join(
        (
            _table(
                (
                    "pool : trainer",
                    "spread of batches",
                    "single",
                    "overlapped (paper)",
                    "in step (simulated)",
                    "queued (simulated)",
                ),
                rows,
            ),
            _table(("pool : trainer", "single", "dedicated, no overhead"), ideal),
        )
    )


def machine_line(runs: Sequence[Run]) -> str:
    """Machines and dates of the runs, and what they cost."""
    machines = sorted({run.record["machine"] for run in runs})
    dates = sorted({run.record["date"] for run in runs})
    return f"{'; '.join(machines)}. {' to '.join(sorted({dates[0], dates[-1]}))}; {len(runs)} runs, {cpu_minutes(runs):.0f} CPU minutes."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
