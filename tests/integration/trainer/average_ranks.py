"""The average of weights at any number of ranks. Run in the test's own process, and by torchrun: `average_ranks.py FOLDER`.

Findings go to `FOLDER/average-<size>.json`; the tests compare those of one and two ranks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tests.integration.trainer.toy import TRAINING, local_state, make_batch, make_policy, publish, same_bits, settings
from torch import Tensor
from torch.distributed.tensor import DTensor

from rljob_api.correction import Ewma, OldLogprobs
from rljob_api.spec import ComputeType
from rljob_runtime.correction.averaged_policy import AveragedPolicy
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.sources import Source
from rljob_runtime.trainer.batch import broadcast_batch
from rljob_runtime.trainer.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.packing import rank_shares
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.step_statistics import step_statistics
from rljob_runtime.trainer.update import UpdateReport, resolve_batch, train_on

CHOSEN = settings(route=OldLogprobs.EWMA, token_budget=1024)
STEPS = 3


class Run:
    """A policy that trains with its average as the route, as the trainer's loop does it."""

    def __init__(self, folder: Path, world: World, compute_type: ComputeType = ComputeType.FLOAT32) -> None:
        self.world = world
        self.policy = make_policy(folder / "flat", world, compute_type)
        self.optimizer = build_optimizer(self.policy, TRAINING)
        self.average = AveragedPolicy(Ewma())
        self.average.start(self.policy)
        self.store = SnapshotStore(torch.float32)

    def step(self, version: int) -> UpdateReport:
        made = make_batch(30 + version, version=version, groups=2) if self.world.is_main else None
        batch = broadcast_batch(made, self.world.device)
        old = resolve_batch(self.policy, batch, self.store, CHOSEN, self.world, self.average)
        report = train_on(self.policy, self.optimizer, batch, old, CHOSEN, self.world, rate=TRAINING.learning_rate)
        self.average.observe(step_statistics(batch, report, CHOSEN, {}))
        self.average.published(self.policy)
        return report

    def averaged(self) -> dict[str, Tensor]:
        """The whole average. Collective."""
        return {name: whole(tensor) for name, tensor in self.average.tensors(self.policy).items()}

    def figures(self, report: UpdateReport) -> dict[str, float]:
        """Of the last step, and of weights and average after it. Collective."""
        found = {"loss": report.loss, "norm": report.gradient_norm, "keep": report.keep_fraction}
        found["weights"] = sum(t.double().abs().sum().item() for t in masters(self.policy).values())
        found["average"] = sum(t.double().abs().sum().item() for t in self.averaged().values())
        return found | {name: float(value) for name, value in self.average.report().model_dump().items()}

    def digest(self) -> str:
        """Of this rank's masters, optimizer state and average, to the bit."""
        state = local_state(self.policy, self.optimizer)
        state |= {f"average {name}": local(tensor) for name, tensor in self.average.tensors(self.policy).items()}
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(state[name].numpy().tobytes())
        return digest.hexdigest()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def masters(policy: Policy) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in policy.published_parameters()}


