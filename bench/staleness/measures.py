"""What is kept of a run: curves by stretch of steps, and the discrepancy ratio by staleness and phase."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.staleness.settings import Settings
from rljob_runtime.correction.ewma_monitor import StepStatistics
from rljob_runtime.correction.objective import LossStats

PHASES = 3
"""Discrepancy and drift grow over training: a table by staleness over all of it would mix them."""
QUANTILES = (0.5, 0.9, 0.99, 0.999)
Floats = NDArray[np.float64]
RunRecord = dict[str, Any]
"""JSON: see `Measures.record`."""


@dataclass(slots=True)
class _Squares:
    """Of log r_d, of the tokens with one staleness in one phase."""

    tokens: int = 0
    used: float = 0.0
    audited: int = 0
    exact: float = 0.0


class Measures:
    """Collects a run's numbers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._evaluations: list[tuple[int, float]] = []
        self._resets: list[int] = []
        self._rows: list[tuple[float, ...]] = []
        self._buckets: dict[tuple[int, int], _Squares] = defaultdict(_Squares)
        self._fresh: list[Floats] = [np.zeros(0)]
        self._drift: list[Floats] = [np.zeros(0)]
        self._engine: list[Floats] = [np.zeros(0)]

    def evaluated(self, step: int, reward: float) -> None:
        self._evaluations.append((step, reward))

    def was_reset(self, step: int) -> None:
        self._resets.append(step)

    def trained(
        self,
        step: int,
        reward: float,
        stats: LossStats,
        staleness_NK: Tensor,
        *,
        behavior_NK: Tensor,
        target_NK: Tensor,
        old_NK: Tensor,
        exact_NK: Tensor | None,
    ) -> StepStatistics:
        """One step's batch; returns what the averaged weights' monitor asks for.

        Args:
            step: its number.
            reward: mean of the batch.
            stats: of the loss.
            staleness_NK: of each token.
            behavior_NK: log mu.
            target_NK: log pi_theta before the update.
            old_NK: what the arm took for log pi_old.
            exact_NK: log pi_old itself, where this step was audited.
        """
        staleness, stale = staleness_NK.numpy().ravel(), staleness_NK.numpy().ravel() > 0
        used = (old_NK - behavior_NK).double().numpy().ravel()
        exact = None if exact_NK is None else (exact_NK - behavior_NK).double().numpy().ravel()
        kept, kept_exactly = self._kept(used), self._kept(used if exact is None else exact)
        self._rows.append(
            (
                reward,
                float(stats["discrepancy_keep_fraction"]),
                float(stats["clip_fraction"]),
                float(stats["active_fraction"]),
                np.nan if exact is None else float(np.mean((used - exact) ** 2)),
                np.nan if exact is None else float(kept_exactly.mean()),
            )
        )
        self._fresh.append(np.abs(used[~stale]))
        if exact is not None and exact_NK is not None:
            moved = (target_NK - exact_NK).double().numpy().ravel()
            self._drift.append(moved[staleness == 1])
            self._engine.append(exact)
        for value in np.unique(staleness):
            bucket = self._buckets[step * PHASES // self._settings.steps, int(value)]
            of_value = staleness == value
            bucket.tokens += int(of_value.sum())
            bucket.used += float((used[of_value] ** 2).sum())
            if exact is not None:
                bucket.audited += int(of_value.sum())
                bucket.exact += float((exact[of_value] ** 2).sum())
        known = ~stale if exact is None else np.ones_like(stale)
        return StepStatistics(
            tokens=staleness.size,
            mean_staleness=float(staleness.mean()),
            ewma_tokens=int(stale.sum()),
            ewma_keep_fraction=_share(kept[stale]),
            exact_tokens=int(known.sum()),
            exact_keep_fraction=_share(kept_exactly[known]),
        )

    def _kept(self, log_discrepancy: Floats) -> NDArray[np.bool_]:
        return np.asarray(np.abs(log_discrepancy) <= np.log(self._settings.discrepancy_bound))

    def record(self, center_of_mass: float) -> RunRecord:
        """The run as JSON. Curves hold one value for each `evaluate_every` steps; buckets are by phase and staleness."""
        rows = np.array(self._rows)
        means = np.nanmean(rows.reshape(-1, self._settings.evaluate_every, rows.shape[1]), axis=1)
        names = ("train_reward", "keep", "clip", "active", "leak_square", "exact_keep")
        curves = {name: _rounded(means[:, column]) for column, name in enumerate(names)}
        curves["leak"] = _rounded(np.sqrt(means[:, names.index("leak_square")]))
        del curves["leak_square"]
        fresh = np.concatenate(self._fresh)
        return {
            "evaluation_steps": [step for step, _ in self._evaluations],
            "reward": _rounded([reward for _, reward in self._evaluations]),
            **curves,
            "resets": self._resets,
            "final_center_of_mass": round(center_of_mass, 3),
            # Of tokens without staleness: engine noise and nothing else, in all arms but `engine`, where it is 0.
            "abs_log_discrepancy": {
                str(share): _digits(float(np.quantile(fresh, share))) for share in QUANTILES if fresh.size
            },
            "buckets": [
                {
                    "phase": phase,
                    "staleness": staleness,
                    "tokens": bucket.tokens,
                    "rms_used": _digits((bucket.used / bucket.tokens) ** 0.5),
                    "rms_exact": _digits((bucket.exact / bucket.audited) ** 0.5) if bucket.audited else None,
                }
                for (phase, staleness), bucket in sorted(self._buckets.items())
            ],
            # Of log pi_theta - log pi_old on tokens of the last version, and of log pi_old - log mu on all; where audited.
            "rms_drift_per_version": _rms(self._drift),
            "rms_engine_discrepancy": _rms(self._engine),
        }


def _share(selected: NDArray[np.bool_]) -> float:
    return float(selected.mean()) if selected.size else 1.0


def _rms(pieces: list[Floats]) -> float | None:
    values = np.concatenate(pieces)
    return _digits(float(np.sqrt(np.mean(values**2)))) if values.size else None


def _rounded(values: Any) -> list[float]:
    return [_digits(float(value)) for value in values]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
