"""The exponentially weighted moving average of weights behind revised PPO-EWMA (docs/algorithms.md).

With a fixed decay β, after weights θ_0 ... θ_t, the average is sum_k β^(t-k) θ_k / sum_k β^(t-k): Eq. 20 of arXiv
2605.12070. A plain moving average would stay anchored on θ_0 for long; this one is an average of what it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def decay_for_window(window: int) -> float:
    """β = W / (W + 2): the average's centre of mass is W / 2 updates, the mean staleness if it is uniform on 0 ... W.

    Raises:
        ValueError: W is negative.
    """
    if window < 0:
        raise ValueError(f"the version gap W is {window} and cannot be negative: give the largest staleness trained on")
    return window / (window + 2)


def decay_for_staleness(mean: float, updates_per_version: float = 1.0) -> float:
    """β = u n / (1 + u n): the average's centre of mass is u n updates, the mean staleness n.

    A reference that lies m versions back has the mean square residual Var(staleness) + (n - m)^2: smallest at m = n.

    Args:
        mean: token-weighted mean staleness n, in versions.
        updates_per_version: u, updates of the average a published version.

    Raises:
        ValueError: n is negative or not finite, or u is not a positive number.
    """
    if not (math.isfinite(mean) and mean >= 0):
        raise ValueError(f"the mean staleness is {mean}, not a number >= 0: average it over tokens that were trained")
    if not (math.isfinite(updates_per_version) and updates_per_version > 0):
        raise ValueError(
            f"updates per version is {updates_per_version}, not a number > 0: it is 1 for an average updated at publication"
        )
    centre_of_mass = updates_per_version * mean
    return centre_of_mass / (1 + centre_of_mass)


class WeightEwma:
    """Bias-corrected average of weights; the decay may change between updates.

    It accumulates in float32, in float64 for float64 weights: a narrower accumulator would round away the small steps
    of reinforcement learning. Tensors are updated in place, one after the other, on the device of the weights. Shards
    of a sharded model can be averaged shard by shard.
    """

    def __init__(self, decay: float) -> None:
        """Raises ValueError: the decay is not in [0, 1)."""
        self.decay = decay
        self._params: dict[str, Tensor] = {}
        self._weight = 0.0
        self._aged_weight = 0.0

    @property
    def decay(self) -> float:
        """β of the updates to come, in [0, 1)."""
        return self._decay

    @decay.setter
    def decay(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"the decay is {decay}, outside [0, 1): 0 keeps the newest weights alone, 1 would never forget; "
                "take decay_for_window or decay_for_staleness"
            )
        self._decay = decay

    @property
    def params(self) -> Tensors:
        """The average by name: the tensors themselves, which updates change. Empty before the first weights."""
        return self._params

    @property
    def weight(self) -> float:
        """w_t = 1 + β_t w_(t-1), the sum of the weights' shares before division; 1 after a reset, 0 before any weights."""
        return self._weight

    @property
    def center_of_mass(self) -> float:
        """Mean age of the weights in the average as it stands, in updates: 0 after a reset, towards β / (1 - β) later."""
        return self._aged_weight / self._weight if self._weight else 0.0

    def reset(self, params: Tensors) -> None:
        """Start anew: the average is bitwise these weights, and nothing else.

        Raises:
            ValueError: a tensor is not of a floating-point type; nothing was changed.
        """
        for name, tensor in params.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}: average weights of a floating-point type only")
        if not self._fits(params):
            self._params = {name: tensor.detach().to(_wide(tensor.dtype), copy=True) for name, tensor in params.items()}
        else:
            for name, average in self._params.items():
                average.copy_(params[name].detach())
        self._weight, self._aged_weight = 1.0, 0.0

    def update(self, params: Tensors) -> None:
        """Take the next weights in; the first ones are a reset.

        Raises:
            ValueError: names or shapes are not those of the weights before; nothing was changed.
        """
        if not self._weight:
            self.reset(params)
            return
        if not self._fits(params):
            raise ValueError("these are not the weights averaged so far, by name and shape: reset to start with others")
        weight = 1 + self._decay * self._weight
        for name, average in self._params.items():
            # θ / w_t + β (w_(t-1) / w_t) average, as a step from the average towards θ.
            average.lerp_(params[name].detach().to(average.dtype), 1 / weight)
        self._aged_weight = self._decay * (self._aged_weight + self._weight)
        self._weight = weight

    def state_dict(self) -> dict[str, Any]:
        """All there is to save; tensors are the average's own, not copies."""
        return {
            "decay": self._decay,
            "weight": self._weight,
            "aged_weight": self._aged_weight,
            "params": dict(self._params),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; tensors are copied.

        Raises:
            ValueError: the saved decay is out of range.
        """
        self.decay = state["decay"]
        self.reset(state["params"])
        self._weight, self._aged_weight = state["weight"], state["aged_weight"]

    def _fits(self, params: Tensors) -> bool:
        return params.keys() == self._params.keys() and all(
            average.shape == params[name].shape and average.dtype == _wide(params[name].dtype)
            for name, average in self._params.items()
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype is torch.float64 else torch.float32
