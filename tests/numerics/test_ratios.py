"""The ratios' identity, their aggregation, and segments as tensors."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.numerics.toy import tiny_causal_logprobs, tiny_causal_parameters

from rljob_api.messages import Outcome, TrajectoryHeader
from rljob_api.trajectory import Segment, segments
from rljob_runtime.correction.ratios import (
    geometric_mean_log_ratio,
    log_discrepancy_ratio,
    log_importance_ratio,
    log_staleness_ratio,
    segment_ids,
)
from rljob_runtime.trajectory_codec import Trajectory, decode_trajectory, encode_trajectory


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_log_discrepancy_and_log_staleness_add_up_to_the_log_importance_ratio(
    dtype: torch.dtype, tolerance: float
) -> None:  # test 1
    generator = torch.Generator().manual_seed(0)
    target, old, behavior = (-8 * torch.rand(64, 128, generator=generator, dtype=dtype) for _ in range(3))
    mask = torch.rand(64, 128, generator=generator) < 0.7

    def deviation(old_of_discrepancy: torch.Tensor) -> float:
        d = log_discrepancy_ratio(old_logprobs_BT=old_of_discrepancy, behavior_logprobs_BT=behavior, mask_BT=mask)
        s = log_staleness_ratio(target_logprobs_BT=target, old_logprobs_BT=old, mask_BT=mask)
        total = log_importance_ratio(target_logprobs_BT=target, behavior_logprobs_BT=behavior, mask_BT=mask)
        return float((d + s - total).abs().max())

    assert deviation(old) <= tolerance
    assert deviation(target) > tolerance  # two different old policies in the two factors: no identity


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_same_version_and_an_exact_engine_have_no_discrepancy_whatever_the_batch_shape(
    dtype: torch.dtype, tolerance: float
) -> None:  # test 2
    tokens = torch.randint(0, 11, (9, 40), generator=torch.Generator().manual_seed(1))
    weights = tiny_causal_parameters(dtype=dtype)
    with torch.no_grad():
        one_by_one = torch.cat([tiny_causal_logprobs(weights, row.unsqueeze(0)) for row in tokens])
        together = tiny_causal_logprobs(weights, tokens)
        next_version = tiny_causal_logprobs([w * 1.001 for w in weights], tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def largest(old: torch.Tensor) -> float:
        return float(
            log_discrepancy_ratio(old_logprobs_BT=old, behavior_logprobs_BT=one_by_one, mask_BT=mask).abs().max()
        )

    assert largest(together) <= tolerance
    assert largest(next_version) > tolerance


def test_only_the_target_receives_gradient_and_nothing_outside_the_mask_is_seen() -> None:
    target, old, behavior = (torch.tensor([[-1.0, v]], requires_grad=True) for v in (float("nan"), float("inf"), 0.0))
    mask = torch.tensor([[True, False]])
    d = log_discrepancy_ratio(old_logprobs_BT=old, behavior_logprobs_BT=behavior, mask_BT=mask)
    s = log_staleness_ratio(target_logprobs_BT=target, old_logprobs_BT=old, mask_BT=mask)
    r = log_importance_ratio(target_logprobs_BT=target, behavior_logprobs_BT=behavior, mask_BT=mask)
    assert d.tolist() == s.tolist() == r.tolist() == [[0.0, 0.0]]
    (s + r).sum().backward()
    assert target.grad is not None and target.grad.tolist() == [[2.0, 0.0]]
    assert not d.requires_grad and old.grad is None and behavior.grad is None


def test_a_geometric_mean_is_over_the_mask_tokens_of_its_own_row_and_segment() -> None:
    log_ratio = torch.tensor([[1.0, 3.0, 100.0, 5.0], [7.0, 8.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    ids = torch.tensor([[4, 4, 4, -9], [4, -9, 4, 4]])

    def mean(granularity: str) -> list[list[float]]:
        return geometric_mean_log_ratio(log_ratio, mask, granularity=granularity, segment_ids_BT=ids).tolist()

    assert mean("token") == [[1, 3, 0, 5], [7, 8, 0, 0]]
    assert mean("segment") == [[2, 2, 0, 5], [7, 8, 0, 0]]
    assert mean("sequence") == [[3, 3, 0, 3], [7.5, 7.5, 0, 0]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.tuples(st.integers(-1, 2), st.integers(3, 5)), min_size=7, max_size=7), min_size=1, max_size=3)
)
def test_segment_ids_are_the_segments_of_the_trajectory_format(rows: list[list[tuple[int, int]]]) -> None:
    turn = torch.tensor([[t for t, _ in row] for row in rows])
    version = torch.tensor([[v if t >= 0 else -1 for t, v in row] for row in rows])
    ids = segment_ids(turn, version)
    for b, row in enumerate(ids.tolist()):
        expected = [-1] * len(row)
        for number, segment in enumerate(segments(turn[b].tolist(), version[b].tolist())):
            expected[segment.start : segment.end] = [number] * (segment.end - segment.start)
        assert row == expected


def test_segment_ids_refuse_tensors_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"turn_BT has shape \[1, 3\] and weight_version_BT \[1, 2\]"):
        segment_ids(torch.zeros(1, 3), torch.zeros(1, 2))


def interrupted_trajectory(*, first_token_of_new_version: int) -> Trajectory:
    """A prompt of 2, a turn of 4 interrupted after its second token, an observation of 2, a turn of 2."""
    turn = np.array([-1, -1, 0, 0, 0, 0, -1, -1, 1, 1], dtype=np.int32)
    version = np.where(np.arange(10) < first_token_of_new_version, 7, 8)
    header = TrajectoryHeader(
        task=1, sample=0, attempt=1, epoch=1, worker="w", incarnation="i", outcome=Outcome.FINISHED, interruptions=1
    )
    return Trajectory(
        header=header,
        tokens=np.arange(10, dtype=np.int32),
        turn=turn,
        weight_version=np.where(turn >= 0, version, -1).astype(np.int32),
        behavior_logprobs=np.where(turn >= 0, -0.5, 0).astype(np.float32),
    )


def test_an_interruption_after_token_k_gives_k_the_old_version_and_the_next_token_the_new_one() -> None:  # test 19
    def check(trajectory: Trajectory) -> None:
        received = decode_trajectory(encode_trajectory(trajectory))
        found = segments(received.turn.tolist(), received.weight_version.tolist())
        assert found == (Segment(2, 4, 7), Segment(4, 6, 8), Segment(8, 10, 8))
        covered = list(itertools.chain.from_iterable(range(s.start, s.end) for s in found))
        assert (
            covered == np.flatnonzero(received.model_mask).tolist()
        )  # none lost, none twice, prompt and tool left out
        ids = segment_ids(torch.from_numpy(received.turn)[None], torch.from_numpy(received.weight_version)[None])
        assert ids.tolist() == [[-1, -1, 0, 0, 1, 1, -1, -1, 2, 2]]
        assert received.versions == (7, 8)

    check(interrupted_trajectory(first_token_of_new_version=4))
    for off_by_one in (3, 5):
        with pytest.raises(AssertionError):
            check(interrupted_trajectory(first_token_of_new_version=off_by_one))
