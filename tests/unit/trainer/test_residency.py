"""Whether the policy still holds what was saved last is never answered with yes when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rljob_runtime.correction.published import local_shard
from rljob_runtime.correction.residency import Residency
from rljob_runtime.trainer.distributed import distributed_world

IMPLEMENTATIONS: list[dict[str, bool]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(rows)

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named_parameters()


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with distributed_world("cpu", timeout_seconds=30) as world:
        yield world.mesh


def model(mesh: DeviceMesh, *, is_sharded: bool) -> Two:
    made = Two()
    if is_sharded:
        fully_shard(made, mesh=mesh)
    return made


def train(policy: Two, optimizer: torch.optim.Optimizer) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def known(policy: Two, *optimizers: torch.optim.Optimizer) -> Residency:
    residency = Residency()
    for optimizer in optimizers:
        residency.watch(optimizer)
    residency.record(5, policy)
    return residency


def content(residency: Residency, policy: Two) -> int | None:
    mark = residency.mark(policy)
    return None if mark is None else mark.content


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_after_an_optimizer_step_of_any_implementation_nothing_is_known(
    mesh: DeviceMesh, is_sharded: bool, implementation: dict[str, Any]
) -> None:
    policy = model(mesh, is_sharded=is_sharded)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, **implementation)
    residency = known(policy, optimizer)
    policy(torch.ones(2, 64)).sum().backward()
    optimizer.zero_grad()
    assert content(residency, policy) == 5
    train(policy, optimizer)
    assert content(residency, policy) is None


def test_version_counters_alone_would_miss_steps(mesh: DeviceMesh) -> None:
    """Why steps are watched."""
    missed = []
    for is_sharded in (False, True):
        for implementation in IMPLEMENTATIONS:
            policy = model(mesh, is_sharded=is_sharded)
            optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, **implementation)
            before = [parameter._version for parameter in policy.parameters()]
            train(policy, optimizer)
            if before == [parameter._version for parameter in policy.parameters()]:
                missed.append((is_sharded, *implementation))
    assert missed == [(False, "fused"), (True, "foreach"), (True, "fused")]


def test_a_step_that_moves_nothing_that_is_sampled_is_a_step(mesh: DeviceMesh) -> None:
    policy = model(mesh, is_sharded=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    residency = known(policy, optimizer)
    train(policy, optimizer)
    assert content(residency, policy) is None


def test_a_step_that_fails_half_way_is_a_step(mesh: DeviceMesh) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("half-way")

    policy = model(mesh, is_sharded=False)
    optimizer = Failing(policy.parameters(), lr=0.1)
    residency = known(policy, optimizer)
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()
    assert content(residency, policy) is None


@pytest.mark.parametrize("is_sharded", [False, True])
def test_writes_past_the_optimizer_are_noticed(mesh: DeviceMesh, is_sharded: bool) -> None:
    def one_element(policy: Two) -> None:
        with torch.no_grad():
            policy.layer.weight.copy_(policy.layer.weight)

    def all_past_the_parameter(policy: Two) -> None:
        local_shard(policy.layer.weight).mul_(1.001)

    def by_data(policy: Two) -> None:
        policy.layer.bias.data.add_(1)

    for write in (one_element, all_past_the_parameter, by_data):
        policy = model(mesh, is_sharded=is_sharded)
        residency = known(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
        assert content(residency, policy) == 5
        write(policy)
        assert content(residency, policy) is None, write


def test_without_an_optimizer_to_watch_and_of_another_policy_nothing_is_known(mesh: DeviceMesh) -> None:
    policy = model(mesh, is_sharded=False)
    assert content(known(policy), policy) is None
    residency = known(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    assert content(residency, model(mesh, is_sharded=False)) is None
    residency.forget()
    assert content(residency, policy) is None


def test_nothing_of_the_runtime_writes_to_the_data_of_a_parameter() -> None:
    """The one kind of write that no counter sees and a sample may miss."""
    runtime = Path(__file__).parents[3] / "runtime"
    found = [
        str(path)
        for path in runtime.rglob("*.py")
        if ".data.copy_" in path.read_text() or ".data =" in path.read_text()
    ]
    assert found == []
