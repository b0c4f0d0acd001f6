"""What must hold at any number of ranks. Run in the test's own process, and by torchrun: `ranks.py FOLDER`.

Findings go to `FOLDER/world-<size>/`; the tests compare those of one and two ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.integration.trainer.toy import (
    TRAINING,
    local_state,
    make_batch,
    make_policy,
    publish,
    same_bits,
    settings,
)

from rljob_api.spec import ComputeType
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.batch import TrainBatch, broadcast_batch
from rljob_runtime.trainer.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy, compute_dtype, full_state
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.packing import rank_shares
from rljob_runtime.trainer.probe import make_probe, probe_tokens
from rljob_runtime.trainer.scoring import score, token_tensor
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings, resolve_batch, train_on


def step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    store: SnapshotStore,
    chosen: UpdateSettings,
    world: World,
    rate: float = TRAINING.learning_rate,
) -> UpdateReport:
    """One step's scoring and updates, the batch coming from rank 0 as it does in a job."""
    batch = broadcast_batch(batch if world.is_main else None, world.device)
    old = resolve_batch(policy, batch, store, chosen, world)
    return train_on(policy, optimizer, batch, old, chosen, world, rate=rate)


def check_exactness(folder: Path, world: World, compute_type: ComputeType, tied: bool) -> dict[str, bool]:
    """Resident and snapshot values against scoring the published files with fresh policies, on one batch layout."""
    name = f"{compute_type.value}-{'tied' if tied else 'untied'}"
    source = folder / ("tied" if tied else "untied")
    out = folder / f"world-{world.size}" / name
    policy = make_policy(source, world, compute_type)
    optimizer = build_optimizer(policy, TRAINING)
    store = SnapshotStore(compute_dtype(compute_type))
    batch = make_batch(1, version=0, max_staleness=0)
    # One update first: masters that a bf16 file cannot hold, so that rounding is part of what is compared.
    step(policy, optimizer, batch, store, settings(), world)
    store.save(1, policy)
    first = make_policy(publish(policy, source, out / "1"), world, compute_type)
    step(policy, optimizer, batch, store, settings(), world)
    second = make_policy(publish(policy, source, out / "2"), world, compute_type)

    share = rank_shares([row.num_tokens for row in batch.rows], world.size)[world.rank]
    rows = [batch.rows[index].tokens for index in share]

    def scored(model: Policy) -> np.ndarray:
        return np.concatenate(score(model, rows, temperature=0.8, token_budget=96))

    def forward(model: Policy) -> torch.Tensor:
        return model(token_tensor(rows, world.device), temperature=0.8, with_entropy=True).logprobs_BT

    before = local_state(policy, optimizer)
    with torch.no_grad():
        from_blob = forward(second)
    resident = forward(policy)
    resident.sum().backward()
    optimizer.zero_grad(set_to_none=True)
    with store.held(1, policy):
        switched = scored(policy)
    after = scored(policy)

    fresh = SnapshotStore(compute_dtype(compute_type))
    fresh.load_full(1, policy, out / "1" / "model.safetensors")
    with fresh.held(1, policy):
        reloaded = scored(policy)

    tokens = probe_tokens(policy.vocab_size, seed=0)
    found = {
        "resident equals the published file": torch.equal(resident.detach(), from_blob),
        "a snapshot equals the published file": bool((switched == scored(first)).all()),
        "a snapshot read from a file equals the one taken": bool((reloaded == switched).all()),
        "versions differ, so equality says something": bool((switched != after).mean() > 0.5),
        "the policy holds its own weights after a switch": bool((after == scored(second)).all()),
        "masters and optimizer state are unchanged to the bit": same_bits(before, local_state(policy, optimizer)),
        "tied embeddings stay tied": policy.tied_embeddings is tied and first.tied_embeddings is tied,
        "rotary frequencies stay fp32": all(buffer.dtype == torch.float32 for buffer in policy.buffers()),
        "the probe is that of the published file": make_probe(policy, tokens) == make_probe(second, tokens),
    }
    return {f"{name}: {claim}": holds for claim, holds in found.items()}


def check_versions(folder: Path, world: World, compute_type: ComputeType) -> dict[str, bool]:
    """Four versions in one store, scored as by fresh policies from the published files; then those files in a new store.

    With the optimizer watched and without; half the memory of a copy, so that most of it lies on disk.
    """
    source, out = folder / "untied", folder / f"world-{world.size}" / f"versions-{compute_type.value}"
    policy = make_policy(source, world, compute_type)
    optimizer = build_optimizer(policy, TRAINING)
    dtype = compute_dtype(compute_type)
    plain, watched = SnapshotStore(dtype), SnapshotStore(dtype)
    spilled = SnapshotStore(dtype, memory_bytes=30_000, spill_directory=out / f"spill-{world.rank}")
    watched.watch(optimizer)
    spilled.watch(optimizer)
    batch = make_batch(1, version=0, max_staleness=0)
    rows = [batch.rows[i].tokens for i in rank_shares([row.num_tokens for row in batch.rows], world.size)[world.rank]]

    def scored(model: Policy) -> np.ndarray:
        return np.concatenate(score(model, rows, temperature=0.8, token_budget=96))

    published = {}
    for version in range(4):
        step(policy, optimizer, batch, plain, settings(), world, rate=1e-5)
        for store in (plain, watched, spilled):
            store.save(version, policy)
        published[version] = scored(make_policy(publish(policy, source, out / str(version)), world, compute_type))
    before = local_state(policy, optimizer)

    resumed = SnapshotStore(dtype)
    for version in (2, 0, 3, 1):
        resumed.load_full(version, policy, out / str(version) / "model.safetensors")

    def exact(store: SnapshotStore) -> bool:
        found = []
        for version in store.versions:
            with store.held(version, policy):
                found.append(bool((scored(policy) == published[version]).all()))
        return all(found) and len(found) > 1

    found = {
        f"{name} versions equal the published files": exact(store)
        for name, store in {"kept": plain, "watched": watched, "spilled": spilled, "reloaded": resumed}.items()
    }
    plain.drop(1)
    watched.evict(2)
    found |= {
        "the rest is exact when one between is dropped": exact(plain) and plain.versions == (0, 2, 3),
        "the rest is exact when the oldest are evicted": exact(watched) and watched.versions == (2, 3),
        "most lies on disk": spilled.num_spilled_bytes > spilled.num_bytes and spilled.num_bytes <= 30_000,
        "versions are not all alike": len({values.tobytes() for values in published.values()}) == 4,
        "bf16 versions are differences": compute_type is ComputeType.FLOAT32 or resumed.copies < 2,
        "masters and optimizer state are unchanged to the bit": same_bits(before, local_state(policy, optimizer)),
    }
    spilled.close()
    return {f"versions in {compute_type.value}: {claim}": holds for claim, holds in found.items()}


