"""Loads a weight version from a safetensors file into a running vLLM worker.

vLLM imports this module in every worker process, because `WeightWorker` is the engine's `worker_extension_cls`; the import
registers the weight-transfer backend `rljob` before the worker creates it. Tensor-parallel workers each read the file and
keep their own shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rljob_protocol.children import die_with_parent

BACKEND = "rljob"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """How this engine's updates end."""

    repack: bool = True
    """Re-pack CPU linear layers after each update. False only to show what goes wrong without it."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One full version."""

    path: str
    """A safetensors file whose digest the caller has checked, readable by every worker."""


class FileWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """vLLM's update session over a local file: start, receive, finish."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._repack = init_info.repack
        # Here, because it runs in the worker's process: a rollout process that is killed must not leave an engine behind.
        die_with_parent()

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._repack:
            repack_cpu_linear_layers(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def repack_cpu_linear_layers(model: torch.nn.Module) -> int:
    """Pack the current weights of every CPU linear layer that still holds them; returns how many.

    On a CPU vLLM multiplies with a packed copy of the weights. A tied output layer shares its parameter with the embedding,
    so a reload replaces the parameter and leaves the packed copy of the *old* version in use, silently (measured: up to 12.9
    nats off). Layers whose parameter is empty gave their weights to the packed copy and are packed by the reload itself.
    On a GPU no layer has such a copy.
    """
    packed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
            packed += 1
    return packed


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safe_open handle cannot be iterated
            yield name, file.get_tensor(name)


class WeightWorker:
    """Mixed into vLLM's worker class. Importing it registers the backend."""

    distributed_init_method: str

    def rendezvous_address(self) -> str:
        """Where this worker met the others: `file://...` for a single one, and vLLM leaves that file behind."""
        return self.distributed_init_method


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
