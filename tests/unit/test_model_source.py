"""Model directories: random ones are reproducible, given ones are checked, and none is half made."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rljob_api.errors import RljobError
from rljob_api.spec import ClaimModel, HuggingFaceModel, Model, RandomModel
from rljob_runtime.model_source import materialise

SPEC = RandomModel(hidden_size=32, intermediate_size=48, layers=1, max_positions=32)


def weights_digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_a_random_model_depends_on_its_spec_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = weights_digest(materialise(Model(random=SPEC), tmp_path / "a"))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert weights_digest(materialise(Model(random=SPEC), tmp_path / "b")) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    other = SPEC.model_copy(update={"seed": 1})
    assert weights_digest(materialise(Model(random=other), tmp_path / "c")) != first


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_has_the_sizes_of_its_spec(tmp_path: Path, architecture: str, tied: bool) -> None:
    spec = RandomModel.model_validate(
        {
            "architecture": architecture,
            "alphabet": "0123456789",
            "hidden_size": 48,
            "intermediate_size": 80,
            "layers": 3,
            "heads": 4,
            "key_value_heads": 2,
            "max_positions": 64,
            "tied_embeddings": tied,
            "initializer_range": 0.1,
        }
    )
    directory = materialise(Model(random=spec), tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(directory)
    assert network.config.architectures == [f"{architecture}ForCausalLM"]
    assert network.config.max_position_embeddings == 64
    state = network.state_dict()
    assert len(network.model.layers) == 3
    assert state["model.embed_tokens.weight"].shape == (16, 48)  # 3 + 10, rounded up to a multiple of 8
    assert state["model.layers.2.self_attn.q_proj.weight"].shape == (4 * 32, 48)
    assert state["model.layers.2.self_attn.k_proj.weight"].shape == (2 * 32, 48)
    assert state["model.layers.2.mlp.gate_proj.weight"].shape == (80, 48)
    assert abs(float(state["model.layers.0.mlp.up_proj.weight"].std()) - 0.1) < 0.01
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied


def test_special_tokens_come_first_and_the_generation_defaults_are_absent(tmp_path: Path) -> None:
    directory = materialise(Model(random=SPEC), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"], config["bos_token_id"]) == (0, 1, 2)
    assert not (directory / "generation_config.json").exists()


def test_the_tokenizer_has_one_token_a_character_and_gives_them_back(tmp_path: Path) -> None:
    alphabet = "ab =\nß0∑.'"
    directory = materialise(Model(random=SPEC.model_copy(update={"alphabet": alphabet})), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template is None
    assert tokenizer.encode(alphabet, add_special_tokens=False) == list(range(3, 3 + len(alphabet)))
    text = "a  b = 0.'\n\n∑ß a"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([2, *tokens, 1, 0], skip_special_tokens=True) == text


def test_an_unknown_character_can_be_told_from_every_known_one(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(materialise(Model(random=SPEC), tmp_path / "model"))
    tokens = tokenizer.encode("1?2", add_special_tokens=False)
    assert [token == tokenizer.unk_token_id for token in tokens] == [False, True, False]


def test_making_a_model_again_leaves_it_alone_and_another_spec_replaces_it(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    materialise(Model(random=SPEC), directory)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert materialise(Model(random=SPEC), directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    first = weights_digest(directory)
    materialise(Model(random=SPEC.model_copy(update={"seed": 5})), directory)
    assert weights_digest(directory) != first
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_whose_making_was_cut_off_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    directory.mkdir()
    (directory / "config.json").write_text("{}")  # no marker: nobody finished it
    materialise(Model(random=SPEC), directory)
    AutoModelForCausalLM.from_pretrained(directory)
    assert os.listdir(tmp_path) == ["model"]


def test_a_path_is_used_where_it_is(tmp_path: Path) -> None:
    made = materialise(Model(random=SPEC), tmp_path / "made")
    assert materialise(Model(path=str(made)), tmp_path / "elsewhere") == made
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (None, r"the directory \S+ does not exist"),
        ("config.json", r"has no config\.json"),
        ("model.safetensors", r"has no \*\.safetensors file: convert the weights"),
    ],
)
def test_an_unusable_path_is_refused_with_a_remedy(tmp_path: Path, removed: str | None, message: str) -> None:
    path = tmp_path / "absent"
    if removed is not None:
        path = materialise(Model(random=SPEC), tmp_path / "model")
        (path / removed).unlink()
    with pytest.raises(RljobError, match=message):
        materialise(Model(path=str(path)), tmp_path / "out")


def test_a_hub_model_without_a_network_is_refused_in_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = HuggingFaceModel(repo="nobody/no-such-model", revision="0" * 40)
    with pytest.raises(RljobError, match=r"nobody/no-such-model@0+ could not be fetched .*spec\.model\.path"):
        materialise(Model(hugging_face=source), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_sources_that_cannot_be_had_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RljobError, match="mounted by the operator"):
        materialise(Model(persistent_volume_claim=ClaimModel(claim_name="models")), tmp_path / "model")
    with pytest.raises(RljobError, match="names no source"):
        materialise(Model(), tmp_path / "model")
    assert os.listdir(tmp_path) == []
