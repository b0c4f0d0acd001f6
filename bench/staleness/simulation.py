"""One asynchronous run, step by step: sample with old weights, find old log-probabilities, update, publish.

What a cluster does side by side happens here one after the other, with the delays given instead of suffered. So runs are
deterministic, and arms that differ only in the old policy see the same questions, delays and random numbers.

The trainer is fp32 unless the settings say otherwise. The engine is a copy of a version's weights in bfloat16, so that the
discrepancy is real. Loss, advantages, averaged weights, reset and learning-rate schedule are the project's own; so are the
numbers of AdamW.

Shapes: N trajectories of a batch, K answer tokens, P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.staleness import task
from bench.staleness.delays import Delay
from bench.staleness.learner import Batch, Learner
from bench.staleness.llama import Weights
from bench.staleness.measures import Measures, RunRecord
from bench.staleness.rollout import generate, score
from bench.staleness.settings import Settings
from rljob_api.correction import Ewma, EwmaReset
from rljob_api.spec import Advantage
from rljob_runtime.correction.ewma import WeightEwma
from rljob_runtime.correction.ewma_monitor import EwmaMonitor, StepStatistics
from rljob_runtime.correction.objective import decoupled_policy_loss
from rljob_runtime.correction.sources import Source, interpolated
from rljob_runtime.trainer.advantages import group_advantages

AUDIT_EVERY = 5
"""Steps between those whose tokens are scored exactly whatever the arm, to measure what leaked."""
_EVALUATION_SEED = 999
_NO_RESET = 0.0
_WARM_BOUND = 2.0
"""The project's default mask, whatever the one of the run that follows."""


class Rollouts:
    """Draws questions, delays and answers; the same ones for every arm of a seed, as far as the weights allow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._delay = Delay(settings.delay, settings.cap)
        self._questions, self._delays, self._tokens = (
            torch.Generator().manual_seed(1000 * settings.seed + stream) for stream in range(3)
        )

    def batch(self, learner: Learner) -> tuple[Batch, float]:
        """The batch that the learner's next step trains on, and its mean reward."""
        its = self._settings
        rows = its.groups * its.group_size
        digits_NK = torch.randint(0, 10, (its.groups, its.digits), generator=self._questions)
        digits_NK = digits_NK.repeat_interleave(its.group_size, dim=0)
        versions_NK = self._delay.versions(learner.version, rows, its.digits, self._delays)
        prompts_NP = task.prompts(digits_NK)
        answers_NK, behavior_NK = generate(
            learner.history,
            learner.shape,
            prompts_NP,
            versions_NK,
            torch.rand(rows, its.digits, generator=self._tokens),
            engine_type=getattr(torch, its.engine),
        )
        rewards_N = task.rewards(digits_NK, answers_NK)
        advantages = [group_advantages(of_group, Advantage()) for of_group in rewards_N.view(its.groups, -1).numpy()]
        advantages_N = torch.tensor([value for of_group in advantages for value in of_group], dtype=torch.float32)
        return Batch(prompts_NP, answers_NK, behavior_NK, versions_NK, advantages_N), float(rewards_N.mean())


class OldPolicy:
    """Old log-probabilities as an arm has them: the sources that the project's resolver would assign.

    Tokens of the resident version are exact, but in the arms `log-linear` and `engine`, which need no forward at all.
    """

    def __init__(self, settings: Settings, learner: Learner) -> None:
        self._arm = settings.arm
        threshold = _NO_RESET if settings.arm == "ewma-no-reset" else settings.reset_threshold
        self._ewma = Ewma(decay=settings.decay, reset=EwmaReset(threshold=threshold))
        self._monitor = EwmaMonitor()
        self._average = WeightEwma(self._monitor.decay(self._ewma))
        if self.is_average:
            self._average.reset(learner.history[0])

    @property
    def is_average(self) -> bool:
        return self._arm in ("ewma", "ewma-no-reset")

    @property
    def center_of_mass(self) -> float:
        return self._average.center_of_mass

    def logprobs(self, batch: Batch, learner: Learner, target_NK: Tensor) -> Tensor:
        """The reference [N, K], without gradient."""
        staleness_NK = learner.version - batch.versions_NK
        current_NK = target_NK.detach()
        match self._arm:
            case "exact":
                return exact_logprobs(batch, learner, target_NK)
            case "current":
                return current_NK
            case "engine":
                return batch.behavior_logprobs_NK
            case "log-linear":
                return interpolated(
                    batch.behavior_logprobs_NK,
                    current_NK,
                    staleness_NK,
                    torch.full_like(staleness_NK, Source.LOG_LINEAR),
                    current_NK,
                )
            case "ewma" | "ewma-no-reset":
                only_NK = torch.zeros_like(batch.versions_NK)
                average_NK = score(
                    {0: self._average.params}, learner.shape, batch.prompts_NP, batch.answers_NK, only_NK
                )
                return torch.where(staleness_NK == 0, current_NK, average_NK)

    def published(self, learner: Learner, statistics: StepStatistics) -> bool:
        """After an update: take the new version into the average; returns whether it was reset to it instead."""
        if not self.is_average:
            return False
        self._monitor, is_due = self._monitor.after(statistics, self._ewma)
        self._average.decay = self._monitor.decay(self._ewma)
        newest = learner.history[learner.version]
        if is_due:
            self._average.reset(newest)
        else:
            self._average.update(newest)
        return is_due


