"""Old weight versions of SmolLM2-135M in bf16: what five of them take over one copy, and what a switch costs over a reload.

Versions are one AdamW update apart, at learning rate 1e-6 and without warm-up, by the gradient of a small random batch.
The weights come from a bf16 file, so before the first update each master is moved to a random place between the
numbers that round to its bf16 value, where training has masters: on the bf16 grid itself hardly any would round anew.

A switch goes to the version four updates back, or one, and returns, by the deltas, between an update and the next. A reload copies
all masters away, reads a version's published file, copies its weights in, and the masters back. The visits go to the
versions one, two, three and four updates back and then return; the reloads beside them read four files. All in turn.

What bounds a switch from below is the share of the masters' cache lines that it writes: changed elements lie scattered, so
that a line of 16 masters is fetched, written and written back for one of them, twice. It is given beside the times.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
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
LINE = 64 // 4
"""fp32 masters of a cache line."""
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
        weights_VN = [_rounded(policy)]
        for version in range(1, VERSIONS):
            _update(policy, optimizer)
            store.save(version, policy)
            weights_VN.append(_rounded(policy))
        value, low, high = repeated([store.copies])
        detail = (
            f"{store.num_bytes / 1e6:,.1f} over {store.num_bytes / store.copies / 1e6:,.1f} MB, "
            f"{store.density:.2%} of elements differ from one version to the next"
        )
        Figure("snapshot_bytes", value, low, high, "exact for its seed", detail).print()
        _print_switch(store, policy, published, [_lines_written(weights_VN[-back:]) for back in (2, VERSIONS)])


def _print_switch(store: SnapshotStore, policy: Policy, published: Path, lines: list[float]) -> None:
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
    one_back, all_back = (f", which writes to {share:.0%} of the masters' cache lines" for share in lines)
    compares = (
        f"; {middle['compared']} ms where all elements are compared as the weights may not be what was saved last"
    )
    for figure, one, other, more in (
        ("snapshot_switch", "four", "reload", all_back + compares),
        ("snapshot_switch_by_one", "one", "reload", one_back),
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


def _rounded(policy: Policy) -> torch.Tensor:
    return torch.cat([local_shard(parameter).view(-1).bfloat16() for _, parameter in policy.published_parameters()])


def _lines_written(weights_VN: list[torch.Tensor]) -> float:
    written_N = torch.zeros_like(weights_VN[0], dtype=torch.bool)
    for older_N, newer_N in pairwise(weights_VN):
        written_N |= older_N != newer_N
    return float(written_N.view(-1, LINE).any(1).double().mean())  # tensors begin at lines and end with them


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
