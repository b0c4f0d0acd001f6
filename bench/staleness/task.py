"""The task: k random digits are shown, the same digits are asked for; reward by position.

Shapes: N rows, K digits, P = K + 2 prompt tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEGIN = 2
FIRST_DIGIT = 3
EQUALS = 13
"""Token ids of the project's character tokenizer over `0123456789=`: pad, end and begin come first."""


def prompts(digits_NK: Tensor) -> Tensor:
    """Tokens [N, P] of `<begin>3718=`."""
    rows = len(digits_NK)
    return torch.cat([torch.full((rows, 1), BEGIN), digits_NK + FIRST_DIGIT, torch.full((rows, 1), EQUALS)], dim=1)


def rewards(digits_NK: Tensor, answers_NK: Tensor) -> Tensor:
    """Share of positions [N] that are right."""
    return (answers_NK == digits_NK + FIRST_DIGIT).float().mean(dim=1)