def run(settings: Settings, on_step: Callable[[int, Learner, Batch], None] | None = None) -> RunRecord:
    """Train for the settings' steps and say what was measured.

    Args:
        settings: the run.
        on_step: called before each update with the step's batch.
    """
    started = time.process_time()
    learner = Learner(settings, _warm_weights(settings) if settings.warm_steps else None)
    return train(settings, learner, on_step) | {"cpu_seconds": round(time.process_time() - started, 1)}


def _warm_weights(settings: Settings) -> Weights:
    """Those of a run without staleness; all arms and masks of a seed start from the same ones."""
    warm = Settings(
        arm="exact",
        cap=0,
        delay="fixed",
        seed=settings.seed,
        discrepancy_bound=_WARM_BOUND,
        digits=settings.digits,
        steps=settings.warm_steps,
        groups=settings.groups,
        group_size=settings.group_size,
    )
    learner = Learner(warm)
    train(warm, learner)
    return learner.weights


def train(
    settings: Settings, learner: Learner, on_step: Callable[[int, Learner, Batch], None] | None = None
) -> RunRecord:
    """The settings' steps, from the learner's weights on; what was measured."""
    rollouts, old_policy, measures = Rollouts(settings), OldPolicy(settings, learner), Measures(settings)
    for step in range(settings.steps):
        if step % settings.evaluate_every == 0:
            measures.evaluated(step, evaluate(settings, learner))
        batch, reward = rollouts.batch(learner)
        if on_step:
            on_step(step, learner, batch)
        target_NK = learner.target_logprobs(batch)
        old_NK = old_policy.logprobs(batch, learner, target_NK)
        exact_NK = old_NK if settings.arm == "exact" else None
        if exact_NK is None and step % AUDIT_EVERY == 0:
            exact_NK = exact_logprobs(batch, learner, target_NK)
        loss, stats = decoupled_policy_loss(
            target_logprobs_BT=target_NK,
            old_logprobs_BT=old_NK,
            behavior_logprobs_BT=batch.behavior_logprobs_NK,
            advantages_BT=batch.advantages_N[:, None].expand_as(target_NK),
            mask_BT=torch.ones_like(target_NK, dtype=torch.bool),
            clip_low=settings.clip,
            clip_high=settings.clip,
            discrepancy_low=1 / settings.discrepancy_bound,
            discrepancy_high=settings.discrepancy_bound,
        )
        statistics = measures.trained(
            step,
            reward,
            stats,
            learner.version - batch.versions_NK,
            behavior_NK=batch.behavior_logprobs_NK,
            target_NK=target_NK.detach(),
            old_NK=old_NK,
            exact_NK=exact_NK,
        )
        learner.update(loss)
        if old_policy.published(learner, statistics):
            measures.was_reset(step)
    measures.evaluated(settings.steps, evaluate(settings, learner))
    return measures.record(old_policy.center_of_mass)


def exact_logprobs(batch: Batch, learner: Learner, target_NK: Tensor) -> Tensor:
    """log pi of each token [N, K] under its own version: resident or from a snapshot."""
    resident_NK = batch.versions_NK == learner.version
    if bool(resident_NK.all()):
        return target_NK.detach()
    scored_NK = score(learner.history, learner.shape, batch.prompts_NP, batch.answers_NK, batch.versions_NK)
    return torch.where(resident_NK, target_NK.detach(), scored_NK)


def evaluate(settings: Settings, learner: Learner) -> float:
    """Mean reward of the trainer's present policy on fixed prompts, sampled at temperature 1 with fixed numbers."""
    generator = torch.Generator().manual_seed(_EVALUATION_SEED)
    shape = (settings.evaluation_prompts, settings.digits)
    digits_NK = torch.randint(0, 10, shape, generator=generator)
    answers_NK, _ = generate(
        learner.history,
        learner.shape,
        task.prompts(digits_NK),
        torch.full(shape, learner.version),
        torch.rand(shape, generator=generator),
        engine_type=torch.float32,
    )
    return float(task.rewards(digits_NK, answers_NK).mean())
