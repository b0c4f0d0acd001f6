"""Old weight versions of SmolLM2-135M in bf16: what five of them take over one copy, and what a switch costs over a reload.

Versions are one AdamW update apart, at learning rate 1e-6 and without warm-up, by the gradient of a small random batch.
The weights come from a bf16 file, so before the first update each master is moved to a random place between the
numbers that round to its bf16 value, where training has masters: on the bf16 grid itself hardly any would round anew.

A switch goes to the version four updates back and returns, by the deltas, between an update and the next. A reload reads
that version's published file, copies all masters away, the file's weights in, and the masters back; both in turn.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.measure import Figure, bootstrap_ratio, repeated
from rljob_api.spec import ComputeType, Training
from rljob_runtime.correction.published import local_shard
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.distributed import distributed_world
from rljob_runtime.trainer.model import Policy, build_policy, full_state
from rljob_runtime.trainer.optimizer import apply_gradients, build_optimizer

VERSIONS, RATE = 5, 1e-6
ROWS, TOKENS = 2, 64
ROUNDS = 9
CONVERT = Path(__file__).parents[1] / "tools" / "convert_smollm2.py"


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, distributed_world("cpu", timeout_seconds=600) as world:
        model, published = Path(folder) / "smollm2", Path(folder) / "published.safetensors"
        subprocess.run([sys.executable, str(CONVERT), str(model)], check=True, stdout=subprocess.DEVNULL)
        policy = build_policy(model, compute_type=ComputeType.BFLOAT16, device=world.device, mesh=world.mesh)
        _leave_the_grid(policy)
        training = Training(steps=VERSIONS, tasks_per_step=1, learning_rate=RATE, warmup_steps=0)
        optimizer = build_optimizer(policy, training)
        store = SnapshotStore(torch.bfloat16)
        store.watch(optimizer)
        save_file(full_state(policy), published)
        store.save(0, policy)
        for version in range(1, VERSIONS):
            _update(policy, optimizer)
            store.save(version, policy)
        value, low, high = repeated([store.copies])
        detail = (
            f"{store.num_bytes / 1e6:,.1f} over {store.num_bytes / store.copies / 1e6:,.1f} MB, "
            f"{store.density:.2%} of elements differ from one version to the next"
        )
        Figure("snapshot_bytes", value, low, high, "exact for its seed", detail).print()
        _print_switch(store, policy, published)


def _print_switch(store: SnapshotStore, policy: Policy, published: Path) -> None:
    compared = SnapshotStore(torch.bfloat16)  # without an optimizer to watch: each element is compared
    compared.load_full(0, policy, published)
    switches, comparisons, reloads = [], [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with store.held(0, policy):
            pass
        switched = time.perf_counter()
        with compared.held(0, policy):
            pass
        searched = time.perf_counter()
        _reload(policy, published)
        switches.append(switched - started)
        comparisons.append(searched - switched)
        reloads.append(time.perf_counter() - searched)
    value, low, high = bootstrap_ratio(switches, reloads, _median)
    detail = (
        f"{_median(switches) * 1e3:.0f} over {_median(reloads) * 1e3:.0f} ms; {_median(comparisons) * 1e3:.0f} ms where "
        "all elements are compared because the weights may not be what was saved last"
    )
    Figure("snapshot_switch", value, low, high, f"{ROUNDS} rounds, 90 % bootstrap interval", detail).print()


def _leave_the_grid(policy: Policy) -> None:
    for parameter in policy.parameters():
        masters = local_shard(parameter)
        _, exponent = torch.frexp(masters)
        between = torch.rand_like(masters) - 0.5  # in distances of neighbouring bf16 numbers, which have 8 digits
        masters += torch.ldexp(between, exponent - 8)


def _update(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    tokens_BT = torch.randint(0, policy.vocab_size, (ROWS, TOKENS))
    loss = -policy(tokens_BT, temperature=1.0, with_entropy=False).logprobs_BT[:, 1:].mean()
    loss.backward()
    apply_gradients(policy, optimizer, rate=RATE, clip=1.0)


def _reload(policy: Policy, published: Path) -> None:
    weights = load_file(published)
    local = {name: local_shard(parameter) for name, parameter in policy.published_parameters()}
    masters = {name: tensor.clone() for name, tensor in local.items()}
    for name, tensor in local.items():
        tensor.copy_(weights[name])
    for name, tensor in local.items():
        tensor.copy_(masters[name])


def _median(values: object) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


if __name__ == "__main__":
    main()
