"""An engine that goes on after a weight change with its old KV cache samples from no version's policy.

Test 18 of the method: the reason why an interrupted request goes on as prompt + tokens on a fresh cache, and why
weightSync has no mode that keeps the cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rljob_api.spec import WeightSync

BEFORE, AFTER = 8, 12
"""Tokens of the prompt and the first version; tokens sampled after the weights changed."""


def two_versions() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model in float64 and the same after an update of one percent of the weights' size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.3,
    )
    old = LlamaForCausalLM(config).double().eval()
    new = copy.deepcopy(old)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    return old, new


def logprobs(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """[AFTER], of the tokens after the change, by one forward of one version."""
    with torch.no_grad():
        logits_TV = model(tokens).logits[0].log_softmax(-1)
    return logits_TV[BEFORE - 1 : -1].gather(1, tokens[0, BEFORE:, None])[:, 0]


def generate(prefix_by: LlamaForCausalLM, then: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [1, BEFORE + AFTER] sampled by `then` on a cache that `prefix_by` filled, and what was recorded for them."""
    cache = DynamicCache(config=then.config)
    generator = torch.Generator().manual_seed(1)
    recorded = []
    with torch.no_grad():
        prefix_by(tokens[:, :-1], past_key_values=cache)
        for _ in range(AFTER):
            row_V = then(tokens[:, -1:], past_key_values=cache).logits[0, -1].log_softmax(-1)
            sampled = torch.multinomial(row_V.exp(), 1, generator=generator)
            recorded.append(row_V[sampled])
            tokens = torch.cat([tokens, sampled[None]], dim=1)
    return tokens, torch.cat(recorded)


def test_a_recomputed_cache_has_no_discrepancy_and_a_kept_one_has() -> None:
    old, new = two_versions()
    prompt = torch.randint(0, 24, (1, BEFORE), generator=torch.Generator().manual_seed(2))
    tokens, behavior = generate(new, new, prompt)
    assert (logprobs(new, tokens) - behavior).abs().max() <= 1e-12
    tokens, behavior = generate(old, new, prompt)
    assert (logprobs(new, tokens) - behavior).abs().max() >= 1e-3
    assert (logprobs(old, tokens) - behavior).abs().max() >= 1e-3, "nor is it the old version's policy"


def test_no_mode_keeps_the_cache() -> None:
    with pytest.raises(ValidationError, match="Interrupt"):
        WeightSync.model_validate({"mode": "KeepKV"})