def check_scoring(folder: Path, world: World, compute_type: ComputeType) -> dict[str, bool]:
    """The average against its closed form, and its scores against those of a model directory made of it."""
    run = Run(folder, world, compute_type)
    versions, decays = [masters(run.policy)], [0.0]
    for version in range(STEPS):
        run.step(version)
        versions.append(masters(run.policy))
        decays.append(run.average.report().decay)
    shares = [float(np.prod(decays[k + 1 :])) for k in range(len(versions))]
    averaged = run.averaged()
    closed = {
        name: sum(share * of[name].double() for share, of in zip(shares, versions, strict=True)) / sum(shares)
        for name in averaged
    }

    batch = make_batch(40, version=STEPS, groups=2)
    share = rank_shares([row.num_tokens for row in batch.rows], world.size)[world.rank]
    before = local_state(run.policy, run.optimizer)
    old = resolve_batch(run.policy, batch, run.store, CHOSEN, world, run.average)
    unchanged = same_bits(before, local_state(run.policy, run.optimizer))
    out = folder / f"average-{world.size}-{compute_type.value}"
    with run.average.held(run.policy):
        directory = publish(run.policy, folder / "flat", out)
    of_average = make_policy(directory, world, compute_type)
    # The layout of the rows is part of the bits: only rows with tokens of the average were scored, to the last of them.
    ends = {index: np.flatnonzero(old[index].source == Source.EWMA) for index in share}
    ends = {index: int(positions[-1]) + 1 for index, positions in ends.items() if positions.size}
    rows = [batch.rows[index].tokens[:end] for index, end in ends.items()]
    expected = score(of_average, rows, temperature=0.8, token_budget=1024)
    present = score(run.policy, rows, temperature=0.8, token_budget=1024)

    def equal(scored: list[np.ndarray]) -> bool:
        pairs = zip(ends, scored, strict=True)
        return all(
            np.array_equal(old[index].logprobs[: len(values)][chosen], values[chosen])
            for index, values in pairs
            for chosen in [old[index].source[: len(values)] == Source.EWMA]
        )

    found = {
        "the average is the closed form": all(
            torch.allclose(averaged[name].double(), closed[name], rtol=0, atol=1e-6) for name in closed
        ),
        "the average is not the present weights": any(
            (averaged[name] - versions[-1][name]).abs().max() > 1e-4 for name in closed
        ),
        "stale tokens carry the average's own scores": bool(ends) and equal(expected),
        "which are not the present policy's": not equal(present),
        "masters and optimizer state are unchanged to the bit": unchanged,
    }
    return {f"{compute_type.value}: {claim}": holds for claim, holds in found.items()}


def check_resume(folder: Path, world: World, *, load_from: int | None) -> dict[str, object]:
    """Steps, a checkpoint and one more step: uninterrupted, and on from a checkpoint of a world size."""
    run = Run(folder, world)
    if load_from is None:
        for version in range(STEPS):
            run.step(version)
        state = CheckpointState(epoch=1, version=STEPS, step=STEPS, ledger={})
        root = folder / f"with-average-{world.size}"
        save_checkpoint(root, run.policy, run.optimizer, state, world, run.average)
        without = folder / f"without-average-{world.size}"
        save_checkpoint(without, run.policy, run.optimizer, state, world)
    else:
        directory = folder / f"with-average-{load_from}" / f"1-{STEPS}"
        load_checkpoint(directory, run.policy, run.optimizer, world, run.average)
    restored = run.average.report().model_dump()
    figures = run.figures(run.step(STEPS))
    digests: list[str | None] = [None] * world.size
    dist.all_gather_object(digests, run.digest())
    return {"restored": restored, "figures": figures, "digests": digests}


def check_older_checkpoint(folder: Path, world: World) -> dict[str, bool]:
    """One that was written without an average, and one with an average that this job has no use for."""
    run = Run(folder, world)
    run.step(0)
    without = folder / f"without-average-{world.size}" / f"1-{STEPS}"
    load_checkpoint(without, run.policy, run.optimizer, world, run.average)
    present = masters(run.policy)
    averaged = run.averaged()
    report = run.average.report()
    plain = Run(folder, world)
    load_checkpoint(folder / f"with-average-{world.size}" / f"1-{STEPS}", plain.policy, plain.optimizer, world)
    return {
        "the average starts anew from the restored weights": all(torch.equal(averaged[n], present[n]) for n in present),
        "and remembers nothing": (report.weight, report.decay, report.relative_distance) == (1.0, 0.0, 0.0),
        "a job without an average restores the weights": all(
            torch.equal(tensor, present[name]) for name, tensor in masters(plain.policy).items()
        ),
    }


def run_checks(folder: Path, world: World) -> None:
    claims: dict[str, bool] = {}
    for compute_type in ComputeType:
        claims |= check_scoring(folder, world, compute_type)
    resumes = {"uninterrupted": check_resume(folder, world, load_from=None)}
    claims |= check_older_checkpoint(folder, world)
    for size in (1, 2):
        if (folder / f"with-average-{size}").exists():
            resumes[f"from {size}"] = check_resume(folder, world, load_from=size)
    gathered: list[dict[str, bool] | None] = [None] * world.size
    dist.all_gather_object(gathered, claims)
    if world.is_main:
        findings = {"claims": gathered, "resumes": resumes}
        (folder / f"average-{world.size}.json").write_text(json.dumps(findings))
    dist.barrier()


if __name__ == "__main__":
    with distributed_world("cpu", timeout_seconds=60) as joined:
        run_checks(Path(sys.argv[1]), joined)
