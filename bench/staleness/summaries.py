"""Numbers of runs that differ in their seed alone, and how two arms compare seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.staleness.results import Run

LAST = 3
"""Evaluations at the end of a run whose mean is its result: never the best one."""
Value = Callable[[Run], float]


def last_mean(run: Run) -> float:
    """Mean reward of the last evaluations."""
    return float(np.mean(run.record["reward"][-LAST:]))


def curve_mean(run: Run) -> float:
    """Mean reward over all evaluations: the area under the curve, which tells who learns early."""
    return float(np.mean(run.record["reward"]))


def early_mean(run: Run) -> float:
    """Mean reward over the first half of the evaluations."""
    return float(np.mean(run.record["reward"][: len(run.record["reward"]) // 2]))


def keep(run: Run) -> float:
    """Share of tokens that the discrepancy mask keeps, mean over steps."""
    return float(np.mean(run.record["keep"]))


def clipped(run: Run) -> float:
    """Share of tokens that the clip stops, mean over steps."""
    return float(np.mean(run.record["clip"]))


def leak(run: Run) -> float:
    """RMS of the used minus the exact log-probability, over audited steps."""
    return float(np.sqrt(np.mean(np.square(run.record["leak"]))))


def resets(run: Run) -> float:
    """Number of resets."""
    return float(len(run.record["resets"]))


def drift(run: Run) -> float:
    """RMS of what the policy moves in log-probability from one version to the next, on sampled tokens."""
    return float(run.record["rms_drift_per_version"])


def engine_discrepancy(run: Run) -> float:
    """RMS of log r_d with exact old log-probabilities: what the engine differs from the trainer by."""
    return float(run.record["rms_engine_discrepancy"])


@dataclass(frozen=True, slots=True)
class Spread:
    """One value over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def text(self, digits: int = 3) -> str:
        """Mean and range, as `0.912 (0.905–0.921)`."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(runs: Iterable[Run], value: Value) -> Spread:
    return Spread(tuple(value(run) for run in runs))


def chosen(runs: Iterable[Run], **fields: object) -> list[Run]:
    """Runs whose settings have these values, by seed."""
    found = [run for run in runs if all(getattr(run.settings, name) == value for name, value in fields.items())]
    return sorted(found, key=lambda run: run.settings.seed)


def paired(runs: Sequence[Run], others: Sequence[Run], value: Value) -> Spread:
    """Differences `runs - others` over the seeds that both have; runs must differ from their partner in nothing else unmeant."""
    of_seed = {run.settings.seed: run for run in others}
    return Spread(tuple(value(run) - value(of_seed[run.settings.seed]) for run in runs if run.settings.seed in of_seed))


def verdict(differences: Spread) -> str:
    """What three seeds can say: an order that holds in each of them, or none."""
    if not differences.values:
        return "–"
    if differences.low > 0:
        return "above in every seed"
    if differences.high < 0:
        return "below in every seed"
    return "not told apart"


def curves(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation steps, and rewards [seeds, evaluations]."""
    return np.array(runs[0].record["evaluation_steps"]), np.array([run.record["reward"] for run in runs])


def pooled_buckets(runs: Sequence[Run], phase: int) -> dict[int, tuple[float, float]]:
    """By staleness: RMS of log r_d as used, and exactly, over the tokens of all runs in one phase of training."""
    totals: dict[int, list[float]] = {}
    for run in runs:
        for bucket in run.record["buckets"]:
            if bucket["phase"] == phase and bucket["rms_exact"] is not None:
                total = totals.setdefault(bucket["staleness"], [0.0, 0.0, 0.0])
                total[0] += bucket["tokens"]
                total[1] += bucket["tokens"] * bucket["rms_used"] ** 2
                total[2] += bucket["tokens"] * bucket["rms_exact"] ** 2
    return {n: ((used / count) ** 0.5, (exact / count) ** 0.5) for n, (count, used, exact) in sorted(totals.items())}


def cpu_minutes(runs: Iterable[Run]) -> float:
    return float(sum(run.record["cpu_seconds"] for run in runs)) / 60


def common_settings(runs: Sequence[Run]) -> dict[str, object]:
    """Settings that all runs share."""
    first = asdict(runs[0].settings)
    return {name: value for name, value in first.items() if all(getattr(run.settings, name) == value for run in runs)}
