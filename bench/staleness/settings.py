"""What one run is: every field that changes its result, and the key it is stored under."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from bench.staleness.delays import DelayKind

Arm = Literal["exact", "ewma", "ewma-no-reset", "log-linear", "current", "engine"]
ARMS: tuple[Arm, ...] = ("exact", "ewma", "ewma-no-reset", "log-linear", "current", "engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. The defaults are those of the learning sweep."""

    arm: Arm
    cap: int
    """Staleness bound, in versions."""
    delay: DelayKind
    seed: int
    """Of the initial weights, the questions, the delays and the sampling; arms share all of them."""

    discrepancy_bound: float
    """The mask keeps r_d in [1 / bound, bound]."""
    clip: float = 0.2
    """r_s is clipped to [1 - clip, 1 + clip]."""
    decay: float | None = None
    """Of the average; unset, it follows the mean staleness."""
    reset_threshold: float = 0.9

    digits: int = 2
    steps: int = 150
    groups: int = 32
    group_size: int = 8
    learning_rate: float = 2e-3
    warm_steps: int = 0
    """Steps without staleness, at the learning rate of the learning sweep, that make the initial weights."""
    trainer: Literal["float32", "float64"] = "float32"
    engine: Literal["bfloat16", "float32"] = "bfloat16"
    evaluate_every: int = 10
    evaluation_prompts: int = 256

    def __post_init__(self) -> None:
        if self.cap < 0 or self.discrepancy_bound < 1 or not 0 <= self.clip < 1:
            raise ValueError(
                f"cap {self.cap} must be >= 0, discrepancy_bound {self.discrepancy_bound} >= 1, clip {self.clip} in [0, 1)"
            )
        if self.steps % self.evaluate_every:
            raise ValueError(f"steps {self.steps} must be a multiple of evaluate_every {self.evaluate_every}")

    @property
    def key(self) -> str:
        """All fields as text: equal keys are the same run."""
        return json.dumps(asdict(self), sort_keys=True)
