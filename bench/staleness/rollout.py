"""Sampling and scoring with the weights of many versions at once.

Shapes: N trajectories, P prompt tokens, K answer tokens, V versions, R rows of each version (padded).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.staleness.llama import Cache, Shape, Weights, logits, stacked

History = Mapping[int, Weights]
"""The trainer's weights by version."""


def generate(
    history: History,
    shape: Shape,
    prompts_NP: Tensor,
    versions_NK: Tensor,
    uniform_NK: Tensor,
    *,
    engine_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Answers [N, K] and the fp32 log-probabilities [N, K] that the engine gave to their tokens.

    The engine is a copy of the version's weights in its own type. A row whose version changes goes on under the later
    one with a fresh cache: nothing that older weights computed remains. Temperature 1, and no end token: an answer has
    K tokens.

    Args:
        history: holds every version named.
        versions_NK: not falling within a row, with at most one change, at the same token in all rows that change.
        uniform_NK: in [0, 1); a token depends on its own number alone, so that equal seeds give equal samples however
            rows are grouped.
    """
    answers_NK, behavior_NK = _sample(
        history, shape, prompts_NP, versions_NK[:, 0], uniform_NK, engine_type=engine_type
    )
    changes_NK = versions_NK[:, 1:] != versions_NK[:, :-1]
    rows = changes_NK.any(dim=1).nonzero()[:, 0]
    if rows.numel():
        boundary = int(changes_NK.any(dim=0).nonzero()[0, 0]) + 1
        prefixes = torch.cat([prompts_NP[rows], answers_NK[rows, :boundary]], dim=1)
        answers_NK[rows, boundary:], behavior_NK[rows, boundary:] = _sample(
            history, shape, prefixes, versions_NK[rows, boundary], uniform_NK[rows, boundary:], engine_type=engine_type
        )
    return answers_NK, behavior_NK


def score(history: History, shape: Shape, prompts_NP: Tensor, answers_NK: Tensor, versions_NK: Tensor) -> Tensor:
    """Log-probability [N, K] of each answer token under the trainer's forward at its own version."""
    named = torch.zeros(len(answers_NK), int(versions_NK.max()) + 1, dtype=torch.bool)
    named.scatter_(1, versions_NK, True)
    row_M, version_M = named.nonzero(as_tuple=True)  # a row appears once for each of its versions
    tokens_MT = torch.cat([prompts_NP, answers_NK], dim=1)[row_M]
    place = _Places(version_M)
    with torch.no_grad():
        scored_MK = place.flat(
            answer_logprobs(stacked([history[v] for v in place.versions]), shape, place.grid(tokens_MT), answers_NK)
        )
    result_NK = torch.zeros(answers_NK.shape, dtype=scored_MK.dtype)
    own_MK = versions_NK[row_M] == version_M[:, None]
    result_NK[row_M[:, None].expand_as(own_MK)[own_MK], own_MK.nonzero()[:, 1]] = scored_MK[own_MK]
    return result_NK


def answer_logprobs(weights: Weights, shape: Shape, tokens_VRT: Tensor, answers_NK: Tensor) -> Tensor:
    """Log-probabilities [V, R, K] of the last K tokens of each row, with gradient if the weights have it."""
    count = answers_NK.shape[1]
    found = logits(weights, tokens_VRT[..., :-1], shape)[..., -count:, :]
    return found.log_softmax(-1).gather(-1, tokens_VRT[..., -count:, None])[..., 0]


@torch.no_grad()
def _sample(
    history: History,
    shape: Shape,
    prefixes_NP: Tensor,
    versions_N: Tensor,
    uniform_NK: Tensor,
    *,
    engine_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    place = _Places(versions_N)
    weights = stacked([history[version] for version in place.versions], engine_type)
    cache, inputs = Cache(), place.grid(prefixes_NP)
    answers, behavior = [], []
    for uniform_N in uniform_NK.T:
        log_mu = logits(weights, inputs, shape, cache)[:, :, -1].float().log_softmax(-1)
        cumulative = log_mu.exp().cumsum(-1)
        # Scaled by the last sum: rounding must not send a number near 1 to a token of probability 0.
        chosen = torch.searchsorted(cumulative, place.grid(uniform_N)[..., None] * cumulative[..., -1:], right=True)
        inputs = chosen.clamp(max=log_mu.shape[-1] - 1)
        answers.append(place.flat(inputs)[:, 0])
        behavior.append(place.flat(log_mu.gather(-1, inputs))[:, 0])
    return torch.stack(answers, dim=1), torch.stack(behavior, dim=1)


class _Places:
    """Rows [N, ...] grouped by version into a grid [V, R, ...] and back; empty places repeat row 0."""

    def __init__(self, versions_N: Tensor) -> None:
        distinct, group_N, counts = torch.unique(versions_N, return_inverse=True, return_counts=True)
        self.versions: list[int] = distinct.tolist()
        order = torch.argsort(group_N, stable=True)
        within = torch.arange(len(order)) - (counts.cumsum(0) - counts)[group_N[order]]
        self._row_VR = torch.zeros(len(counts), int(counts.max()), dtype=torch.long)
        self._row_VR[group_N[order], within] = order
        self._place_N = torch.empty_like(order)
        self._place_N[order] = group_N[order] * self._row_VR.shape[1] + within

    def grid(self, values_N: Tensor) -> Tensor:
        return values_N[self._row_VR]

    def flat(self, grid_VR: Tensor) -> Tensor:
        return grid_VR.flatten(0, 1)[self._place_N]
