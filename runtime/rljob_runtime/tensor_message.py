"""A message of named arrays and a JSON header as safetensors bytes: no pickle on any wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rljob_api.base import WireMessage
from rljob_api.errors import MalformedMessage
from rljob_api.trajectory import HEADER_KEY

H = TypeVar("H", bound=WireMessage)


def pack(header: WireMessage, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Bytes of the arrays, with the header as metadata."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save_tensors(contiguous, {HEADER_KEY: header.to_bytes().decode()})


def unpack(data: bytes, kind: type[H], types: Mapping[str, str], what: str) -> tuple[H, dict[str, NDArray[Any]]]:
    """Header and arrays from message bytes; `what` names the message in errors.

    Raises:
        MalformedMessage: not safetensors, an array or the header is missing, or the header is no `kind`.
    """
    try:
        tensors = load_tensors(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise MalformedMessage(f"{what}: not a safetensors message ({len(data)} bytes): {error}") from error
    if set(tensors) != set(types):
        raise MalformedMessage(f"{what}: tensors {sorted(tensors)} instead of {sorted(types)}")
    if HEADER_KEY not in metadata:
        raise MalformedMessage(f"{what}: metadata key {HEADER_KEY!r} is missing")
    try:
        header = kind.from_bytes(metadata[HEADER_KEY].encode())
    except ValidationError as error:
        raise MalformedMessage(f"{what}: header: {error}") from error
    return header, tensors


def check_arrays(label: str, tensors: Mapping[str, NDArray[Any]], types: Mapping[str, str]) -> int:
    """Their common length; the first name in `types` gives it.

    Raises:
        MalformedMessage: an array has another type than `types` says, or another shape than the first.
    """
    first = next(iter(types))
    length = tensors[first].shape[0] if tensors[first].ndim == 1 else -1
    for name, kind in types.items():
        tensor = tensors[name]
        if tensor.dtype != np.dtype(kind):
            # bf16 or fp16 log-probabilities would swamp the discrepancy thresholds (docs/algorithms.md, test 25).
            raise MalformedMessage(f"{label}: {name} has type {tensor.dtype}, must be {kind}")
        if tensor.ndim != 1 or tensor.shape[0] != length:
            raise MalformedMessage(f"{label}: {name} has shape {tensor.shape}, must be [{length}] as {first}")
    return length
