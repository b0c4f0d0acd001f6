"""How large a random model is: as large as the one that is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rljob_api.model_size import number_of_parameters, vocabulary_size
from rljob_api.spec import Model, RandomModel
from rljob_runtime.model_source import materialise

SIZES = {"hidden_size": 48, "intermediate_size": 80, "layers": 3, "heads": 4, "max_positions": 64}


def made(spec: RandomModel, directory: Path) -> dict[str, int]:
    """Elements by the name of the weight, as the model's file has them."""
    materialise(Model(random=spec), directory)
    return {name: weight.numel() for name, weight in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_the_parameters_are_those_of_the_model_that_is_made(
    tmp_path: Path, architecture: str, tied: bool, groups: int | None
) -> None:
    spec = RandomModel.model_validate(
        {**SIZES, "architecture": architecture, "tied_embeddings": tied, "key_value_heads": groups}
    )
    weights = made(spec, tmp_path / "model")
    assert ("lm_head.weight" in weights) is not tied
    assert number_of_parameters(spec) == sum(weights.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen3"),
        ("alphabet", "0123456789=abc"),
        ("hidden_size", 56),
        ("intermediate_size", 88),
        ("layers", 4),
        ("heads", 8),
        ("key_value_heads", 1),
        ("head_dim", 64),
        ("tied_embeddings", True),
    ],
)
def test_each_size_counts(field: str, value: object) -> None:
    spec = RandomModel.model_validate(SIZES)
    other = RandomModel.model_validate({**SIZES, field: value})
    assert number_of_parameters(other) != number_of_parameters(spec)


@pytest.mark.parametrize("characters", [1, 5, 6, 13, 14])
def test_the_vocabulary_is_filled_up_as_the_models_is(tmp_path: Path, characters: int) -> None:
    spec = RandomModel.model_validate({**SIZES, "alphabet": "ß∑abcdefghijkl"[:characters]})
    weights = made(spec, tmp_path / "model")
    assert vocabulary_size(spec) * 48 == weights["model.embed_tokens.weight"]
