"""The trainer's side of a simulated run: what it trains on, its weights, and the versions that it keeps.

Shapes: N trajectories of a batch, K answer tokens, P prompt tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.staleness.llama import Weights, random_llama
from bench.staleness.rollout import answer_logprobs
from bench.staleness.settings import Settings
from rljob_api.spec import RandomModel, Training
from rljob_runtime.trainer.optimizer import learning_rate


@dataclass(frozen=True, slots=True)
class Batch:
    """What the rollout side hands over, with its advantages."""

    prompts_NP: Tensor
    answers_NK: Tensor
    behavior_logprobs_NK: Tensor
    versions_NK: Tensor
    advantages_N: Tensor


class Learner:
    """The trainer: weights, AdamW, and the last versions.

    Args:
        settings: the run.
        start: the first version's weights; unset, random ones of the settings' seed.
    """

    def __init__(self, settings: Settings, start: Weights | None = None) -> None:
        self.shape, weights = random_llama(RandomModel(seed=settings.seed, max_positions=64))
        precision = getattr(torch, settings.trainer)
        self.weights = {
            name: tensor.detach().to(precision, copy=True).requires_grad_()
            for name, tensor in (start or weights).items()
        }
        self.training = Training(
            steps=settings.steps, tasks_per_step=settings.groups, learning_rate=settings.learning_rate
        )
        self._optimizer = torch.optim.AdamW(
            list(self.weights.values()),
            lr=self.training.learning_rate,
            betas=(self.training.beta1, self.training.beta2),
            weight_decay=self.training.weight_decay,
        )
        self.version = 0
        self._kept = deque([self._copy()], maxlen=settings.cap + 1)

    @property
    def history(self) -> dict[int, dict[str, Tensor]]:
        """The versions that a token within the bound may name."""
        return {self.version - age: weights for age, weights in enumerate(reversed(self._kept))}

    def target_logprobs(self, batch: Batch) -> Tensor:
        """log pi_theta [N, K], with gradient."""
        tokens_NT = torch.cat([batch.prompts_NP, batch.answers_NK], dim=1)
        stack_of_one = {name: tensor[None] for name, tensor in self.weights.items()}
        return answer_logprobs(stack_of_one, self.shape, tokens_NT[None], batch.answers_NK)[0]

    def update(self, loss: Tensor) -> None:
        """One optimizer update, and the version that it makes."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.training.gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.version)
        self._optimizer.step()
        self.version += 1
        self._kept.append(self._copy())

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.weights.items()}
