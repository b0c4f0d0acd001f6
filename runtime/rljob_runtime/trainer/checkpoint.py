"""Checkpoints of model, optimizer, ledger and random state: a directory that exists whole or not at all.

    <root>/<epoch>-<version>/
        weights/            torch's distributed checkpoint of masters, optimizer state and the average of weights where
                            there is one, readable at any world size
        random-<rank>.safetensors
        state.json          step, ledger, counters
        complete.json       size and sha256 of every file above; written last

Everything is written under `<root>/.tmp-...`, made durable, then renamed. A reader trusts only directories whose
`complete.json` agrees with their files. The root is one directory that all trainer processes share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, JsonValue
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rljob_api.base import WireMessage
from rljob_api.errors import CheckpointCorrupt, MalformedMessage, StorageError
from rljob_runtime.correction.averaged_policy import AveragedPolicy, AverageState
from rljob_runtime.trainer.distributed import World, broadcast_bytes
from rljob_runtime.trainer.model import Policy

_WEIGHTS, _STATE, _COMPLETE = "weights", "state.json", "complete.json"
_NAME = re.compile(r"([0-9]+)-([0-9]+)")


class CheckpointState(WireMessage):
    """What goes with the weights."""

    epoch: int = Field(ge=1)
    version: int = Field(ge=0)
    step: int = Field(ge=0)
    """Steps trained."""
    ledger: dict[str, JsonValue]
    counters: dict[str, JsonValue] = Field(default_factory=dict)
    has_optimizer_state: bool = True
    """False before the first update, when AdamW has none."""
    average: AverageState | None = None
    """Of the job's average of weights, if it has one."""

    @property
    def directory(self) -> str:
        """Name of the checkpoint's directory below the root."""
        return f"{self.epoch}-{self.version}"


def save_checkpoint(
    root: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    world: World,
    average: AveragedPolicy | None = None,
) -> str:
    """Write one checkpoint durably and return its directory's name. Collective.

    A checkpoint of the same epoch and version is replaced: its ledger may have moved on without a step. Of the state,
    what the optimizer and the average say of themselves is filled in here.

    Raises:
        StorageError: it could not be written; an earlier checkpoint of that name still exists.
    """
    own = {"has_optimizer_state": bool(optimizer.state), "average": None if average is None else average.state()}
    state = state.model_copy(update=own)
    temporary = root / f".tmp-{state.directory}"
    _on_main(world, lambda: _prepare(root, temporary))
    try:
        save_file(_random_state(world.device), temporary / f"random-{world.rank}.safetensors")
        save(_weights(policy, optimizer, state, average), checkpoint_id=temporary / _WEIGHTS)
    except (OSError, CheckpointException) as error:
        raise StorageError(f"checkpoint {state.directory} could not be written below {root}: {error}") from error
    dist.barrier()
    _on_main(world, lambda: _complete(root, temporary, state))
    return state.directory


def load_checkpoint(
    directory: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    world: World,
    average: AveragedPolicy | None = None,
) -> CheckpointState:
    """Restore weights, optimizer, average and random state in place, at any world size; return the rest. Collective.

    A rank that did not exist when the checkpoint was made keeps its present random state. An average, which must have
    been started, starts anew from the restored weights if the checkpoint has none.

    Raises:
        CheckpointCorrupt: it is missing, incomplete, or a file differs from its digest; nothing was changed.
    """
    _on_main(world, lambda: _verify(directory))
    state = _read_state(directory)
    weights = _weights(policy, optimizer, state, average)
    load(weights, checkpoint_id=directory / _WEIGHTS)
    set_state_dict(
        policy,
        optimizer if state.has_optimizer_state else (),
        model_state_dict=weights["model"],
        optim_state_dict=weights.get("optimizer", {}),
    )
    if not state.has_optimizer_state:
        optimizer.state.clear()
    if average is not None and state.average is not None:
        average.restore(state.average, policy)
    elif average is not None:
        average.start(policy)
    random_file = directory / f"random-{world.rank}.safetensors"
    if random_file.exists():
        _restore_random_state(load_file(random_file), world.device)
    return state


