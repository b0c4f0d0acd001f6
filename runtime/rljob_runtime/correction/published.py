"""The weights that a published version is made of, as the correction sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class PublishedParameters(Protocol):
    """What a snapshot is taken of: sharded fp32 masters under their published names, tied ones once."""

    def published_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A policy's parameters, found once: to go through all modules again takes milliseconds."""

    named: tuple[tuple[str, nn.Parameter], ...]
    masters: tuple[Tensor, ...]
    """This rank's part of each, flat, sharing its memory."""

    @classmethod
    def of(cls, policy: PublishedParameters) -> LookedUp:
        if isinstance(policy, cls):
            return policy
        named = tuple(policy.published_parameters())
        return cls(named, tuple(local_shard(parameter).view(-1) for _, parameter in named))

    def published_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.named


def local_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, sharing its memory."""
    if isinstance(parameter, DTensor):
        with torch.no_grad():  # then it is the very shard; to detach a sharded parameter takes many times as long
            return parameter.to_local().detach()
    return parameter.detach()
