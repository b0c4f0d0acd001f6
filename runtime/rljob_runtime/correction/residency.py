"""Does the policy still hold the weights that were saved last? Asked before a switch, which is much cheaper if so.

Tensors' version counters cannot answer it: fused optimizers write without counting, and so do multi-tensor ones on
sharded parameters (`test_residency.py` shows both), which are what training on a GPU uses. What is certain is that no
optimizer step has begun, and that is what is watched. Counters and a sample of the masters' bits stand behind it, for
writers that are no optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rljob_runtime.correction.published import LookedUp, PublishedParameters

SAMPLES = 32
"""Elements of each tensor that are looked at, at least: an optimizer step or an average of weights moves them all."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a write to the masters would change, unless it is made past both optimizer and parameters."""

    steps: int
    counters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Weights that a policy was seen to hold."""

    content: int
    parameters: tuple[nn.Parameter, ...]
    stamp: Stamp
    sample: Tensor


class Residency:
    """Which saved weights a policy is known to hold, by a number that its user gives them; unknown when in doubt."""

    def __init__(self) -> None:
        self._is_watching = False
        self._steps = 0
        self._mark: Mark | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Heed the steps of what trains the policy. Without it nothing is ever known."""
        optimizer.register_step_pre_hook(self._on_step)
        self._is_watching = True

    def record(self, content: int, policy: PublishedParameters) -> None:
        """The policy's present weights have this number."""
        policy = LookedUp.of(policy)
        self._mark = Mark(content, _parameters(policy), self.stamp(policy), _sample(policy))

    def forget(self) -> None:
        """Nothing is known of the policy's weights."""
        self._mark = None

    def restore(self, mark: Mark, policy: PublishedParameters) -> None:
        """The policy holds again, bit for bit, what it held when the mark was made."""
        self._mark = replace(mark, stamp=self.stamp(policy))

    def mark(self, policy: PublishedParameters) -> Mark | None:
        """What the policy was recorded to hold and holds still; None if it cannot be told."""
        mark, policy = self._mark, LookedUp.of(policy)
        if mark is None or not self._is_watching or mark.stamp != self.stamp(policy):
            return None
        is_same = all(one is other for one, other in zip(_parameters(policy), mark.parameters, strict=True))
        return mark if is_same and torch.equal(_sample(policy), mark.sample) else None

    def stamp(self, policy: PublishedParameters) -> Stamp:
        """Optimizer steps begun so far, and the parameters' counters of writes."""
        return Stamp(self._steps, tuple(parameter._version for parameter in _parameters(policy)))

    def _on_step(self, *_: Any) -> None:
        # Before the step, not after: one that fails half-way has moved some of the weights.
        self._steps += 1


def _parameters(policy: PublishedParameters) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for _, parameter in policy.published_parameters())


def _sample(policy: LookedUp) -> Tensor:
    """Bits of evenly spaced masters of each tensor, as bytes."""
    return torch.cat([flat[:: max(1, flat.numel() // SAMPLES)] for flat in policy.masters]).view(torch.uint8)
