"""Policies small enough to know everything about: one that drifts with the version, and a tiny causal model."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


class DriftingPolicy:
    """Single-step softmax policy whose logits move by `drift` (standard deviation) along one direction per version.

    Tokens are drawn from their own version's policy. Shapes: N tokens, F features, V vocabulary.
    """

    def __init__(
        self, *, num_tokens: int, versions: int, staleness: int, drift: float, noise: float, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        features, vocabulary = 16, 8

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.present = versions
        self.weights = [normal(features, vocabulary)]
        direction = normal(features, vocabulary)
        self.weights += [self.weights[0] + version * drift * direction for version in range(1, versions + 1)]
        self.features_NF = normal(num_tokens, features) / features**0.5
        self.staleness_N = torch.randint(0, staleness + 1, (num_tokens,), generator=generator)
        versions_N = self.present - self.staleness_N
        tables = torch.stack([self.all_logprobs(weights) for weights in self.weights[versions - staleness :]])
        own_NV = tables[versions_N - (versions - staleness), torch.arange(num_tokens)]
        self.tokens_N = torch.multinomial(own_NV.exp(), 1, generator=generator).squeeze(1)
        self.exact_N = own_NV.gather(1, self.tokens_N.unsqueeze(1)).squeeze(1)
        self.behavior_N = self.exact_N + noise * normal(num_tokens)
        self.current_N = self.logprobs(self.weights[-1])
        self.advantages_N = normal(num_tokens)

    def all_logprobs(self, weights_FV: Tensor) -> Tensor:
        return torch.log_softmax(self.features_NF @ weights_FV, dim=1)

    def logprobs(self, weights_FV: Tensor) -> Tensor:
        return self.all_logprobs(weights_FV).gather(1, self.tokens_N.unsqueeze(1)).squeeze(1)

    def ewma_logprobs(self, decay: float) -> Tensor:
        """Log-probabilities under the bias-corrected average of all weights so far (Eq. 20 of arXiv 2605.12070)."""
        shares = torch.tensor([decay ** (self.present - k) for k in range(self.present + 1)], dtype=F64)
        return self.logprobs(sum(w * share for w, share in zip(self.weights, shares / shares.sum(), strict=True)))


def tiny_causal_parameters(*, dtype: torch.dtype, seed: int = 0, vocabulary: int = 11, width: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(vocabulary, width), (width, width), (width, vocabulary)]
    return [(torch.randn(*shape, generator=generator, dtype=F64) / 2).to(dtype).requires_grad_() for shape in shapes]


def tiny_causal_logprobs(parameters: list[Tensor], tokens_BT: Tensor) -> Tensor:
    """[:, t] = log p(token t | tokens before it); column 0 is 0. The state is a running mean of embeddings."""
    embedding, mixing, output = parameters
    count = torch.arange(1, tokens_BT.shape[1] + 1, dtype=embedding.dtype).unsqueeze(1)
    state = torch.tanh((embedding[tokens_BT].cumsum(1) / count) @ mixing)
    scores = torch.log_softmax(state[:, :-1] @ output, dim=2).gather(2, tokens_BT[:, 1:].unsqueeze(2)).squeeze(2)
    return torch.nn.functional.pad(scores, (1, 0))
