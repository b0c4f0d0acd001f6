"""Is a safetensors file the whole of a model? Checked before an engine is touched: half-loaded weights kill it or, worse, do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from rljob_api.errors import EngineError

SHOWN = 3


@dataclass(frozen=True, slots=True)
class ExpectedTensors:
    """Names and shapes of a model's weights; `optional` are copies of others (a tied output layer)."""

    shapes: dict[str, tuple[int, ...]]
    optional: frozenset[str]


def expected_tensors(model_directory: Path) -> ExpectedTensors:
    """What a weight file of this model holds, from its config alone; nothing is allocated.

    Raises:
        OSError, ValueError: the directory has no usable config.json.
    """
    config = AutoConfig.from_pretrained(model_directory)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    optional = {name for name in state if name == "lm_head.weight"} if is_tied else set()
    return ExpectedTensors({name: tuple(tensor.shape) for name, tensor in state.items()}, frozenset(optional))


def check_weight_file(path: Path, expected: ExpectedTensors) -> None:
    """Refuse a file that would leave an engine half loaded; reads its header only.

    vLLM says nothing when a tensor is missing: the layer keeps its old weights, or a fused one (q, k and v; gate and up)
    turns to NaN.

    Raises:
        EngineError: no safetensors file, or its tensors are not those of the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path.name} cannot be read as safetensors: {error}") from error
    missing = sorted(expected.shapes.keys() - shapes.keys() - expected.optional)
    unknown = sorted(shapes.keys() - expected.shapes.keys())
    wrong = sorted(name for name, shape in shapes.items() if expected.shapes.get(name, shape) != shape)
    findings = []
    if missing:
        findings.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unknown:
        findings.append(f"{len(unknown)} are not of this model ({_some(unknown)})")
    if wrong:
        first = wrong[0]
        findings.append(
            f"{len(wrong)} have another shape ({first} {shapes[first]} instead of {expected.shapes[first]})"
        )
    if findings:
        raise EngineError(f"{path.name} is not a full set of weights of this model: {'; '.join(findings)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
