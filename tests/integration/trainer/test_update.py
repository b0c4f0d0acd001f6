"""One step's updates against a plain loop written from the formulas, and what stays out of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.trainer.toy import SETTINGS, TRAINING, local_state, make_batch, make_model, make_policy, settings
from transformers import AutoModelForCausalLM

from rljob_api.correction import OldLogprobs
from rljob_api.errors import TrainingDiverged
from rljob_api.spec import RLJob
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Source
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings, resolve_batch, train_on

RATE = 0.2


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with distributed_world("cpu", timeout_seconds=30) as joined:
        yield joined


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), sharpness=0.05)


def trained(
    model: Path, world: World, batch: TrainBatch, chosen: UpdateSettings, *, held: tuple[int, ...] = ()
) -> tuple[UpdateReport, Policy]:
    """One step of plain gradient descent; snapshots hold the same weights, which suffices where only masks matter."""
    policy, store = make_policy(model, world), SnapshotStore(torch.float32)
    for version in held:
        store.save(version, policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    old = resolve_batch(policy, batch, store, chosen, world)
    return train_on(policy, optimizer, batch, old, chosen, world, rate=RATE), policy


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in policy.published_parameters()}


def plain_update(model: Path, batch: TrainBatch, chosen: UpdateSettings) -> tuple[float, float, dict[str, Any]]:
    """Token by token in float64, from the formulas: one update on a batch whose every token is resident."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        tokens = torch.from_numpy(row.tokens).long()
        logprobs_TV = torch.log_softmax(causal_lm(tokens[None]).logits[0] / chosen.temperature, -1)
        for position in np.flatnonzero(row.turn >= 0):
            distribution_V = logprobs_TV[position - 1]
            target = distribution_V[tokens[position]]
            discrepancy = float((target.detach() - float(row.behavior_logprobs[position])).exp())
            staleness = (target - target.detach()).exp()  # 1, with the gradient of the logarithm
            if chosen.discrepancy_low <= discrepancy <= chosen.discrepancy_high:
                total = total - staleness * float(row.advantages[position])
            total = total + chosen.entropy_coefficient * (distribution_V.exp() * distribution_V).sum()
    loss = total / batch.num_model_tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(causal_lm.parameters(), chosen.gradient_clip)
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            parameter -= RATE * parameter.grad
    return loss.item(), norm.item(), dict(causal_lm.named_parameters())


def test_an_update_is_the_one_that_the_formulas_give(model: Path, world: World) -> None:
    batch = make_batch(11, version=0, max_staleness=0)
    report, policy = trained(model, world, batch, settings(token_budget=64))
    loss, norm, expected = plain_update(model, batch, settings())
    assert report.loss == pytest.approx(loss, abs=1e-6) and report.gradient_norm == pytest.approx(norm, rel=1e-5)
    for name, tensor in weights(policy).items():
        torch.testing.assert_close(tensor.double(), expected[name].detach(), rtol=0, atol=1e-6)
    assert report.num_updates == 1 and report.clip_fraction == 0
    assert 0 < report.active_fraction == report.keep_fraction < 1


def test_with_one_update_resident_values_are_the_training_forward_itself(model: Path, world: World) -> None:
    batch = make_batch(12, version=0, max_staleness=0)
    report, _ = trained(model, world, batch, settings())
    for row, record in zip(batch.rows, report.records, strict=True):
        assert set(record.source[row.turn >= 0]) == {Source.RESIDENT} and set(record.source[row.turn < 0]) == {0}
        np.testing.assert_array_equal(record.old_logprobs[row.trainable], record.target_logprobs[row.trainable])


def test_with_more_updates_old_values_are_those_before_the_first(model: Path, world: World) -> None:
    batch = make_batch(12, version=0, max_staleness=0)
    report, _ = trained(model, world, batch, settings(mini_batches=2, epochs=2))
    untouched = make_policy(model, world)
    before = score(untouched, [row.tokens for row in batch.rows], temperature=0.8, token_budget=96)
    assert report.num_updates == 4 and report.clip_fraction > 0
    second_mini_batch_moved = False
    for row, record, expected in zip(batch.rows, report.records, before, strict=True):
        np.testing.assert_allclose(record.old_logprobs[row.trainable], expected[row.trainable], rtol=0, atol=1e-5)
        if row.task % 2:
            second_mini_batch_moved |= bool(np.abs(record.target_logprobs - expected).max() > 1e-3)
        else:  # the first update's forward has the layout of the pass before it: equal to the bit
            np.testing.assert_array_equal(record.old_logprobs[row.trainable], record.target_logprobs[row.trainable])
    assert second_mini_batch_moved


