"""The task: k random digits are shown, their sorted (or the same) digits are asked for; reward by position.

Shapes: N rows, K digits, P = K + 2 prompt tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TaskName = Literal["sort", "copy"]
BEGIN = 2
FIRST_DIGIT = 3
EQUALS = 13
"""Token ids of the project's character tokenizer over `0123456789=`: pad, end and begin come first."""


def prompts(digits_NK: Tensor) -> Tensor:
    """Tokens [N, P] of `<begin>3718=`."""
    rows = len(digits_NK)
    return torch.cat([torch.full((rows, 1), BEGIN), digits_NK + FIRST_DIGIT, torch.full((rows, 1), EQUALS)], dim=1)


def rewards(task: TaskName, digits_NK: Tensor, answers_NK: Tensor) -> Tensor:
    """Share of positions [N] that are right."""
    right_NK = digits_NK.sort(dim=1).values if task == "sort" else digits_NK
    return (answers_NK == right_NK + FIRST_DIGIT).float().mean(dim=1)
