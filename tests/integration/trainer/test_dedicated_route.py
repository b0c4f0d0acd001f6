"""The dedicated route against the snapshot route on one set of versions: same values, same parameters afterwards."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tests.integration.trainer.toy import SETTINGS, local_state, make_batch, make_model, make_policy, same_bits

from rljob_api.correction import OldLogprobs
from rljob_api.errors import BlobCorrupt, EngineError
from rljob_api.messages import Outcome, TrajectoryHeader
from rljob_api.spec import RLJob
from rljob_api.weights import Probe
from rljob_runtime.correction.score_pool import ScorePool
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import OldRow, Source
from rljob_runtime.old_policy.in_hand import InHand
from rljob_runtime.old_policy.plan import Turn, next_pass
from rljob_runtime.old_policy.scorer import Scorer
from rljob_runtime.score_codec import decode_scores, encode_scores
from rljob_runtime.trainer.batch import TrainBatch, TrainRow
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy, full_state
from rljob_runtime.trainer.probe import make_probe
from rljob_runtime.trainer.update import resolve_batch, train_on
from rljob_runtime.trajectory_codec import Trajectory

VERSION = 3
"""Of the batch's step; versions 1 and 2 are old ones."""
ALONE = dataclasses.replace(SETTINGS, token_budget=1)
"""Each row is a forward of its own: with the same layout the values are the same bits."""
SPEC = RLJob.model_validate(
    {
        "metadata": {"name": "toy"},
        "spec": {
            "model": {"path": "/unused"},
            "environment": {"name": "digit-copy", "parameters": {"digits": 2, "turns": 2}},
            "sampling": {"maxTokens": 2, "maxTrajectoryTokens": 128, "temperature": SETTINGS.temperature},
            "training": {"steps": 9, "tasksPerStep": 4, "learningRate": 0.005, "computeType": "Float32"},
            "rolloutPools": [{"name": "main"}],
        },
    }
).spec


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """What the trainer left: the old versions as files with their probes, and what its own snapshots say."""

    model: Path
    files: dict[int, Path]
    probes: dict[int, Probe]
    batch: TrainBatch
    snapshot: dict[int, OldRow]


def drift(policy: Policy, version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for _, parameter in policy.published_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.add_(0.02 * torch.randn(local.shape, generator=generator))


def old_versions(
    policy: Policy, directory: Path | None, store: SnapshotStore
) -> tuple[dict[int, Path], dict[int, Probe]]:
    """Take the policy from version 0 to VERSION, keeping a snapshot and a file of each on the way."""
    files: dict[int, Path] = {}
    probes: dict[int, Probe] = {}
    for version in range(1, VERSION + 1):
        drift(policy, version)
        if version < VERSION:
            store.save(version, policy)
            if directory is not None:
                files[version] = directory / f"{version}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in full_state(policy).items()}, files[version])
                probes[version] = make_probe(policy, tuple(range(3, 19)))
    return files, probes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    model = make_model(tmp_path_factory.mktemp("model"))
    batch = make_batch(7, version=VERSION)
    with distributed_world("cpu", timeout_seconds=60) as world:
        policy, store = make_policy(model, world), SnapshotStore(torch.float32)
        files, probes = old_versions(policy, tmp_path_factory.mktemp("versions"), store)
        snapshot = resolve_batch(policy, batch, store, ALONE, world)
    return Published(model, files, probes, batch, snapshot)


@pytest.fixture(scope="module")
def scorer(published: Published) -> Iterator[Scorer]:
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"tokens_per_micro_batch": 1})})
    made = Scorer(spec, "cpu")
    made.open(published.model)
    for version, path in published.files.items():
        made.load(version, path, published.probes[version])
    try:
        yield made
    finally:
        made.close()


