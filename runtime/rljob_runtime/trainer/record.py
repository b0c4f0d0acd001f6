"""The record that `rljob verify` re-scores: each step's rows with the old log-probabilities used, and the versions they name.

Layout, below the record directory:

    model/                         config and tokenizer files
    versions/<epoch>-<version>/    manifest.json, weights.safetensors: the published bytes
    steps/<step>.safetensors       rows joined end to end (row_offsets int64 [R + 1]); header JSON in the metadata
    notes.json                     {"truncated_at_step": step or null}

Bounded by bytes: when the bound is reached recording stops, and notes.json and the log say at which step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from rljob_api.weights import ModelFile
from rljob_runtime.correction.sources import SOURCE_NAMES
from rljob_runtime.trajectory_codec import Trajectory
from rljob_runtime.weights.encode import EncodedVersion

RECORD_KEY = "rljob"


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """What was used for one trajectory's tokens [T]."""

    trajectory: Trajectory
    old_logprobs: NDArray[np.float32]
    old_source: NDArray[np.int8]
    target_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    loss_mask: NDArray[np.bool_]


class Recorder:
    """Writes the record on rank 0; after the byte bound it writes nothing more."""

    def __init__(
        self, directory: Path, *, max_bytes: int, temperature: float, compute_type: str, logger: logging.Logger
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._temperature = temperature
        self._compute_type = compute_type
        self._logger = logger
        for folder in ("model", "versions", "steps"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        self._num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        self._stopped = False
        self._note(None)

    def add_model_files(self, files: Sequence[ModelFile], directory: Path) -> None:
        """Copy the small files of the model directory."""
        for file in files:
            shutil.copyfile(directory / file.file_name, self._directory / "model" / file.file_name)

    def add_version(self, encoded: EncodedVersion, *, step: int) -> None:
        """Keep a published version's bytes."""
        if not self._reserve(encoded.manifest.num_bytes, step):
            return
        manifest = encoded.manifest
        folder = self._directory / "versions" / f"{manifest.epoch}-{manifest.version}"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "weights.safetensors.partial"
        with temporary.open("wb") as file:
            for _, chunk in encoded.chunks:
                file.write(chunk)
        os.replace(temporary, folder / "weights.safetensors")
        (folder / "manifest.json").write_bytes(manifest.to_bytes())

    def add_step(
        self,
        *,
        step: int,
        epoch: int,
        version_start: int,
        rows: Sequence[RecordedRow],
    ) -> None:
        """Keep one step's rows."""
        offsets = np.cumsum([0, *(row.trajectory.num_tokens for row in rows)], dtype=np.int64)
        joined: dict[str, list[NDArray[Any]]] = {
            "tokens": [row.trajectory.tokens for row in rows],
            "turn": [row.trajectory.turn for row in rows],
            "weight_version": [row.trajectory.weight_version for row in rows],
            "behavior_logprobs": [row.trajectory.behavior_logprobs for row in rows],
            "old_logprobs": [row.old_logprobs for row in rows],
            "old_source": [row.old_source.astype(np.uint8) for row in rows],
            "target_logprobs": [row.target_logprobs for row in rows],
            "advantages": [row.advantages for row in rows],
            "loss_mask": [row.loss_mask.astype(np.uint8) for row in rows],
        }
        tensors: dict[str, NDArray[Any]] = {name: np.concatenate(parts) for name, parts in joined.items()} | {
            "row_offsets": offsets
        }
        header = {
            "step": step,
            "epoch": epoch,
            "version_start": version_start,
            "temperature": self._temperature,
            "compute_type": self._compute_type,
            "source_names": {str(code): name for code, name in enumerate(SOURCE_NAMES)},
            "headers": [row.trajectory.header.model_dump(mode="json", by_alias=True) for row in rows],
        }
        data = save_tensors(tensors, {RECORD_KEY: json.dumps(header)})
        if not self._reserve(len(data), step):
            return
        path = self._directory / "steps" / f"{step:06d}.safetensors"
        temporary = path.with_suffix(".partial")
        temporary.write_bytes(data)
        os.replace(temporary, path)

    def _reserve(self, num_bytes: int, step: int) -> bool:
        if self._stopped:
            return False
        if self._num_bytes + num_bytes > self._max_bytes:
            self._stopped = True
            self._note(step)
            self._logger.warning(
                "record stopped: its byte bound is reached", extra={"step": step, "max_bytes": self._max_bytes}
            )
            return False
        self._num_bytes += num_bytes
        return True

    def _note(self, truncated_at_step: int | None) -> None:
        path = self._directory / "notes.json"
        path.write_text(json.dumps({"truncated_at_step": truncated_at_step}) + "\n")
