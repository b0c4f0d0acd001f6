"""AdamW on the fp32 masters, with a linear warm-up and a bound on the gradient norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rljob_api.errors import TrainingDiverged
from rljob_api.spec import Training
from rljob_runtime.trainer.model import Policy


def build_optimizer(policy: Policy, training: Training) -> torch.optim.AdamW:
    """AdamW over all parameters; the learning rate is set for each step."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
    )


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of a step (steps trained before it, so the first is 0): a line up to the peak, then the peak."""
    if training.warmup_steps == 0:
        return training.learning_rate
    return training.learning_rate * min(1.0, (step + 1) / training.warmup_steps)


def apply_gradients(policy: Policy, optimizer: torch.optim.Optimizer, *, rate: float, clip: float) -> float:
    """One optimizer update at a learning rate, with the gradient's global norm bounded; returns the norm. Collective.

    Gradients are cleared.

    Raises:
        TrainingDiverged: the norm is not finite; weights and optimizer state are untouched.
    """
    norm: Tensor = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
    # Each rank must ask: making the norm whole is itself a collective.
    value = float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    if not math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingDiverged(
            f"the gradient norm is {value}: the update was refused, weights are those before it. "
            "Lower training.learningRate, or go back to an earlier checkpoint"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value