class Lease:
    """A message that nobody gets back."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence


def trajectory_of(row: TrainRow) -> Trajectory:
    header = TrajectoryHeader(
        task=row.task, sample=row.sample, attempt=1, epoch=1, worker="w", incarnation="i", outcome=Outcome.FINISHED
    )
    return Trajectory(header, row.tokens, row.turn, row.weight_version, row.behavior_logprobs)


def score_all(scorer: Scorer, trajectories: dict[int, Trajectory], order: list[int], *, at_once: int) -> list[bytes]:
    """Messages of a worker to which trajectories come in this order, `at_once` before each pass; as they are finished."""
    arriving = list(order)
    in_hand: dict[int, InHand] = {}
    turn: Turn | None = None
    messages: list[bytes] = []
    while arriving or in_hand:
        for sequence in arriving[:at_once]:
            lease: Any = Lease(sequence)
            in_hand[sequence] = InHand.take(lease, trajectories[sequence], 0.0)
            in_hand[sequence].open.pop(VERSION, None)  # resident: the worker need not have it yet
        arriving = arriving[at_once:]
        waiting = [part for held in in_hand.values() for part in held.open.values()]
        planned = next_pass(waiting, turn, ready=(1, 2), max_tokens=60)
        if planned is not None:
            turn, parts = planned
            rows = scorer.score(turn.version, [in_hand[part.sequence].row(part) for part in parts])
            for part, logprobs in zip(parts, rows, strict=True):
                in_hand[part.sequence].fill(part, logprobs)
        for sequence in [sequence for sequence, held in in_hand.items() if not held.open]:
            messages.append(encode_scores(in_hand.pop(sequence).scores("p-0")))
    return messages


def with_known(batch: TrainBatch, messages: list[bytes], first_sequence: int = 1) -> TrainBatch:
    """The batch as rank 0 builds it from the messages; its rows are neighbours on the trajectory stream."""
    pool = ScorePool(1 << 20)
    for message in messages:
        pool.accept(decode_scores(message))
    rows = []
    for sequence, row in enumerate(batch.rows, first_sequence):
        pool.complete(trajectory_of(row), sequence)
        known = pool.known(trajectory_of(row))
        rows.append(dataclasses.replace(row, known_logprobs=known.logprobs, known_source=known.source))
    return dataclasses.replace(batch, rows=tuple(rows))


def trajectories_of(batch: TrainBatch) -> dict[int, Trajectory]:
    return {sequence: trajectory_of(row) for sequence, row in enumerate(batch.rows, 1)}


def stale_values(rows: dict[int, OldRow], source: Source) -> list[NDArray[np.float32]]:
    return [rows[index].logprobs[rows[index].source == source] for index in sorted(rows)]


def test_scored_concurrently_in_any_order_the_values_are_those_of_the_snapshots_bit_for_bit(
    published: Published, scorer: Scorer
) -> None:
    """Test 21 of docs/algorithms.md: concurrent result == inline result."""
    batch = published.batch
    expected = stale_values(published.snapshot, Source.SNAPSHOT)
    assert sum(len(row) for row in expected) > 50
    chance = random.Random(1)
    for at_once in (1, 3, 12):
        order = list(range(1, len(batch.rows) + 1))
        chance.shuffle(order)
        messages = score_all(scorer, trajectories_of(batch), order, at_once=at_once)
        chance.shuffle(messages)
        known = with_known(batch, [*messages, messages[0]])
        for row, snapshot in zip(known.rows, expected, strict=True):
            stale = row.trainable & (row.staleness > 0)
            assert (row.known_source[stale] == Source.DEDICATED).all()
            np.testing.assert_array_equal(row.known_logprobs[stale], snapshot)


def test_batched_with_other_rows_the_values_agree_to_rounding(published: Published, scorer: Scorer) -> None:
    rows = [row.tokens for row in published.batch.rows]
    alone = scorer.score(1, rows)
    scorer._token_budget = 4096
    try:
        together = scorer.score(1, rows)
    finally:
        scorer._token_budget = 1
    assert max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True)) <= 1e-5


def test_scored_under_the_neighbouring_version_the_comparison_fails(published: Published, scorer: Scorer) -> None:
    """Negative control: the versions differ by far more than the tolerance of the comparison."""
    rows = [row.tokens for row in published.batch.rows]
    one, two = scorer.score(1, rows), scorer.score(2, rows)
    assert min(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True)) > 1e-2


def test_keyed_by_the_sample_alone_a_second_trajectory_of_it_gets_the_firsts_values(
    published: Published, scorer: Scorer
) -> None:
    """Negative control of the key: a sample that was rolled out twice has two trajectories and one (task, sample)."""
    first = trajectory_of(published.batch.rows[0])
    second = dataclasses.replace(first, tokens=np.roll(first.tokens, 1))
    messages = score_all(scorer, {1: first, 2: second}, [2, 1], at_once=2)
    rows = [published.batch.rows[0], dataclasses.replace(published.batch.rows[0], tokens=second.tokens)]
    right, other = (
        with_known(dataclasses.replace(published.batch, rows=(row,)), messages, first_sequence=sequence).rows[0]
        for sequence, row in enumerate(rows, 1)
    )
    stale = right.trainable & (right.staleness > 0)
    assert stale.any()
    assert np.abs(right.known_logprobs[stale] - other.known_logprobs[stale]).max() > 1e-2


def test_a_step_with_the_pools_values_ends_at_the_same_parameters_as_one_with_snapshots(
    published: Published, scorer: Scorer
) -> None:
    """Test 26 of docs/algorithms.md, one step: snapshot and dedicated route on the same recorded batch."""
    messages = score_all(
        scorer, trajectories_of(published.batch), list(range(len(published.batch.rows), 0, -1)), at_once=4
    )
    scorer.close()
    try:
        with distributed_world("cpu", timeout_seconds=60) as world:
            by_snapshot = after_a_step(published, world, published.batch, OldLogprobs.SNAPSHOT)
            by_pool = after_a_step(published, world, with_known(published.batch, messages), OldLogprobs.DEDICATED)
            missing = after_a_step(published, world, published.batch, OldLogprobs.DEDICATED)
    finally:
        scorer.open(published.model)
        for version, path in published.files.items():
            scorer.load(version, path, published.probes[version])
    assert same_bits(by_snapshot, by_pool)
    assert not same_bits(by_snapshot, missing), "the negative control: without the values the step is another one"


def after_a_step(published: Published, world: World, batch: TrainBatch, route: OldLogprobs) -> dict[str, torch.Tensor]:
    policy, store = make_policy(published.model, world), SnapshotStore(torch.float32)
    old_versions(policy, None, store)
    if route is OldLogprobs.DEDICATED:
        store = SnapshotStore(torch.float32)
    chosen = dataclasses.replace(ALONE, route=route)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    old = resolve_batch(policy, batch, store, chosen, world)
    train_on(policy, optimizer, batch, old, chosen, world, rate=0.2)
    return local_state(policy, optimizer)


def test_a_version_whose_values_are_not_the_trainers_is_not_held(published: Published, scorer: Scorer) -> None:
    with pytest.raises(EngineError, match="version 8 was loaded and is not what the trainer published"):
        scorer.load(8, published.files[1], published.probes[2])
    with pytest.raises(KeyError):
        scorer.score(8, [published.batch.rows[0].tokens])


def test_a_file_that_does_not_fit_the_model_is_refused(published: Published, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(BlobCorrupt):
        scorer.load(8, tmp_path / "broken", published.probes[1])


def test_a_dropped_version_is_gone_and_the_one_in_use_may_be_dropped(published: Published, scorer: Scorer) -> None:
    row = published.batch.rows[0].tokens
    before = scorer.score(1, [row])[0]
    scorer.drop(1)
    with pytest.raises(KeyError):
        scorer.score(1, [row])
    scorer.load(1, published.files[1], published.probes[1])
    np.testing.assert_array_equal(scorer.score(1, [row])[0], before)
