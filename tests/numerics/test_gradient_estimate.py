"""What the loss's gradient estimates: the policy gradient, and which forms of it are the same (tests 3 to 7)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.numerics.defective_loss import defective
from tests.numerics.toy import tiny_causal_logprobs, tiny_causal_parameters
from torch import Tensor

from rljob_runtime.correction.objective import decoupled_policy_loss

F64 = torch.float64
OPEN: dict[str, Any] = {"clip_low": 1.0, "clip_high": math.inf, "discrepancy_low": 0.0, "discrepancy_high": math.inf}
USUAL: dict[str, Any] = {"clip_low": 0.003, "clip_high": 0.004, "discrepancy_low": 0.99, "discrepancy_high": 1.01}


def test_a_target_equal_to_the_old_policy_has_no_staleness_and_clips_nothing() -> None:  # test 3
    tokens = torch.randint(0, 11, (4, 20), generator=torch.Generator().manual_seed(0))
    old = tiny_causal_logprobs(tiny_causal_parameters(dtype=F64), tokens).detach()

    def clip_fraction(target: Tensor) -> float:
        _, stats = decoupled_policy_loss(
            target_logprobs_BT=target,
            old_logprobs_BT=old,
            behavior_logprobs_BT=old,
            advantages_BT=torch.randn(4, 20, dtype=F64, generator=torch.Generator().manual_seed(1)),
            mask_BT=torch.ones(4, 20, dtype=torch.bool),
            **{**USUAL, "clip_low": 0.0, "clip_high": 0.0},
        )
        return stats["clip_fraction"].item()

    assert clip_fraction(old) == 0.0
    assert clip_fraction(old + 1e-9) > 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-6)])
def test_without_staleness_and_discrepancy_the_gradient_is_that_of_ppo_and_of_reinforce(
    dtype: torch.dtype, tolerance: float
) -> None:  # test 4
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (6, 24), generator=generator)
    mask = torch.rand(6, 24, generator=generator) < 0.6
    mask[:, 0] = False
    advantages = torch.randn(6, 1, generator=generator, dtype=F64).to(dtype).expand(6, 24).contiguous()
    weights = tiny_causal_parameters(dtype=dtype)
    behavior = tiny_causal_logprobs(weights, tokens).detach()

    def decoupled(old: Tensor) -> Tensor:
        loss, _ = decoupled_policy_loss(
            target_logprobs_BT=tiny_causal_logprobs(weights, tokens),
            old_logprobs_BT=old,
            behavior_logprobs_BT=behavior,
            advantages_BT=advantages,
            mask_BT=mask,
            **USUAL,
        )
        return _flat(torch.autograd.grad(loss, weights))

    ratio = (tiny_causal_logprobs(weights, tokens) - behavior).exp()
    clipped = ratio.clamp(0.8, 1.2)
    ppo = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()
    reinforce = -(tiny_causal_logprobs(weights, tokens) * advantages * mask).sum() / mask.sum()
    ours = decoupled(behavior)
    for loss in (ppo, reinforce):
        assert float((ours - _flat(torch.autograd.grad(loss, weights))).abs().max()) <= tolerance
    stale = tiny_causal_logprobs([w * 1.01 for w in weights], tokens).detach()
    assert float((ours - decoupled(stale)).abs().max()) > 100 * tolerance


def test_differentiating_the_clipped_minimum_gives_the_masked_importance_sampling_form() -> None:  # test 5
    generator = torch.Generator().manual_seed(0)
    shape = (8, 250)
    log_s, log_d = (0.02 * torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    advantages = torch.randn(shape, generator=generator, dtype=F64)
    behavior = -torch.rand(shape, generator=generator, dtype=F64)
    old = behavior + log_d
    arguments = {
        "old_logprobs_BT": old,
        "behavior_logprobs_BT": behavior,
        "advantages_BT": advantages,
        "mask_BT": torch.ones(shape, dtype=torch.bool),
        "discrepancy_weight": "raw",
        "denominator": 1.0,
        **USUAL,
    }

    def gradient(loss_function: Any) -> Tensor:
        target = (old + log_s).requires_grad_()
        return torch.autograd.grad(loss_function(target_logprobs_BT=target, **arguments)[0], target)[0]

    r_s, r_d = log_s.exp(), log_d.exp()
    ppo = ((advantages >= 0) & (r_s <= 1.004)) | ((advantages < 0) & (r_s >= 0.997))
    masked = (ppo & (r_d >= 0.99) & (r_d <= 1.01)) * r_d * r_s * -advantages
    assert float((gradient(defective("none")) - masked).abs().max()) <= 1e-8
    assert float((gradient(decoupled_policy_loss) - masked).abs().max()) <= 1e-8
    assert float((gradient(defective("clip bounds swapped")) - masked).abs().max()) > 1e-3
    assert float((gradient(defective("mask bounds inverted")) - masked).abs().max()) > 1e-3


def _trajectories(length: int) -> tuple[Tensor, Tensor]:
    """Every trajectory [R, length] over 4 actions, and a reward for each [R]."""
    every = torch.tensor(list(itertools.product(range(4), repeat=length)))
    return every, torch.randn(len(every), generator=torch.Generator().manual_seed(7), dtype=F64)


def _step_logprobs(logits_LVV: Tensor, actions_RL: Tensor) -> Tensor:
    """[R, L]: step l's distribution depends on the action before it."""
    before_RL = torch.nn.functional.pad(actions_RL[:, :-1], (1, 0))
    steps = torch.arange(actions_RL.shape[1])
    return torch.log_softmax(logits_LVV, dim=2)[steps, before_RL].gather(2, actions_RL.unsqueeze(2)).squeeze(2)


