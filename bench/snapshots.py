"""Old weight versions of SmolLM2-135M in bf16: what five of them take over one copy, and what a switch costs over a reload.

Versions are one AdamW update apart, at learning rate 1e-6 and without warm-up, by the gradient of a small random batch.
The weights come from a bf16 file, so before the first update each master is moved to a random place between the
numbers that round to its bf16 value, where training has masters: on the bf16 grid itself hardly any would round anew.

A switch goes to the version four updates back, or one, and returns, by the deltas, between an update and the next. A reload copies
all masters away, reads a version's published file, copies its weights in, and the masters back. The visits go to the
versions one, two, three and four updates back and then return; the reloads beside them read four files. All in turn.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    older = tuple(reversed(range(VERSIONS - 1)))

    def switch(version: int, of: SnapshotStore = store) -> None:
        with of.held(version, policy):
            pass

    def visits() -> None:
        with store.visiting(policy) as visit:
            for version in older:
                visit(version)

    ways: dict[str, Callable[[], None]] = {
        "one": lambda: switch(older[0]),
        "four": lambda: switch(older[-1]),
        "compared": lambda: switch(0, compared),
        "visits": visits,
        "reload": lambda: _reload(policy, published, 1),
        "reloads": lambda: _reload(policy, published, len(older)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    middle = {name: f"{_median(of_way) * 1e3:.0f}" for name, of_way in seconds.items()}
    spread = f"{ROUNDS} rounds, 90 % bootstrap interval"
    compares = (
        f"; {middle['compared']} ms where all elements are compared because the weights may not be what was saved last"
    )
    for figure, one, other, more in (
        ("snapshot_switch", "four", "reload", compares),
        ("snapshot_switch_by_one", "one", "reload", ""),
        ("snapshot_visits", "visits", "reloads", f" for {len(older)} versions"),
    ):
        ratio = bootstrap_ratio(seconds[one], seconds[other], _median)
        Figure(figure, *ratio, spread, f"{middle[one]} over {middle[other]} ms{more}").print()


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


def _reload(policy: Policy, published: Path, times: int) -> None:
    local = {name: local_shard(parameter) for name, parameter in policy.published_parameters()}
    masters = {name: tensor.clone() for name, tensor in local.items()}
    for _ in range(times):
        weights = load_file(published)
        for name, tensor in local.items():
            tensor.copy_(weights[name])
    for name, tensor in local.items():
        tensor.copy_(masters[name])


def _median(values: object) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


if __name__ == "__main__":
    main()
