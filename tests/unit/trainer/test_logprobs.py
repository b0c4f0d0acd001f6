"""Chunked log-probabilities against log_softmax of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rljob_runtime.trainer.logprobs import chunked_logprobs

N, D, V = 37, 8, 19


def naive(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs_NV = torch.log_softmax((hidden_ND @ weight_VD.T) / temperature, dim=-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def example(dtype: torch.dtype, num: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(num, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(0, V, (num,), generator=generator)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk_tokens", [1, 7, N, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_those_of_log_softmax(
    dtype: torch.dtype, tolerance: float, chunk_tokens: int, temperature: float
) -> None:
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(5), dtype=dtype)
    gradients, values = [], []
    for chunked in (True, False):
        hidden_ND, weight_VD, targets_N = example(dtype)
        if chunked:
            logprobs_N, entropy_N = chunked_logprobs(
                hidden_ND,
                weight_VD,
                targets_N,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                with_entropy=True,
            )
            assert entropy_N is not None
        else:
            logprobs_N, entropy_N = naive(hidden_ND, weight_VD, targets_N, temperature)
        (logprobs_N @ upstream[0] + entropy_N @ upstream[1]).backward()
        values.append((logprobs_N.detach(), entropy_N.detach()))
        gradients.append((hidden_ND.grad, weight_VD.grad))
    torch.testing.assert_close(values[0], values[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance * 10, atol=tolerance * 10)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients_agree_with_finite_differences(with_entropy: bool) -> None:
    hidden_ND, weight_VD, targets_N = example(torch.float64, num=5)

    def outputs(hidden_ND: Tensor, weight_VD: Tensor) -> Any:
        results = chunked_logprobs(
            hidden_ND, weight_VD, targets_N, temperature=0.7, chunk_tokens=2, with_entropy=with_entropy
        )
        return results if with_entropy else results[0]

    assert torch.autograd.gradcheck(outputs, (hidden_ND, weight_VD))


def test_a_gradient_through_the_entropy_alone_is_right() -> None:
    (hidden_ND, weight_VD, targets_N), (plain_ND, plain_VD, _) = example(torch.float64), example(torch.float64)
    entropy_N = chunked_logprobs(hidden_ND, weight_VD, targets_N, temperature=1.0, chunk_tokens=5, with_entropy=True)[1]
    assert entropy_N is not None
    entropy_N.sum().backward()
    naive(plain_ND, plain_VD, targets_N, 1.0)[1].sum().backward()
    torch.testing.assert_close(hidden_ND.grad, plain_ND.grad)
    torch.testing.assert_close(weight_VD.grad, plain_VD.grad)


def test_results_are_fp32_for_bf16_operands_and_gradients_are_as_close_as_bf16_allows() -> None:
    (hidden_ND, weight_VD, targets_N), (plain_ND, plain_VD, _) = example(torch.bfloat16), example(torch.bfloat16)
    logprobs_N, _ = chunked_logprobs(
        hidden_ND, weight_VD, targets_N, temperature=1.0, chunk_tokens=6, with_entropy=False
    )
    expected_N = torch.log_softmax((plain_ND @ plain_VD.T).float(), -1).gather(1, targets_N[:, None]).squeeze(1)
    assert logprobs_N.dtype == torch.float32
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-6, atol=1e-6)
    logprobs_N.sum().backward()
    expected_N.sum().backward()
    assert hidden_ND.grad is not None and hidden_ND.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden_ND.grad, plain_ND.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight_VD.grad, plain_VD.grad, rtol=2e-2, atol=4e-2)


def test_no_tensor_of_all_logits_ever_exists() -> None:
    hidden_ND, weight_VD, targets_N = example(torch.float32, num=400)
    with LargestTensor() as seen:
        logprobs_N, entropy_N = chunked_logprobs(
            hidden_ND, weight_VD, targets_N, temperature=1.0, chunk_tokens=10, with_entropy=True
        )
        assert entropy_N is not None
        (logprobs_N.sum() + entropy_N.sum()).backward()
    assert seen.elements == 400 * D  # the hidden states' gradient; a chunk of logits has 10 * V = 190

    with LargestTensor() as control:
        naive(*example(torch.float32, num=400), 1.0)[0].sum().backward()
    assert control.elements == 400 * V


def test_logits_that_overflow_exp_give_finite_results() -> None:
    hidden_ND, weight_VD, targets_N = example(torch.float32)
    logprobs_N, entropy_N = chunked_logprobs(
        hidden_ND * 1e3, weight_VD, targets_N, temperature=1.0, chunk_tokens=8, with_entropy=True
    )
    assert entropy_N is not None
    assert logprobs_N.isfinite().all() and entropy_N.isfinite().all()
    (logprobs_N.sum() + entropy_N.sum()).backward()
    assert hidden_ND.grad is not None and hidden_ND.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be > 0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be >= 1"),
        ({"targets_N": torch.zeros(3, dtype=torch.int64)}, r"targets have shape \[3\], must be \[37\]"),
        ({"weight_VD": torch.zeros(V, D + 1)}, r"must be \[N, D\] and \[V, D\]"),
        ({"weight_VD": torch.zeros(V, D, dtype=torch.bfloat16)}, "both must have the compute type"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    hidden_ND, weight_VD, targets_N = example(torch.float32)
    arguments: dict[str, Any] = {
        "hidden_ND": hidden_ND,
        "weight_VD": weight_VD,
        "targets_N": targets_N,
        "temperature": 1.0,
        "chunk_tokens": 4,
        "with_entropy": False,
    }
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(**(arguments | change))
