"""What describes a weight version: manifest, blobs, probe. Write-once, named by content."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rljob_api.base import FrozenModel, WireMessage


class Blob(FrozenModel):
    """A write-once run of bytes; its name holds its digest, so a name never means two contents."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class ModelFile(FrozenModel):
    """A small file of the model directory that engines need: config.json, tokenizer files."""

    file_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    blob: Blob


class Probe(FrozenModel):
    """Tokens whose log-probabilities under a version are known: proof of what an engine holds (invariant 1).

    `logprobs[i]` is the trainer's log-probability of `tokens[i + 1]` after `tokens[: i + 1]`, at temperature 1.
    """

    tokens: tuple[int, ...] = Field(min_length=2)
    logprobs: tuple[float, ...] = Field(min_length=1)
    compute_type: Literal["Float32", "BFloat16"]


class WeightManifest(WireMessage):
    """One weight version. The blobs, joined in order, are the bytes of one safetensors file."""

    epoch: int = Field(ge=1)
    version: int = Field(ge=0)
    base: int | None = None
    """Version this one is a delta against; None for a full version."""
    encoding: Literal["Full"] = "Full"
    compute_type: Literal["Float32", "BFloat16"]
    blobs: tuple[Blob, ...] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the joined bytes."""
    num_bytes: int = Field(ge=1)
    model_files: tuple[ModelFile, ...]
    probe: Probe