def test_tokens_over_the_bound_count_in_the_denominator_and_nowhere_else(model: Path, world: World) -> None:
    batch = make_batch(13, version=4, max_staleness=4, max_versions=2)
    over = sum(int(((row.turn >= 0) & ~row.trainable).sum()) for row in batch.rows)
    assert over > 10
    garbage = dataclasses.replace(
        batch,
        rows=tuple(
            dataclasses.replace(
                row,
                advantages=np.where(row.trainable, row.advantages, 1e6).astype(np.float32),
                behavior_logprobs=np.where(row.trainable, row.behavior_logprobs, -50).astype(np.float32),
            )
            for row in batch.rows
        ),
    )
    (report, policy), (of_garbage, other) = (
        trained(model, world, one, settings(), held=(2, 3)) for one in (batch, garbage)
    )
    assert report.tokens_over_bound == over and report.tokens_missing == 0
    assert report.tokens_trained + over == batch.num_model_tokens
    assert report.loss == of_garbage.loss
    assert all(torch.equal(one, weights(other)[name]) for name, one in weights(policy).items())
    # Negative control: the same garbage on trainable tokens is seen.
    trainable = dataclasses.replace(
        batch, rows=tuple(dataclasses.replace(row, advantages=row.advantages + np.float32(1)) for row in batch.rows)
    )
    assert trained(model, world, trainable, settings(), held=(2, 3))[0].loss != pytest.approx(report.loss, rel=1e-3)


def test_tokens_whose_version_is_gone_are_dropped_and_counted(model: Path, world: World) -> None:
    batch = make_batch(14, version=4, max_staleness=2)
    report, _ = trained(model, world, batch, settings(), held=(3,))
    of_two = sum(int((row.weight_version == 2).sum()) for row in batch.rows)
    assert report.tokens_missing == of_two > 0
    assert report.exact_fraction == pytest.approx(1 - of_two / batch.num_model_tokens)
    assert set(report.sources) == {"resident", "snapshot"} and set(report.staleness.histogram) == {"0", "1"}
    assert report.sources["resident"].tokens + report.sources["snapshot"].tokens == report.tokens_trained
    assert sum(bucket.tokens for bucket in report.discrepancy_by_staleness.values()) == report.tokens_trained


@pytest.mark.parametrize(("route", "source"), [(OldLogprobs.CURRENT, "current"), (OldLogprobs.ENGINE, "engine")])
@pytest.mark.parametrize("epochs", [1, 2])
def test_baselines_replace_old_values_and_say_so(
    model: Path, world: World, route: OldLogprobs, source: str, epochs: int
) -> None:
    batch = make_batch(15, version=4)
    report, _ = trained(model, world, batch, settings(route=route, epochs=epochs))
    resident = sum(int((row.staleness == 0).sum()) for row in batch.rows)
    assert report.tokens_missing == 0 and report.sources[source].tokens > 0
    assert report.exact_fraction == pytest.approx(
        resident / batch.num_model_tokens if route is OldLogprobs.CURRENT else 0
    )
    if route is OldLogprobs.ENGINE:
        assert report.sources["engine"].rms_log_discrepancy == 0 and report.keep_fraction == 1


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_optimizer(model: Path, world: World) -> None:
    good = make_batch(16, version=0, max_staleness=0)
    bad = dataclasses.replace(
        good,
        rows=tuple(dataclasses.replace(row, advantages=np.full_like(row.advantages, np.inf)) for row in good.rows),
    )
    policy = make_policy(model, world)
    optimizer, store = build_optimizer(policy, TRAINING), SnapshotStore(torch.float32)
    train_on(policy, optimizer, good, resolve_batch(policy, good, store, SETTINGS, world), SETTINGS, world, rate=1e-3)
    before = local_state(policy, optimizer)
    old = resolve_batch(policy, bad, store, SETTINGS, world)
    with pytest.raises(TrainingDiverged, match=r"the gradient norm is (nan|inf): the update was refused"):
        train_on(policy, optimizer, bad, old, SETTINGS, world, rate=1e-3)
    after = local_state(policy, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_without_rows_makes_no_update(model: Path, world: World) -> None:
    report, policy = trained(model, world, TrainBatch(3, (), 0), settings(epochs=2))
    assert (report.num_updates, report.loss, report.tokens_trained, report.records) == (0, 0.0, 0, ())
    assert report.exact_fraction == 1.0  # nothing was trained on what is not exact
    start = weights(make_policy(model, world))
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(policy).items())


def test_settings_are_those_of_the_spec() -> None:
    job = RLJob.model_validate(
        {
            "metadata": {"name": "a"},
            "spec": {
                "model": {"random": {}},
                "environment": {"name": "digit-copy"},
                "sampling": {"temperature": 0.8},
                "training": {
                    "steps": 1,
                    "tasksPerStep": 1,
                    "learningRate": 0.1,
                    "tokensPerMicroBatch": 96,
                    "entropyCoefficient": 0.01,
                },
                "rolloutPools": [{"name": "main"}],
                "correction": {"discrepancy": {"granularity": "Segment", "weight": "Truncated"}},
            },
        }
    )
    assert UpdateSettings.of(job.spec) == settings(
        granularity="segment", discrepancy_weight="truncated", discrepancy_low=0.999, discrepancy_high=1.001
    )
