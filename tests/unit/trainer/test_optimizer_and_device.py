"""The learning rate's line, and devices that are not there."""

from __future__ import annotations

import pytest
import torch

from rljob_api.errors import AcceleratorMissing
from rljob_api.spec import Training
from rljob_runtime.trainer.distributed import distributed_world
from rljob_runtime.trainer.optimizer import learning_rate
from rljob_runtime.trainer.probe import probe_tokens


@pytest.mark.parametrize(
    ("warmup", "rates"), [(0, [2e-3, 2e-3]), (1, [2e-3, 2e-3]), (4, [5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3])]
)
def test_the_learning_rate_rises_on_a_line_to_its_peak(warmup: int, rates: list[float]) -> None:
    training = Training(steps=9, tasks_per_step=1, learning_rate=2e-3, warmup_steps=warmup)
    assert [learning_rate(training, step) for step in range(len(rates))] == pytest.approx(rates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu() -> None:
    with (
        pytest.raises(AcceleratorMissing, match="local rank 0 and this process sees 0 CUDA devices"),
        distributed_world("cuda", timeout_seconds=1),
    ):
        raise AssertionError("the world must not start")


def test_probe_tokens_are_a_function_of_their_seed() -> None:
    tokens = probe_tokens(24, seed=1)
    assert len(tokens) == 64 and set(tokens) <= set(range(24)) and len(set(tokens)) > 10
    assert tokens == probe_tokens(24, seed=1) != probe_tokens(24, seed=2)
