"""Proposition 1 of arXiv 2605.12070: a log-linear reference is the total ratio with other thresholds.

With behavior share a = 1 / (n + 1) at staleness n, log pi_prox = a log mu + (1 - a) log pi_theta gives r_d = r^(1-a) and
r_s = r^a. So mask [1/c, c] and clip 1 -+ e are the intervals [c^-(1/(1-a)), c^(1/(1-a))] and (1 -+ e)^(1/a) of r alone.

Three trainers take the same recorded batches: the log-linear one, which also samples them; one that knows the total
ratio and the moved thresholds only; and one with the total ratio and the thresholds as they were, which must differ.

Shapes: N trajectories, K answer tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bench.staleness.learner import Batch, Learner
from bench.staleness.settings import Settings
from bench.staleness.simulation import Rollouts, evaluate
from rljob_runtime.correction.objective import decoupled_policy_loss
from rljob_runtime.correction.sources import Source, interpolated

Thresholds = Literal["moved", "as they were"]


def log_linear_loss(target_NK: Tensor, batch: Batch, staleness_NK: Tensor, settings: Settings) -> Tensor:
    """The project's loss with the interpolated reference, weighted with r_d (row "& train_infer" of Table 5)."""
    source_NK = torch.full_like(staleness_NK, Source.LOG_LINEAR)
    loss, _ = decoupled_policy_loss(
        target_logprobs_BT=target_NK,
        old_logprobs_BT=interpolated(
            batch.behavior_logprobs_NK, target_NK.detach(), staleness_NK, source_NK, target_NK.detach()
        ),
        behavior_logprobs_BT=batch.behavior_logprobs_NK,
        advantages_BT=batch.advantages_N[:, None].expand_as(target_NK),
        mask_BT=torch.ones_like(target_NK, dtype=torch.bool),
        clip_low=settings.clip,
        clip_high=settings.clip,
        discrepancy_low=1 / settings.discrepancy_bound,
        discrepancy_high=settings.discrepancy_bound,
        discrepancy_weight="raw",
    )
    return loss


def direct_loss(
    target_NK: Tensor, batch: Batch, staleness_NK: Tensor, settings: Settings, thresholds: Thresholds
) -> Tensor:
    """Minus the mean of r A over the tokens whose total ratio r lies within mask and clip; no reference appears."""
    log_r_NK = target_NK - batch.behavior_logprobs_NK
    at_NK = log_r_NK.detach()
    mask_power_NK, clip_power_NK = torch.ones_like(at_NK), torch.ones_like(at_NK)
    if thresholds == "moved":
        share_NK = 1 / (staleness_NK.to(at_NK.dtype) + 1)
        # At staleness 0 the reference is mu itself: r_d is 1, and the mask is infinitely wide.
        mask_power_NK, clip_power_NK = 1 / (1 - share_NK), 1 / share_NK
    advantages_NK = batch.advantages_N[:, None].expand_as(at_NK)
    kept_NK = at_NK.abs() <= math.log(settings.discrepancy_bound) * mask_power_NK
    above_NK = at_NK > math.log(1 + settings.clip) * clip_power_NK
    below_NK = at_NK < math.log(1 - settings.clip) * clip_power_NK
    active_NK = kept_NK & ~torch.where(advantages_NK >= 0, above_NK, below_NK)
    ratio_NK = torch.where(active_NK, log_r_NK, 0.0).exp()
    return -torch.where(active_NK, ratio_NK * advantages_NK, 0.0).sum() / at_NK.numel()


def compare(settings: Settings) -> dict[str, Any]:
    """Train the three on one stream. Curves; and of the other two, how they part from the log-linear run.

    `difference` is the largest one of a parameter up to an evaluation, relative to the largest distance that a parameter
    of the log-linear run has moved so far. `crossed` counts the tokens that one loss gives a gradient and the other does
    not, and names the step of the first: their ratio lies on two sides of a threshold.
    """
    learners = {name: Learner(settings) for name in ("log-linear", "moved", "as they were")}
    first, *others = learners
    rollouts = Rollouts(settings)
    start = {name: tensor.detach().clone() for name, tensor in learners[first].weights.items()}
    curves: dict[str, list[float]] = {name: [] for name in learners}
    differences: dict[str, list[float]] = {name: [] for name in others}
    crossed: dict[str, list[int]] = {name: [] for name in others}
    steps: list[int] = []

    def note(step: int) -> None:
        steps.append(step)
        for name, learner in learners.items():
            curves[name].append(round(evaluate(settings, learner), 5))
        travelled = _distance(learners[first], start) or 1.0
        for name, found in differences.items():
            found.append(float(f"{_distance(learners[first], learners[name].weights) / travelled:.3g}"))

    for step in range(settings.steps):
        if step % settings.evaluate_every == 0:
            note(step)
        batch, _ = rollouts.batch(learners[first])
        active = {name: _updated(learner, name, batch, settings) for name, learner in learners.items()}
        for name, found in crossed.items():
            found.append(int((active[name] != active[first]).sum()))
    note(settings.steps)
    return {
        "seed": settings.seed,
        "trainer": settings.trainer,
        "steps": steps,
        "reward": curves,
        "difference": differences,
        "crossed": {name: _first_and_sum(found) for name, found in crossed.items()},
    }


def _updated(learner: Learner, name: str, batch: Batch, settings: Settings) -> Tensor:
    """Take the named loss's update; returns which tokens [N, K] had a gradient."""
    staleness_NK, target_NK = learner.version - batch.versions_NK, learner.target_logprobs(batch)
    target_NK.retain_grad()
    if name == "log-linear":
        loss = log_linear_loss(target_NK, batch, staleness_NK, settings)
    else:
        loss = direct_loss(target_NK, batch, staleness_NK, settings, "moved" if name == "moved" else "as they were")
    learner.update(loss)
    assert target_NK.grad is not None
    return target_NK.grad != 0


def _first_and_sum(tokens: list[int]) -> dict[str, int | None]:
    return {"first_step": next((step for step, count in enumerate(tokens) if count), None), "tokens": sum(tokens)}


def table_4(mask: tuple[float, float] = (0.99, 1.01), clip: tuple[float, float] = (0.997, 1.004)) -> list[list[float]]:
    """Rows n, mask low, mask high, clip low, clip high for linear interpolation: the thresholds that it amounts to."""
    rows = []
    for n in (1, 2, 3):
        a = 1 / (n + 1)
        moved_mask = [(bound - a) / (1 - a) for bound in mask]
        moved_clip = [a * bound / (1 - (1 - a) * bound) for bound in clip]
        rows.append([n, *(round(value, 4) for value in (*moved_mask, *moved_clip))])
    return rows


def _distance(learner: Learner, weights: dict[str, Tensor]) -> float:
    return max(float((tensor - weights[name]).detach().abs().max()) for name, tensor in learner.weights.items())
