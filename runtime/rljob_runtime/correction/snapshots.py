"""Old weight versions in host memory, and the switch that lets the trainer's own model score with them.

A cache of published versions: what is not here any more can be loaded again from its published file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rljob_api.errors import BlobCorrupt


class PublishedParameters(Protocol):
    """What a snapshot is taken of: sharded fp32 masters under their published names, tied ones once."""

    def published_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


class SnapshotStore:
    """Full copies of this rank's shards, in the compute type, by weight version.

    Every rank must save, load, drop and hold the same versions in the same order: each keeps its own part of a version.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self._compute_dtype = compute_dtype
        self._shards: dict[int, dict[str, Tensor]] = {}

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions held, ascending."""
        return tuple(sorted(self._shards))

    @property
    def num_bytes(self) -> int:
        """Host memory that this rank's snapshots take."""
        return sum(shard.nbytes for shards in self._shards.values() for shard in shards.values())

    def save(self, version: int, policy: PublishedParameters) -> None:
        """Keep the policy's present weights, rounded to the compute type as publication rounds them."""
        self._shards[version] = {
            name: _local(parameter).to("cpu", self._compute_dtype, copy=True)
            for name, parameter in policy.published_parameters()
        }

    def drop(self, version: int) -> None:
        """Forget a version; one that is not held is no error."""
        self._shards.pop(version, None)

    def load_full(self, version: int, policy: PublishedParameters, path: Path) -> None:
        """Keep the version that a published safetensors file holds; each rank reads its own part of it.

        Raises:
            BlobCorrupt: the file cannot be read, or a tensor is missing or of another shape or type than the policy's.
        """
        shards: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, parameter in policy.published_parameters():
                    full = file.get_tensor(name)
                    if full.shape != parameter.shape or full.dtype != self._compute_dtype:
                        raise BlobCorrupt(
                            f"version {version}: {name} in {path} is {full.dtype} {list(full.shape)}, "
                            f"the policy's is {self._compute_dtype} {list(parameter.shape)}"
                        )
                    shards[name] = _shard_like(full, parameter)
        except (SafetensorError, OSError) as error:
            raise BlobCorrupt(f"version {version} cannot be read from {path}: {error}") from error
        self._shards[version] = shards

    @contextmanager
    def held(self, version: int, policy: PublishedParameters) -> Iterator[None]:
        """Let the policy hold another version inside the block; afterwards its masters are bit for bit as before.

        Forwards inside must run without gradient, and the optimizer must not step. Its state is never touched.

        Raises:
            KeyError: the version is not held here.
        """
        if version not in self._shards:
            raise KeyError(f"version {version} is not among the snapshots {self.versions}")
        shards = self._shards[version]
        local = {name: _local(parameter) for name, parameter in policy.published_parameters()}
        # On the host: a second set of fp32 masters does not fit on a device that the first one fills.
        masters = {name: tensor.to("cpu", copy=True) for name, tensor in local.items()}
        try:
            for name, tensor in local.items():
                tensor.copy_(shards[name])
            yield
        finally:
            for name, tensor in local.items():
                tensor.copy_(masters[name])


def _local(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, sharing its memory."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _shard_like(full: Tensor, parameter: nn.Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return full
    sharded = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return sharded.to_local().to("cpu", copy=True)
