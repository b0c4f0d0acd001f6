"""How far back the average of weights should reach, and when it must start anew: decisions from a step's statistics.

Values in, values out, no tensors: every process of a trainer that sees the same statistics decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from rljob_api.base import FrozenModel
from rljob_api.correction import Ewma
from rljob_runtime.correction.ewma import decay_for_staleness, decay_for_window

STALENESS_STEPS = 32
"""Steps that the mean staleness is taken over."""


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """What one step's tokens say about the average that scored some of them. Numbers of tokens, shares in [0, 1]."""

    tokens: int
    """In the loss."""
    mean_staleness: float
    """Of these, in versions."""
    ewma_tokens: int
    """Their old log-probability came from the average."""
    ewma_keep_fraction: float
    """Share of those that the discrepancy mask keeps; without meaning where there are none."""
    exact_tokens: int
    """With an exact old log-probability: of staleness 0, or audited."""
    exact_keep_fraction: float
    """As for the average's tokens: what engine noise alone leaves."""


class EwmaMonitor(FrozenModel):
    """What is remembered from step to step; checkpointed."""

    staleness: tuple[tuple[int, float], ...] = ()
    """(tokens, mean staleness) of the last steps, oldest first."""
    exact_keep_fraction: float = 1.0
    """Of the last step that had exact tokens."""
    low_streak: int = 0
    """Steps in a row whose keep fraction was below the threshold; a step without tokens of the average does not count."""
    resets: int = 0
    steps_since_reset: int = 0
    """Or since the start."""

    @property
    def mean_staleness(self) -> float:
        """Token-weighted, over the last steps; 0 before the first token."""
        tokens = sum(number for number, _ in self.staleness)
        return sum(number * mean for number, mean in self.staleness) / tokens if tokens else 0.0

    def decay(self, settings: Ewma) -> float:
        """The decay for the next version: fixed, or for the version gap W, or for the mean staleness."""
        if settings.decay is not None:
            return settings.decay
        if settings.window is not None:
            return decay_for_window(settings.window)
        return decay_for_staleness(self.mean_staleness, updates_per_version=1)

    def after(self, step: StepStatistics, settings: Ewma) -> tuple[EwmaMonitor, bool]:
        """The monitor after one more step, and whether the average must be reset to the next version's weights.

        It must when its keep fraction has been below `threshold` times that of exact tokens (times 1 if the spec says
        absolute) for `patience` steps in a row: the average has fallen so far behind that the discrepancy mask shuts
        tokens out for it (automatic reset, section 5.2 of arXiv 2605.12070). Relative, so that engine noise, which
        exact tokens have as well, never causes one.
        """
        exact = step.exact_keep_fraction if step.exact_tokens else self.exact_keep_fraction
        expected = 1.0 if settings.reset.is_absolute else exact
        streak = self.low_streak
        if step.ewma_tokens:
            # Multiplied, not divided: an engine so noisy that no exact token is kept proves nothing about the average.
            streak = streak + 1 if step.ewma_keep_fraction < settings.reset.threshold * expected else 0
        is_due = streak >= settings.reset.patience
        return (
            EwmaMonitor(
                staleness=(*self.staleness, (step.tokens, step.mean_staleness))[-STALENESS_STEPS:],
                exact_keep_fraction=exact,
                low_streak=0 if is_due else streak,
                resets=self.resets + is_due,
                steps_since_reset=0 if is_due else self.steps_since_reset + 1,
            ),
            is_due,
        )
