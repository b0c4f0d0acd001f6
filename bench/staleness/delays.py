"""How old the weights are that sample a trajectory: fixed, or drawn for each one and renewed on the way.

Shapes: N trajectories of a batch, K answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DelayKind = Literal["fixed", "variable"]


@dataclass(frozen=True, slots=True)
class Delay:
    """Which versions sample a batch.

    fixed      every token of the batch that step s trains is of version s - cap.
    variable   a trajectory starts under version s - n, with n from 0 to cap, equally often each. At one token boundary
               of the batch, drawn each step, a version lands: half of the trajectories are still in flight and go on
               under the next version, on a fresh cache; the others had ended before.
    """

    kind: DelayKind
    cap: int

    def versions(self, step: int, rows: int, answer_tokens: int, generator: torch.Generator) -> Tensor:
        """The weight version of each answer token [N, K], never below 0 and never above the step."""
        order = torch.randperm(rows, generator=generator)
        boundary = int(torch.randint(1, answer_tokens, (), generator=generator)) if answer_tokens > 1 else answer_tokens
        if self.kind == "fixed":
            return torch.full((rows, answer_tokens), max(0, step - self.cap))
        staleness = torch.empty(rows, dtype=torch.long)
        staleness[order] = torch.arange(rows) % (self.cap + 1)
        in_flight = torch.empty(rows, dtype=torch.bool)
        in_flight[order] = (torch.arange(rows) // (self.cap + 1)) % 2 == 0
        start = (step - staleness).clamp(min=0)
        later = torch.where(in_flight, start + 1, start).clamp(max=step)
        return torch.where(torch.arange(answer_tokens) < boundary, start[:, None], later[:, None])
