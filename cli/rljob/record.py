"""Reads the record of a run: every step's rows with the old log-probabilities used, and the weight versions they name.

Layout, below the record folder:

    model/                         config and tokenizer files
    versions/<epoch>-<version>/    manifest.json, weights.safetensors: the published bytes
    steps/<step>.safetensors       rows joined end to end, header JSON in the metadata
    notes.json                     {"truncated_at_step": step or null}

Shapes: N tokens of a step, R rows (trajectories) of it, T tokens of one row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from rljob_api.errors import BlobCorrupt, MalformedMessage, StorageError
from rljob_api.messages import TrajectoryHeader
from rljob_api.weights import WeightManifest

HEADER_KEY = "rljob"
EXACT_SOURCES = frozenset({"resident", "snapshot", "pool", "dedicated"})
"""Sources that are the weights of the token's own version."""
UNTRAINED_SOURCES = frozenset({"none", "missing"})
TOKEN_TENSORS = {
    "tokens": "int32",
    "turn": "int32",
    "weight_version": "int32",
    "behavior_logprobs": "float32",
    "old_logprobs": "float32",
    "old_source": "uint8",
    "target_logprobs": "float32",
    "advantages": "float32",
    "loss_mask": "uint8",
}
_HEADERS = TypeAdapter(tuple[TrajectoryHeader, ...])


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step as it was trained."""

    path: Path
    step: int
    epoch: int
    version_start: int
    """Version at the start of the step: what staleness counts from."""
    temperature: float
    compute_type: str
    headers: tuple[TrajectoryHeader, ...]
    """[R]"""
    source_names: dict[int, str]
    row_offsets: NDArray[np.int64]
    """[R + 1]"""
    tensors: dict[str, NDArray[Any]]
    """[N] each, see TOKEN_TENSORS."""

    @property
    def staleness(self) -> NDArray[np.int32]:
        """[N], meaningful on model tokens."""
        found: NDArray[np.int32] = self.version_start - self.tensors["weight_version"]
        return found

    @property
    def is_exact(self) -> NDArray[np.bool_]:
        """[N], model tokens whose old log-probability is said to be exact."""
        codes = [code for code, name in self.source_names.items() if name in EXACT_SOURCES]
        found: NDArray[np.bool_] = (self.tensors["turn"] >= 0) & np.isin(self.tensors["old_source"], codes)
        return found

    @property
    def is_trained(self) -> NDArray[np.bool_]:
        """[N], model tokens that entered the loss."""
        codes = [code for code, name in self.source_names.items() if name in UNTRAINED_SOURCES]
        found: NDArray[np.bool_] = (self.tensors["loss_mask"] > 0) & ~np.isin(self.tensors["old_source"], codes)
        return found

    @property
    def num_trained(self) -> int:
        """Model tokens that entered the loss."""
        return int(self.is_trained.sum())

    def row(self, index: int) -> slice:
        """Where row `index` lies in the tensors."""
        return slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """One published weight version."""

    manifest: WeightManifest
    weights: Path

    def check_digest(self) -> None:
        """Read the file and compare.

        Raises:
            BlobCorrupt: it is not the bytes that were published.
        """
        digest = hashlib.sha256()
        with self.weights.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
        if digest.hexdigest() != self.manifest.sha256:
            raise BlobCorrupt(
                f"{self.weights}: its digest {digest.hexdigest()[:16]} is not the manifest's {self.manifest.sha256[:16]}: "
                "the record was altered or is damaged"
            )


class Record:
    """The record below one folder."""

    def __init__(self, directory: Path) -> None:
        """Raises StorageError when there is no record."""
        self._directory = directory
        if not (directory / "steps").is_dir():
            raise StorageError(
                f"{directory} holds no record: the run was started with --record-bytes 0, or has not begun"
            )

    @property
    def model(self) -> Path:
        """Folder with config and tokenizer."""
        return self._directory / "model"

    @property
    def truncated_at_step(self) -> int | None:
        """The step from which on nothing was recorded, because the byte bound was reached."""
        try:
            noted = json.loads((self._directory / "notes.json").read_text()).get("truncated_at_step")
        except (OSError, ValueError, AttributeError) as error:
            raise MalformedMessage(f"{self._directory / 'notes.json'} cannot be read: {error}") from error
        return None if noted is None else int(noted)

    def steps(self) -> Iterator[RecordedStep]:
        """The steps that count, in order; those that a resume trained anew are left out.

        Raises:
            MalformedMessage: a file is not what the layout says.
        """
        newest_epoch = 0
        for path in sorted((self._directory / "steps").glob("*.safetensors")):
            step = read_step(path)
            if step.epoch < newest_epoch:
                continue  # a later attempt began before this step: it belongs to the abandoned one
            newest_epoch = step.epoch
            yield step

    def versions(self) -> dict[int, RecordedVersion]:
        """Weight versions by number; of two epochs' versions of one number the later counts."""
        found: dict[int, RecordedVersion] = {}
        for path in sorted((self._directory / "versions").glob("*/manifest.json")):
            manifest = WeightManifest.from_bytes(path.read_bytes())
            held = found.get(manifest.version)
            if held is None or held.manifest.epoch < manifest.epoch:
                found[manifest.version] = RecordedVersion(manifest, path.with_name("weights.safetensors"))
        return dict(sorted(found.items()))


def read_step(path: Path) -> RecordedStep:
    """One step's file.

    Raises:
        MalformedMessage: it is not what the layout says.
    """
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            header = json.loads((file.metadata() or {})[HEADER_KEY])
        offsets = tensors.pop("row_offsets").astype(np.int64)
        step = RecordedStep(
            path=path,
            step=int(header["step"]),
            epoch=int(header["epoch"]),
            version_start=int(header["version_start"]),
            temperature=float(header["temperature"]),
            compute_type=str(header["compute_type"]),
            headers=_HEADERS.validate_python(header["headers"]),
            source_names={int(code): str(name) for code, name in header["source_names"].items()},
            row_offsets=offsets,
            tensors=tensors,
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise MalformedMessage(f"{path} is not a recorded step: {type(error).__name__}: {error}") from error
    _check(step)
    return step


def _check(step: RecordedStep) -> None:
    length = int(step.row_offsets[-1]) if step.row_offsets.ndim == 1 and step.row_offsets.size else -1
    if step.row_offsets.shape != (len(step.headers) + 1,) or (np.diff(step.row_offsets) < 2).any():
        raise MalformedMessage(f"{step.path}: row_offsets do not fit its {len(step.headers)} rows")
    for name, kind in TOKEN_TENSORS.items():
        tensor = step.tensors.get(name)
        if tensor is None or tensor.dtype != np.dtype(kind) or tensor.shape != (length,):
            shown = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
            raise MalformedMessage(f"{step.path}: {name} is {shown}, must be {kind}[{length}]")
