"""vLLM worker extension: a weight-transfer backend that loads a verified safetensors file.

Named in `worker_extension_cls`, so vLLM imports it in its worker process, and the import registers the backend.
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

BACKEND = "rljob"


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no types
    """Once, at start."""

    repack_tied: bool = True


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM has no types
    """Each version."""

    path: str = ""


class FileWeightTransfer(WeightTransferEngine[FileInit, FileUpdate]):  # type: ignore[misc]  # vLLM has no types
    """start, receive, finish: one version."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate
    repack_tied = True

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Remember the options."""
        self.repack_tied = init_info.repack_tied

    def start_weight_update(self) -> None:
        """Make the layers ready to be loaded again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load the whole file in one session: a part of a fused layer alone would give NaN without an error."""
        self.model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        """Post-process the layers as a first load does."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.repack_tied:
            _repack(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


class Extension:
    """What `worker_extension_cls` names; importing it is all that is needed."""


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, file.get_tensor(name)


def _repack(model: torch.nn.Module) -> None:
    """Pack the CPU's linear layers that still hold their weight again.

    A tied output layer keeps a packed copy of the *old* embedding after every reload path on a CPU: off by nats, with no
    error (the probe finds it). Harmless where nothing is tied; on a GPU no layer has a packed copy.
    """
    packed = [module for module in model.modules() if hasattr(module, "cpu_linear") and _holds_weight(module)]
    if not packed:
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in packed:
        dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _holds_weight(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.numel() > 0


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
