"""The initial model as a directory: config, tokenizer, safetensors weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rljob_api.errors import RljobError
from rljob_api.spec import HuggingFaceModel, Model, RandomModel

PAD, END, BEGIN = "<pad>", "<end>", "<begin>"
SPECIAL_TOKENS = (PAD, END, BEGIN)
VOCABULARY_MULTIPLE = 8
_MARKER = ".source"


def materialise(model: Model, directory: Path, *, mounted: Path | None = None) -> Path:
    """Directory that holds the model; `directory` itself where it has to be made or fetched. Idempotent and atomic.

    Args:
        mounted: where the claim of `model.persistentVolumeClaim` is mounted.

    Raises:
        RljobError: the model is not there or not usable.
    """
    if model.path is not None:
        return check_model_path(Path(model.path))
    if model.persistent_volume_claim is not None:
        if mounted is not None:
            return check_model_path(mounted)
        raise RljobError(
            "spec.model.persistentVolumeClaim is mounted by the operator: use spec.model.path with `rljob run`"
        )
    digest = hashlib.sha256(model.model_dump_json(by_alias=True).encode()).hexdigest()
    marker = directory / _MARKER
    if marker.exists() and marker.read_text() == digest:
        return directory
    temporary = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if model.random is not None:
            _make_random(model.random, temporary)
        elif model.hugging_face is not None:
            _download(model.hugging_face, temporary)
        else:
            raise RljobError("spec.model names no source: give huggingFace, persistentVolumeClaim, path or random")
        (temporary / _MARKER).write_text(digest)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def check_model_path(path: Path) -> Path:
    """The path, if it is a model directory.

    Raises:
        RljobError: it is not.
    """
    return _checked(path, "spec.model.path")


def _checked(path: Path, field: str) -> Path:
    if not path.is_dir():
        raise RljobError(f"{field}: the directory {path} does not exist: give the path of a model directory")
    if not (path / "config.json").is_file():
        raise RljobError(f"{field}: {path} has no config.json: it is not a model directory of transformers")
    if not any(path.glob("*.safetensors")):
        raise RljobError(f"{field}: {path} has no *.safetensors file: convert the weights to safetensors")
    return path


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character after pad (0), end (1) and begin (2).

    The padding token is declared as the unknown one, so that the renderer can tell and refuse characters that have none.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        clean_up_tokenization_spaces=False,
    )


def _make_random(spec: RandomModel, directory: Path) -> None:
    size = len(SPECIAL_TOKENS) + len(spec.alphabet)
    common = {
        "vocab_size": -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads or spec.heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": spec.initializer_range,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        if spec.architecture == "Llama":
            network = LlamaForCausalLM(LlamaConfig(**common))
        else:
            network = Qwen3ForCausalLM(Qwen3Config(**common))
    # Not `save_pretrained` of the model: within a process group it writes on rank 0 only, and each node needs its copy.
    network.config.architectures = [type(network).__name__]
    network.config.dtype = "float32"
    network.config.save_pretrained(directory)
    state = dict(network.state_dict())
    if spec.tied_embeddings:
        del state["lm_head.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    character_tokenizer(spec.alphabet).save_pretrained(directory)


def _download(source: HuggingFaceModel, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=directory,
            ignore_patterns=["*.bin", "*.pt", "*.gguf", "*.onnx", "original/*"],
        )
    except (OSError, ValueError) as error:
        raise RljobError(
            f"spec.model.huggingFace: {source.repo}@{source.revision} could not be fetched ({type(error).__name__}: {error}): "
            "check the name and the network, or give a local directory as spec.model.path"
        ) from error
    _checked(directory, "spec.model.huggingFace")
