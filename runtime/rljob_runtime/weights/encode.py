"""A weight version as bytes: one safetensors file cut into write-once chunks, and the manifest that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from rljob_api.weights import Blob, ModelFile, Probe, WeightManifest
from rljob_runtime.weights.blobs import make_blob

CHUNK_BYTES = 32 << 20
MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What engines need besides weights. `generation_config.json` is left out: a model's generation defaults are ignored."""


@dataclass(frozen=True, slots=True)
class EncodedVersion:
    """A version ready to be stored."""

    manifest: WeightManifest
    chunks: tuple[tuple[Blob, memoryview], ...]


def encode_version(
    state: Mapping[str, Tensor],
    *,
    epoch: int,
    version: int,
    compute_type: Literal["Float32", "BFloat16"],
    model_files: Sequence[ModelFile],
    probe: Probe,
    chunk_bytes: int = CHUNK_BYTES,
) -> EncodedVersion:
    """Cut a full state (name -> CPU tensor in the compute type) into chunks.

    Tensors must not share storage: a tied output layer is left out of the state, and the engine ties it again.
    """
    data, chunks = cut_state(state, epoch=epoch, version=version, chunk_bytes=chunk_bytes)
    manifest = WeightManifest(
        epoch=epoch,
        version=version,
        compute_type=compute_type,
        blobs=tuple(blob for blob, _ in chunks),
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        model_files=tuple(model_files),
        probe=probe,
    )
    return EncodedVersion(manifest, chunks)


def cut_state(
    state: Mapping[str, Tensor], *, epoch: int, version: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[memoryview, tuple[tuple[Blob, memoryview], ...]]:
    """The bytes of a version's safetensors file, and the same as named chunks: a function of the weights alone."""
    data = memoryview(save({name: tensor.contiguous() for name, tensor in state.items()}))
    starts = range(0, len(data), chunk_bytes)
    parts = [data[start : start + chunk_bytes] for start in starts]
    return data, tuple((make_blob(f"w-{epoch}-{version}-{index:04d}", part), part) for index, part in enumerate(parts))


def model_file_blobs(directory: Path) -> tuple[tuple[ModelFile, bytes], ...]:
    """The small files of a model directory with their bytes."""
    found = []
    for name in MODEL_FILES:
        path = directory / name
        if path.is_file():
            data = path.read_bytes()
            found.append((ModelFile(file_name=name, blob=make_blob("f", data)), data))
    return tuple(found)