def checkpoints(root: Path) -> tuple[str, ...]:
    """Names of the finished checkpoints below the root, oldest first."""
    if not root.is_dir():
        return ()
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir())
    return tuple(
        match[0]
        for match in sorted((match for match in matches if match), key=lambda match: (int(match[1]), int(match[2])))
    )


def prune(root: Path, *, keep: int, current: str) -> None:
    """Delete all but the newest `keep` checkpoints, and never `current`.

    To be called once the pointer to `current` is durable: before that, a restart still needs the one before.
    """
    for name in checkpoints(root)[:-keep]:
        if name != current:
            shutil.rmtree(root / name)


def _weights(
    policy: Policy, optimizer: torch.optim.Optimizer, state: CheckpointState, average: AveragedPolicy | None
) -> dict[str, Any]:
    # Asked for the state of an optimizer that has none, torch makes a step of zeros to create it, and AdamW's bias
    # correction would count that step for ever.
    model, optimizer_state = get_state_dict(policy, optimizer if state.has_optimizer_state else ())
    weights: dict[str, Any] = {"model": model}
    if state.has_optimizer_state:
        weights["optimizer"] = optimizer_state
    if average is not None and state.average is not None:
        weights["average"] = average.tensors(policy)
    return weights


def _prepare(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
    for replaced in root.glob(".old-*"):
        _settle(root, replaced)
    temporary.mkdir()


def _settle(root: Path, replaced: Path) -> None:
    """End a replacement that a crash cut short: the old directory goes, or comes back if the new one never arrived."""
    final = root / replaced.name.removeprefix(".old-")
    if final.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(final)


def _complete(root: Path, temporary: Path, state: CheckpointState) -> None:
    (temporary / _STATE).write_bytes(state.to_bytes())
    files = {path.relative_to(temporary).as_posix(): _digest(path) for path in _files(temporary)}
    (temporary / _COMPLETE).write_text(json.dumps(files, indent=1))
    for path in (*_files(temporary), temporary / _WEIGHTS, temporary):
        _sync(path)
    final, replaced = root / state.directory, root / f".old-{state.directory}"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync(root)
    if replaced.exists():
        shutil.rmtree(replaced)


def _verify(directory: Path) -> None:
    for replaced in directory.parent.glob(f".old-{directory.name}"):
        _settle(directory.parent, replaced)
    remedy = f"Choose another one below {directory.parent}"
    try:
        expected = json.loads((directory / _COMPLETE).read_text())
        state = _read_state(directory)
    except (OSError, ValueError, MalformedMessage) as error:
        raise CheckpointCorrupt(f"checkpoint {directory} is missing or incomplete: {error}. {remedy}") from error
    found = {path.relative_to(directory).as_posix() for path in _files(directory)} - {_COMPLETE}
    if found != set(expected):
        raise CheckpointCorrupt(
            f"checkpoint {directory} lacks {sorted(set(expected) - found)} and has unexpected "
            f"{sorted(found - set(expected))}. {remedy}"
        )
    for name, digest in expected.items():
        if _digest(directory / name) != digest:
            raise CheckpointCorrupt(f"checkpoint {directory}: {name} is not what was written. {remedy}")
    if state.directory != directory.name:
        raise CheckpointCorrupt(f"checkpoint {directory} holds {state.directory}: it was renamed. {remedy}")


def _read_state(directory: Path) -> CheckpointState:
    return CheckpointState.from_bytes((directory / _STATE).read_bytes())


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "numBytes": path.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_main(world: World, action: Callable[[], None]) -> None:
    """Run on rank 0 while the others wait; its storage errors are raised on every rank. Collective."""
    failure: StorageError | None = None
    if world.is_main:
        try:
            action()
        except CheckpointCorrupt as error:
            failure = error
        except OSError as error:
            failure = StorageError(f"the checkpoint storage failed: {error}")
    told = "" if failure is None else f"{type(failure).__name__}:{failure}"
    kind, _, message = broadcast_bytes(told.encode() if world.is_main else None, world.device).decode().partition(":")
    if kind:
        raise CheckpointCorrupt(message) if kind == CheckpointCorrupt.__name__ else StorageError(message)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
