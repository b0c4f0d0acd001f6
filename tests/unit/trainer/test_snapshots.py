"""The store against a model of it that keeps full copies; its budget, its files, and who may be evicted."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from rljob_api.errors import StorageError, StorageFull
from rljob_runtime.correction.published import PublishedParameters
from rljob_runtime.correction.residency import Mark, Residency
from rljob_runtime.correction.reverse_delta import BLOCK
from rljob_runtime.correction.snapshots import SnapshotStore

DTYPES = [torch.bfloat16, torch.float32]


class Weights(nn.Module):
    """Tensors of awkward sizes: empty, a single one, more than a block."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterDict(
            {
                "empty": nn.Parameter(torch.zeros(0, 4)),
                "one": nn.Parameter(torch.randn((), generator=generator)),
                "few": nn.Parameter(torch.randn(3, 5, generator=generator)),
                "many": nn.Parameter(torch.randn(BLOCK // 64 + 3, 64, generator=generator) * 0.05),
            }
        )

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.parts.items()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def copies(policy: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.detach().to(dtype, copy=True) for name, parameter in policy.published_parameters()}


def nudge(policy: Weights, random: np.random.Generator, share: float) -> None:
    """Move a share of the elements, some of them to numbers that comparing floats gets wrong."""
    odd = torch.tensor([0.0, -0.0, float("inf"), 1e-40, -1e-40, 3e38])
    with torch.no_grad():
        for parameter in policy.parameters():
            flat = parameter.view(-1)
            picked = torch.from_numpy(random.random(flat.numel()) < share)
            flat[picked] *= 1.01
            special = picked & torch.from_numpy(random.random(flat.numel()) < 0.2)
            flat[special] = odd[torch.from_numpy(random.integers(0, len(odd), int(special.sum())))]


def check_version(store: SnapshotStore, policy: Weights, version: int, expected: dict[str, Tensor]) -> None:
    """The policy rounds to the version inside, and is itself again outside."""
    before = {name: parameter.detach().clone() for name, parameter in policy.published_parameters()}
    with store.held(version, policy):
        for name, parameter in policy.published_parameters():
            inside = parameter.detach().to(expected[name].dtype)
            assert same_bits(inside, expected[name]), (version, name)
    for name, parameter in policy.published_parameters():
        assert same_bits(parameter.detach(), before[name]), (version, name)


def check_visits(
    store: SnapshotStore, policy: Weights, versions: Iterable[int], model: dict[int, dict[str, Tensor]]
) -> None:
    """The same of several versions one after the other, without a return in between."""
    before = {name: parameter.detach().clone() for name, parameter in policy.published_parameters()}
    with store.visiting(policy) as visit:
        for version in versions:
            visit(version)
            for name, parameter in policy.published_parameters():
                inside = parameter.detach().to(model[version][name].dtype)
                assert same_bits(inside, model[version][name]), (version, name)
    for name, parameter in policy.published_parameters():
        assert same_bits(parameter.detach(), before[name]), name


def run_at_random(store: SnapshotStore, dtype: torch.dtype, seed: int, folder: Path, *, operations: int = 12) -> None:
    """Random operations on the store and on a dictionary of full copies; two versions are compared after each, all at the end."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    policy = Weights()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    if random.random() < 0.8:
        store.watch(optimizer)
    model: dict[int, dict[str, Tensor]] = {}
    now = 10
    for _ in range(operations):
        operation = random.choice(["step", "step", "save", "save", "load", "drop", "evict"])
        share = float(random.choice([0.0, 0.001, 0.05, 0.5, 1.0]))
        if operation == "step":
            for parameter in policy.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        elif operation == "save":
            nudge(policy, random, share)
            now += int(random.integers(0, 3))  # 0: the same version again, with other weights
            store.save(now, policy)
            model[now] = copies(policy, dtype)
        elif operation == "load":
            version = int(random.integers(5, now + 5))
            other = Weights()
            nudge(other, random, share)
            model[version] = copies(other, dtype)
            save_file(model[version], folder / "loaded.safetensors")
            store.load_full(version, policy, folder / "loaded.safetensors")
        elif operation == "drop" and model:
            version = int(random.choice(sorted(model)))
            store.drop(version)
            del model[version]
        elif operation == "evict" and model:
            bound = int(random.integers(min(model), max(model) + 2))
            kept = {int(v) for v in random.choice(sorted(model), 1)}
            store.retain(dict.fromkeys(kept, 1))
            expected = tuple(sorted(v for v in model if v < bound and v not in kept))
            assert store.evict(bound) == expected
            for version in expected:
                del model[version]
        assert store.versions == tuple(sorted(model))
        for version in random.permutation(sorted(model))[:2]:
            check_version(store, policy, int(version), model[int(version)])
    for version, expected in model.items():
        check_version(store, policy, version, expected)
    check_visits(store, policy, sorted(model, reverse=True), model)
    check_visits(store, policy, random.permutation(sorted(model)).tolist(), model)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.sampled_from([None, 0, 300_000]))
def test_every_version_is_that_of_a_full_copy_whatever_is_saved_loaded_and_dropped(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, memory_bytes: int | None
) -> None:
    folder = tmp_path_factory.mktemp("store")
    spill = None if memory_bytes is None else folder / "spill"
    store = SnapshotStore(dtype, memory_bytes=memory_bytes, spill_directory=spill)
    run_at_random(store, dtype, seed, folder)
    assert memory_bytes is None or store.num_bytes <= memory_bytes
    store.close()
    assert spill is None or [path.name for path in spill.iterdir()] == ["lock"]


class DropsWithoutRepair(SnapshotStore):
    """Leaves the version before a dropped one as it was."""

    def drop(self, version: int) -> None:
        if version != self.versions[-1]:
            self._chain.pop(version, None)
        else:
            super().drop(version)


class BlindToSteps(SnapshotStore):
    """Takes the policy for what was saved last, whatever happened to it since."""

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        class Blind(Residency):
            def mark(self, policy: PublishedParameters) -> Mark | None:
                return self._mark

        self._residency = Blind()


@pytest.mark.parametrize("defective", [DropsWithoutRepair, BlindToSteps])
def test_the_comparison_with_full_copies_notices_defects(tmp_path: Path, defective: type[SnapshotStore]) -> None:
    noticed = 0
    for seed in range(8):
        try:
            run_at_random(defective(torch.bfloat16), torch.bfloat16, seed, tmp_path)
        except (AssertionError, IndexError):
            noticed += 1
    assert noticed >= 1


def chain(store: SnapshotStore, policy: Weights, versions: range, share: float = 0.01) -> dict[int, dict[str, Tensor]]:
    random = np.random.default_rng(1)
    model = {}
    for version in versions:
        nudge(policy, random, share)
        store.save(version, policy)
        model[version] = copies(policy, torch.bfloat16)
    return model


def test_bf16_versions_cost_little_more_than_their_differences() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    chain(store, policy, range(6))
    one = sum(parameter.numel() for parameter in policy.parameters()) * 2
    assert store.num_bytes < 1.15 * one and store.copies == store.num_bytes / one
    assert 0.005 < store.density < 0.015
    for version in range(5):
        store.drop(version)
    assert (store.num_bytes, store.density, store.copies) == (one, 0.0, 1.0)


def test_fp32_versions_that_move_everywhere_are_full_copies() -> None:
    store, policy = SnapshotStore(torch.float32), Weights()
    for version in range(3):
        store.save(version, policy)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 1e-4
    one = sum(parameter.numel() for parameter in policy.parameters()) * 4
    assert store.num_bytes == 3 * one and store.density == 1


@pytest.mark.parametrize("is_watched", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_and_optimizer_state_come_back_to_the_bit_when_the_block_fails(
    dtype: torch.dtype, is_watched: bool
) -> None:
    store, policy = SnapshotStore(dtype), Weights()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    if is_watched:
        store.watch(optimizer)
    for version in range(3):
        for parameter in policy.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        store.save(version, policy)
    everything = [*policy.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    before, many = [tensor.detach().clone() for tensor in everything], policy.parts["many"].detach().clone()
    with pytest.raises(ZeroDivisionError), store.held(0, policy):
        1 / int(same_bits(policy.parts["many"].detach(), many))
    assert all(same_bits(tensor.detach(), held) for tensor, held in zip(everything, before, strict=True))


def test_a_switch_inside_a_switch_and_a_save_inside_one_are_right() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    store.watch(torch.optim.SGD(policy.parameters(), lr=0.1))
    model = chain(store, policy, range(4))
    with store.held(1, policy):
        check_version(store, policy, 3, model[3])
        check_version(store, policy, 0, model[0])
        store.save(7, policy)
    for version, expected in (model | {7: model[1]}).items():
        check_version(store, policy, version, expected)


def test_a_version_that_is_loaded_over_the_resident_one_is_not_taken_for_it(tmp_path: Path) -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    store.watch(torch.optim.SGD(policy.parameters(), lr=0.1))
    model = chain(store, policy, range(2))
    other = copies(Weights(seed=5), torch.bfloat16)
    save_file(other, tmp_path / "other.safetensors")
    with store.held(0, policy):
        store.load_full(1, policy, tmp_path / "other.safetensors")
    check_version(store, policy, 1, other)
    check_version(store, policy, 0, model[0])


def test_a_switch_writes_only_elements_that_differ_in_the_compute_type() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    store.watch(torch.optim.SGD(policy.parameters(), lr=0.1))
    chain(store, policy, range(2))
    masters = policy.parts["many"].detach().clone()
    with store.held(0, policy):
        written = (policy.parts["many"].detach() != masters).float().mean()
    assert 0.001 < written < 0.02


def test_from_one_visited_version_to_an_older_one_only_their_difference_is_written() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()  # unwatched: what is resident is not known
    model = chain(store, policy, range(4))
    check_visits(store, policy, [3, 2, 1, 0], model)
    with store.visiting(policy) as visit:
        visit(3)
        for version in (2, 1, 0):
            # An element in which the two agree, and which would not be found right if all were compared.
            unchanged = (model[version]["many"] == model[version + 1]["many"]).view(-1).nonzero()[0]
            with torch.no_grad():
                policy.parts["many"].view(-1).data[unchanged] = 123.0  # past the counters of writes
            visit(version)
            assert policy.parts["many"].view(-1)[unchanged] == 123.0


def test_a_write_between_two_visits_is_noticed_and_the_version_is_right_all_the_same() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    store.watch(torch.optim.SGD(policy.parameters(), lr=0.1))
    model = chain(store, policy, range(3))
    with store.visiting(policy) as visit:
        visit(2)
        with torch.no_grad():
            policy.parts["many"] += 1
        visit(1)
        for name, parameter in policy.published_parameters():
            assert same_bits(parameter.detach().to(torch.bfloat16), model[1][name])


def test_a_version_that_is_not_held_ends_no_visit() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    model = chain(store, policy, range(3))
    with store.visiting(policy) as visit:
        visit(2)
        with pytest.raises(KeyError, match=r"version 7 is not among the snapshots \(0, 1, 2\)"):
            visit(7)
        visit(1)
        assert same_bits(policy.parts["many"].detach().to(torch.bfloat16), model[1]["many"])


# ------------------------------------------------------------------------------------------------ eviction


def test_a_version_that_a_token_names_is_never_evicted_and_what_goes_is_said() -> None:
    store, policy = SnapshotStore(torch.bfloat16), Weights()
    model = chain(store, policy, range(6))
    store.retain({1: 3, 2: 0, 4: 1})
    assert store.evict(4) == (0, 2, 3)
    assert store.versions == (1, 4, 5)
    store.retain({4: 1})
    assert store.evict(6) == (1, 5)
    check_version(store, policy, 4, model[4])
    store.drop(4)  # by name, needed or not
    assert store.versions == ()


# ------------------------------------------------------------------------------------------------ memory and disk


def test_a_version_that_does_not_fit_is_refused_with_the_remedy_and_the_rest_stays() -> None:
    policy = Weights()
    one = sum(parameter.numel() for parameter in policy.parameters()) * 2
    store = SnapshotStore(torch.bfloat16, memory_bytes=one + one // 2)
    model = chain(store, policy, range(3), share=0.01)
    random = np.random.default_rng(2)
    nudge(policy, random, 1.0)
    with pytest.raises(StorageFull) as refused:
        store.save(3, policy)
    message = str(refused.value)
    assert message.startswith("weight versions 0, 1, 2, 3 take ")
    assert f"correction.snapshots.memoryBytes is {one + one // 2:,}: raise correction.snapshots.memoryBytes" in message
    assert message.endswith("set correction.snapshots.spill or lower staleness.maxVersions")
    assert store.versions == (0, 1, 2) and store.num_bytes <= one + one // 2
    for version in range(3):
        check_version(store, policy, version, model[version])


def test_the_oldest_versions_go_to_disk_first_and_their_files_go_with_them(tmp_path: Path) -> None:
    policy = Weights()
    one = sum(parameter.numel() for parameter in policy.parameters()) * 2
    store = SnapshotStore(torch.bfloat16, memory_bytes=2 * one, spill_directory=tmp_path)
    random = np.random.default_rng(3)
    for version in range(4):
        nudge(policy, random, 1.0)
        store.save(version, policy)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[0] for name in names] == ["0", "1", "lock"]
    assert one < store.num_bytes <= 2 * one
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.version"))
    assert store.num_spilled_bytes <= on_disk < store.num_spilled_bytes + 4096
    assert store.copies == (store.num_bytes + store.num_spilled_bytes) / one
    store.drop(0)
    assert [path.name.partition("-")[0] for path in tmp_path.glob("*.version")] == ["1"]
    store.close()
    assert list(tmp_path.glob("*.version")) == [] and store.versions == ()


def test_what_a_killed_process_left_is_removed_and_a_living_ones_folder_is_refused(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from rljob_runtime.correction.spill import SpillFolder\n"
        "folder = SpillFolder(Path(sys.argv[1])); folder.write(3, {})\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"\n"
        with pytest.raises(StorageError, match="of another process that is running"):
            SnapshotStore(torch.bfloat16, spill_directory=tmp_path)
        assert len(list(tmp_path.glob("*.version"))) == 1
    finally:
        process.kill()
        process.communicate()
    store = SnapshotStore(torch.bfloat16, spill_directory=tmp_path)
    assert list(tmp_path.glob("*.version")) == []
    store.close()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """This process cannot write larger files: how a full disk is had without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_with_a_remedy_and_changes_nothing(tmp_path: Path) -> None:
    policy = Weights()
    store = SnapshotStore(torch.bfloat16, memory_bytes=0, spill_directory=tmp_path)
    model = chain(store, policy, range(2))
    files = sorted(tmp_path.iterdir())
    random = np.random.default_rng(4)
    nudge(policy, random, 0.01)
    with largest_file(2000), pytest.raises(StorageFull) as refused:
        store.save(2, policy)
    assert os.strerror(errno.EFBIG) in str(refused.value)
    assert str(refused.value).startswith("weight version 1 cannot be kept in ")
    assert str(refused.value).endswith(
        "Give the trainer more local disk, raise correction.snapshots.memoryBytes or lower staleness.maxVersions"
    )
    assert sorted(tmp_path.iterdir()) == files and store.versions == (0, 1)
    for version in range(2):
        check_version(store, policy, version, model[version])
    store.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot hold old weight versions: Not a directory"):
        SnapshotStore(torch.bfloat16, spill_directory=tmp_path / "file" / "folder")
