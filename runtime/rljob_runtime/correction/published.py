"""The weights that a published version is made of, as the correction sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class PublishedParameters(Protocol):
    """What a snapshot is taken of: sharded fp32 masters under their published names, tied ones once."""

    def published_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


def local_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, sharing its memory."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
