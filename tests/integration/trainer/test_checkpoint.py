"""A checkpoint exists whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.integration.trainer.toy import (
    SETTINGS,
    TRAINING,
    local_state,
    make_batch,
    make_model,
    make_policy,
    same_bits,
)

from rljob_api.errors import CheckpointCorrupt, StorageError
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.checkpoint import CheckpointState, checkpoints, load_checkpoint, prune, save_checkpoint
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.update import resolve_batch, train_on


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with distributed_world("cpu", timeout_seconds=30) as joined:
        yield joined


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def state(version: int = 0, epoch: int = 1, **ledger: int) -> CheckpointState:
    return CheckpointState(epoch=epoch, version=version, step=version, ledger=dict(ledger))


def fresh(model: Path, world: World) -> tuple[Policy, torch.optim.Optimizer]:
    policy = make_policy(model, world)
    return policy, build_optimizer(policy, TRAINING)


def train(policy: Policy, optimizer: torch.optim.Optimizer, world: World) -> None:
    batch = make_batch(21, version=0, max_staleness=0)
    old = resolve_batch(policy, batch, SnapshotStore(torch.float32), SETTINGS, world)
    train_on(policy, optimizer, batch, old, SETTINGS, world, rate=1e-3)


def test_weights_optimizer_and_random_state_come_back_to_the_bit(tmp_path: Path, model: Path, world: World) -> None:
    policy, optimizer = fresh(model, world)
    train(policy, optimizer, world)
    torch.manual_seed(77)
    name = save_checkpoint(tmp_path, policy, optimizer, state(3, next=9), world)
    expected, drawn = local_state(policy, optimizer), torch.rand(4)
    train(policy, optimizer, world)
    assert not same_bits(expected, local_state(policy, optimizer))

    for target in ((policy, optimizer), fresh(model, world)):
        torch.manual_seed(1)
        restored = load_checkpoint(tmp_path / name, *target, world)
        assert (name, restored.step, restored.ledger) == ("1-3", 3, {"next": 9})
        assert same_bits(expected, local_state(*target))
        assert torch.equal(torch.rand(4), drawn)


def test_a_checkpoint_before_the_first_update_leaves_the_bias_correction_alone(
    tmp_path: Path, model: Path, world: World
) -> None:
    plain = fresh(model, world)
    train(*plain, world)
    saved = fresh(model, world)
    name = save_checkpoint(tmp_path, *saved, state(), world)
    assert not saved[1].state
    train(*saved, world)
    resumed = fresh(model, world)
    train(*resumed, world)
    load_checkpoint(tmp_path / name, *resumed, world)
    assert not resumed[1].state
    train(*resumed, world)
    expected = local_state(*plain)
    assert same_bits(expected, local_state(*saved)) and same_bits(expected, local_state(*resumed))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "complete.json").unlink(), "is missing or incomplete"),
        (lambda folder: (folder / "complete.json").write_text("{"), "is missing or incomplete"),
        (lambda folder: (folder / "state.json").unlink(), "is missing or incomplete"),
        (lambda folder: (folder / "random-0.safetensors").unlink(), r"lacks \['random-0.safetensors'\]"),
        (lambda folder: (folder / "weights" / "more").touch(), r"unexpected \['weights/more'\]"),
        (lambda folder: flip_a_byte(next((folder / "weights").glob("*.distcp"))), "distcp is not what was written"),
        (lambda folder: folder.rename(folder.with_name("gone")), "is missing or incomplete"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    tmp_path: Path, model: Path, world: World, damage, message: str
) -> None:
    policy, optimizer = fresh(model, world)
    name = save_checkpoint(tmp_path, policy, optimizer, state(5), world)
    damage(tmp_path / name)
    train(policy, optimizer, world)
    before = local_state(policy, optimizer)
    with pytest.raises(CheckpointCorrupt, match=message):
        load_checkpoint(tmp_path / name, policy, optimizer, world)
    assert same_bits(before, local_state(policy, optimizer))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path, model: Path, world: World) -> None:
    policy, optimizer = fresh(model, world)
    save_checkpoint(tmp_path, policy, optimizer, state(5), world)
    (tmp_path / "1-5").rename(tmp_path / "1-6")
    with pytest.raises(CheckpointCorrupt, match="holds 1-5: it was renamed"):
        load_checkpoint(tmp_path / "1-6", policy, optimizer, world)


def test_a_checkpoint_of_the_same_version_is_replaced_also_across_a_crash(
    tmp_path: Path, model: Path, world: World
) -> None:
    policy, optimizer = fresh(model, world)
    for count in (1, 2):
        name = save_checkpoint(tmp_path, policy, optimizer, state(5, count=count), world)
    assert load_checkpoint(tmp_path / name, policy, optimizer, world).ledger == {"count": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-5"]

    (tmp_path / "1-5").rename(tmp_path / ".old-1-5")  # died between the two renames
    (tmp_path / ".tmp-1-5").mkdir()
    assert load_checkpoint(tmp_path / name, policy, optimizer, world).ledger == {"count": 2}
    save_checkpoint(tmp_path, policy, optimizer, state(6), world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-5", "1-6"]


def test_the_newest_are_kept_and_the_current_one_always(tmp_path: Path) -> None:
    for name in ("1-9", "1-10", "2-3", "2-11", ".tmp-2-12", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == ("1-9", "1-10", "2-3", "2-11")
    prune(tmp_path, keep=2, current="1-9")
    assert checkpoints(tmp_path) == ("1-9", "2-3", "2-11")
    assert checkpoints(tmp_path / "absent") == ()


def test_storage_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path, model: Path, world: World) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="the checkpoint storage failed"):
        save_checkpoint(tmp_path / "file", *fresh(model, world), state(), world)
