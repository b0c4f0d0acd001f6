"""Probes: tokens with known log-probabilities, which prove what weights an engine holds (docs/design.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rljob_api.weights import Probe
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.scoring import score


def probe_tokens(vocab_size: int, seed: int, num: int = 64) -> tuple[int, ...]:
    """Arbitrary token ids, the same for equal arguments. They must fit into the model: num <= its positions."""
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, size=num))


def make_probe(policy: Policy, tokens: Sequence[int]) -> Probe:
    """The policy's log-probabilities of `tokens` at temperature 1, whatever the sampling: engines report raw ones.

    Equal on every rank. Collective.
    """
    row = np.asarray(tokens, dtype=np.int32)
    (logprobs,) = score(policy, [row], temperature=1.0, token_budget=len(row))
    return Probe(
        tokens=tuple(int(token) for token in row),
        logprobs=tuple(float(value) for value in logprobs[1:]),
        compute_type=policy.compute_type.value,
    )