def _bias(*, length: int, product_of_ratios: bool, reference: str) -> float:
    """Distance between the expected gradient of the loss under mu, by enumeration, and the true policy gradient."""
    generator = torch.Generator().manual_seed(3)
    target, behavior, random = (torch.randn(length, 4, 4, generator=generator, dtype=F64) for _ in range(3))
    target.requires_grad_()
    actions, rewards = _trajectories(length)
    log_pi, log_mu = _step_logprobs(target, actions), _step_logprobs(behavior, actions).detach()
    log_ref = {"target": log_pi.detach(), "behavior": log_mu, "random": _step_logprobs(random, actions)}[reference]
    probability = log_mu.sum(1, keepdim=True).exp()
    if product_of_ratios:  # the trajectory as a single action: sums of logs are products of ratios
        log_pi, log_mu, log_ref = (x.sum(1, keepdim=True) for x in (log_pi, log_mu, log_ref))
    loss, _ = decoupled_policy_loss(
        target_logprobs_BT=log_pi,
        old_logprobs_BT=log_ref,
        behavior_logprobs_BT=log_mu,
        advantages_BT=(probability * rewards.unsqueeze(1)).expand_as(log_pi),
        mask_BT=torch.ones_like(log_pi, dtype=torch.bool),
        discrepancy_weight="raw",
        denominator=1.0,
        **OPEN,
    )
    (estimate,) = torch.autograd.grad(-loss, target)
    value = (_step_logprobs(target, actions).sum(1).exp() * rewards).sum()
    (truth,) = torch.autograd.grad(value, target)
    return float((estimate - truth).abs().max())


@pytest.mark.parametrize("reference", ["target", "behavior", "random"])
@pytest.mark.parametrize("length", [1, 2])
def test_unmasked_and_unclipped_the_gradient_is_unbiased_for_every_reference(length: int, reference: str) -> None:
    assert _bias(length=length, product_of_ratios=True, reference=reference) <= 1e-12  # test 6


def test_the_enumeration_notices_the_bias_of_token_level_weights_on_longer_trajectories() -> None:  # test 7
    assert _bias(length=2, product_of_ratios=False, reference="random") > 1e-3


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])
