"""How large a model is, where its description says so: a random one. Of the others only the trainer knows."""

from __future__ import annotations

from rljob_api.spec import ComputeType, RandomModel

SPECIAL_TOKENS = 3
"""Pad, end and begin, before the alphabet."""
VOCABULARY_MULTIPLE = 8
"""The vocabulary is filled up to a multiple of it."""
BYTES_PER_ELEMENT = {ComputeType.FLOAT32: 4, ComputeType.BFLOAT16: 2}


def vocabulary_size(model: RandomModel) -> int:
    """Rows of the embedding."""
    tokens = SPECIAL_TOKENS + len(model.alphabet)
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def number_of_parameters(model: RandomModel) -> int:
    """Elements of all weights; a tied output layer is the embedding, and counts once."""
    hidden = model.hidden_size
    attention = 2 * hidden * model.head_dim * (model.heads + (model.key_value_heads or model.heads))
    feed_forward = 3 * hidden * model.intermediate_size
    norms = 2 * hidden + (2 * model.head_dim if model.architecture == "Qwen3" else 0)
    embeddings = (1 if model.tied_embeddings else 2) * vocabulary_size(model) * hidden
    return embeddings + model.layers * (attention + feed_forward + norms) + hidden
