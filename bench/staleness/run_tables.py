"""Tables of runs: what an arm learns, keeps and leaks, over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.pages import table
from bench.staleness import figures, sweeps
from bench.staleness.results import Run
from bench.staleness.settings import ARMS
from bench.staleness.summaries import (
    Value,
    chosen,
    clipped,
    cpu_minutes,
    curve_mean,
    drift,
    early_mean,
    engine_discrepancy,
    keep,
    last_mean,
    leak,
    paired,
    pooled_buckets,
    resets,
    spread,
    verdict,
)

_ABLATION_HEAD = ("seeds", "last 3, mean (range)", "curve, mean (range)", "kept", "clipped", "leak")


def learning_table(runs: Sequence[Run], fresh: Sequence[Run]) -> str:
    """One row an arm; the order against `exact` is that of the same seeds."""
    exact = chosen(runs, arm="exact")
    rows = [_learning_row("no staleness", fresh, exact)]
    rows += [_learning_row(arm, of_arm, exact) for arm in ARMS if (of_arm := chosen(runs, arm=arm))]
    head = ("old policy", "seeds", "last 3, mean (range)", "against exact", "curve, mean (range)")
    return table((*head, "kept", "clipped", "leak", "resets"), rows)


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


def drift_table(settings: Mapping[str, Sequence[Run]]) -> str:
    """What the policy moves in a version and what the engine differs by, where old log-probabilities are exact."""
    rows = []
    for name, runs in settings.items():
        for cap in sweeps.CAPS:
            found = chosen(runs, arm="exact", cap=cap)
            moved, engine = spread(found, drift), spread(found, engine_discrepancy)
            ratio = spread(found, lambda run: drift(run) / engine_discrepancy(run))
            rows.append([name, cap, moved.text(4), engine.text(4), ratio.text(1)])
    return table(("setting", "cap", "drift per version", "engine's discrepancy", "ratio of the two"), rows)


def tracking_table(settings: Mapping[str, Sequence[Run]]) -> str:
    """Averaged weights against the current ones, and with resets against without, seed by seed."""
    pairs = (("ewma-no-reset", "current"), ("ewma", "current"), ("ewma", "ewma-no-reset"))
    rows = []
    for name, of_setting in settings.items():
        for cap in sweeps.CAPS:
            for arm, other in pairs:
                runs, others = (chosen(of_setting, arm=wanted, cap=cap) for wanted in (arm, other))
                ratio = spread(runs, leak).mean / spread(others, leak).mean
                orders = (verdict(paired(runs, others, value)) for value in (leak, keep, last_mean))
                rows.append([name, cap, arm, other, f"{ratio:.2f}", *orders])
    head = ("setting", "cap", "old policy", "against", "leak, ratio", "leak", "kept", "reward, last 3")
    return table(head, rows)


def calibration_table(runs: Sequence[Run], bound: float) -> str:
    """Engine noise without staleness, and the mask that follows."""
    rows = [
        [f"{run.settings.seed}", *(f"{value:.4f}" for value in run.record["abs_log_discrepancy"].values())]
        for run in runs
    ]
    shares = [f"{float(share):.1%}".replace(".0%", "%") for share in runs[0].record["abs_log_discrepancy"]]
    return f"{table(('seed', *shares), rows)}\n\nCalibrated mask: [1/{bound:g}, {bound:g}]."


def discrepancy_table(runs: Sequence[Run]) -> str:
    """RMS of log r_d by staleness in the middle third of training, all seeds pooled."""
    rows = []
    for arm in ARMS:
        found = pooled_buckets(chosen(runs, arm=arm), figures.MIDDLE_PHASE)
        if found:
            rows.append([arm, *(f"{used:.4f}" for used, _ in found.values())])
    return table(("old policy", *(str(n) for n in range(runs[0].settings.cap + 1))), rows)


def decay_table(runs: Sequence[Run], bound: float) -> str:
    """Fixed decays, without resets."""
    rows = [
        [f"[1/{of_mask:g}, {of_mask:g}]", f"{decay:g}", f"{decay / (1 - decay):.2f}", *_ablation(of_decay)]
        for of_mask in (bound, sweeps.OPEN_BOUND)
        for decay in sweeps.DECAYS
        if (of_decay := chosen(runs, discrepancy_bound=of_mask, decay=decay))
    ]
    return table(("mask", "β", "centre of mass", *_ABLATION_HEAD), rows)


def reset_table(runs: Mapping[float, Sequence[Run]]) -> str:
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
    return table(("mask", "τ", *_ABLATION_HEAD, "resets"), rows)


def thresholds_table(runs: Sequence[Run], bound: float) -> str:
    """Mask width times clip width, exact old log-probabilities; the order against the widest mask is that of one clip."""
    rows = []
    for of_mask in sweeps.mask_bounds(bound):
        for clip in sweeps.CLIPS:
            found = chosen(runs, cap=sweeps.ABLATION_CAP, discrepancy_bound=of_mask, clip=clip)
            widest = chosen(runs, cap=sweeps.ABLATION_CAP, discrepancy_bound=sweeps.OPEN_BOUND, clip=clip)
            against = [
                "–" if of_mask == sweeps.OPEN_BOUND else verdict(paired(found, widest, value))
                for value in (early_mean, last_mean)
            ]
            early, last = (spread(found, value).text() for value in (early_mean, last_mean))
            shares = (f"{spread(found, value).mean:.3f}" for value in (keep, clipped))
            rows.append(
                [f"[1/{of_mask:g}, {of_mask:g}]", f"{clip:g}", len(found), early, against[0], last, against[1], *shares]
            )
    of_widest = f"against [1/{sweeps.OPEN_BOUND:g}, {sweeps.OPEN_BOUND:g}]"
    early_head = ("mask", "clip", "seeds", "first half, mean (range)", of_widest)
    return table((*early_head, "last 3, mean (range)", of_widest, "kept", "clipped"), rows)


def _ablation(runs: Sequence[Run]) -> list[str]:
    return [
        str(len(runs)),
        spread(runs, last_mean).text(),
        spread(runs, curve_mean).text(),
        *(f"{spread(runs, value).mean:.3f}" for value in (keep, clipped, leak)),
    ]


def machine_line(runs: Iterable[Run]) -> str:
    """Machines and dates of the runs, and what they cost."""
    found = list(runs)
    machines = sorted({run.record["machine"] for run in found})
    dates = sorted({run.record["date"] for run in found})
    return f"{'; '.join(machines)}. {' to '.join(sorted({dates[0], dates[-1]}))}; {len(found)} runs, {cpu_minutes(found):.0f} CPU minutes."
