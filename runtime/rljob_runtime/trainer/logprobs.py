"""Token log-probabilities from hidden states without ever holding all logits.

Logits of a 150,000-word vocabulary are the largest tensor of a training step: 32,768 tokens of them in fp32 are 20 GB.
Here they exist one chunk of tokens at a time, and are computed again in the backward pass.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and the entropy of that softmax.

    Logits are multiplied in the operands' type, as the model's own output layer does, and everything after them is
    fp32 (float64 for float64 operands). Both results can be differentiated, once.

    Args:
        hidden_ND: last hidden states.
        weight_VD: weight of the output layer, in the hidden states' type. Its gradient is summed over chunks in fp32.
        targets_N: int64 token ids.
        temperature: > 0.
        chunk_tokens: most tokens whose logits exist at once, >= 1.
        with_entropy: also return the entropy, in nats.

    Raises:
        ValueError: shapes or types do not fit, or a setting makes no sense.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {list(hidden_ND.shape)} and weight {list(weight_VD.shape)} must be [N, D] and [V, D]")
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets have shape {list(targets_N.shape)}, must be [{hidden_ND.shape[0]}]")
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_ND.dtype} and weight {weight_VD.dtype}: both must have the compute type")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be > 0")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be >= 1")
    logprobs_N, entropy_N = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, float(temperature), chunk_tokens, with_entropy
    )
    return logprobs_N, entropy_N


class _ChunkedLogprobs(torch.autograd.Function):
    """d log p(y) / d logit = 1[y] - p;  d H / d logit = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        wide = _wide(hidden_ND)
        logprobs_N = hidden_ND.new_empty(targets_N.shape, dtype=wide)
        log_normalizer_N = torch.empty_like(logprobs_N)
        entropy_N = torch.empty_like(logprobs_N) if with_entropy else None
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = _logits(hidden_ND[chunk], weight_VD, temperature)
            normalizer_C = torch.logsumexp(logits_CV, dim=-1)
            log_normalizer_N[chunk] = normalizer_C
            logprobs_CV = logits_CV.sub_(normalizer_C[:, None])
            logprobs_N[chunk] = logprobs_CV.gather(1, targets_N[chunk, None]).squeeze(1)
            if entropy_N is not None:
                # Not as log Z - E[logit]: large logits would cancel to a few digits.
                entropy_N[chunk] = -logprobs_CV.exp().mul_(logprobs_CV).sum(dim=-1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_normalizer_N, entropy_N)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_ND, weight_VD, targets_N, log_normalizer_N, entropy_N = ctx.saved_tensors
        if grad_logprobs_N is None and grad_entropy_N is None:
            return None, None, None, None, None, None
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD)) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_ND.shape[0], ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logprobs_CV = _logits(hidden_ND[chunk], weight_VD, ctx.temperature).sub_(log_normalizer_N[chunk, None])
            probabilities_CV = logprobs_CV.exp()
            grad_logits_CV = torch.zeros_like(logprobs_CV)
            if grad_logprobs_N is not None:
                grad_C = grad_logprobs_N[chunk, None]
                grad_logits_CV.addcmul_(probabilities_CV, grad_C, value=-1).scatter_add_(
                    1, targets_N[chunk, None], grad_C
                )
            if grad_entropy_N is not None:
                slope_CV = logprobs_CV.add_(entropy_N[chunk, None]).mul_(probabilities_CV)
                grad_logits_CV.addcmul_(slope_CV, grad_entropy_N[chunk, None], value=-1)
            narrow_CV = grad_logits_CV.div_(ctx.temperature).to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(narrow_CV, weight_VD, out=grad_hidden_ND[chunk])
            if grad_weight_VD is not None:
                grad_weight_VD += narrow_CV.T @ hidden_ND[chunk]
        return grad_hidden_ND, grad_weight_VD, None, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    return (hidden_CD @ weight_VD.T).to(_wide(hidden_CD)).div_(temperature)
