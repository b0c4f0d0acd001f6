"""The tiny Llama's forward, for many weight versions in one call.

Nine versions of a model of 85,000 parameters, 60 rows each: called one after the other they spend their time between
kernels. Stacked, they are one batched product a layer. The tests hold the results against transformers.

Shapes: V weight versions, R rows of each, T tokens, D hidden width, H heads, W vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from rljob_api.spec import Model, RandomModel
from rljob_runtime.model_source import materialise

Weights = Mapping[str, Tensor]
"""By the names of the model directory; stacked weights have a leading dimension V."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the weights alone do not tell."""

    layers: int
    heads: int
    epsilon: float
    theta: float


@dataclass(slots=True)
class Cache:
    """Keys and values of the tokens so far, [V * R, H, T, D / H] a layer."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


def random_llama(spec: RandomModel) -> tuple[Shape, dict[str, Tensor]]:
    """A random model as the project makes it: its shape and fp32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        directory = materialise(Model(random=spec), Path(folder) / "model")
        config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
    theta = config["rope_parameters"]["rope_theta"]
    return Shape(spec.layers, spec.heads, config["rms_norm_eps"], theta), weights


def stacked(versions: Sequence[Weights], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Versions of one model as stacked weights, in a type or their own."""
    return {name: torch.stack([weights[name] for weights in versions]).to(dtype) for name in versions[0]}


def logits(weights: Weights, tokens_VRT: Tensor, shape: Shape, cache: Cache | None = None) -> Tensor:
    """Logits [V, R, T, W] after each token, in the weights' type; the cache is read and extended.

    Products run in the weights' type. Norms are computed in fp32 and rounded, rotary angles are never rounded.
    """
    versions, rows, length = tokens_VRT.shape
    past = cache.tokens if cache else 0
    embedding_VWD = weights["model.embed_tokens.weight"]
    width = embedding_VWD.shape[-1]
    offsets = torch.arange(versions)[:, None, None] * embedding_VWD.shape[1]
    hidden = F.embedding(tokens_VRT + offsets, embedding_VWD.reshape(-1, width)).view(versions, rows * length, width)
    cos, sin = _rotary(past, length, weights["model.layers.0.self_attn.q_proj.weight"].shape[1] // shape.heads, shape)
    cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)

    def project(inputs: Tensor, *names: str) -> Tensor:
        weight = torch.cat([weights[f"{name}.weight"] for name in names], dim=1)
        return torch.bmm(inputs, weight.transpose(1, 2))

    def norm(name: str, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, (width,), None, shape.epsilon) * weights[f"{name}.weight"][:, None, :]

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        inputs = norm(f"{prefix}.input_layernorm", hidden)
        projected = project(inputs, *(f"{prefix}.self_attn.{name}_proj" for name in "qkv"))
        projected = projected.view(versions * rows, length, 3 * shape.heads, -1).transpose(1, 2)
        query, key = _rotated(projected[:, : 2 * shape.heads], cos, sin).chunk(2, dim=1)
        value = projected[:, 2 * shape.heads :]
        if cache is not None:
            if past:
                key = torch.cat([cache.keys[layer], key], dim=2)
                value = torch.cat([cache.values[layer], value], dim=2)
            cache.keys[layer], cache.values[layer] = key, value
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        mixed = mixed.transpose(1, 2).reshape(versions, rows * length, -1)
        hidden = hidden + project(mixed, f"{prefix}.self_attn.o_proj")
        inputs = norm(f"{prefix}.post_attention_layernorm", hidden)
        gate, up = project(inputs, f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj").chunk(2, dim=-1)
        hidden = hidden + project(F.silu(gate) * up, f"{prefix}.mlp.down_proj")
    hidden = norm("model.norm", hidden)
    return project(hidden, "lm_head").view(versions, rows, length, -1)


def _rotary(past: int, length: int, head_width: int, shape: Shape) -> tuple[Tensor, Tensor]:
    inverse = shape.theta ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(past, past + length, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = inputs.chunk(2, dim=-1)
    return inputs * cos + torch.cat([-second, first], dim=-1) * sin
