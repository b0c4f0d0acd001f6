"""A pod that asked for a GPU never falls back to the CPU in silence."""

from __future__ import annotations

from collections.abc import Mapping

from rljob_api.errors import AcceleratorMissing
from rljob_api.names import ENV_ACCELERATOR


def check_accelerator(environ: Mapping[str, str], *, is_available: bool) -> None:
    """Nothing, where what was asked for is there.

    Raises:
        AcceleratorMissing: the host asked for a CUDA device and the process finds none.
    """
    if environ.get(ENV_ACCELERATOR) == "cuda" and not is_available:
        raise AcceleratorMissing(
            "the pod asks for nvidia.com/gpu and the process finds no CUDA device: check the node's driver and device "
            "plugin, and that the image's CUDA version fits the driver"
        )
