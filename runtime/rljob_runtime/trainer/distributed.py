"""The process group of one trainer: torchrun's, or a world of one that needs no launcher.

Every wait has a deadline: a collective whose peer is gone ends after `timeout_seconds` with an error. So a process that
has nothing to do must still meet the others in a collective before that time is over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rljob_api.errors import AcceleratorMissing

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among the trainer's processes."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    local_rank: int = 0
    """Place among the processes of its node (pod), which share its disk."""
    node: int = 0
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that talks to the rest of the job."""
        return self.rank == 0


@contextmanager
def distributed_world(kind: DeviceKind, *, timeout_seconds: float) -> Iterator[World]:
    """Join the process group (gloo on cpu, nccl on cuda) and leave it at the end, whatever happens inside.

    Rank and address come from torchrun's environment; without it this is a world of one.

    Raises:
        AcceleratorMissing: cuda is asked for and there is no device for this process.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ["RANK"]) if launched else 0
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if launched else 0
    device = _device(kind, local_rank)
    dist.init_process_group(
        backend="nccl" if kind == "cuda" else "gloo",
        store=None if launched else dist.HashStore(),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if kind == "cuda" else None,
    )
    try:
        mesh = init_device_mesh(kind, (size,))
        node = int(os.environ.get("GROUP_RANK", "0")) if launched else 0
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) if launched else 1
        yield World(
            rank=rank, size=size, device=device, mesh=mesh, local_rank=local_rank, node=node, num_nodes=num_nodes
        )
    finally:
        dist.destroy_process_group()


def _device(kind: DeviceKind, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise AcceleratorMissing(
            f"a GPU was requested for local rank {local_rank} and this process sees {found} CUDA devices: give the pod "
            "one GPU a process (limits: nvidia.com/gpu), lower trainer.processesPerReplica, or request none"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def broadcast_bytes(data: bytes | None, device: torch.device) -> bytes:
    """The bytes that rank 0 passes, on every rank; the others pass None. Collective."""
    if (data is None) is (dist.get_rank() == 0):
        raise ValueError("rank 0 gives the bytes, and no other rank does")
    size = torch.tensor([0 if data is None else len(data)], dtype=torch.int64, device=device)
    dist.broadcast(size, src=0)
    num_bytes = int(size.item())
    if num_bytes == 0:
        return b""
    if data is None:
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    else:
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    dist.broadcast(payload, src=0)
    return payload.cpu().numpy().tobytes()


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values, on every rank. Collective."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())
