"""One recorded stream of trajectories, trained by each exact route. Run in the test's own process, and by torchrun.

The stream: step s trains batch s, whose tokens are of versions s-2 to s. Tokens of a version reach the trainer while it
is resident, as segments do. Findings go to `FOLDER/world-<size>/`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from tests.fakes.trajectories import finished
from tests.integration.trainer.toy import TRAINING, local_state, make_batch, make_policy, same_bits, settings
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from rljob_api.correction import OldLogprobs
from rljob_api.messages import ScoreHeader, SegmentHeader
from rljob_api.spec import ComputeType
from rljob_runtime.correction.score_pool import ScorePool, Wanted
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.score_codec import Scores, decode_scores, encode_scores
from rljob_runtime.segment_codec import OpenSegment
from rljob_runtime.trainer.batch import TrainBatch, TrainRow, broadcast_batch
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.eager import ScoreRound, broadcast_round, score_round
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.update import UpdateSettings, resolve_batch, train_on
from rljob_runtime.trajectory_codec import Trajectory

STEPS = 4
BOUND = 2
RATE = 0.2
Route = Literal["snapshot", "pool", "barrier", "dedicated", "current"]
AHEAD: tuple[Route, ...] = ("pool", "barrier", "dedicated")
"""Routes whose values come with the batch."""


def recorded_stream() -> list[TrainBatch]:
    """Batch of each step; its rows' task numbers are the step's own."""
    batches = []
    for step in range(STEPS):
        batch = make_batch(
            40 + step, version=step, groups=3, samples=2, max_staleness=min(step, BOUND), max_versions=BOUND
        )
        rows = tuple(dataclasses.replace(row, task=row.task + 10 * step) for row in batch.rows)
        batches.append(dataclasses.replace(batch, rows=rows))
    return batches


def lone_policy(directory: Path, world: World) -> Policy:
    """In float64 throughout: routes then differ by rounding of 1e-16 only."""
    causal_lm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return Policy(causal_lm.to(world.device), ComputeType.FLOAT32).eval()


def double_policy(directory: Path, world: World) -> Policy:
    """The same, sharded as `build_policy` does."""
    policy = lone_policy(directory, world)
    causal_lm = policy.causal_lm
    precision = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float64)
    for layer in causal_lm.get_decoder().layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=precision)
    fully_shard(policy, mesh=world.mesh, mp_policy=precision, reshard_after_forward=True)
    return policy


def forward(policy: Policy, row: TrainRow, temperature: float) -> np.ndarray:
    """Log-probabilities [T] of one row, with no others beside it."""
    tokens_BT = torch.from_numpy(row.tokens.astype(np.int64))[None].to(policy.device)
    with torch.no_grad():
        return policy(tokens_BT, temperature=temperature, with_entropy=False).logprobs_BT[0].double().cpu().numpy()


def _arrays(row: TrainRow, end: int) -> tuple[Any, ...]:
    return row.tokens[:end], row.turn[:end], row.weight_version[:end], row.behavior_logprobs[:end]


def segment(row: TrainRow, end: int) -> OpenSegment:
    header = SegmentHeader(task=row.task, sample=row.sample, attempt=1, worker="w", incarnation="i", start=0)
    return OpenSegment(header, *_arrays(row, end))


def trajectory(row: TrainRow) -> Trajectory:
    header = finished(row.task, row.sample)
    return Trajectory(header, *_arrays(row, row.num_tokens))


class OldPolicyWorker:
    """A policy of its own, on rank 0 only: takes versions from their published files, scores trajectories in any order."""

    def __init__(self, folder: Path, world: World, chosen: UpdateSettings) -> None:
        self._policy = lone_policy(folder / "flat", world)
        self._settings = chosen
        self._store = SnapshotStore(torch.float64)
        self._published = folder / f"world-{world.size}" / "published.safetensors"
        self._random = np.random.default_rng(7)

    def load(self, version: int, weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, self._published)
        self._store.load_full(version, self._policy, self._published)

    def score(self, rows: list[TrainRow]) -> list[Scores]:
        """One message for each trajectory and version that is here, the messages and the versions in random order."""
        messages = []
        for version in self._random.permutation(self._store.versions).tolist():
            for row in (rows[index] for index in self._random.permutation(len(rows))):
                mine = np.flatnonzero(row.weight_version == version).astype(np.int32)
                if mine.size:
                    with self._store.held(version, self._policy):
                        values = forward(self._policy, row, self._settings.temperature)
                    header = ScoreHeader(task=row.task, sample=row.sample, sequence=1, worker="old")
                    messages.append(
                        Scores(header, mine, np.full(mine.shape, version, np.int32), values[mine].astype(np.float32))
                    )
        return [decode_scores(encode_scores(messages[index])) for index in self._random.permutation(len(messages))]


class Run:
    """The trainer's steps on the stream, by one route."""

    def __init__(self, route: Route, policy: Policy, world: World, chosen: UpdateSettings, folder: Path) -> None:
        self.route = route
        self.policy = policy
        self.world = world
        named = {
            "barrier": OldLogprobs.INTERRUPTION,
            "dedicated": OldLogprobs.DEDICATED,
            "current": OldLogprobs.CURRENT,
        }.get(route, OldLogprobs.SNAPSHOT)
        self.settings = dataclasses.replace(chosen, route=named)
        self.old_policy = OldPolicyWorker(folder, world, chosen) if route == "dedicated" and world.is_main else None
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        self.snapshots = SnapshotStore(next(policy.parameters()).dtype)
        self.pool = ScorePool(1 << 20)
        self.stream = recorded_stream()
        self.weights: list[dict[str, torch.Tensor]] = []
        self.old: dict[tuple[int, int], np.ndarray] = {}
        """Old log-probabilities that each row was trained with."""
        self.recorded: dict[tuple[int, int], np.ndarray] = {}
        """The same, from a plain forward of each version over the whole trajectories while it was resident."""
        self.sources: dict[str, int] = {}
        self.missing = 0

    def train(self) -> Run:
        for version in range(STEPS):
            if self.route in ("snapshot", "current"):
                self._record(version)
            if self.route == "snapshot":
                self.snapshots.save(version, self.policy)
                self.snapshots.drop(version - BOUND - 1)
            if self.route == "dedicated":
                weights = self._published()
                if self.old_policy is not None:
                    self.old_policy.load(version, weights)
            self._arrive(version)
            if self.route == "pool":
                while self._score(self.pool.wanted(version, 60)):
                    pass
            self._step(version)
        return self

    def _arrive(self, version: int) -> None:
        """Everything that workers have made with this version reaches the pool, but for the batch that is taken."""
        for row in (row for batch in self.stream[version + 1 :] for row in batch.rows):
            made = np.flatnonzero(row.weight_version == version)
            if made.size:
                self.pool.extend(segment(row, int(made[-1]) + 1))

    def _score(self, rows: list[Wanted]) -> int:
        chosen = ScoreRound(rows[0].version, tuple(row.tokens for row in rows)) if rows else ScoreRound(0, ())
        chosen = broadcast_round(chosen if self.world.is_main else None, self.world.device)
        if chosen.rows:
            values = score_round(
                self.policy, chosen, self.snapshots, self.settings, self.world, resident=chosen.version
            )
            for row, of_row in zip(rows, values, strict=True):
                self.pool.store(row, of_row)
        return len(rows)

    def _record(self, version: int) -> None:
        """Row by row, in this process: no pool, no switch, no other rows in the forward."""
        for row in (row for batch in self.stream[version:] for row in batch.rows):
            mine = row.weight_version == version
            if mine.any():
                held = self.recorded.setdefault((row.task, row.sample), np.zeros(row.num_tokens))
                held[mine] = forward(self.policy, row, self.settings.temperature)[mine]

    def _step(self, version: int) -> None:
        batch = self.stream[version]
        if self.route in AHEAD:
            # Trajectories are finished when they reach an old-policy worker; half of its answers overtake them.
            scores = self.old_policy.score(list(batch.rows)) if self.old_policy is not None else []
            for message in scores[: len(scores) // 2]:
                self.pool.accept(message)
            rows = []
            for row in batch.rows:
                self.pool.complete(trajectory(row), 1)
            for message in scores[len(scores) // 2 :]:
                self.pool.accept(message)
            for row in batch.rows:
                known = self.pool.known(trajectory(row))
                rows.append(dataclasses.replace(row, known_logprobs=known.logprobs, known_source=known.source))
            batch = dataclasses.replace(batch, rows=tuple(rows))
            self.pool.forget((row.task, row.sample) for row in rows)
        batch = broadcast_batch(batch if self.world.is_main else None, self.world.device)
        old = resolve_batch(self.policy, batch, self.snapshots, self.settings, self.world)

        def behind_barrier() -> None:
            if self.route == "barrier":
                self._score(self.pool.wanted(version))

        report = train_on(
            self.policy,
            self.optimizer,
            batch,
            old,
            self.settings,
            self.world,
            rate=RATE,
            before_first_update=behind_barrier,
        )
        self.missing += report.tokens_missing
        for name, stats in report.sources.items():
            self.sources[name] = self.sources.get(name, 0) + stats.tokens
        for row, record in zip(batch.rows, report.records, strict=True):
            self.old[row.task, row.sample] = np.where(row.trainable, record.old_logprobs, 0)
        self.weights.append(self._published())

    def _published(self) -> dict[str, torch.Tensor]:
        return {
            name: parameter.detach().full_tensor().clone() for name, parameter in self.policy.published_parameters()
        }


def largest_difference(one: dict[Any, Any], other: dict[Any, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(abs(one[name] - other[name]).max()) for name in one)


def check_routes(folder: Path, world: World) -> dict[str, float]:
    """Parameters and old values of the exact routes against each other, in float64."""
    found: dict[str, float] = {}
    for name, chosen in {"one update": settings(), "two updates": settings(mini_batches=2)}.items():
        runs = {
            route: Run(route, double_policy(folder / "flat", world), world, chosen, folder).train()
            for route in get_args(Route)
        }
        snapshot = runs["snapshot"]
        for route, run in runs.items():
            for step in range(STEPS):
                found[f"{name}: {route}: parameters {step}"] = largest_difference(
                    run.weights[step], snapshot.weights[step]
                )
            found[f"{name}: {route}: against snapshot"] = largest_difference(run.old, snapshot.old)
            if run.recorded:
                found[f"{name}: {route}: against recorded"] = largest_difference(
                    run.old, {key: values.astype(np.float32) for key, values in run.recorded.items()}
                )
            found[f"{name}: {route}: missing"] = run.missing
            for source, tokens in run.sources.items():
                found[f"{name}: {route}: {source} tokens"] = tokens
        if world.is_main:
            save_file(snapshot.weights[-1], folder / f"world-{world.size}" / f"{name}.safetensors")
    return found


def check_float32(folder: Path, world: World) -> dict[str, float]:
    """Old values of the routes as a job computes them."""
    runs = [
        Run(route, make_policy(folder / "flat", world), world, settings(), folder).train()
        for route in ("snapshot", "pool")
    ]
    return {"float32: pool against snapshot": largest_difference(runs[0].old, runs[1].old)}


def check_hook(folder: Path, world: World) -> dict[str, bool]:
    """An update with and without forwards between its gradients and its optimizer, on this rank."""
    batch = make_batch(50, version=0, max_staleness=0)
    rows = tuple(row.tokens for row in make_batch(51, version=0, max_staleness=0).rows)
    found: dict[str, bool] = {}
    for compute_type in ComputeType:
        for name, chosen in {"one update": settings(), "four updates": settings(mini_batches=2, epochs=2)}.items():

            def after(
                hook: Callable[[Policy], None] | None, chosen: UpdateSettings = chosen
            ) -> dict[str, torch.Tensor]:
                policy = make_policy(folder / "flat", world, compute_type)  # noqa: B023
                optimizer = build_optimizer(policy, TRAINING)
                store = SnapshotStore(torch.float32)
                calls: list[None] = []

                def called() -> None:
                    calls.append(None)
                    if hook is not None:
                        hook(policy)

                old = resolve_batch(policy, batch, store, chosen, world)
                train_on(policy, optimizer, batch, old, chosen, world, rate=1e-2, before_first_update=called)
                assert len(calls) == 1
                return local_state(policy, optimizer)

            def scoring(policy: Policy, chosen: UpdateSettings = chosen) -> None:
                score_round(policy, ScoreRound(0, rows), SnapshotStore(torch.float32), chosen, world, resident=0)

            def with_gradient(policy: Policy) -> None:
                tokens = torch.from_numpy(rows[0].astype(np.int64))[None].to(world.device)
                policy(tokens, temperature=1.0, with_entropy=False).logprobs_BT.sum().backward()

            plain = after(None)
            case = f"{compute_type.value}, {name}"
            found[f"{case}: scoring changes nothing"] = same_bits(plain, after(scoring))
            found[f"{case}: a backward would have been noticed"] = not same_bits(plain, after(with_gradient))
    return found


def run_checks(folder: Path, world: World) -> None:
    if world.is_main:
        (folder / f"world-{world.size}").mkdir()
    torch.distributed.barrier()
    figures = check_routes(folder, world) | check_float32(folder, world)
    gathered: list[dict[str, bool] | None] = [None] * world.size
    torch.distributed.all_gather_object(gathered, check_hook(folder, world))
    if world.is_main:
        findings = {"figures": figures, "hook": gathered}
        (folder / f"world-{world.size}" / "findings.json").write_text(json.dumps(findings))
    torch.distributed.barrier()


if __name__ == "__main__":
    with distributed_world("cpu", timeout_seconds=60) as joined:
        run_checks(Path(sys.argv[1]), joined)