def check_updates(folder: Path, world: World) -> dict[str, float]:
    """Updates with unequal tokens per rank, and ranks without rows; final weights are written for comparison."""
    results: dict[str, float] = {}
    cases = {
        "one update": (make_batch(2, version=2), settings(granularity="segment", discrepancy_high=1.3)),
        "four updates": (make_batch(3, version=2), settings(mini_batches=2, epochs=2, discrepancy_weight="truncated")),
        "a rank without rows": (make_batch(4, version=2, groups=2, samples=1), settings(mini_batches=2)),
    }
    for name, (batch, chosen) in cases.items():
        policy = make_policy(folder / "flat", world)
        if name == "a rank without rows":  # one sample a group has advantage 0: give it some
            rows = tuple(dataclasses.replace(row, advantages=(row.turn + 1.0).astype(np.float32)) for row in batch.rows)
            batch = dataclasses.replace(batch, rows=rows)
        # Plain gradient descent: AdamW divides by the gradient's own size, which blows rounding up to the rate itself.
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        store = SnapshotStore(torch.float32)
        store.save(0, policy)
        step(policy, optimizer, make_batch(5, version=0, max_staleness=0), store, settings(), world, rate=0.2)
        store.save(1, policy)
        report = step(policy, optimizer, batch, store, chosen, world, rate=0.2)
        results |= {
            f"{name}: {field.name}": float(getattr(report, field.name))
            for field in dataclasses.fields(report)
            if isinstance(getattr(report, field.name), int | float)
        }
        results[f"{name}: snapshot rms"] = report.sources["snapshot"].rms_log_discrepancy
        results[f"{name}: old sum"] = float(
            sum(record.old_logprobs.astype(np.float64).sum() for record in report.records)
        )
        state = full_state(policy)
        if state:
            save_file(state, folder / f"world-{world.size}" / f"{name}.safetensors")
    return results


def check_checkpoint(folder: Path, world: World, *, save: bool, load_from: int | None) -> dict[str, float]:
    """Two steps, a checkpoint, a third step: uninterrupted, and on from a checkpoint of another world size."""
    policy = make_policy(folder / "flat", world)
    optimizer = build_optimizer(policy, TRAINING)
    batches = [make_batch(seed, version=0, max_staleness=0) for seed in (6, 7, 8)]
    store = SnapshotStore(torch.float32)
    if save:
        for batch in batches[:2]:
            step(policy, optimizer, batch, store, settings(), world)
        saved = CheckpointState(epoch=1, version=2, step=2, ledger={"next": 5}, counters={"tokens": 7})
        save_checkpoint(folder / f"checkpoints-{world.size}", policy, optimizer, saved, world)
    else:
        restored = load_checkpoint(folder / f"checkpoints-{load_from}" / "1-2", policy, optimizer, world)
        assert (restored.step, restored.ledger, restored.counters) == (2, {"next": 5}, {"tokens": 7})
    report = step(policy, optimizer, batches[2], store, settings(), world)
    total = sum(tensor.double().abs().sum().item() for tensor in full_state(policy).values())
    return {"loss": report.loss, "norm": report.gradient_norm, "weights": total}


def run_checks(folder: Path, world: World) -> None:
    out = folder / f"world-{world.size}"
    if world.is_main:
        out.mkdir()
    dist.barrier()
    exact: dict[str, bool] = {}
    for compute_type in ComputeType:
        for tied in (False, True):
            exact |= check_exactness(folder, world, compute_type, tied)
        exact |= check_versions(folder, world, compute_type)
    gathered: list[dict[str, bool] | None] = [None] * world.size
    dist.all_gather_object(gathered, exact)
    updates = check_updates(folder, world)
    checkpoints = {"uninterrupted": check_checkpoint(folder, world, save=True, load_from=None)}
    for size in (1, 2):
        if (folder / f"checkpoints-{size}").exists():
            checkpoints[f"from {size}"] = check_checkpoint(folder, world, save=False, load_from=size)
    if world.is_main:
        findings = {"exact": gathered, "updates": updates, "checkpoints": checkpoints}
        (out / "findings.json").write_text(json.dumps(findings))
    dist.barrier()


if __name__ == "__main__":
    with distributed_world("cpu", timeout_seconds=60) as joined:
        run_checks(Path(sys.argv[1]), joined)
